"""Every kernel against the float64 oracle, on a GPU: fresh random inputs, poisoned outputs, odd sizes, every dtype."""

from __future__ import annotations

import pytest
import torch

import kernel_oracle as oracle
from kernel_groups import captured, check_group, check_replayed_chain, check_two_streams, make_group
from kernel_oracle import DTYPES, poison_allocator, randn
from peft_loraswitch import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 70])
def test_linear_every_token_count(dtype, tokens):
    check_group([256, 64, 80], 512, [8, 8, 16], 8, 2, tokens, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 4, 8, 12, 16, 40, 64, 128, 250, 256])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_linear_every_rank(dtype, rank, tokens):
    check_group([96, 33], 256, [rank, rank], 6, 3, tokens, dtype, bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 2), (8, 8), (16, 4), (64, 1), (256, 8), (200, 7)])
@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_linear_experts_and_top_k(dtype, num_experts, top_k, tokens):
    check_group([72], 320, [8], num_experts, top_k, tokens, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [1, 7, 8, 24, 31, 32, 40, 100, 1000, 1032, 4100, 11008])
@pytest.mark.parametrize("tokens", [1, 6, 13])
def test_linear_odd_input_widths(dtype, in_features, tokens):
    check_group([17, 1, 130], in_features, [8, 8, 8], 4, 2, tokens, dtype, bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 9, 40])
@pytest.mark.parametrize(("out", "in_features"), [(96, 64), (33, 65), (2304, 768)])
def test_linear_transposed_like_conv1d(dtype, tokens, out, in_features):
    check_group([out], in_features, [8], 4, 2, tokens, dtype, bias=True, transposed=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 21])
@pytest.mark.parametrize("rank", [5, 8, 64])
def test_delta_alone(dtype, tokens, rank):
    check_group([128, 40], 264, [rank, rank], 8, 2, tokens, dtype, weight=False, base=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17, 32, 33])
@pytest.mark.parametrize(
    ("outs", "in_features", "ranks"),
    [
        ([4096, 1024, 1024], 4096, [8, 8, 8]),  # q, k, v beside a quantised backbone
        ([11008, 11008], 4096, [8, 64]),
        ([17, 1, 130, 64], 1096, [16, 8, 0, 256]),  # a linear without experts; a hidden too large for one launch
        ([40] * kernels.MAX_GROUP, 72, [8] * kernels.MAX_GROUP),
    ],
)
@pytest.mark.parametrize("launches", [0, kernels.TUNING_TWO_LAUNCHES])
def test_deltas_of_a_group(dtype, tokens, outs, in_features, ranks, launches):
    check_group(outs, in_features, ranks, 8, 2, tokens, dtype, tuning=launches, weight=False, base=True)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 2)])  # one launch; two
def test_replay_of_deltas_behind_products_of_the_library(tokens, num_experts, top_k):
    """Each replay adds to what this replay's products are, never to the last one's."""
    dtype, width = torch.bfloat16, 1024
    group = make_group([width, 512, 300], width, [8, 16, 8], num_experts, dtype, weight=False)
    experts = [group[k] for k in ("lora_a", "lora_b", "scalings")]
    weights = [randn(b.shape[1], width, dtype=dtype, scale=width**-0.5) for b in group["lora_b"]]
    router = randn(num_experts, width, dtype=dtype, scale=width**-0.5)
    x = randn(tokens, width, dtype=dtype)

    def run():
        ids, gates = kernels.router(x, router, top_k, True)
        bases = [oracle.product(x, weight) for weight in weights]
        return ids, gates, bases, torch.ops.loraswitch.deltas(bases, x, ids, gates, *experts)

    graph, (ids, gates, bases, results) = captured(run)
    for _ in oracle.rounds(50):
        x.copy_(torch.randn_like(x))
        for t in (gates, *bases, *results):
            t.fill_(float("nan"))
        ids.fill_(num_experts)
        graph.replay()
        assert torch.equal(ids, kernels.router(x, router, top_k, True)[0])
        for base, weight in zip(bases, weights, strict=True):
            assert oracle.relative_error(base, x.double() @ weight.double().T) < oracle.limit(base)
        # bit for bit: the library may multiply otherwise within a graph, so from the products of this replay
        for got, expected in zip(results, torch.ops.loraswitch.deltas(bases, x, ids, gates, *experts), strict=True):
            oracle.assert_same(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 12, 32])
@pytest.mark.parametrize("launches", [0, kernels.TUNING_TWO_LAUNCHES])
@pytest.mark.parametrize("tuning", [kernels.TUNING_STREAMING, kernels.TUNING_REGISTERS, kernels.TUNING_PERSISTENT])
@pytest.mark.parametrize("in_features", [32, 1120, 1096])
def test_linear_every_kernel_shape(dtype, tokens, tuning, launches, in_features):
    check_group([512, 100, 4096], in_features, [16, 8, 64], 8, 2, tokens, dtype, tuning=tuning + launches)


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize(("rank", "top_k"), [(256, 2), (256, 8), (64, 8)])
def test_more_shrink_tasks_than_blocks(tokens, rank, top_k):
    check_group([4096, 64], 1024, [rank, rank], 8, top_k, tokens, torch.bfloat16, tuning=kernels.TUNING_STREAMING)
    check_group(
        [16], 1024, [rank], 8, top_k, tokens, torch.bfloat16, tuning=kernels.TUNING_STREAMING
    )  # one block has it all
    for tuning in (kernels.TUNING_REGISTERS, kernels.TUNING_PERSISTENT):
        check_group([4096, 64], 1024, [rank, rank], 8, top_k, tokens, torch.bfloat16, tuning=tuning)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 8, 9, 16, 17, 27, 32])
@pytest.mark.parametrize(
    ("outs", "in_features", "ranks"),
    [
        ([4096, 4096, 4096], 4096, [8, 8, 8]),  # a panel for each block
        ([11008, 11000], 4096, [8, 16]),  # two
        ([300, 28672, 8], 2080, [8, 0, 8]),  # three, and a linear without experts
        ([4096], 11008, [8]),  # more parts of the features than eight
        ([40], 64, [8]),  # fewer blocks than parts
        ([4096], 14336, [8]),
    ],
)
def test_panels(dtype, tokens, outs, in_features, ranks):
    for flags in (0, kernels.TUNING_IMPATIENT, kernels.TUNING_TWO_LAUNCHES):
        tuning = kernels.TUNING_PERSISTENT + flags
        check_group(outs, in_features, ranks, 8, 2, tokens, dtype, tuning=tuning, bias=True, base=tokens % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 32])
def test_ids_outside_the_experts_add_nothing_and_repeated_ids_add_twice(dtype, tokens):
    ids = torch.randint(-2, 10, (tokens, 3), device="cuda")
    ids[0] = torch.tensor([4, 4, -1], device="cuda")
    check_group([128], 256, [8], 8, 3, tokens, dtype, ids=ids)
    check_group([128], 250, [7], 8, 3, tokens, dtype, ids=ids)


def test_full_size_groups_of_llama():
    for outs, in_features in (([4096] * 3, 4096), ([4096], 4096), ([11008] * 2, 4096), ([4096], 11008)):
        for tokens in (1, 8, 32):
            packed, x, experts = check_group(outs, in_features, [8] * len(outs), 8, 2, tokens, torch.bfloat16)
            large = tokens > 16 and sum(outs) * in_features * 2 >= 64 << 20
            hopper = torch.cuda.get_device_capability() == (9, 0)
            assert packed.path(x, experts) == (kernels.SM90_PATH if large and hopper else kernels.FAST_PATH)


def test_unaligned_pointers_take_the_slow_path_and_are_right():
    dtype = torch.bfloat16
    group = make_group([64], 128, [8], 4, dtype)
    group["weights"] = [randn(64 * 128 + 1, dtype=dtype)[1:].view(64, 128)]
    x = randn(2 * 128 + 1, dtype=dtype)[1:].view(2, 128)
    experts, gates = oracle.random_ids(2, 4, 2, "cuda")
    packed = kernels.PackedGroup(**group)
    result = packed(x, experts, gates)[0]
    assert packed.path(x, experts) == kernels.GENERIC_PATH
    reference = oracle.linear(x, experts, gates, group["weights"][0], None, group["lora_a"][0], group["lora_b"][0], 0.5)
    assert oracle.relative_error(result, reference) < oracle.limit(result)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (8, 8), (33, 5), (256, 8)])
@pytest.mark.parametrize("in_features", [7, 64, 4096])
def test_router(x_dtype, router_dtype, num_experts, top_k, in_features):
    x = randn(37, in_features, dtype=x_dtype)
    router = randn(num_experts, in_features, dtype=router_dtype, scale=in_features**-0.5)
    for normalize in (False, True):
        experts, gates = kernels.router(x, router, top_k, normalize)
        reference_experts, reference_gates = oracle.route(x, router, top_k, normalize)
        assert torch.allclose(gates.double(), reference_gates, rtol=1e-4, atol=1e-7)
        # ids may differ only where two probabilities are equal to float32 rounding
        differ = experts != reference_experts
        assert differ.float().mean() < 0.01
        assert all(len(set(row)) == top_k for row in experts.tolist())


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 2), (8, 2), (8, 8), (33, 5), (256, 8)])
@pytest.mark.parametrize("in_features", [7, 4096])
def test_router_with_top_p(x_dtype, num_experts, top_k, in_features):
    x = randn(37, in_features, dtype=x_dtype)
    router = randn(num_experts, in_features, dtype=torch.float32, scale=in_features**-0.5)
    for normalize in (False, True):
        for top_p in (0.05, 0.4, 0.9, 1.0):
            oracle.poison_allocator()
            experts, gates = kernels.router(x, router, top_k, normalize, top_p)
            reference_experts, reference_gates = oracle.route(x, router, top_k, normalize, top_p)
            # they may differ only where probabilities are equal to float32 rounding, or their sum is top_p
            same = (experts == reference_experts).all(-1)
            assert same.float().mean() > 0.9
            assert torch.allclose(gates[same].double(), reference_gates[same], rtol=1e-4, atol=1e-7)
            assert torch.equal(experts == num_experts, (gates == 0) & (experts == num_experts))
            assert ((experts >= 0) & (experts <= num_experts)).all() and (experts[:, 0] < num_experts).all()
            single = (experts < num_experts).sum(-1) == 1
            assert not normalize or (gates[single, 0] == 1).all()


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 32, 256])
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize(
    "tuning", [0, kernels.abi.TUNING_STREAMING, kernels.abi.TUNING_REGISTERS, kernels.abi.TUNING_PERSISTENT]
)
def test_experts_that_top_p_leaves_out_are_not_read(tokens, rank, tuning):
    """With id num_experts, as the router writes it: NaN in the A of experts that nobody takes reaches nothing, whatever the path;
    nor that in their B for few tokens (for more, B of all experts is one matrix)."""
    group = make_group([128, 64], 256, [rank, rank], 8, torch.bfloat16)
    x = randn(tokens, 256, dtype=torch.bfloat16)
    experts, gates = oracle.random_ids(tokens, 4, 3, "cuda")
    left_out = torch.rand(tokens, 3, device="cuda") < 0.6
    left_out[:, 0] = False
    experts, gates = experts.masked_fill(left_out, 8), gates.masked_fill(left_out, 0.0)
    for tensor in (*group["lora_a"], *(group["lora_b"] if 3 * tokens <= 8 else ())):
        tensor[4:] = float("nan")
    packed = kernels.PackedGroup(**group, tuning=tuning)
    oracle.poison_allocator()
    for i, result in enumerate(packed(x, experts, gates)):
        w, bias, a, b, s = (group[name][i] for name in ("weights", "biases", "lora_a", "lora_b", "scalings"))
        reference = oracle.linear(x, experts, gates, w, bias, a, b, s)
        assert oracle.relative_error(result, reference) < oracle.limit(result)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "tokens"), [(32, 4, 8), (64, 2, 32), (40, 8, 5), (256, 8, 32), (33, 3, 7)]
)
@pytest.mark.parametrize("rank", [8, 16, 72])
@pytest.mark.parametrize("tuning", [0, kernels.abi.TUNING_REGISTERS, kernels.abi.TUNING_PERSISTENT])
def test_many_experts_of_which_some_are_chosen(num_experts, top_k, tokens, rank, tuning):
    """More experts than choices: an entry has its part of B to itself. Some choices are none at all; NaN in who is not chosen."""
    group = make_group([520, 48, 264], 576, [rank, 8, rank], num_experts, torch.bfloat16)
    x = randn(tokens, 576, dtype=torch.bfloat16)
    experts, gates = oracle.random_ids(tokens, num_experts, top_k, "cuda")
    experts[torch.rand_like(gates) < 0.2] = num_experts
    gates = oracle.poison_gates(experts, gates, num_experts)
    unused = ~torch.isin(torch.arange(num_experts, device="cuda"), experts)
    packed = kernels.PackedGroup(**group, tuning=tuning)
    reads_all = packed.path(x, experts) == kernels.SM90_PATH  # B of all experts, times zeros
    for tensor in (*group["lora_a"], *([] if reads_all else group["lora_b"])):
        tensor[unused] = float("nan")
    names = ("weights", "biases", "lora_a", "lora_b", "scalings")
    references = [oracle.linear(x, experts, gates, *(group[name][i] for name in names)) for i in range(3)]
    for _ in oracle.rounds(50):
        poison_allocator()
        for result, reference in zip(packed(x, experts, gates), references, strict=True):
            assert oracle.relative_error(result, reference) < oracle.limit(result)


def choices(how, tokens, num_experts, top_k):
    """Ids and gates: every token's the same, no two the same as far as that goes, any (some gates being 0), some twice."""
    ids, gates = oracle.random_ids(tokens, num_experts, top_k, "cuda")
    if how == "the same":
        ids = ids[:1].expand(tokens, top_k).contiguous()
    elif how == "all different":
        ids = torch.arange(tokens * top_k, device="cuda").remainder(num_experts).view(tokens, top_k)
    elif how == "any":
        gates[torch.rand_like(gates) < 0.3] = 0.0
    elif how == "some twice":
        ids = torch.randint(-1, num_experts + 1, (tokens, top_k), device="cuda")
        ids[-1] = ids[-1, 0].clone()
    return ids, oracle.poison_gates(ids, gates, num_experts)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "rank", "tokens", "in_features"),
    [
        # AllExperts
        (8, 2, 8, 32, 4096),  # one tile of A at most for each row of blocks
        (8, 2, 8, 8, 11008),  # the same, in parts of three splits
        (8, 2, 16, 16, 4096),
        (8, 2, 128, 1, 4096),
        (8, 2, 128, 8, 4096),  # many tiles of A: the shrink is a launch of its own
        (8, 4, 256, 8, 4096),
        (16, 4, 8, 8, 4096),  # twice as many choices as experts
        (32, 8, 64, 2, 2080),  # two tokens
        (256, 8, 16, 1, 14336),
        (256, 8, 8, 32, 4096),  # more tiles of the chosen experts' A than ChosenExperts takes
        # ChosenExperts
        (9, 2, 8, 3, 4096),  # a tile of A of all experts for each row of blocks: asked for with the ids
        (16, 2, 8, 8, 11008),
        (32, 4, 8, 8, 4096),
        (32, 4, 8, 9, 11008),  # more choices than experts
        (64, 2, 16, 32, 4096),
        (64, 1, 24, 17, 8224),  # tiles of two experts; the last split has 32 features
        (16, 1, 128, 4, 4096),  # four tiles of A for a row of blocks
        (32, 4, 40, 15, 4096),  # more hidden than AllExperts has room for
    ],
)
def test_persistent_with_every_kind_of_choice(num_experts, top_k, rank, tokens, in_features):
    group = make_group([4096, 1000, 520], in_features, [rank, 8, rank], num_experts, torch.bfloat16)
    x = randn(tokens, in_features, dtype=torch.bfloat16)
    pristine = [t.clone() for t in (*group["lora_a"], *group["lora_b"])]
    for how in ("the same", "all different", "any", "some twice"):
        experts, gates = choices(how, tokens, num_experts, top_k)
        unused = ~torch.isin(torch.arange(num_experts, device="cuda"), experts)
        for tensor, was in zip((*group["lora_a"], *group["lora_b"]), pristine, strict=True):
            tensor.copy_(was)
        # With more choices than experts AllExperts multiplies B of all of them, ChosenExperts of the chosen ones alone.
        b_is_read = tokens * top_k > num_experts and (num_experts <= 8 or tokens * top_k >= 2 * num_experts)
        for tensor in (*group["lora_a"], *(() if b_is_read else group["lora_b"])):
            tensor[unused] = float("nan")
        references = [
            oracle.linear(x, experts, gates, *(group[name][i] for name in ("weights", "biases", "lora_a", "lora_b", "scalings")))
            for i in range(3)
        ]  # fmt: skip
        results = {}
        for flags in (0, kernels.TUNING_IMPATIENT, kernels.TUNING_TWO_LAUNCHES):
            packed = kernels.PackedGroup(**group, tuning=kernels.TUNING_PERSISTENT + flags)
            poison_allocator()
            results[flags] = packed(x, experts, gates)
            for result, reference in zip(results[flags], references, strict=True):
                error = oracle.relative_error(result, reference)
                assert error < oracle.limit(result), f"{how}, flags {flags}: error {error:.2e}"
        packed = kernels.PackedGroup(**group, tuning=kernels.TUNING_PERSISTENT)
        for _ in oracle.rounds(50):
            poison_allocator()
            for again, first in zip(packed(x, experts, gates), results[0], strict=True):
                oracle.assert_same(again, first)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "rank", "tokens"),
    [
        # the tiles of A for a block
        *[(8, 2, rank, tokens) for rank in (16, 24, 32, 64, 128) for tokens in (2, 3, 8, 9)],
        # as many choices as twice the experts, or just fewer
        *[(experts, 2, 8, tokens) for experts in (8, 9, 16) for tokens in (2, 3, experts - 1, experts)],
        (32, 4, 8, 8),
        (64, 2, 16, 32),
        (64, 2, 128, 32),  # more hidden than anything has room for
    ],
)
def test_at_the_limits_of_the_choice_of_a_kernel(num_experts, top_k, rank, tokens):
    """choose() and persistent_takes_chosen(), with all sizes as in a model: the kernels on both sides of a limit."""
    for launches in (0, kernels.TUNING_TWO_LAUNCHES):
        check_group([4096] * 3, 4096, [rank] * 3, num_experts, top_k, tokens, torch.bfloat16, tuning=launches)


def test_router_ties_and_broken_inputs_give_valid_ids():
    x = torch.zeros(3, 64, device="cuda")
    x[1], x[2, 5] = float("nan"), float("inf")
    router = torch.randn(10, 64, device="cuda")
    experts, gates = kernels.router(x, router, 4, False)
    assert experts[0].tolist() == [0, 1, 2, 3] and torch.allclose(gates[0], torch.full((4,), 0.1, device="cuda"))
    assert ((experts >= 0) & (experts < 10)).all() and all(len(set(row)) == 4 for row in experts.tolist())
    assert gates[1].isnan().all()


def make_merge(dtype, shapes, num_experts, rank, in_place=False, transposed=False):
    sources = [randn(*((i, o) if transposed else (o, i)), dtype=dtype) for o, i in shapes]
    weights = sources if in_place else [torch.full_like(s, float("nan")) for s in sources]
    a = [randn(num_experts, rank, i, dtype=dtype, scale=i**-0.5) for _, i in shapes]
    b = [randn(num_experts, o, rank, dtype=dtype, scale=rank**-0.5) for o, _ in shapes]
    return weights, sources, a, b, [0.5 + n for n in range(len(shapes))], [transposed] * len(shapes)


def merged(source, a, b, scaling, transposed, ids, gates):
    update = (
        sum(g.double() * (b[e].double() @ a[e].double()) for e, g in zip(ids.tolist(), gates, strict=True)) * scaling
    )
    return source.double() + (update.T if transposed else update)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 8, 24, 64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shapes", [[(128, 256), (40, 72)], [(65, 264), (200, 1000)], [(33, 70), (1, 5)]])
def test_merge_from_pristine(dtype, rank, transposed, shapes):
    weights, sources, a, b, s, tr = make_merge(dtype, shapes, 6, rank, transposed=transposed)
    table = kernels.MergeTable(weights, sources, a, b, s, tr)
    for _ in range(2):  # the second merge must not see the first
        ids, gates = (t[0] for t in oracle.random_ids(1, 6, 3, "cuda"))
        table(ids, gates)
        for w, source, ea, eb, scaling in zip(weights, sources, a, b, s, strict=True):
            reference = merged(source, ea, eb, scaling, transposed, ids, gates)
            assert oracle.relative_error(w, reference) < oracle.limit(w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_in_place_takes_the_old_experts_out(dtype):
    weights, _, a, b, s, tr = make_merge(dtype, [(256, 512)], 8, 8, in_place=True)
    pristine = weights[0].clone()
    table = kernels.MergeTable(weights, weights, a, b, s, tr)
    (ids, gates), (ids2, gates2) = ([t[0] for t in oracle.random_ids(1, 8, 2, "cuda")] for _ in range(2))
    table(ids, gates)
    table(ids2, gates2, ids, gates)
    reference = merged(pristine, a[0], b[0], s[0], False, ids2, gates2)
    assert oracle.relative_error(weights[0], reference) < 1.5 * oracle.limit(weights[0])  # one more rounding


def test_merge_from_pristine_does_not_drift_over_20000_steps():
    weights, sources, a, b, s, tr = make_merge(torch.bfloat16, [(256, 256)], 8, 8)
    table = kernels.MergeTable(weights, sources, a, b, s, tr)
    before = sources[0].clone()
    ids = torch.rand(20000, 8, device="cuda").topk(2).indices
    gates = torch.rand(20000, 2, device="cuda")
    for step in range(20000):
        table(ids[step], gates[step])
    assert torch.equal(sources[0], before)
    reference = merged(before, a[0], b[0], s[0], False, ids[-1], gates[-1])
    assert oracle.relative_error(weights[0], reference) < oracle.limit(weights[0])


@pytest.mark.parametrize(
    ("num_experts", "top_k", "rank", "tokens"), [(8, 2, 8, 4), (32, 4, 8, 8), (64, 2, 16, 32), (8, 2, 128, 1)]
)
def test_graph_replay_with_everything_poisoned_between_replays(num_experts, top_k, rank, tokens):
    dtype, width = torch.bfloat16, 1024
    packed = [kernels.PackedGroup(**make_group([width] * 2, width, [rank] * 2, num_experts, dtype)) for _ in range(6)]
    check_replayed_chain(packed, num_experts, top_k, tokens, width)


def test_two_streams_at_once_do_not_disturb_each_other():
    packed = [kernels.PackedGroup(**make_group([2048], 2048, [8], 8, torch.bfloat16)) for _ in range(2)]
    check_two_streams(packed, 1, 2048)


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_launches_that_fill_the_gpu_on_many_streams_do_not_wait_for_each_other_for_ever(tokens):
    """Blocks of one launch wait for each other: with four launches at once, none of which fits beside another, that must end."""
    group = make_group([16384], 4096, [64], 8, torch.bfloat16)
    x = randn(tokens, 4096, dtype=torch.bfloat16)
    ids, gates = oracle.random_ids(tokens, 8, 2, "cuda")
    packed = kernels.PackedGroup(**group)
    expected = packed(x, ids, gates)[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(packed(x, ids, gates)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_graphs_captured_on_one_stream_can_be_replayed_on_two():
    group = make_group([4096, 4096], 2048, [16, 16], 8, torch.bfloat16)
    packed = kernels.PackedGroup(**group)
    stream, graphs = torch.cuda.Stream(), []
    for tokens in (1, 8, 100):
        x = randn(tokens, 2048, dtype=torch.bfloat16)
        ids, gates = oracle.random_ids(tokens, 8, 2, "cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            expected = packed(x, ids, gates)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                results = packed(x, ids, gates)
        graphs.append((graph, results, expected, (x, ids, gates), torch.cuda.Stream()))
    torch.cuda.synchronize()
    for _ in oracle.rounds(300):
        for graph, results, *_, replayed_on in graphs:
            with torch.cuda.stream(replayed_on):
                for result in results:
                    result.fill_(float("nan"))
                graph.replay()
    torch.cuda.synchronize()
    for _, results, expected, *_ in graphs:
        assert all(torch.equal(result, e) for result, e in zip(results, expected, strict=True))


def test_the_workspace_is_given_once():
    device = torch.cuda.current_device()
    kernels.give_workspace(device)
    with pytest.raises(RuntimeError, match="ls_set_workspace"):
        kernels.check(
            kernels.library().ls_set_workspace(device, kernels.loader._workspaces[device].data_ptr(), 16),
            "ls_set_workspace",
        )


def test_soak_of_many_sizes():
    """Random sizes, one after the other without a wait in between: hangs and races show here."""
    generator = torch.Generator().manual_seed(3)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    for _ in range(300):
        n = pick(1, 2, 3, 8)
        num_experts = pick(1, 4, 8, 64)
        ranks = [pick(0, 1, 8, 16, 64) for _ in range(n)]
        outs = [pick(1, 16, 100, 768, 1024) for _ in range(n)]
        tokens, top_k = pick(1, 2, 8, 15, 32, 33, 100), pick(1, min(2, num_experts))
        check_group(outs, pick(8, 96, 500, 1024, 4096), ranks, num_experts, top_k, tokens, pick(*DTYPES),
                    bias=pick(True, False), base=pick(True, False))  # fmt: skip


def test_refused_arguments():
    group = make_group([64], 128, [8], 4, torch.bfloat16)
    packed = kernels.PackedGroup(**group)
    x = randn(1, 128, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="outside what the kernels take"):
        packed(x, torch.zeros(1, 9, dtype=torch.int64, device="cuda"), torch.ones(1, 9, device="cuda"))
