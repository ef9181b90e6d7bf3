"""Base layers of bitsandbytes in 4 bits, as a model from `BitsAndBytesConfig(load_in_4bit=True)` has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import kernel_oracle
import layer_checks
import oracle
from fusing import adapted, close, ids, logits
from helpers import LAYERS, switch_layers, tiny_llama
from int8_linear import ALL
from peft_loraswitch.inference.fuse import adapted_layers

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}  # blocks have at least 64 features
# Of models in 4 bits, by whichever library.
SIZES = [3, 1, 2, 1] * LAYERS  # q, k, v; o; gate, up; down
FEW, MANY = ids(2, 3, "cpu"), ids(3, 20, "cpu")
BF16 = 4e-2  # either forward in bf16 is 2 % from the exact one


def linear_4bit(
    linear: Any, quant_type: str = "nf4", double: bool = False, blocksize: int = 64, storage: torch.dtype = torch.uint8,
    compute_dtype: torch.dtype | None = torch.bfloat16,
) -> Any:  # fmt: skip
    """`linear` quantised, on its device.

    Args:
        double: the scales are quantised, too.
    """
    import bitsandbytes as bnb

    kind = {"quant_type": quant_type, "compress_statistics": double, "quant_storage": storage}
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=compute_dtype, **kind
    )
    weight = linear.weight.detach()
    made.weight = bnb.nn.Params4bit(
        weight.cpu().clone(), requires_grad=False, blocksize=blocksize, module=made, **kind
    ).to(weight.device)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    made.support_avx512bf16_for_cpu = False  # on such CPUs bitsandbytes packs weights in a form of its own
    return made.eval()


def in_4_bits(model: nn.Module, names: tuple[str, ...] = ALL, **kind: Any) -> nn.Module:
    """`model`, the base layers of its adapted linears quantised that go by `names`."""
    for layer in adapted_layers(model):
        if layer.name.rpartition(".")[2] in names:
            layer.base_layer = linear_4bit(layer.base_layer, **kind)
    return model


def made_4bit(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, settings: Any = None, **kind: Any) -> Any:
    """Two layers, k and v with fewer outputs than q."""
    model = adapted(tiny_llama(attention_bias=True, **SHAPE), device, dtype, **(settings or {}))
    return in_4_bits(model, **{"compute_dtype": dtype, **kind})


def exact_weight(base: Any) -> torch.Tensor:
    """What the library makes of it, [out, in] in float64."""
    from bitsandbytes.functional import dequantize_4bit

    state = base.weight.quant_state
    before, state.dtype = state.dtype, torch.float32
    try:
        return dequantize_4bit(base.weight.detach(), state).double()
    finally:
        state.dtype = before


def check_layers(model: nn.Module, batches: list[torch.Tensor], weight_of: Any = exact_weight) -> None:
    """In a forward of each batch, every linear computes its weight, its bias and its experts, against float64.

    Args:
        weight_of: a base layer's weight in float64.
    """
    config, layers = model.peft_config["default"], switch_layers(model.get_base_model())
    first = next(iter(layers))
    router = layers[first].loraswitch_router["default"].weight.cpu()
    seen = layer_checks.watch(model)
    for tokens in batches:
        logits(model, tokens)
        chosen = oracle.decide(seen[first][0].cpu(), router, config.top_k, config.normalize_gates)
        decision = oracle.with_shared(chosen, config)
        for name, (x, y) in seen.items():
            base, bias = layers[name].base_layer, layers[name].base_layer.bias
            a, b = (e["default"].weight.cpu() for e in (layers[name].loraswitch_A, layers[name].loraswitch_B))
            expected = oracle.delta(x.cpu(), a, b, decision, oracle.scaling_of(config, name, a.shape[1]))
            expected += (x.double() @ weight_of(base).T).cpu() + (0 if bias is None else bias.double().cpu())
            assert y.dtype == x.dtype and y.shape == expected.shape
            assert kernel_oracle.relative_error(y.cpu(), expected) < 3 * kernel_oracle.limit(y), name


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = BF16) -> bool:
    return close(one.float(), other.float(), tolerance)


def sizes(called: list[tuple[str, int]], name: str) -> list[int]:
    return [size for op, size in called if op == name]
