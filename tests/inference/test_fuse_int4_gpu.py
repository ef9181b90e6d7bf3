"""Fused models whose base layers are torchao's in int4, on a GPU: eager, compiled, in CUDA graphs, generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import four_bit_checks as checks
from four_bit_linear import BF16, SIZES, check_layers
from fusing import adapted, close, ids, logits
from helpers import LAYERS, tiny_llama
from int4_linear import exact_weight
from int8_linear import ALL, launches
from peft_loraswitch.inference.fuse import adapted_layers
from recipes.benchmarks.decode.loops import Decoder

quantization = pytest.importorskip("torchao.quantization")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
both_sizes = pytest.mark.parametrize("width", [256, 1024])  # padded, and not


def made(width: int = 256, group: int = 128, settings: Any = None) -> Any:
    """By torchao's own functions, as the decode benchmark does it."""
    base = tiny_llama(
        hidden_size=width,
        intermediate_size=768,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=width**-0.5,
    )
    model = adapted(base, "cuda", torch.bfloat16, **(settings or {}))
    config = quantization.Int4WeightOnlyConfig(
        group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    holder = nn.ModuleDict({str(i): layer.base_layer for i, layer in enumerate(adapted_layers(model))})
    assert len(holder) == len(ALL) * LAYERS
    quantization.quantize_(holder, config)
    return model.requires_grad_(False)


def served(model: nn.Module) -> bool:
    """By the kernel for int4, all of it."""
    kinds = {type(layer.base_layer.weight) for layer in adapted_layers(model)}
    assert kinds == {quantization.Int4TilePackedTo4dTensor}
    return all(layer.fused_groups["default"].four_bit for layer in adapted_layers(model))


@both_sizes
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_every_linear_is_its_weight_and_its_experts(group, width):
    model = made(width, group, {"rank_pattern": {"k_proj": 16, "up_proj": 128}})
    model.fuse_for_inference("fused")
    assert served(model)
    check_layers(
        model,
        [ids(1, 1, "cuda"), ids(2, 3, "cuda"), ids(2, 3, "cuda"), ids(1, 32, "cuda"), ids(3, 20, "cuda")],
        exact_weight,
    )


@both_sizes
def test_fused_as_unfused_for_few_and_for_many_tokens(width):
    checks.check_few_and_many_tokens(
        made(width), [ids(b, n, "cuda") for b, n in ((1, 1), (8, 1), (2, 3), (1, 16), (1, 32), (1, 33), (3, 40))]
    )


def test_what_the_kernel_does_not_take_goes_by_the_library():
    model = made(settings={"r": 3})
    tokens = ids(2, 3, "cuda")
    expected = logits(model, tokens)
    model.fuse_for_inference("fused")
    with launches() as of:
        assert close(logits(model, tokens).float(), expected.float(), BF16)
    assert [size for name, size in of if name == "deltas"] == SIZES and not served(model)


def weights_changed(model: nn.Module) -> None:
    for layer in adapted_layers(model):
        layer.base_layer.weight.qdata.bitwise_xor_(0x77777777)
        layer.base_layer.weight.scale_and_zero.mul_(1.5)


@both_sizes
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("batch", [1, 8])
def test_compiled(mode, batch, width):
    """By inductor, in CUDA graphs with the second mode: tokens that differ from replay to replay, then weights that do."""
    checks.check_compiled(made(width), mode, batch, served, weights_changed, tolerance=BF16)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 8])
def test_captured(batch):
    """A decode step over a static cache in a CUDA graph, as the decode benchmark captures it, replayed with other tokens."""
    model = made()
    decoder = Decoder(model, batch, "cuda")
    token = decoder.token.clone()
    batches = [ids(batch, 1, "cuda", seed=seed) for seed in range(4)]

    def step() -> torch.Tensor:
        return model(
            input_ids=token, position_ids=decoder.position, past_key_values=decoder.cache, use_cache=True
        ).logits

    def rewound(one: torch.Tensor) -> None:
        token.copy_(one)
        decoder.rewind()

    expected = []
    for one in batches:
        rewound(one)
        expected.append(step().clone())
    model.fuse_for_inference("fused")
    decoder.rewind()
    assert served(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        for one, value in zip(batches, expected, strict=True):
            rewound(one)
            captured.fill_(float("nan"))
            graph.replay()
            assert close(captured.float(), value.float(), BF16)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 8])
def test_generates_as_unfused(cache, batch):
    checks.check_generates_as_unfused(made(settings={"task_type": "CAUSAL_LM"}), batch, cache, served)


def test_experts_in_float32_are_served_from_casts():
    checks.check_experts_in_float32(made(), served)


def test_a_model_that_goes_to_the_cpu_and_comes_back():
    checks.check_to_the_cpu_and_back(made(), served)


def test_memory():
    """No second copy of weights or scales."""
    model = made(1024)
    taken = checks.memory_of_fusing(model)
    small = 1 << 16  # decisions, and what the allocator rounds up
    assert served(model)
    assert sum(layer.base_layer.weight.scale_and_zero.nbytes for layer in adapted_layers(model)) > 2 * small
    assert taken <= small
