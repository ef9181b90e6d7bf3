"""The merge kernels against the float64 oracle, on a GPU: every way they split ranks, columns and rows."""

from __future__ import annotations

import pytest
import torch

import kernel_oracle as oracle
from kernel_oracle import randn
from peft_loraswitch import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]
NUM_EXPERTS = 9
# Rows over and under a tile and not a multiple of 8; columns over and under a strip; one row, one 16-byte column.
SHAPES = [(1037, 264), (40, 72), (1, 8), (520, 1032)]


class Linears:
    """Linears of SHAPES with experts; `weights` are poisoned unless the merge is in place."""

    def __init__(self, dtype, ranks, in_place):
        self.sources = [randn(o, i, dtype=dtype) for o, i in SHAPES]
        self.pristine = [s.clone() for s in self.sources]
        self.weights = self.sources if in_place else [torch.full_like(s, float("nan")) for s in self.sources]
        ranks = [ranks[n % len(ranks)] for n in range(len(SHAPES))]
        self.a = [randn(NUM_EXPERTS, r, i, dtype=dtype, scale=i**-0.5) for (_, i), r in zip(SHAPES, ranks, strict=True)]
        self.b = [randn(NUM_EXPERTS, o, r, dtype=dtype, scale=r**-0.5) for (o, _), r in zip(SHAPES, ranks, strict=True)]
        self.scalings = [0.5 + n for n in range(len(SHAPES))]
        self.table = kernels.MergeTable(
            self.weights, self.sources, self.a, self.b, self.scalings, [False] * len(SHAPES)
        )
        assert self.table.args.fast == (dtype != torch.float32)

    def reference(self, n, ids, gates, old_ids=None, old_gates=None):
        result = self.pristine[n].double()
        signed = [(e, float(g)) for e, g in zip(ids.tolist(), gates, strict=True)]
        if old_ids is not None:
            signed += [(e, -float(g)) for e, g in zip(old_ids.tolist(), old_gates, strict=True)]
        for e, gate in signed:
            if 0 <= e < NUM_EXPERTS:
                result += self.scalings[n] * gate * (self.b[n][e].double() @ self.a[n][e].double())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("ranks", "top_k"),
    [
        ([8], 1), ([8], 2), ([8], 3), ([16], 1), ([16], 2), ([24], 1), ([16, 8], 2), ([8], 8), ([40], 2), ([64], 2),
        ([8, 64, 24], 3), ([96], 2), ([128], 2), ([256], 2), ([256], 3), ([256, 8], 8),
    ],
)  # fmt: skip
def test_merge_ranks_and_ways_to_split_them(dtype, in_place, ranks, top_k):
    linears = Linears(dtype, ranks, in_place)
    (ids, gates), (old_ids, old_gates) = (
        [t[0] for t in oracle.random_ids(1, NUM_EXPERTS, top_k, "cuda")] for _ in range(2)
    )
    old = (old_ids, old_gates) if in_place else ()
    linears.table(ids, gates, *old)
    for n, weight in enumerate(linears.weights):
        reference = linears.reference(n, ids, gates, *old)
        # B is rounded once more, after its gate; what is put in and what is taken out partly cancel, their roundings do not.
        assert oracle.relative_error(weight, reference) < (1.6 if in_place else 1.2) * oracle.limit(weight)
        if not in_place:
            assert torch.equal(linears.sources[n], linears.pristine[n])


@pytest.mark.parametrize("rank", [8, 16, 64, 256])
@pytest.mark.parametrize("in_place", [False, True])
def test_merge_ids_that_are_none_leave_the_source_as_it_is(rank, in_place):
    linears = Linears(torch.bfloat16, [rank], in_place)
    none = torch.tensor([-1, NUM_EXPERTS, 1 << 40], device="cuda")
    gates = torch.rand(3, device="cuda")
    linears.table(none, gates, *((none, gates) if in_place else ()))
    for weight, pristine in zip(linears.weights, linears.pristine, strict=True):
        assert torch.equal(weight, pristine)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_merge_some_ids_that_are_none(rank):
    linears = Linears(torch.bfloat16, [rank], False)
    ids, gates = torch.tensor([-7, 4], device="cuda"), torch.tensor([float("nan"), 0.75], device="cuda")
    linears.table(ids, gates)
    for n, weight in enumerate(linears.weights):
        reference = linears.reference(n, ids[1:], gates[1:])
        assert oracle.relative_error(weight, reference) < 1.2 * oracle.limit(weight)


@pytest.mark.parametrize("rank", [8, 64])
def test_merge_writes_nothing_beyond_its_weights(rank):
    """Weights side by side in one buffer, with guards of which no bit may change."""
    shapes, guard = [(13, 72), (7, 264)], 64
    sizes = [o * i for o, i in shapes]
    buffer = torch.full((sum(sizes) + guard * 3,), 3.0, dtype=torch.bfloat16, device="cuda")
    starts = [guard, guard * 2 + sizes[0]]
    weights = [buffer[s : s + n].view(shape) for s, n, shape in zip(starts, sizes, shapes, strict=True)]
    sources = [randn(*shape, dtype=torch.bfloat16) for shape in shapes]
    a = [randn(4, rank, i, dtype=torch.bfloat16) for _, i in shapes]
    b = [randn(4, o, rank, dtype=torch.bfloat16) for o, _ in shapes]
    table = kernels.MergeTable(weights, sources, a, b, [1.0, 1.0], [False, False])
    assert table.args.fast
    table(torch.tensor([0, 3], device="cuda"), torch.tensor([0.5, 0.5], device="cuda"))
    ends = [0, *(s + n for s, n in zip(starts, sizes, strict=True))]
    for end in ends:
        assert (buffer[end : end + guard] == 3.0).all()


def test_merge_in_place_graph_replay_follows_its_inputs():
    """Replays of a captured merge take out what the last replay put in; the buffers change in between."""
    linears = Linears(torch.bfloat16, [8, 16], True)
    ids, gates = torch.tensor([1, 2], device="cuda"), torch.tensor([0.5, 0.5], device="cuda")
    old_ids, old_gates = torch.full_like(ids, -1), torch.zeros_like(gates)

    def step():
        linears.table(ids, gates, old_ids, old_gates)
        old_ids.copy_(ids)
        old_gates.copy_(gates)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the operands may not be there yet
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    torch.cuda.synchronize()
    for _ in range(5):
        new = oracle.random_ids(1, NUM_EXPERTS, 2, "cuda")
        ids.copy_(new[0][0])
        gates.copy_(new[1][0])
        graph.replay()
    for n, weight in enumerate(linears.weights):
        assert oracle.relative_error(weight, linears.reference(n, ids, gates)) < 3 * oracle.limit(weight)
