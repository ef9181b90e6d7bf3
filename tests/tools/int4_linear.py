"""Base layers as torchao's `Int4WeightOnlyConfig` with "tile_packed_to_4d" leaves them, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import kernel_oracle
from fusing import adapted
from helpers import tiny_llama
from int8_linear import ALL
from peft_loraswitch.inference.fuse import adapted_layers

SHAPE = {"hidden_size": 64, "intermediate_size": 136, "num_key_value_heads": 2}  # both padded, to 1,024


def int4_weight(weight: torch.Tensor, group: int = 32) -> Any:
    """`weight` [out, in] as an nn.Parameter of torchao's class. The class's own `from_hp` packs on a GPU alone."""
    from torchao.quantization import Int4TilePackedTo4dTensor

    out, width = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -width % 1024, 0, -out % 8))
    blocks = padded.unflatten(1, (-1, group))
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-6).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    q = ((blocks - zero.unsqueeze(-1)) / scale.unsqueeze(-1) + 8).round().clamp(0, 15).flatten(1)
    tiles, scales = kernel_oracle.pack_int4(q), kernel_oracle.pack_int4_scales(scale, zero)
    return nn.Parameter(Int4TilePackedTo4dTensor(tiles, scales, [1, group], weight.shape), requires_grad=False)


def int4_linear(linear: Any, group: int = 32) -> nn.Linear:
    """`linear` quantised, on its device."""
    made = nn.Linear(
        linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta", dtype=torch.bfloat16
    )
    made.weight = int4_weight(linear.weight.detach(), group)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made.eval()


def in_int4(model: nn.Module, names: tuple[str, ...] = ALL, group: int = 32) -> nn.Module:
    """`model`, the base layers of its adapted linears quantised that go by `names`."""
    for layer in adapted_layers(model):
        if layer.name.rpartition(".")[2] in names:
            layer.base_layer = int4_linear(layer.base_layer, group)
    return model


def made_int4(device: str = "cpu", settings: Any = None, group: int = 32) -> Any:
    """Two layers, k and v with fewer outputs than q, in bf16."""
    model = adapted(tiny_llama(attention_bias=True, **SHAPE), device, torch.bfloat16, **(settings or {}))
    return in_int4(model, group=group)


def exact_weight(base: Any) -> torch.Tensor:
    """[out, in] in float64."""
    weight = base.weight
    return kernel_oracle.from_int4(weight.qdata, weight.scale_and_zero, *weight.shape)


@contextmanager
def product_on_a_cpu() -> Iterator[list[int]]:
    """Within it, the product that torchao calls, and PyTorch has for GPUs alone, is there on a CPU. Gives the tokens of each."""
    calls: list[int] = []

    def product(x: torch.Tensor, tiles: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[0])
        weight = kernel_oracle.from_int4(tiles, scales, 8 * tiles.shape[0], x.shape[1])
        return (x.double() @ weight.T).to(x.dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_weight_int4pack_mm", product, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
