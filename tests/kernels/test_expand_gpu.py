"""`ls_expand` and `ls_widen` against the float64 oracle, on a GPU: what a library's products need for many tokens."""

from __future__ import annotations

import pytest
import torch

import kernel_oracle as oracle
from kernel_oracle import HALVES, SANITIZING, poison_allocator, randn
from peft_loraswitch import kernels, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]


MOST_RANKS = 128  # of all experts of a linear, for ls_expand


def expand(hidden, experts, gates, biases, lora_b, scalings, bases=()):
    group = kernels.expansion(lora_b, biases, scalings, experts.shape[1])
    return kernels.expand(group, hidden, experts, gates, bases) if group.expands else None


def widen(lora_b):
    group = kernels.expansion(lora_b, [None] * len(lora_b), [1.0] * len(lora_b), 1)
    return kernels.widen(group, lora_b[0]) if group.widens else None


def check_expand(outs, ranks, num_experts, top_k, tokens, dtype, bias=False, ids=None, scalings=None):
    """The kernel where it takes such linears, else `ops.expand`, which widens their B first. Without bases, and with bases and
    hidden side by side in one matrix."""
    lora_b = [randn(num_experts, o, r, dtype=dtype, scale=r**-0.5) for o, r in zip(outs, ranks, strict=True)]
    biases = [randn(o, dtype=dtype) if bias else None for o in outs]
    scalings = [0.5 + i for i in range(len(outs))] if scalings is None else scalings
    experts, gates = oracle.random_ids(tokens, num_experts, top_k, "cuda")
    if ids is not None:
        experts, gates = ids, oracle.poison_gates(ids, gates, num_experts)
    width = num_experts * sum(ranks)
    takes = num_experts * max(ranks) <= MOST_RANKS
    *parts, _ = randn(tokens, sum(outs) + width + 8, dtype=dtype).split([*outs, width, 8], dim=1)
    for bases, hidden in (((), parts[-1].contiguous()), (parts[:-1], parts[-1])):
        poison_allocator()
        results = expand(hidden, experts, gates, biases, lora_b, scalings, bases)
        assert (results is not None) == takes
        if SANITIZING and results is None:
            return
        summands = bases or [hidden.new_zeros(tokens, o) for o in outs]
        arguments = (hidden, experts, gates, summands, biases, lora_b, scalings)
        pytorch = results if SANITIZING else ops.pytorch.expand_pytorch(*arguments)
        poison_allocator()
        results = ops.expand(*arguments) if results is None else results
        hiddens = hidden.split([num_experts * r for r in ranks], dim=1)
        lists = (hiddens, summands, biases, lora_b, scalings)
        for result, theirs, h, base, bias_, b, s in zip(results, pytorch, *lists, strict=True):
            reference = base.double() + oracle.expand(h, experts, gates, bias_, b, s)
            assert result.shape == reference.shape and result.dtype == dtype
            error, pytorchs = (oracle.relative_error(t, reference, at_least=1e-3) for t in (result, theirs))
            what = (
                f"out {result.shape[1]}, rank {b.shape[2]} of {outs}, {ranks}, {tokens} tokens, {num_experts} experts"
            )
            # PyTorch's operations round the gates, too
            assert error < oracle.limit(result) * (1.0 if takes else 1.6), f"{what}: error {error:.2e}"
            if result.numel() >= 4096:  # of a few numbers, either may be lucky
                assert error <= 1.1 * pytorchs + 1e-6, f"{what}: error {error:.2e}, PyTorch's {pytorchs:.2e}"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 33, 127, 128, 129, 500, 2049])
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_expand_every_token_count(dtype, tokens, rank):
    check_expand([256, 136, 8], [rank, rank, rank], 8, 2, tokens, dtype, bias=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [8, 16, 24, 40, 64, 128, 256])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
def test_expand_every_rank(dtype, rank, num_experts):
    check_expand([136, 264], [rank, rank], num_experts, 1, 200, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("out", [8, 16, 24, 32, 120, 128, 136, 4104])
def test_expand_odd_output_widths(dtype, out):
    check_expand([out], [16], 8, 2, 300, dtype, bias=True)
    check_expand([out], [64], 8, 2, 300, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize(("num_experts", "rank"), [(8, 8), (8, 24), (16, 8), (256, 8), (64, 64), (256, 256)])
def test_expand_experts_and_top_k(dtype, num_experts, top_k, rank):
    check_expand([136], [rank], num_experts, top_k, 150, dtype, bias=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [33, 300])
def test_expand_linears_of_different_sizes(dtype, tokens):
    outs = [136, 8, 1024, 16, 264, 8, 512, 40]
    check_expand(outs, [8, 40, 16, 24, 32, 8, 8, 40], 3, 2, tokens, dtype, bias=True)
    check_expand(outs, [8, 256, 16, 24, 64, 8, 128, 40], 3, 2, tokens, dtype, bias=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [8, 64])
def test_expand_ids_outside_the_experts_add_nothing_and_repeated_ids_add_twice(dtype, rank):
    ids = torch.randint(-2, 10, (200, 3), device="cuda")
    ids[0] = torch.tensor([4, 4, -1], device="cuda")
    check_expand([136], [rank], 8, 3, 200, dtype, ids=ids)
    nothing = torch.full((300, 2), -1, device="cuda")
    for bias in (False, True):
        check_expand([264], [rank], 8, 2, 300, dtype, bias=bias, ids=nothing)
    same = torch.full((300, 2), 5, device="cuda")
    check_expand([264], [rank], 8, 2, 300, dtype, ids=same)
    huge = torch.full((300, 2), (1 << 32) + 5, device="cuda")  # not expert 5
    check_expand([264], [rank], 8, 2, 300, dtype, bias=True, ids=huge)


def test_expand_full_size_groups_of_llama():
    for rank in (8, 16, 64):
        for outs in ([4096] * 3, [4096], [11008] * 2):
            check_expand(outs, [rank] * len(outs), 8, 2, 2048, torch.bfloat16)


def test_expand_full_size_with_more_tokens_than_a_grid_is_high_and_more_outputs_than_an_int_counts():
    dtype, tokens, out = torch.bfloat16, 200_000, 11008  # 2.2e9 outputs, 4.4 GB
    b, hidden = randn(2, out, 8, dtype=dtype), randn(tokens, 16, dtype=dtype)
    experts, gates = oracle.random_ids(tokens, 2, 1, "cuda")
    (result,) = expand(hidden, experts, gates, [None], [b], [0.5])
    for rows in (slice(0, 200), slice(131_000, 131_200), slice(tokens - 200, tokens)):
        reference = oracle.expand(hidden[rows], experts[rows], gates[rows], None, b, 0.5)
        assert oracle.relative_error(result[rows], reference) < oracle.limit(result[rows])


def test_expand_reads_no_hidden_of_experts_that_a_token_did_not_choose():
    b, hidden = randn(8, 136, 16, dtype=torch.bfloat16), randn(200, 128, dtype=torch.bfloat16)
    experts, gates = oracle.random_ids(200, 8, 2, "cuda")
    chosen = torch.zeros(200, 8, dtype=torch.bool, device="cuda").scatter(1, experts, True)
    (expected,) = expand(hidden, experts, gates, [None], [b], [1.0])
    for value in (float("nan"), float("inf")):
        hidden.view(200, 8, 16)[~chosen] = value
        (result,) = expand(hidden, experts, gates, [None], [b], [1.0])
        assert torch.equal(result, expected)


def test_expand_does_not_take_everything():
    dtype = torch.bfloat16
    experts, gates = oracle.random_ids(40, 4, 2, "cuda")
    for out, rank in ((12, 8), (16, 12), (16, 4), (12, 64), (16, 40)):
        b, hidden = randn(4, out, rank, dtype=dtype), randn(40, 4 * rank, dtype=dtype)
        assert expand(hidden, experts, gates, [None], [b], [1.0]) is None
        if SANITIZING:
            continue
        base = randn(40, out, dtype=dtype)
        (result,) = ops.expand(hidden, experts, gates, [base], [None], [b], [1.0])
        reference = base.double() + oracle.expand(hidden, experts, gates, None, b, 1.0)
        assert oracle.relative_error(result, reference) < 1.6 * oracle.limit(result)
    b, hidden = randn(4 * 16 * 8 + 1, dtype=dtype)[1:].view(4, 16, 8), randn(40, 32, dtype=dtype)
    assert expand(hidden, experts, gates, [None], [b], [1.0]) is None and widen([b]) is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_experts", [1, 3, 8, 256])
@pytest.mark.parametrize("ranks", [[8], [64, 64], [24, 136, 8, 256]])
def test_widen(dtype, num_experts, ranks):
    for out in (1, 13, 136, 4104):
        if num_experts == 256 and out > 136:
            continue
        lora_b = [randn(num_experts, out + 8 * i, r, dtype=dtype) for i, r in enumerate(ranks)]
        poison_allocator()
        for result, b in zip(widen(lora_b), lora_b, strict=True):
            assert torch.equal(result, ops.wide(b))


def test_widen_does_not_take_everything():
    assert widen([randn(4, 16, 12, dtype=torch.bfloat16)]) is None
    assert widen([randn(4, 16, 8, dtype=torch.float32)]) is None
