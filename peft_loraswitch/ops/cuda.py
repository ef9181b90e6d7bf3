"""The ops on a GPU: by the kernels, or by PyTorch for what the kernels do not serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .contract import (
    check_deltas,
    check_expand,
    check_linear,
    check_linear_4bit,
    check_merge,
    check_route,
    check_route_context,
    library,
)
from .pytorch import (
    deltas_pytorch,
    expand_pytorch,
    linear_4bit_pytorch,
    linear_pytorch,
    merge_pytorch,
    route_context_pytorch,
    route_pytorch,
)


def _usable(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors) and kernels.available(tensors[0].get_device())


def _route_cuda(x: Tensor, router: Tensor, top_k: int, normalize: bool, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    if not kernels.available(x.get_device()):
        return route_pytorch(x, router, top_k, normalize, top_p)
    check_route(x, router, top_k, top_p)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    experts, gates = kernels.router(tokens, router.contiguous(), top_k, normalize, top_p)
    return experts.view(*x.shape[:-1], top_k), gates.view(*x.shape[:-1], top_k)


def _route_context_cuda(
    x: Tensor, router: Tensor, previous: Tensor, decay: float, top_k: int, normalize: bool, real: Tensor | None = None,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not kernels.available(x.get_device()):
        return route_context_pytorch(x, router, previous, decay, top_k, normalize, real, top_p)
    check_route_context(x, router, previous, decay, top_k, real, top_p)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    experts, gates, sums = kernels.router_context(
        tokens, router.contiguous(), previous.contiguous(), decay, top_k, normalize,
        None if real is None else real.contiguous(), top_p,
    )  # fmt: skip
    return experts.view(*x.shape[:-1], top_k), gates.view(*x.shape[:-1], top_k), sums


def _linear_cuda(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool = False,
) -> list[Tensor]:  # fmt: skip
    present = [bias for bias in biases if bias is not None]
    if x.numel() == 0 or not _usable(*weights, *present, *lora_a, *lora_b):
        return linear_pytorch(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    check_linear(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    packed = kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, transposed)
    x, experts, gates = x.contiguous(), experts.contiguous(), gates.contiguous()
    if x.data_ptr() % 16:  # part of a larger tensor: only the slowest kernel reads it there
        x = x.clone()
    kernels.warn_if_generic(packed, x, experts)
    return packed(x, experts, gates)


def _linear_4bit_cuda(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], code: Tensor | None,
    biases: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_linear_4bit(x, experts, gates, weights, scales, code, biases, lora_a, lora_b, scalings)
    present = [t for t in (*biases, code) if t is not None]
    halves = (torch.bfloat16,) if code is None else (torch.float16, torch.bfloat16)
    few = 0 < x.shape[:-1].numel() <= kernels.FAST_TOKENS and x.dtype in halves
    if few and _usable(*weights, *scales, *present, *lora_a, *lora_b):
        packed = kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, scales=scales, code=code)
        rows = x.contiguous()
        if rows.data_ptr() % 16:  # part of a larger tensor: no kernel reads it there
            rows = rows.clone()
        if packed.path(rows, experts) == kernels.FAST_PATH:
            return packed(rows, experts.contiguous(), gates.contiguous())
        kernels.log_once(
            f"LoRA-Switch: linear_4bit dequantises weights by PyTorch operations, which is slow: no kernel takes in_features="
            f"{x.shape[-1]} with ranks {sorted({a.shape[1] for a in lora_a})} and memory as it is aligned."
        )
    return linear_4bit_pytorch(x, experts, gates, weights, scales, code, biases, lora_a, lora_b, scalings)


def _rows_in_place(tensor: Tensor) -> Tensor:
    """[T, n] as `kernels.expand` reads it: rows may be parts of longer rows."""
    apart = tensor.stride(0)  # of any size where there is one row
    fits = tensor.stride(1) == 1 and (len(tensor) < 2 or (apart >= tensor.shape[1] and apart % 8 == 0))
    return tensor if fits else tensor.contiguous()


def _expand_cuda(
    hidden: Tensor, experts: Tensor, gates: Tensor, bases: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_expand(hidden, experts, gates, bases, biases, lora_b, scalings)
    if hidden.numel() and _usable(*lora_b, *[bias for bias in biases if bias is not None]):
        group = kernels.expansion(lora_b, biases, scalings, experts.shape[1])
        hidden, *rows = map(_rows_in_place, (hidden, *bases))
        if group.expands and all(each.data_ptr() % 16 == 0 for each in (hidden, *rows)):
            return kernels.expand(group, hidden, experts.contiguous(), gates.contiguous(), rows)
    return expand_pytorch(hidden, experts, gates, bases, biases, lora_b, scalings)


def _deltas_cuda(
    bases: Sequence[Tensor], x: Tensor, experts: Tensor, gates: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    if x.numel() == 0 or not _usable(*lora_a, *lora_b):
        return deltas_pytorch(bases, x, experts, gates, lora_a, lora_b, scalings)
    check_deltas(bases, x, experts, gates, lora_a, lora_b, scalings)
    nothing = [None] * len(bases)  # no weights, no biases
    packed = kernels.PackedGroup(nothing, nothing, lora_a, lora_b, scalings)
    x, experts, gates = x.contiguous(), experts.contiguous(), gates.contiguous()
    kernels.warn_if_generic(packed, x, experts)
    return packed(x, experts, gates, [base.contiguous() for base in bases])


_tables: list[kernels.MergeTable] = []  # of the last models merged: a CUDA graph cannot make one while it is captured


def merge_table(*arguments: Any) -> kernels.MergeTable:
    """The table for `weights, sources, lora_a, lora_b, scalings, transposed`, made once and kept."""
    pointers = [t.data_ptr() for tensors in arguments[:4] for t in tensors]
    for table in _tables:
        if table.pointers == pointers and table.scalings == list(arguments[4]):
            return table
    table = kernels.MergeTable(*arguments)
    _tables[:] = [*_tables[-7:], table]
    return table


def drop_merge_tables(weights: Sequence[Tensor]) -> None:
    """Forget the tables that write `weights`, and with them the memory they hold on to."""
    _tables[:] = [table for table in _tables if not weights or table.pointers[0] != weights[0].data_ptr()]


def _merge_cuda(
    weights: Sequence[Tensor], sources: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float], transposed: Sequence[bool], experts: Tensor, gates: Tensor,
    old_experts: Tensor | None = None, old_gates: Tensor | None = None,
) -> None:  # fmt: skip
    if not weights or not _usable(*weights, *sources, *lora_a, *lora_b):
        merge_pytorch(weights, sources, lora_a, lora_b, scalings, transposed, experts, gates, old_experts, old_gates)
        return
    check_merge(weights, sources, lora_a, lora_b, scalings, transposed, experts, gates, old_experts, old_gates)
    table = merge_table(weights, sources, lora_a, lora_b, scalings, transposed)
    table(experts, gates, old_experts, old_gates)


for _name, _function in (
    ("route", _route_cuda), ("route_context", _route_context_cuda), ("linear", _linear_cuda),
    ("linear_4bit", _linear_4bit_cuda), ("expand", _expand_cuda), ("deltas", _deltas_cuda), ("merge", _merge_cuda),
):  # fmt: skip
    library.impl(_name, _function, "CUDA")
