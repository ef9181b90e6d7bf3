"""The ops in PyTorch: their definition, the path on a CPU, and that of any GPU tensor that the kernels do not serve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing.decayed_sums import decayed_sums, mean_of, weighted
from ..routing.decision import decide
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
from .dense_products import all_hidden, dense, gated, wide


def _one_by_one(x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """What the chosen experts of a few tokens add, [T, out], on a CPU: each is read where it lies, and no copy is made of it.
    The ids are looked at here, which makes a GPU's host wait, but costs nothing on a CPU."""
    result = x.new_zeros(x.shape[0], lora_b.shape[1])
    for t, (ids, factors) in enumerate(zip(experts.tolist(), gates.tolist(), strict=True)):
        row, total = x[t : t + 1], result[t : t + 1]
        for e, gate in zip(ids, factors, strict=True):
            if 0 <= e < lora_a.shape[0]:
                total.addmm_(F.linear(row, lora_a[e]).mul_(gate * scaling), lora_b[e].T)
    return result


def _add_chosen(x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """What the chosen experts of a few tokens add, [T, out]: reads those experts only."""
    tokens, top_k = experts.shape
    out = lora_b.shape[1]
    valid = (experts >= 0) & (experts < lora_a.shape[0])
    ids = experts.where(valid, 0).flatten()
    rows = x.repeat_interleave(top_k, 0).unsqueeze(-1)  # [T * k, in, 1]
    hidden = torch.bmm(lora_a[ids], rows)  # [T * k, r, 1]
    factors = (gates * scaling).flatten().to(x.dtype)
    each = torch.bmm(lora_b[ids], hidden * factors.view(-1, 1, 1)).view(tokens, top_k, out)
    return each.where(valid.unsqueeze(-1), 0.0).sum(1)


def _experts_reference(
    x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """x [T, in], experts and gates [T, k] -> [T, out]"""
    if x.device.type == "cpu" and experts.numel() <= lora_a.shape[0]:
        return _one_by_one(x, experts, gates, lora_a, lora_b, scaling)
    if experts.numel() < lora_a.shape[0]:
        return _add_chosen(x, experts, gates, lora_a, lora_b, scaling)
    factors, chosen = dense(experts, gates, lora_a.shape[0])
    hidden = gated(all_hidden(x, [lora_a]), (factors * scaling).to(x.dtype), chosen, lora_a.shape[1])
    return hidden @ wide(lora_b).T


def route_pytorch(x: Tensor, router: Tensor, top_k: int, normalize: bool, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    check_route(x, router, top_k, top_p)
    with torch.autocast(device_type=x.device.type, enabled=False):
        return decide(F.linear(x.float(), router.float()), top_k, normalize, top_p)


def route_context_pytorch(
    x: Tensor, router: Tensor, previous: Tensor, decay: float, top_k: int, normalize: bool, real: Tensor | None = None,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_route_context(x, router, previous, decay, top_k, real, top_p)
    with torch.autocast(device_type=x.device.type, enabled=False):
        own = F.linear(x.float(), router.float())
        grid = own.reshape(-1, 1, own.shape[-1])
        real = None if real is None else real.unsqueeze(-1)
        sums = decayed_sums(weighted(grid, real), decay, previous=previous, real=real)
        experts, gates = decide(mean_of(sums, grid).view(own.shape), top_k, normalize, top_p)
    return experts, gates, sums.squeeze(1)


def linear_pytorch(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool = False,
) -> list[Tensor]:  # fmt: skip
    check_linear(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    matrices = [weight.T for weight in weights] if transposed else weights
    return _linears(x, experts, gates, matrices, biases, lora_a, lora_b, scalings)


def dequantized(weight: Tensor, scales: Tensor, code: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [out, in / 2], float32 [out, in / block], float32 [16] -> [out, in] in `dtype`: code[index] * scale, rounded once.
    The index of an even feature is the higher half of its byte."""
    indices = torch.stack((weight >> 4, weight & 15), -1).flatten(1)
    blocks = code[indices.int()].unflatten(1, (scales.shape[1], -1))
    return (blocks * scales.unsqueeze(-1)).flatten(1).to(dtype)


def dequantized_tiles(weight: Tensor, scales: Tensor, out: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """int32 [out / 8, in / 128, 32, 4], bfloat16 [in / group, out, 2], padded -> [out, in] in `dtype`: (q - 8) * scale + zero,
    rounded once.

    Of the 32, the one at 4 g + t holds row g, and word j of its four the features 32 j + 2 t + {0, 1} + {0, 8, 16, 24}, 4 bits
    each: the even ones in the lower 16 bits.
    """
    shifts = torch.tensor([[16 * e + 4 * k for e in range(2)] for k in range(4)], device=weight.device)
    q = (weight.view(*weight.shape[:2], 8, 4, 4, 1, 1) >> shifts) & 15  # tile, chunk, g, t, j, k, e
    values = (q - 8).permute(0, 2, 1, 4, 5, 3, 6).reshape(8 * weight.shape[0], -1).float()
    scale, zero = (part.T.unsqueeze(-1).float() for part in scales.unbind(-1))  # [out, groups, 1]
    blocks = values.unflatten(1, (scales.shape[0], -1)) * scale + zero
    return blocks.flatten(1)[:out, :in_features].to(dtype)


def linear_4bit_pytorch(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], code: Tensor | None,
    biases: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_linear_4bit(x, experts, gates, weights, scales, code, biases, lora_a, lora_b, scalings)
    one_by_one = (
        dequantized_tiles(weight, scale, b.shape[1], x.shape[-1], x.dtype)
        if code is None
        else dequantized(weight, scale, code, x.dtype)
        for weight, scale, b in zip(weights, scales, lora_b, strict=True)
    )
    return _linears(x, experts, gates, one_by_one, biases, lora_a, lora_b, scalings)


def _linears(
    x: Tensor, experts: Tensor, gates: Tensor, matrices: Iterable[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """matrices: [out, in] each"""
    tokens = x.reshape(-1, x.shape[-1])
    experts, gates = (t.reshape(-1, t.shape[-1]) for t in (experts, gates))
    results = []
    for matrix, bias, a, b, scaling in zip(matrices, biases, lora_a, lora_b, scalings, strict=True):
        base = F.linear(tokens, matrix, bias)
        result = base + _experts_reference(tokens, experts, gates, a, b, scaling)
        results.append(result.view(*x.shape[:-1], b.shape[1]))
    return results


def expand_pytorch(
    hidden: Tensor, experts: Tensor, gates: Tensor, bases: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_expand(hidden, experts, gates, bases, biases, lora_b, scalings)
    factors, chosen = dense(experts, gates, lora_b[0].shape[0])
    parts = hidden.split([b.shape[0] * b.shape[2] for b in lora_b], dim=1)
    results = []
    for h, base, bias, b, scaling in zip(parts, bases, biases, lora_b, scalings, strict=True):
        h = gated(h, (factors * scaling).to(h.dtype), chosen, b.shape[2])
        results.append(torch.addmm(base if bias is None else base + bias, h, wide(b).T))
    return results


def deltas_pytorch(
    bases: Sequence[Tensor], x: Tensor, experts: Tensor, gates: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_deltas(bases, x, experts, gates, lora_a, lora_b, scalings)
    tokens = x.reshape(-1, x.shape[-1])
    experts, gates = (t.reshape(-1, t.shape[-1]) for t in (experts, gates))
    results = []
    for base, a, b, scaling in zip(bases, lora_a, lora_b, scalings, strict=True):
        # A base may be a view of any strides; the result has those that the fake says.
        added = _experts_reference(tokens, experts, gates, a, b, scaling)
        results.append(base.contiguous() + added.view(base.shape))
    return results


def merge_pytorch(
    weights: Sequence[Tensor], sources: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float], transposed: Sequence[bool], experts: Tensor, gates: Tensor,
    old_experts: Tensor | None = None, old_gates: Tensor | None = None,
) -> None:  # fmt: skip
    check_merge(weights, sources, lora_a, lora_b, scalings, transposed, experts, gates, old_experts, old_gates)
    ids, factors = experts, gates
    if old_experts is not None and old_gates is not None:
        ids, factors = torch.cat([experts, old_experts]), torch.cat([gates, -old_gates])
    for weight, source, a, b, scaling, swapped in zip(
        weights, sources, lora_a, lora_b, scalings, transposed, strict=True
    ):
        valid = ((ids >= 0) & (ids < a.shape[0])).view(-1, 1, 1)
        down, up = (each[ids.where(valid.flatten(), 0)].float().where(valid, 0.0) for each in (a, b))
        up = up * (factors.view(-1, 1, 1) * scaling).where(valid, 0.0)  # [k, out, r]
        update = up.transpose(0, 1).flatten(1) @ down.flatten(0, 1)  # [out, in]
        weight.copy_(source.float() + (update.T if swapped else update))


for _name, _function in (
    ("route", route_pytorch), ("route_context", route_context_pytorch), ("linear", linear_pytorch),
    ("linear_4bit", linear_4bit_pytorch), ("expand", expand_pytorch), ("deltas", deltas_pytorch), ("merge", merge_pytorch),
):  # fmt: skip
    library.impl(_name, _function, "CPU")
