"""The kernel for weights of 4 bits against the float64 oracle, on a GPU: fresh random inputs, poisoned outputs, odd sizes."""

from __future__ import annotations

import pytest
import torch

import kernel_oracle as oracle
from kernel_groups import (
    check_group_4bit,
    check_replayed_chain,
    check_two_streams,
    check_unread_experts,
    make_group_4bit,
    reference_4bit,
)
from kernel_oracle import HALVES, SANITIZING, poison_allocator, randn
from peft_loraswitch import kernels, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]
TOKENS = [1, 2, 3, 7, 8, 9, 16, 17, 31, 32]
dtypes = pytest.mark.parametrize("dtype", HALVES)


@dtypes
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_every_token_count(dtype, tokens, code):
    check_group_4bit([256, 64, 80], 512, [8, 8, 16], 8, 2, tokens, dtype, code=code)


@dtypes
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("in_features", [64, 192, 4096, 11008])
def test_every_width(dtype, tokens, in_features):
    """Groups of linears of other sizes, with outputs that are no multiple of a tile's."""
    check_group_4bit([1024, 1000, 17, 1], in_features, [8, 16, 8, 0], 8, 2, tokens, dtype, bias=True)


@dtypes
@pytest.mark.parametrize("tokens", [1, 8, 17])
@pytest.mark.parametrize(("in_features", "block"), [(128, 128), (4096, 128), (4096, 1024), (4096, 4096), (11008, 256)])
def test_every_block_of_scales(dtype, tokens, in_features, block):
    check_group_4bit([520, 48], in_features, [8, 8], 8, 2, tokens, dtype, block=block)


@dtypes
@pytest.mark.parametrize("tokens", [1, 2, 5, 20, 32])
@pytest.mark.parametrize("rank", [0, 8, 16, 24, 64])
def test_every_rank(dtype, tokens, rank):
    check_group_4bit([96, 33], 256, [rank, rank], 6, 3, tokens, dtype, bias=True)
    check_group_4bit([1024, 200], 4096, [rank, 8], 8, 2, tokens, dtype)


@dtypes
@pytest.mark.parametrize("tokens", [1, 4, 9, 32])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 1), (8, 2), (8, 4), (8, 8), (64, 1), (64, 2), (64, 8)])
def test_experts_and_top_k(dtype, tokens, num_experts, top_k):
    check_group_4bit([72, 520], 320, [8, 16], num_experts, top_k, tokens, dtype)


@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 32])
def test_ids_outside_the_experts_add_nothing_and_repeated_ids_add_twice(dtype, tokens):
    ids = torch.randint(-2, 10, (tokens, 3), device="cuda")
    ids[0] = torch.tensor([4, 4, -1], device="cuda")
    check_group_4bit([128], 256, [8], 8, 3, tokens, dtype, ids=ids)


@dtypes
@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("size", [1, kernels.MAX_GROUP])
def test_every_size_of_a_group(dtype, tokens, size):
    check_group_4bit([40] * size, 192, [8] * size, 8, 2, tokens, dtype)


@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("flags", [0, kernels.TUNING_TWO_LAUNCHES])
def test_full_size_groups_of_llama(tokens, flags):
    for outs, in_features in (([4096] * 3, 4096), ([4096], 4096), ([11008] * 2, 4096), ([4096], 11008)):
        check_group_4bit(outs, in_features, [8] * len(outs), 8, 2, tokens, torch.bfloat16, tuning=flags)


@dtypes
def test_each_of_the_16_values_at_each_place(dtype):
    """Unit vectors pick out single weights: the value times the scale, to the rounding of the value and of the result."""
    group = make_group_4bit([16], 128, [0], 1, dtype)
    index = torch.arange(16, dtype=torch.uint8, device="cuda")
    group["weights"] = [(index * 16 + index.flip(0))[:, None].repeat(1, 64)]
    packed = kernels.PackedGroup(**group)
    expected = oracle.from_4bit(group["weights"][0], group["scales"][0], group["code"])
    for x in torch.eye(128, device="cuda", dtype=dtype).split(32):
        experts, gates = oracle.random_ids(32, 1, 1, "cuda")
        poison_allocator()
        wanted = x.double() @ expected.T
        error = (packed(x, experts, gates)[0].double() - wanted).abs()
        assert (error <= 1.01 * torch.finfo(dtype).eps * wanted.abs()).all()


@pytest.mark.parametrize("tokens", [1, 5, 32])
def test_nothing_is_read_of_experts_that_nobody_chose(tokens):
    check_unread_experts(make_group_4bit([128, 64], 256, [16, 16], 8, torch.bfloat16), tokens)


@pytest.mark.parametrize(("num_experts", "top_k", "rank", "tokens"), [(8, 2, 8, 1), (8, 2, 8, 8), (64, 2, 16, 32)])
def test_graph_replay_with_everything_poisoned_between_replays(num_experts, top_k, rank, tokens):
    width = 1024
    groups = [make_group_4bit([width] * 2, width, [rank] * 2, num_experts, torch.bfloat16) for _ in range(6)]
    packed = [kernels.PackedGroup(**group) for group in groups]
    x, made = check_replayed_chain(packed, num_experts, top_k, tokens, width)
    ids, gates, first, *_ = made
    reference, _ = reference_4bit(groups[0], 0, x, ids, gates)
    assert oracle.relative_error(first, reference) < oracle.limit_4bit(first)


@pytest.mark.parametrize("tokens", [1, 8])
def test_two_streams_at_once_do_not_disturb_each_other(tokens):
    packed = [kernels.PackedGroup(**make_group_4bit([2048], 2048, [8], 8, torch.bfloat16)) for _ in range(2)]
    check_two_streams(packed, tokens, 2048)


def test_what_the_library_refuses():
    """It must never compute anything of them: no kernel but the one for few tokens reads 4 bits."""

    def path(group, tokens, dtype=torch.bfloat16):
        x = randn(tokens, 128, dtype=dtype)
        experts, gates = oracle.random_ids(tokens, 4, 2, "cuda")
        packed = kernels.PackedGroup(**group)
        if (found := packed.path(x, experts)) != kernels.FAST_PATH:
            with pytest.raises(RuntimeError, match="outside what the kernels take"):
                packed(x, experts, gates)
        return found

    group = make_group_4bit([64], 128, [8], 4, torch.bfloat16)
    assert path(group, 32) == kernels.FAST_PATH and path(group, 33) == -1
    assert path(make_group_4bit([64], 128, [8], 4, torch.float32), 1, torch.float32) == -1
    odd = torch.zeros(64 * 64 + 8, dtype=torch.uint8, device="cuda")[8:].view(64, 64)
    assert path({**group, "weights": [odd]}, 1) == -1
    assert path(make_group_4bit([64], 128, [3], 4, torch.bfloat16), 1) == -1


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_op_serves_inputs_at_any_address(tokens, offset):
    if SANITIZING and tokens == 40:
        return  # PyTorch's operations: a product of cuBLAS in 16 bits
    group = make_group_4bit([64, 33], 128, [8, 3 if tokens == 40 else 8], 4, torch.bfloat16, bias=True)
    x = randn(tokens * 128 + offset, dtype=torch.bfloat16)[offset:].view(tokens, 128)
    experts, gates = oracle.random_ids(tokens, 4, 2, "cuda")
    lists = [group[k] for k in ("weights", "scales", "code", "biases", "lora_a", "lora_b", "scalings")]
    for i, result in enumerate(ops.linear_4bit(x, experts, gates, *lists)):
        reference, _ = reference_4bit(group, i, x, experts, gates)
        assert oracle.relative_error(result, reference) < oracle.limit_4bit(result)
