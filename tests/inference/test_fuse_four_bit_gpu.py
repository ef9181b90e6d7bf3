"""Fused models whose base layers are bitsandbytes' in 4 bits, on a GPU: eager, compiled, in CUDA graphs, generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import four_bit_checks as checks
from four_bit_linear import BF16, SIZES, check_layers, in_4_bits
from fusing import adapted, close, ids, logits
from helpers import tiny_llama
from int8_linear import launches
from peft_loraswitch.inference.fuse import adapted_layers

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
KINDS = [{}, {"quant_type": "fp4"}, {"double": True}, {"double": True, "storage": torch.bfloat16}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def made(dtype: torch.dtype = torch.bfloat16, settings: Any = None, **kind: Any) -> Any:
    base = tiny_llama(hidden_size=256, intermediate_size=704, num_key_value_heads=2, attention_bias=True)
    model = adapted(base, "cuda", dtype, **(settings or {}))
    return in_4_bits(model, **{"compute_dtype": dtype, **kind})


def served(model: nn.Module) -> bool:
    """By the kernel for 4 bits, all of it."""
    return all(layer.fused_groups["default"].four_bit for layer in adapted_layers(model))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_linear_is_its_weight_and_its_experts(kind, dtype):
    model = made(dtype, {"rank_pattern": {"k_proj": 16, "up_proj": 128}}, **kind)
    model.fuse_for_inference("fused")
    assert served(model)
    check_layers(
        model, [ids(1, 1, "cuda"), ids(2, 3, "cuda"), ids(2, 3, "cuda"), ids(1, 32, "cuda"), ids(3, 20, "cuda")]
    )


@kinds
def test_fused_as_unfused_for_few_and_for_many_tokens(kind):
    checks.check_few_and_many_tokens(
        made(**kind), [ids(b, n, "cuda") for b, n in ((1, 1), (8, 1), (2, 3), (1, 32), (1, 33), (3, 40))]
    )


def test_what_the_kernel_does_not_take_goes_by_the_library():
    for settings, kind in (({"r": 3}, {}), ({}, {"compute_dtype": torch.float32}), ({}, {"blocksize": 32})):
        model = made(settings=settings, **kind)
        tokens = ids(2, 3, "cuda")
        expected = logits(model, tokens)
        model.fuse_for_inference("fused")
        with launches() as of:
            assert close(logits(model, tokens).float(), expected.float(), BF16)
        assert served(model) or [size for name, size in of if name == "deltas"] == SIZES
        assert not any(name == "linear_4bit" for name, _ in of) or served(model)
        assert settings or not served(model)


def weights_changed(model: nn.Module) -> None:
    for layer in adapted_layers(model):
        state = layer.base_layer.weight.quant_state
        layer.base_layer.weight.data.view(torch.uint8).bitwise_xor_(0x7F)  # the bytes may be kept as another dtype
        (state.offset if state.nested else state.absmax).mul_(1.5)
    model.refresh_fused()


@kinds
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(kind, mode):
    """By inductor, in CUDA graphs with the second mode: tokens that differ from replay to replay, then weights that do."""
    checks.check_compiled(made(**kind), mode, 1, served, weights_changed, tolerance=3e-2)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 8])
def test_generates_as_unfused(double, cache, batch):
    checks.check_generates_as_unfused(made(double=double, settings={"task_type": "CAUSAL_LM"}), batch, cache, served)


def test_experts_in_float32_are_served_from_casts():
    checks.check_experts_in_float32(made(), served)


def test_a_model_that_goes_to_the_cpu_and_comes_back():
    checks.check_to_the_cpu_and_back(made(double=True), served)


@pytest.mark.parametrize("double", [False, True])
def test_memory(double):
    """No second copy of weights: scales that were quantised take 4 bytes for each block, others nothing."""
    model = made(double=double)
    taken = checks.memory_of_fusing(model)
    layers = adapted_layers(model)
    packed = sum(layer.base_layer.weight.numel() for layer in layers)  # bytes
    scales = 4 * packed * 2 // 64
    small = 1 << 16  # decisions, and what the allocator rounds up
    assert served(model) and packed > 8 * small
    assert taken <= (scales if double else 0) + small
