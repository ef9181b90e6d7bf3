"""Fused models whose base layers are bitsandbytes' in 4 bits, on a GPU: eager, compiled, in CUDA graphs, generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from four_bit_linear import BF16, SIZES, check_layers, in_4_bits
from fusing import adapted, close, ids, logits
from helpers import tiny_llama
from int8_linear import launches
from peft_loraswitch import kernels
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
    model = made(**kind)
    batches = [ids(b, n, "cuda") for b, n in ((1, 1), (8, 1), (2, 3), (1, 32), (1, 33), (3, 40))]
    expected = [logits(model, tokens) for tokens in batches]
    model.fuse_for_inference("fused")
    for _ in range(2):
        for tokens, value in zip(batches, expected, strict=True):
            assert close(logits(model, tokens).float(), value.float(), BF16)
    for tokens in batches:
        with launches() as of:
            logits(model, tokens)
        few = tokens.numel() <= kernels.FAST_TOKENS
        assert [size for name, size in of if name == "linear"] == (SIZES if few else [])
        assert not any(name in ("linear_4bit", "deltas") for name, _ in of)
    model.unfuse()
    for tokens, value in zip(batches, expected, strict=True):
        assert torch.equal(logits(model, tokens), value)


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


@kinds
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(kind, mode):
    """By inductor, in CUDA graphs with the second mode: tokens that differ from replay to replay, then weights that do."""
    model = made(**kind)
    batches = [ids(1, 1, "cuda", seed=seed) for seed in range(4)]
    expected = [logits(model, tokens, use_cache=False) for tokens in batches]
    model.fuse_for_inference("fused")
    assert served(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(3):
        for tokens, value in zip(batches, expected, strict=True):
            assert close(logits(compiled, tokens, use_cache=False).float(), value.float(), 3e-2)
    for layer in adapted_layers(model):
        state = layer.base_layer.weight.quant_state
        layer.base_layer.weight.data.view(torch.uint8).bitwise_xor_(0x7F)  # the bytes may be kept as another dtype
        (state.offset if state.nested else state.absmax).mul_(1.5)
    model.refresh_fused()
    changed = [logits(compiled, tokens, use_cache=False).clone() for tokens in batches]
    model.unfuse()
    for tokens, value, before in zip(batches, changed, expected, strict=True):
        assert close(value.float(), logits(model, tokens, use_cache=False).float(), BF16)
        assert not close(value.float(), before.float(), 0.1)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 8])
def test_generates_as_unfused(double, cache, batch):
    model = made(double=double, settings={"task_type": "CAUSAL_LM"})
    prompt = ids(batch, 5, "cuda")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(input_ids=prompt, **settings)
    torch._dynamo.reset()
    with model.fuse_for_inference("fused"):
        assert served(model)
        for _ in range(2):
            found = model.generate(input_ids=prompt, cache_implementation=cache, **settings)
            assert found.shape == wanted.shape
            # after a near-tie that falls the other way all differ
            assert (found == wanted).float().mean() > 0.6


def test_experts_in_float32_are_served_from_casts():
    model = made()
    for layer in adapted_layers(model):
        layer.loraswitch_A["default"].float()
        layer.loraswitch_B["default"].float()
    tokens = ids(2, 3, "cuda")
    expected = logits(model, tokens)
    model.fuse_for_inference("fused")
    assert served(model) and close(logits(model, tokens).float(), expected.float(), BF16)


def test_a_model_that_goes_to_the_cpu_and_comes_back():
    model = made(double=True)
    tokens = ids(2, 3, "cuda")
    expected = logits(model, tokens)
    model.fuse_for_inference("fused")
    model.to("cpu")
    assert not served(model)
    model.to("cuda")
    assert served(model) and close(logits(model, tokens).float(), expected.float(), BF16)


@pytest.mark.parametrize("double", [False, True])
def test_memory(double):
    """No second copy of weights: scales that were quantised take 4 bytes for each block, others nothing."""
    model = made(double=double)
    logits(model, ids(1, 1, "cuda"))
    kernels.give_workspace(torch.cuda.current_device())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model.fuse_for_inference("fused")
    logits(model, ids(1, 1, "cuda"))
    torch.cuda.synchronize()
    layers = adapted_layers(model)
    packed = sum(layer.base_layer.weight.numel() for layer in layers)  # bytes
    scales = 4 * packed * 2 // 64
    small = 1 << 16  # decisions, and what the allocator rounds up
    assert served(model) and packed > 8 * small
    assert torch.cuda.memory_allocated() - before <= (scales if double else 0) + small
