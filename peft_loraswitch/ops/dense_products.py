"""The experts of many tokens as dense products: the hidden of all experts, gated, and B of all experts as one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(experts: Tensor, gates: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[T, k] each -> gates [T, E] float32, scattered over all experts, and bool [T, E], which of those were chosen. Ids
    outside [0, E) are dropped, the gates of repeated ones added."""
    valid = (experts >= 0) & (experts < num_experts)
    ids = experts.where(valid, num_experts)  # one column more, for what is dropped
    scattered = torch.zeros(experts.shape[0], num_experts + 1, dtype=gates.dtype, device=gates.device)
    chosen = torch.zeros_like(scattered, dtype=torch.bool).scatter_(1, ids, True)
    return scattered.scatter_add_(1, ids, gates)[:, :num_experts], chosen[:, :num_experts]


def all_hidden(x: Tensor, lora_a: Sequence[Tensor]) -> Tensor:
    """What all experts of each linear of a group make of x [T, in], side by side: [T, sum of E * r]. lora_a: [E, r, in], or
    [E * r, in], each.

    One product for the whole group: the experts' A side by side are one wide matrix. Putting them there takes 1 % of the
    time of the group's own products and no lasting memory, where a copy that is kept would take up to 5 % of the model's.
    """
    stacked = [a.flatten(0, -2) for a in lora_a]
    return F.linear(x, stacked[0] if len(stacked) == 1 else torch.cat(stacked))


def gated(hidden: Tensor, gates: Tensor, chosen: Tensor | None, rank: int) -> Tensor:
    """One linear's hidden [T, E * r] times its gates [T, E]; zero, whatever it is, where `chosen` (bool [T, E]; None: all are)
    says that it does not count."""
    each = hidden.unflatten(1, (gates.shape[1], rank))
    if chosen is not None:
        each = each.where(chosen.unsqueeze(-1), 0.0)
    return (each * gates.unsqueeze(-1)).flatten(1)


def group_hidden(
    hidden: Tensor, shapes: Sequence[Sequence[int]], gates: Sequence[Tensor], chosen: Tensor | None
) -> list[Tensor]:
    """`all_hidden`, gated: [T, E * r] for each linear.

    Args:
        shapes: (E, r) each.
        gates: [T, E] each, in the dtype of x, times the linear's scaling; the same tensor where linears share it.
        chosen: of the experts, bool [T, E], or None: all are.
    """
    if all(shape == shapes[0] for shape in shapes) and all(g is gates[0] for g in gates):
        together = hidden.view(hidden.shape[0], len(shapes), *shapes[0])
        if chosen is not None:
            together = together.where(chosen[:, None, :, None], 0.0)
        return list((together * gates[0][:, None, :, None]).flatten(2).unbind(1))
    parts = hidden.split([num_experts * rank for num_experts, rank in shapes], dim=1)
    return [gated(h, g, chosen, shape[1]) for h, shape, g in zip(parts, shapes, gates, strict=True)]


def wide(lora_b: Tensor) -> Tensor:
    """[E, out, r] -> [out, E * r]: B of all experts as one matrix (a copy: the experts' hidden is its inner dimension)."""
    return lora_b.transpose(0, 1).flatten(1)


def dense_linear(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, wide_b: Tensor, transposed: bool
) -> Tensor:
    """The linear's own product of x [T, in], plus what the experts make of `hidden` [T, E * r]: [T, out]."""
    up, matrix = wide_b.T, weight if transposed else weight.T
    if torch.compiler.is_compiling():  # which joins the sum with what comes next
        return F.linear(x, matrix.T, bias) + hidden @ up
    # The larger product adds to the smaller one's result while it computes: one pass over the outputs less.
    result = hidden @ up if bias is None else torch.addmm(bias, hidden, up)
    return result.addmm_(x, matrix)
