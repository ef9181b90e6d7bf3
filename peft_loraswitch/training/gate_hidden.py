"""What the gates do to the hidden of a group of linears, forward and backward: the one elementwise step of the fused path.

    gated[t, i, e, :]  = s_i * g[t, e] * hidden[t, i, e, :]                     0 where token t did not choose e
    d_hidden           = s_i * g[t, e] * d_gated[t, i, e, :]                    0 there as well
    d_g[t, e]          = sum over i and r of s_i * d_gated * hidden             0 there as well

for token t, linear i of the group and expert e. In columns, the linears stand side by side, in each its experts, in each of
those its r. Zero by `chosen` and not by the gate: 0 * Inf is NaN.

On a GPU with Triton it is one launch each way (`gate_kernels.py`), which computes in float32; elsewhere these PyTorch
operations, which multiply in the dtype of the hidden and sum in float32 (float64 if that is the hidden's).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import gate_kernels


class Columns(NamedTuple):
    """The columns of one linear in the hidden of its group."""

    start: int
    experts: int
    rank: int
    scaling: float

    @property
    def stop(self) -> int:
        return self.start + self.experts * self.rank


@functools.lru_cache(maxsize=4096)
def runs(columns: tuple[Columns, ...]) -> list[tuple[Columns, int]]:
    """Linears alike that stand side by side: the first of them, and how many."""
    found: list[tuple[Columns, int]] = []
    for one in columns:
        if found and one[1:] == found[-1][0][1:]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((one, 1))
    return found


def gate(hidden: Tensor, gates: Tensor, chosen: Tensor | None, columns: tuple[Columns, ...]) -> Tensor:
    """hidden [T, N] -> gated [T, N], of its dtype.

    Args:
        gates: float32 [T, E]; chosen: bool [T, E], or None: all are.
        columns: of each linear; together they are the N.
    """
    if gate_kernels.usable(hidden):
        return gate_kernels.gate(hidden, gates, chosen, runs(columns))
    return _gate((hidden,), gates, None if chosen is None else ~chosen, columns)[0]


def gate_backward(
    d_gated: Tensor,
    hidden: Tensor,
    gates: Tensor,
    chosen: Tensor | None,
    columns: tuple[Columns, ...],
    want_gates: bool,
    want_gated: bool,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d_hidden [T, N], d_gates float32 [T, E] if wanted, and `gate()` again if wanted), from d_gated [T, N], which may be
    written over.

    Args:
        total: float32 [T, E], the gradient of the gates so far: added to, and returned as d_gates.
    """
    if gate_kernels.usable(hidden):
        return gate_kernels.gate_backward(d_gated, hidden, gates, chosen, runs(columns), want_gates, want_gated, total)
    absent = None if chosen is None else ~chosen
    d_hidden, *again = _gate((d_gated, hidden) if want_gated else (d_gated,), gates, absent, columns)
    gated = again[0] if again else None
    if not want_gates:
        return d_hidden, None, gated
    d_gates = None
    for (h, first, count), (d, _, _) in zip(_each_run(hidden, columns), _each_run(d_gated, columns), strict=True):
        products = d.to(promoted(d.dtype, gates.dtype)) * h
        part = products.view(h.shape[0], count, first.experts, first.rank).sum(dim=(1, 3)).mul_(first.scaling)
        d_gates = part if d_gates is None else d_gates.add_(part)
    assert d_gates is not None
    if absent is not None:
        d_gates.masked_fill_(absent, 0.0)
    return d_hidden, d_gates if total is None else total.add_(d_gates), gated


promoted = functools.cache(torch.promote_types)


def _each_run(each: Tensor, columns: tuple[Columns, ...]) -> list[tuple[Tensor, Columns, int]]:
    found = runs(columns)
    if len(found) == 1:
        return [(each, *found[0])]
    return [
        (each[:, first.start : first.start + count * (first.stop - first.start)], first, count)
        for first, count in found
    ]


def _gate(
    values: tuple[Tensor, ...], gates: Tensor, absent: Tensor | None, columns: tuple[Columns, ...]
) -> list[Tensor]:
    """`gate()` of each [T, N], all of one dtype; absent: bool [T, E], the experts that are not chosen."""
    tokens, experts = gates.shape
    factors: dict[float, Tensor] = {}  # by scaling, which all linears share mostly
    for _, _, _, scaling in columns:
        if scaling not in factors:
            factors[scaling] = (gates * scaling).to(values[0].dtype).view(tokens, 1, experts, 1)
    if absent is not None:
        absent = absent.view(tokens, 1, experts, 1)
    gated = []
    for value in values:
        parts = []
        for h, first, count in _each_run(value, columns):
            part = h.reshape(tokens, count, experts, first.rank) * factors[first.scaling]
            if absent is not None:
                part.masked_fill_(absent, 0.0)
            parts.append(part.view(h.shape))
        gated.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return gated
