"""What the experts of a group of linears compute where products go by (token, expert) pairs: the steps of `group_function.py`
which it takes in place of products with all experts. The hidden has a row for each pair, [P, sum of r], and no gates in it: the
products that read it apply them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gate_hidden import runs
from .group_layout import Packed, Spec
from .pair_order import PairOrder
from .pair_products import from_rank, to_rank, to_rank_backward, weight_gradient


def write_hidden(rows: Tensor, packed: Packed, a: Sequence[Tensor], spec: Spec, order: PairOrder) -> Tensor:
    """[P, sum of r], from rows [T, in]."""
    hidden = packed.hidden()
    for w, part in _with_columns(packed.pair_a(a, spec), hidden):
        to_rank(side_by_side(rows), w, order, part)
    return hidden


def add_to(result: Tensor, hidden: Tensor, gates: Tensor, packed: Packed, spec: Spec, order: PairOrder, i: int) -> None:
    """Adds to result [T, out] what the experts of linear i make of the hidden."""
    from_rank(*_up(hidden, packed, spec, i), order, result, None, True, gates, spec.columns[i].scaling)


def write_up(
    result: Tensor, hidden: Tensor, gates: Tensor, packed: Packed, spec: Spec, order: PairOrder, i: int, bias: Tensor | None
) -> None:  # fmt: skip
    """Writes it there, with the base layer's bias."""
    from_rank(*_up(hidden, packed, spec, i), order, result, bias, False, gates, spec.columns[i].scaling)


def hidden_backward(
    d_rows: Sequence[Tensor | None], hidden: Tensor, gates: Tensor, packed: Packed, spec: Spec, order: PairOrder
) -> tuple[Tensor, Tensor]:
    """(d_hidden [P, sum of r], d_gates [T, E]) from the gradients [T, out] of the outputs."""
    first = next(d for d in d_rows if d is not None)
    d_hidden = torch.empty_like(hidden)
    d_pairs = gates.new_empty(spec.size, order.pairs, dtype=torch.promote_types(gates.dtype, hidden.dtype))
    parts = zip(_parts(d_hidden, spec), _parts(hidden, spec), packed.pair_b(spec), strict=True)
    for i, (d_part, part, w) in enumerate(parts):
        d = d_rows[i]
        if d is None:
            d_part.zero_()
            d_pairs[i].zero_()
        else:
            to_rank_backward(side_by_side(d), w, order, part, gates, spec.columns[i].scaling, d_part, d_pairs[i])
    d_gates = d_pairs.new_zeros(first.shape[0], order.experts + 1)
    d_gates.view(-1).scatter_(0, order.gate_places, d_pairs.sum(dim=0) if spec.size > 1 else d_pairs[0])
    return d_hidden, d_gates[:, : order.experts]  # without the null index


def d_input(d_hidden: Tensor, packed: Packed, a: Sequence[Tensor], spec: Spec, order: PairOrder, tokens: int) -> Tensor:
    """[T, in], of the experts alone."""
    total = d_hidden.new_empty(tokens, packed.layout.features)
    add = False
    for w, part in _with_columns(packed.pair_a(a, spec), d_hidden):
        from_rank(part, w, order, total, None, add)
        add = True
    return total


def d_b(d_rows: Tensor, hidden: Tensor, gates: Tensor, b: Tensor, spec: Spec, order: PairOrder, i: int) -> Tensor:
    """[E, out, r] of linear i, in the dtype of its B."""
    gradient = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    w = gradient.transpose(1, 2).unsqueeze(0)
    weight_gradient(side_by_side(d_rows), _parts(hidden, spec)[i], order, w, gates, spec.columns[i].scaling)
    return gradient


def d_a(d_hidden: Tensor, rows: Tensor, a: Sequence[Tensor], spec: Spec, order: PairOrder) -> list[Tensor]:
    """[E, r, in] of each linear."""
    gradients: list[Tensor] = []
    alike = [a[0].new_empty(count, first.experts, first.rank, rows.shape[1]) for first, count in runs(spec.columns)]
    for w, part in _with_columns(alike, d_hidden):
        weight_gradient(side_by_side(rows), part, order, w)
        gradients += w.unbind(0)
    return gradients


def side_by_side(each: Tensor) -> Tensor:
    """With the columns of a row one after the other, as kernels read them."""
    return each if each.stride(-1) == 1 else each.contiguous()


def _parts(hidden: Tensor, spec: Spec) -> Sequence[Tensor]:
    return hidden.split_with_sizes(spec.hidden_widths, -1)


def _up(hidden: Tensor, packed: Packed, spec: Spec, i: int) -> tuple[Tensor, Tensor]:
    return _parts(hidden, spec)[i], packed.pair_b(spec)[i]


def _with_columns(weights: Sequence[Tensor], hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each [linears, E, r, features] with its columns of the hidden."""
    start = 0
    for w in weights:
        end = start + w.shape[0] * w.shape[2]
        yield w, hidden[:, start:end]
        start = end
