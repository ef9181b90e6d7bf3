"""Products over (token, expert) pairs: the work of a token's own experts, where the product with all of them does that of all.

    to_rank           small[p, l, :]  = W[l, e_p] features[t_p]                    A in the forward
    to_rank_backward  d[p, :]         = W[e_p] d_out[t_p];  d_hidden = s g d;  d_gate[p] = s d . hidden[p]
    from_rank         out[t, :]       = sum over t's pairs of small[p] W[:, e_p]   B in the forward, and dX
    weight_gradient   d_W[l, e]       = sum over e's pairs of small[p, l] features[t_p]^T    dA, dB

for pair p of token t_p and expert e_p in a `PairOrder`, and linear l of those that share the rows. W is [linears, experts, r,
features], of any strides but for the kernels' unit ones between features of rows. Sums over a token's experts are rounded to the
dtype of the result after each. But for the first, each is of up to `LINEARS` linears that have the same experts, ranks and
scaling but rows of their own: their W have the same strides but for those that follow from the number of features.

On a GPU with Triton these are kernels (`pair_kernels.py`). The PyTorch operations below define them; they read the order on the
host, so they are for a CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import pair_kernels
from .pair_order import PairOrder

# From how many columns of all experts together, E * r, pairs take less of the GPU's time, by the number of experts of a token:
# read off the times of kernels and the fastest steps on an H200 (docs/training_log.md,
# recipes/results/train_crossover_h200.json, whose medians hold waits for the host), for three experts between two and four. With
# fewer experts there is too little that pairs leave out.
CROSSOVER = {1: 512, 2: 512, 3: 1152, 4: 1536}
LEAST_EXPERTS = 12  # for each that a token has
MOST_RANK = 32  # of one expert: for 8 x 64, a step took 1.58 of the floor's by pairs, and 1.30 without
LINEARS = pair_kernels.LINEARS
LEAST_PAIRS = 32  # an expert, on average: with fewer, tiles are mostly empty
_forced: bool | None = None
_by_kernels: Callable[[Tensor], bool] = operator.attrgetter("is_cuda")


@contextmanager
def forced(pairs: bool) -> Iterator[None]:
    """Within it, pairs are computed wherever they can be, or nowhere: to measure and to compare."""
    global _forced
    before, _forced = _forced, pairs
    try:
        yield
    finally:
        _forced = before


def pays(device: torch.device, dtype: torch.dtype, tokens: int, slots: int, experts: int, ranks: Sequence[int]) -> bool:
    """Whether linears of these ranks take less time by pairs.

    Args:
        dtype: of the products.
        slots: experts of a token.
    """
    if _forced is not None:
        return _forced and (device.type != "cuda" or pair_kernels.usable(device, dtype, max(ranks)))
    least = CROSSOVER.get(slots)
    if least is None or device.type != "cuda" or experts * sum(ranks) < least * len(ranks) or max(ranks) > MOST_RANK:
        return False
    if experts < LEAST_EXPERTS * slots:
        return False
    return tokens * slots >= LEAST_PAIRS * experts and pair_kernels.usable(device, dtype, max(ranks))


def to_rank(features: Tensor, w: Tensor, order: PairOrder, small: Tensor) -> None:
    """Writes small [P, linears * r] from features [T, F] and w [linears, E, r, F]."""
    if _by_kernels(features):
        return pair_kernels.to_rank(features, w, order, small)
    for expert, rows, tokens in _segments(order):
        small[rows] = features[tokens] @ w[:, expert].flatten(0, 1).t()


def to_rank_backward(
    d_outs: Sequence[Tensor], ws: Sequence[Tensor], order: PairOrder, hidden: Tensor, gates: Tensor, scaling: float,
    d_hidden: Tensor, d_gates: Tensor,
) -> None:  # fmt: skip
    """Writes d_hidden [P, n * r], and where there is a pair d_gates [n, T, E] (of one linear also [T, E]), of n linears.

    Args:
        d_outs: [T, F] each; ws: [1, E, r, F] each; hidden: [P, n * r], of `to_rank`; gates: [T, E].
    """
    if _by_kernels(d_outs[0]):
        return pair_kernels.to_rank_backward(d_outs, ws, order, hidden, gates, scaling, d_hidden, d_gates)
    rank = ws[0].shape[2]
    d_gates = d_gates if d_gates.ndim == 3 else d_gates.unsqueeze(0)
    for i, (d_out, w, d_gate) in enumerate(zip(d_outs, ws, d_gates, strict=True)):
        d, h = (each[:, i * rank : (i + 1) * rank] for each in (d_hidden, hidden))
        for expert, rows, tokens in _segments(order):
            each = d_out[tokens] @ w[0, expert].t()
            d_gate[tokens, expert] = (each.to(d_gate.dtype) * h[rows]).sum(dim=1) * scaling
            d[rows] = each * _factors(gates, tokens, expert, scaling, each)


def from_rank(
    small: Tensor, ws: Sequence[Tensor], order: PairOrder, outs: Sequence[Tensor], biases: Sequence[Tensor | None], add: bool,
    gates: Tensor | None = None, scaling: float = 1.0,
) -> None:  # fmt: skip
    """Writes outs [T, F] each, or adds to them, from small [P, n * linears * r] and ws [linears, E, r, F] each, of n outputs.

    Args:
        biases: [F] each, or None each; only if not `add`.
        gates: [T, E]: each pair counts by `scaling` times that of its token and expert; None: by 1.
    """
    if _by_kernels(outs[0]):
        return pair_kernels.from_rank(small, ws, order, outs, biases, add, gates, scaling)
    columns = ws[0].shape[0] * ws[0].shape[2]
    for i, (w, out, bias) in enumerate(zip(ws, outs, biases, strict=True)):
        if not add:
            out.zero_() if bias is None else out.copy_(bias)
        for expert, rows, tokens in _segments(order):
            part = small[rows, i * columns : (i + 1) * columns]
            if gates is not None:
                part = part * _factors(gates, tokens, expert, scaling, part)
            out.index_add_(0, tokens, (part @ w[:, expert].flatten(0, 1)).to(out.dtype))


def weight_gradient(
    features: Sequence[Tensor], small: Tensor, order: PairOrder, d_ws: Sequence[Tensor], gates: Tensor | None = None,
    scaling: float = 1.0,
) -> None:  # fmt: skip
    """Writes d_ws [linears, E, r, F] each, of any strides, from features [T, F] each and small [P, n * linears * r]; gates as in
    `from_rank`."""
    if _by_kernels(features[0]):
        return pair_kernels.weight_gradient(features, small, order, d_ws, gates, scaling)
    columns = d_ws[0].shape[0] * d_ws[0].shape[2]
    for i, (each, d_w) in enumerate(zip(features, d_ws, strict=True)):
        d_w.zero_()
        for expert, rows, tokens in _segments(order):
            part = small[rows, i * columns : (i + 1) * columns]
            if gates is not None:
                part = part * _factors(gates, tokens, expert, scaling, part)
            d_w[:, expert] = (part.t() @ each[tokens]).view(d_w.shape[0], d_w.shape[2], -1).to(d_w.dtype)


def _segments(order: PairOrder) -> Iterator[tuple[int, slice, Tensor]]:
    """(expert, its rows, their tokens) of the experts that have any."""
    bounds = order.bounds.tolist()
    for expert, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if first < end:
            yield expert, slice(first, end), order.tokens[first:end].long()


def _factors(gates: Tensor, tokens: Tensor, expert: int, scaling: float, like: Tensor) -> Tensor:
    """[pairs, 1]"""
    return (gates[tokens, expert] * scaling).to(like.dtype).unsqueeze(1)
