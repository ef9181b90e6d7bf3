"""What the experts of a group of linears compute where products go by (token, expert) pairs: the steps of `group_function.py`
which it takes in place of products with all experts. The hidden has a row for each pair, [P, sum of r], and no gates in it: the
products that read it apply them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .gate_hidden import Columns, runs
from .group_layout import Casts, Spec
from .pair_order import PairOrder
from .pair_products import from_rank, to_rank, to_rank_backward, weight_gradient


def hidden_of(rows: Tensor, casts: Casts, a: Sequence[Tensor], spec: Spec, order: PairOrder) -> Tensor:
    """[P, sum of r], from rows [T, in]."""
    hidden = rows.new_empty(rows.shape[0] * spec.slots, sum(spec.hidden_widths))
    for w, part in _with_columns(casts.pair_a(a), hidden):
        to_rank(side_by_side(rows), w, order, part)
    return hidden


def add_up(
    results: Sequence[Tensor], hidden: Tensor, gates: Tensor, casts: Casts, spec: Spec, order: PairOrder
) -> None:
    """Adds to the results [T, out] of all linears what their experts make of the hidden."""
    _up(results, hidden, gates, casts, spec, order, (None,) * spec.size, True)


def write_up(
    results: Sequence[Tensor], hidden: Tensor, gates: Tensor, casts: Casts, spec: Spec, order: PairOrder,
    biases: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Writes it there, with the base layers' biases."""
    _up(results, hidden, gates, casts, spec, order, biases, False)


def _up(
    results: Sequence[Tensor], hidden: Tensor, gates: Tensor, casts: Casts, spec: Spec, order: PairOrder,
    biases: Sequence[Tensor | None], add: bool,
) -> None:  # fmt: skip
    weights = casts.pair_b()
    for one, _, some, columns in _alike(spec, [bias is None or bias.dtype for bias in biases]):
        from_rank(hidden[:, columns], weights[some], order, results[some], biases[some], add, gates, one.scaling)


def hidden_backward(
    d_rows: Sequence[Tensor | None], hidden: Tensor, gates: Tensor, casts: Casts, spec: Spec, order: PairOrder
) -> tuple[Tensor, Tensor]:
    """(d_hidden [P, sum of r], d_gates [T, E]) from the gradients [T, out] of the outputs."""
    first = next(d for d in d_rows if d is not None)
    d_hidden = torch.empty_like(hidden)
    d_pairs = gates.new_empty(spec.size, order.pairs, dtype=torch.promote_types(gates.dtype, hidden.dtype))
    weights = casts.pair_b()
    for one, there, some, columns in _alike(spec, [d is not None for d in d_rows]):
        d_part, part = d_hidden[:, columns], hidden[:, columns]
        if there:
            ds = [side_by_side(d) for d in d_rows[some] if d is not None]
            to_rank_backward(ds, weights[some], order, part, gates, one.scaling, d_part, d_pairs[some])
        else:
            d_part.zero_()
            d_pairs[some].zero_()
    d_gates = d_pairs.new_zeros(first.shape[0], order.experts + 1)
    d_gates.view(-1).scatter_(0, order.gate_places, d_pairs.sum(dim=0) if spec.size > 1 else d_pairs[0])
    return d_hidden, d_gates[:, : order.experts]  # without the null index


def d_input(d_hidden: Tensor, casts: Casts, a: Sequence[Tensor], spec: Spec, order: PairOrder, tokens: int) -> Tensor:
    """[T, in], of the experts alone."""
    total = d_hidden.new_empty(tokens, casts.layout.features)
    add = False
    for w, part in _with_columns(casts.pair_a(a), d_hidden):
        from_rank(part, [w], order, [total], [None], add)
        add = True
    return total


def d_b(
    d_rows: Sequence[Tensor | None], hidden: Tensor, gates: Tensor, b: Sequence[Tensor], wanted: Sequence[bool], spec: Spec,
    order: PairOrder,
) -> list[Tensor | None]:  # fmt: skip
    """[E, out, r] of each linear that wants one and has a gradient, in the dtype of its B."""
    found: list[Tensor | None] = [None] * spec.size
    asked = [d is not None and want and each.dtype for d, want, each in zip(d_rows, wanted, b, strict=True)]
    for one, ask, some, columns in _alike(spec, asked):
        if ask:
            ds = [side_by_side(d) for d in d_rows[some] if d is not None]
            made = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in b[some]]
            turned = [each.transpose(1, 2).unsqueeze(0) for each in made]
            weight_gradient(ds, hidden[:, columns], order, turned, gates, one.scaling)
            found[some] = made
    return found


def d_a(d_hidden: Tensor, rows: Tensor, a: Sequence[Tensor], spec: Spec, order: PairOrder) -> list[Tensor]:
    """[E, r, in] of each linear."""
    gradients: list[Tensor] = []
    alike = [a[0].new_empty(count, first.experts, first.rank, rows.shape[1]) for first, count in runs(spec.columns)]
    for w, part in _with_columns(alike, d_hidden):
        weight_gradient([side_by_side(rows)], part, order, [w])
        gradients += w.unbind(0)
    return gradients


def side_by_side(each: Tensor) -> Tensor:
    """With the columns of a row one after the other, as kernels read them."""
    return each if each.stride(-1) == 1 else each.contiguous()


def _alike(spec: Spec, keys: Sequence[Any]) -> Iterator[tuple[Columns, Any, slice, slice]]:
    """Linears alike that stand side by side and have the same key: one of them, the key, which they are, their columns of the
    hidden. (A launch takes operands of one dtype, so what may differ in it is part of the key.)"""
    start, column = 0, 0
    for one, count in runs(spec.columns):
        for key, same in itertools.groupby(keys[start : start + count]):
            end = start + len(list(same))
            until = column + (end - start) * one.rank
            yield one, key, slice(start, end), slice(column, until)
            start, column = end, until


def _with_columns(weights: Sequence[Tensor], hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each [linears, E, r, features] with its columns of the hidden."""
    start = 0
    for w in weights:
        end = start + w.shape[0] * w.shape[2]
        yield w, hidden[:, start:end]
        start = end
