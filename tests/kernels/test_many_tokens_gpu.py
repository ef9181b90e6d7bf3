"""`linear_sm90.cu` and its shrink, for many tokens, against the float64 oracle: on a GPU of compute capability 9.0."""

from __future__ import annotations

import pytest
import torch

from kernel_groups import check_group
from kernel_oracle import HALVES
from peft_loraswitch import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("linear_sm90.cu is for compute capability 9.0")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [0, kernels.TUNING_NARROW, kernels.TUNING_WIDE])
@pytest.mark.parametrize("tokens", [33, 64, 65, 127, 128, 129, 255, 256, 257, 700, 2048])
def test_many_tokens(dtype, width, tokens, hopper):
    packed, x, experts = check_group([512, 104, 8], 520, [8, 24, 64], 8, 2, tokens, dtype, tuning=width, bias=True)
    assert packed.path(x, experts) == kernels.SM90_PATH


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [kernels.TUNING_NARROW, kernels.TUNING_WIDE])
@pytest.mark.parametrize("rank", [0, 8, 16, 24, 32, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_many_tokens_every_rank(dtype, width, rank, num_experts, hopper):
    ranks = [rank, 8, rank, 0]
    packed, x, experts = check_group([136, 256, 264, 40], 256, ranks, num_experts, 1, 150, dtype, tuning=width)
    assert packed.path(x, experts) == kernels.SM90_PATH


@pytest.mark.parametrize("width", [kernels.TUNING_NARROW, kernels.TUNING_WIDE])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 8), (64, 3), (256, 8), (200, 7)])
def test_many_tokens_experts_and_top_k(width, num_experts, top_k, hopper):
    check_group([264], 320, [8], num_experts, top_k, 200, torch.bfloat16, tuning=width)


@pytest.mark.parametrize("width", [kernels.TUNING_NARROW, kernels.TUNING_WIDE])
@pytest.mark.parametrize("in_features", [8, 24, 56, 64, 72, 128, 1000, 4104])
def test_many_tokens_odd_input_widths(width, in_features, hopper):
    check_group([264, 16], in_features, [8, 16], 4, 2, 130, torch.bfloat16, tuning=width, bias=True)


def test_many_tokens_full_size(hopper):
    """More tiles than blocks, so that a block has several, of several linears."""
    for outs, in_features, tokens in (
        ([4096] * 3, 4096, 2048),
        ([4096, 1024, 1024], 4096, 1111),
        ([4096], 11008, 3000),
    ):
        for rank in (8, 64):
            for width in (0, kernels.TUNING_NARROW, kernels.TUNING_WIDE):
                ranks = [rank] * len(outs)
                packed, x, experts = check_group(outs, in_features, ranks, 8, 2, tokens, torch.bfloat16, tuning=width)
                assert packed.path(x, experts) == kernels.SM90_PATH


def test_many_tokens_ids_outside_the_experts_add_nothing_and_repeated_ids_add_twice(hopper):
    ids = torch.randint(-2, 12, (300, 3), device="cuda")
    ids[0] = torch.tensor([4, 4, -1], device="cuda")
    for num_experts in (8, 7, 5):  # with 7 and 5, hidden columns are left that are of no expert
        for ranks in ([8, 24], [64, 40], [8, 256]):
            packed, x, experts = check_group([128, 64], 256, ranks, num_experts, 3, 300, torch.bfloat16, ids=ids)
            assert packed.path(x, experts) == kernels.SM90_PATH


def test_many_tokens_at_the_same_addresses_in_other_shapes(hopper):
    """Tensor maps are kept, by all that they say; the allocator hands out again what the case before has given back."""
    for _ in range(2):
        for outs, in_features, tokens in (
            ([64, 128], 256, 256),
            ([128, 64], 256, 256),
            ([64, 128], 512, 128),
            ([64], 128, 512),
        ):
            for dtype in HALVES:
                for rank, num_experts in ((8, 4), (16, 2), (32, 1)):
                    check_group(outs, in_features, [rank] * len(outs), num_experts, 1, tokens, dtype)


def test_many_tokens_more_than_a_grid_is_high(hopper):
    packed, x, experts = check_group([16], 64, [8], 4, 2, 70000, torch.bfloat16)
    assert packed.path(x, experts) == kernels.SM90_PATH
