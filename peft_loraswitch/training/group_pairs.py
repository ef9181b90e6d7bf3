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

from .gate_hidden import promoted, runs
from .group_layout import Casts, Part, Spec
from .pair_order import PairOrder
from .pair_products import LINEARS, from_rank, to_rank, to_rank_backward, weight_gradient


def hidden_of(rows: Tensor, casts: Casts, a: Sequence[Tensor], order: PairOrder) -> Tensor:
    """[P, sum of r], from rows [T, in]."""
    rows = side_by_side(rows)
    hidden = rows.new_empty(order.pairs, casts.layout.hidden_width)
    for w, part in _with_columns(casts.pair_a(a), hidden):
        to_rank(rows, w, order, part)
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
    for _, one, some, columns in _alike(spec, tuple([None if bias is None else bias.dtype for bias in biases])):
        small = hidden if columns is None else hidden[:, columns]
        from_rank(small, weights[some], order, results[some], biases[some], add, gates, one.scaling)


def hidden_backward(
    d_rows: Sequence[Tensor | None], hidden: Tensor, gates: Tensor, casts: Casts, spec: Spec, order: PairOrder
) -> tuple[Tensor, Tensor]:
    """(d_hidden [P, sum of r], d_gates [T, E]) from the gradients [T, out] of the outputs, side by side."""
    d_hidden = torch.empty_like(hidden)
    dtype = promoted(gates.dtype, hidden.dtype)
    d_gates = gates.new_zeros((spec.size, *gates.shape) if spec.size > 1 else gates.shape, dtype=dtype)
    weights = casts.pair_b()
    for there, one, some, columns in _alike(spec, tuple([d is not None for d in d_rows])):
        d_small, small, d_part = d_hidden, hidden, d_gates
        if columns is not None:
            d_small, small, d_part = d_hidden[:, columns], hidden[:, columns], d_gates[some]
        if there:
            ds = [d for d in d_rows[some] if d is not None]
            to_rank_backward(ds, weights[some], order, small, gates, one.scaling, d_small, d_part)
        else:
            d_small.zero_()
    return d_hidden, d_gates.sum(dim=0) if spec.size > 1 else d_gates


def d_input(d_hidden: Tensor, casts: Casts, a: Sequence[Tensor], order: PairOrder, tokens: int) -> Tensor:
    """[T, in], of the experts alone."""
    total = d_hidden.new_empty(tokens, casts.layout.features)
    add = False
    for w, part in _with_columns(casts.pair_a(a), d_hidden):
        from_rank(part, [w], order, [total], [None], add)
        add = True
    return total


def d_b(
    d_rows: Sequence[Tensor | None], hidden: Tensor, gates: Tensor, b: Sequence[Tensor], wanted: Sequence[bool], casts: Casts,
    spec: Spec, order: PairOrder,
) -> list[Tensor | None]:  # fmt: skip
    """[E, out, r] of each linear that wants one and has a gradient, in the dtype of its B."""
    found: list[Tensor | None] = [None] * spec.size
    asked = tuple([
        each.dtype if d is not None and want else None for d, want, each in zip(d_rows, wanted, b, strict=True)
    ])  # fmt: skip
    for ask, one, some, columns in _alike(spec, asked):
        if ask is not None:
            ds = [d for d in d_rows[some] if d is not None]
            made = [each.new_empty(each.shape) for each in b[some]]
            turned = [
                each.as_strided(*place) for each, place in zip(made, casts.layout.pair_d_b[some], strict=True)
            ]  # fmt: skip
            small = hidden if columns is None else hidden[:, columns]
            weight_gradient(ds, small, order, turned, gates, one.scaling)
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


def _alike(spec: Spec, keys: tuple[Any, ...]) -> list[Part]:
    """Linears alike that stand side by side and have the same key, as many as a launch takes. (Its operands have one dtype, so
    what may differ in it is part of the key.)"""
    found = spec.parts.get(keys)
    if found is None:
        found = spec.parts[keys] = list(_parts(spec, keys))
    return found


def _parts(spec: Spec, keys: tuple[Any, ...]) -> Iterator[Part]:
    start, column = 0, 0
    for one, count in runs(spec.columns):
        for key, same in itertools.groupby(keys[start : start + count]):
            left = len(list(same))
            while left:
                some = min(left, LINEARS)
                end, until = start + some, column + some * one.rank
                columns = None if some == spec.size else slice(column, until)
                yield Part(key, one, slice(start, end), columns)
                start, column, left = end, until, left - some


def _with_columns(weights: Sequence[Tensor], hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each [linears, E, r, features] with its columns of the hidden."""
    if len(weights) == 1:
        yield weights[0], hidden
        return
    start = 0
    for w in weights:
        end = start + w.shape[0] * w.shape[2]
        yield w, hidden[:, start:end]
        start = end
