"""Quantised backbones: the adapted linears of a model by a library's own classes, everything else as it was."""

from __future__ import annotations

from typing import Any

from recipes.benchmarks.decode.plan import TARGETS


def quantize(model: Any, backbone: str, device: str) -> None:
    """Replace the weights of the linears in TARGETS, in place, one after the other: the old ones may be another process's.

    Args:
        backbone: one of plan.BACKBONES; "bf16" changes nothing.

    Raises:
        RuntimeError: int4 on a CPU, where torchao has no product for weights packed for tensor cores.
    """
    if backbone == "nf4":
        _to_nf4(model, device)
    elif backbone != "bf16":
        _by_torchao(model, backbone, device)


def _to_nf4(model: Any, device: str) -> None:
    import bitsandbytes as bnb
    import torch

    # as transformers' BitsAndBytesConfig has them by default: scales in float32
    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    for name, linear in _targets(model):
        small = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **kind
        )
        weight = linear.weight.data.clone()
        small.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=small, **kind).to(device)
        small.support_avx512bf16_for_cpu = False  # on such CPUs it packs the weights in a form of its own
        model.set_submodule(name, small)


def _by_torchao(model: Any, backbone: str, device: str) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if backbone == "int4" and device != "cuda":
        raise RuntimeError("int4 needs a CUDA GPU: torchao packs these weights for its tensor cores")
    config: Any = {
        "int8": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
        "float8": lambda: Float8WeightOnlyConfig(set_inductor_config=False),
        "int4": lambda: Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", set_inductor_config=False),
    }[backbone]()
    quantize_(model, config, filter_fn=lambda module, name: name.rpartition(".")[2] in TARGETS)


def _targets(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]


def bytes_of(parameter: Any) -> int:
    """What a parameter holds in memory, with its scales where it is quantised."""
    parts = [getattr(parameter, name) for name in _inner(parameter)]
    if parts:
        return sum(bytes_of(part) for part in parts)
    state = getattr(parameter, "quant_state", None)
    scales = state.absmax.numel() * state.absmax.element_size() if state is not None else 0
    return int(parameter.numel() * parameter.element_size() + scales)


def _inner(parameter: Any) -> list[str]:
    """Names of the tensors that a tensor of torchao's is made of."""
    flatten = getattr(parameter, "__tensor_flatten__", None)
    return [] if flatten is None else list(flatten()[0])
