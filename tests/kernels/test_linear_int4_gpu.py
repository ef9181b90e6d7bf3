"""The kernel for weights that torchao keeps in int4 against the float64 oracle, on a GPU: fresh random inputs, poisoned outputs,
odd sizes; and the layout against PyTorch's own packing."""

from __future__ import annotations

import functools

import pytest
import torch

import kernel_oracle as oracle
from kernel_groups import (
    check_group_4bit,
    check_replayed_chain,
    check_two_streams,
    check_unread_experts,
    make_group_int4,
    reference_4bit,
)
from kernel_oracle import SANITIZING, poison_allocator, randn
from peft_loraswitch import kernels, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]
BF16 = torch.bfloat16
TOKENS = [1, 2, 3, 7, 8, 9, 16, 17, 31, 32]
check = functools.partial(check_group_4bit, make=make_group_int4)


# ------------------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize(("out", "in_features"), [(8, 1024), (24, 2048), (4096, 4096)])
def test_the_layout_is_that_of_pytorch(out, in_features):
    """Bit for bit; `linear_4bit` in PyTorch unpacks it, too."""
    q = torch.randint(0, 16, (out, in_features), device="cuda")
    halves = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
    assert packed.dtype == torch.int32 and torch.equal(packed, oracle.pack_int4(q))
    assert torch.equal(oracle.unpack_int4(packed), q)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_scales_are_read_as_pytorch_reads_them(group):
    tiles, scales = oracle.random_int4(64, 2048, group, "cuda")
    x = randn(4, 2048, dtype=BF16)
    result = torch.ops.aten._weight_int4pack_mm(x, tiles, group, scales)
    expected = x.double() @ oracle.from_int4(tiles, scales, 64, 2048).T
    assert oracle.relative_error(result, expected) < 3 * oracle.limit_4bit(result)  # it rounds each weight


# ------------------------------------------------------------------------------------------------------------ kernel


@pytest.mark.parametrize("tokens", range(1, 33))
def test_every_token_count(tokens):
    check([256, 64, 80], 1024, [8, 8, 16], 8, 2, tokens, BF16)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("in_features", [8, 64, 136, 1000, 1024, 1160, 4096, 11008])
def test_every_width(tokens, in_features):
    """Groups of linears of other sizes, with outputs that are no multiple of a tile's, and features that are padded."""
    check([1024, 1000, 17, 1], in_features, [8, 16, 8, 0], 8, 2, tokens, BF16, bias=True)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17])
@pytest.mark.parametrize("in_features", [128, 1032, 4096, 11008])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_every_group_of_scales(tokens, in_features, block):
    check([520, 48], in_features, [8, 8], 8, 2, tokens, BF16, block=block)


@pytest.mark.parametrize("tokens", [1, 2, 5, 12, 20, 32])
@pytest.mark.parametrize("rank", [0, 8, 16, 24, 64])
def test_every_rank(tokens, rank):
    check([96, 33], 256, [rank, rank], 6, 3, tokens, BF16, bias=True)
    check([1024, 200], 4096, [rank, 8], 8, 2, tokens, BF16)


@pytest.mark.parametrize("tokens", [1, 4, 9, 32])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 1), (8, 2), (8, 4), (8, 8), (64, 1), (64, 2), (64, 8)])
def test_experts_and_top_k(tokens, num_experts, top_k):
    check([72, 520], 320, [8, 16], num_experts, top_k, tokens, BF16)


@pytest.mark.parametrize("tokens", [1, 3, 32])
def test_ids_outside_the_experts_add_nothing_and_repeated_ids_add_twice(tokens):
    ids = torch.randint(-2, 10, (tokens, 3), device="cuda")
    ids[0] = torch.tensor([4, 4, -1], device="cuda")
    check([128], 256, [8], 8, 3, tokens, BF16, ids=ids)


@pytest.mark.parametrize("tokens", [1, 8, 16, 32])
@pytest.mark.parametrize("size", [1, kernels.MAX_GROUP])
def test_every_size_of_a_group(tokens, size):
    check([40] * size, 192, [8] * size, 8, 2, tokens, BF16)


@pytest.mark.parametrize("tokens", [1, 8, 16, 32])
@pytest.mark.parametrize("flags", [0, kernels.TUNING_TWO_LAUNCHES])
def test_full_size_groups_of_llama(tokens, flags):
    for outs, in_features in (([4096] * 3, 4096), ([4096], 4096), ([11008] * 2, 4096), ([4096], 11008)):
        check(outs, in_features, [8] * len(outs), 8, 2, tokens, BF16, tuning=flags)


def test_each_of_the_16_values_at_each_place():
    """Unit vectors pick out single weights: exactly, since these are numbers of bf16."""
    group = make_group_int4([16], 1024, [0], 1, block=32)
    q = (torch.arange(16, device="cuda")[:, None] + torch.arange(1024, device="cuda")) % 16
    group["weights"] = [oracle.pack_int4(q)]
    group["scales"][0][..., 0], group["scales"][0][..., 1] = 0.5, 0.25
    packed = kernels.PackedGroup(**group)
    for size in (1, 8, 16, 32):
        for x in torch.eye(1024, device="cuda", dtype=BF16).split(size)[:: 32 if size == 1 else 1]:
            experts, gates = oracle.random_ids(size, 1, 1, "cuda")
            poison_allocator()
            wanted = x.double() @ ((q - 8) * 0.5 + 0.25).double().T
            assert torch.equal(packed(x, experts, gates)[0].double(), wanted)


@pytest.mark.parametrize("tokens", [1, 5, 12, 32])
def test_tokens_do_not_see_each_other(tokens):
    """Where one of them is not finite, the others are what they were."""
    group = make_group_int4([256], 1160, [8], 4)
    packed = kernels.PackedGroup(**group)
    x = randn(tokens, 1160, dtype=BF16)
    experts, gates = oracle.random_ids(tokens, 4, 2, "cuda")
    (before,) = packed(x, experts, gates)
    x[-1] = float("nan")
    poison_allocator()
    (after,) = packed(x, experts, gates)
    assert torch.equal(after[:-1], before[:-1]) and after[-1].isnan().all()


@pytest.mark.parametrize("tokens", [1, 5, 32])
def test_nothing_is_read_of_experts_that_nobody_chose(tokens):
    check_unread_experts(make_group_int4([128, 64], 256, [16, 16], 8), tokens)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "rank", "tokens"), [(8, 2, 8, 1), (8, 2, 8, 8), (8, 2, 8, 16), (64, 2, 16, 32)]
)
def test_graph_replay_with_everything_poisoned_between_replays(num_experts, top_k, rank, tokens):
    width = 1024
    groups = [make_group_int4([width] * 2, width, [rank] * 2, num_experts) for _ in range(6)]
    packed = [kernels.PackedGroup(**group) for group in groups]
    x, made = check_replayed_chain(packed, num_experts, top_k, tokens, width)
    ids, gates, first, *_ = made
    reference, _ = reference_4bit(groups[0], 0, x, ids, gates)
    assert oracle.relative_error(first, reference) < oracle.limit_4bit(first)


@pytest.mark.parametrize("tokens", [1, 8])
def test_two_streams_at_once_do_not_disturb_each_other(tokens):
    packed = [kernels.PackedGroup(**make_group_int4([2048], 2048, [8], 8)) for _ in range(2)]
    check_two_streams(packed, tokens, 2048)


def test_what_the_library_refuses():
    """It must never compute anything of them: no kernel but the one for few tokens reads 4 bits."""

    def path(group, tokens, dtype=BF16, width=128):
        x = randn(tokens, width, dtype=dtype)
        experts, gates = oracle.random_ids(tokens, 4, 2, "cuda")
        packed = kernels.PackedGroup(**group)
        if (found := packed.path(x, experts)) != kernels.FAST_PATH:
            with pytest.raises(RuntimeError, match="outside what the kernels take"):
                packed(x, experts, gates)
        return found

    group = make_group_int4([64], 128, [8], 4)
    assert path(group, 32) == kernels.FAST_PATH and path(group, 33) == -1
    for dtype in (torch.float16, torch.float32):
        assert path(make_group_int4([64], 128, [8], 4, dtype), 1, dtype) == -1
    assert path(make_group_int4([64], 132, [8], 4), 1, width=132) == -1
    assert path(make_group_int4([64], 128, [3], 4), 1) == -1
    tiles = group["weights"][0]
    odd = torch.zeros(tiles.numel() + 2, dtype=torch.int32, device="cuda")[2:].view(tiles.shape)
    assert path({**group, "weights": [odd]}, 1) == -1
    scales = group["scales"][0]
    odd = torch.zeros(scales.numel() + 1, dtype=BF16, device="cuda")[1:].view(scales.shape)
    assert path({**group, "scales": [odd]}, 1) == -1


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_op_serves_inputs_at_any_address(tokens, offset, dtype):
    if SANITIZING and (tokens == 40 or dtype != BF16):
        return  # PyTorch's operations: a product of cuBLAS in 16 bits
    group = make_group_int4([64, 33], 136, [8, 3 if tokens == 40 else 8], 4, dtype, bias=True)
    x = randn(tokens * 136 + offset, dtype=dtype)[offset:].view(tokens, 136)
    experts, gates = oracle.random_ids(tokens, 4, 2, "cuda")
    lists = [group[k] for k in ("weights", "scales", "code", "biases", "lora_a", "lora_b", "scalings")]
    for i, result in enumerate(ops.linear_4bit(x, experts, gates, *lists)):
        reference, _ = reference_4bit(group, i, x, experts, gates)
        assert oracle.relative_error(result, reference) < oracle.limit_4bit(result)
