"""`pair_products.py` as Triton kernels: three, of which each takes the strides of weights of any layout.

One launch computes linears alike of a group (q, k and v; gate and up), whose rows lie apart: each program takes the addresses of
its own. Rows are read where they lie, by the token of each pair, so nothing is gathered in memory. Grids depend on numbers of
tokens and experts alone. No atomics: every number is written by one program, and what is added up over a token's experts is added
by one launch after the other, so the bits are the same in every run. Products and sums are float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .pair_order import TILE, PairOrder, order_of
from .triton_launch import Launcher, Rest

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of PyTorch
    triton = None

logger = logging.getLogger(__name__)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_RANK = 128  # one program sums up a gate's gradient
COLUMNS = 128  # of small matrices, in one program that makes them
FEATURES = 64  # of wide matrices: read at a time
WRITTEN = 128  # and written by one program
LINEARS = 3  # of a group, in one launch: q, k and v. Kernels take operands for so many, None where there are fewer
TENSORS = {"to_rank": 12, "from_rank": 13, "weight_gradient": 10}  # of each kernel's arguments
UNUSED: list[tuple[None, ...]] = [(None,) * (LINEARS - n) for n in range(LINEARS + 1)]  # of n
_compiles: dict[torch.device, bool] = {}


def usable(device: torch.device, dtype: torch.dtype, largest_rank: int) -> bool:
    """Whether the kernels take products of this dtype on this device (a GPU)."""
    if triton is None or dtype not in FLOATS or largest_rank > LARGEST_RANK:
        return False
    if device not in _compiles:
        _compiles[device] = _compile(device)
    return _compiles[device]


def _compile(device: torch.device) -> bool:
    """Whether Triton can compile for this device: it wants a C compiler on the machine."""
    one = torch.ones(1, 16, device=device)
    try:
        order = order_of(torch.zeros(1, 1, dtype=torch.int64, device=device), 1)
        to_rank(one, one.view(1, 1, 1, 16), order, torch.empty(1, 1, device=device))
        return True
    except torch.OutOfMemoryError:  # says nothing of Triton: the next call looks again
        raise
    except Exception as error:
        logger.warning(f"LoRA-Switch: all experts are multiplied at once, because Triton fails: {error}")
        return False


if triton is not None:

    @triton.jit(do_not_specialize=["d_gates_row"])  # type: ignore[untyped-decorator]
    def _to_rank_kernel(  # type: ignore[no-untyped-def]
        small, tokens, tiles, features, w, gates, hidden, d_gates, features1, w1, features2, w2,
        d_gates_row, width, width1, width2, features_row, features_row1, features_row2,
        experts, small_row, hidden_row, w_linear, w_expert, w_rank, w_feature, gate_row, scaling,
        RANK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr,
        BACKWARD: tl.constexpr, LINEARS: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        if LINEARS > 1:  # which of them: each has one block of columns
            other = tl.program_id(1) == 1
            features, w = tl.where(other, features1, features), tl.where(other, w1, w)
            width, features_row = tl.where(other, width1, width), tl.where(other, features_row1, features_row)
        if LINEARS > 2:
            other = tl.program_id(1) == 2
            features, w = tl.where(other, features2, features), tl.where(other, w2, w)
            width, features_row = tl.where(other, width2, width), tl.where(other, features_row2, features_row)
        if LINEARS > 1:
            column = tl.arange(0, BLOCK)
            small += tl.program_id(1) * COLUMNS
            if BACKWARD:
                hidden += tl.program_id(1) * COLUMNS
                d_gates += tl.program_id(1).to(tl.int64) * d_gates_row
        tile = tiles + tl.program_id(0) * 3
        expert = tl.load(tile)
        if (expert < 0) | (expert >= experts):
            return
        row = tl.load(tile + 1) + tl.arange(0, TILE)
        there = row < tl.load(tile + 2)
        token = tl.load(tokens + row, mask=there, other=0).to(tl.int64)
        is_column = column < COLUMNS
        weight = w + expert.to(tl.int64) * w_expert + (column // RANK).to(tl.int64) * w_linear + column % RANK * w_rank
        source = features + token * features_row
        total = tl.zeros([TILE, BLOCK], dtype=tl.float32)
        for start in range(0, width, FEATURES):
            feature = start + tl.arange(0, FEATURES)
            is_feature = feature < width
            left = tl.load(source[:, None] + feature[None, :], mask=there[:, None] & is_feature[None, :], other=0.0)
            at = weight[None, :] + feature[:, None] * w_feature
            right = tl.load(at, mask=is_column[None, :] & is_feature[:, None], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        inside = there[:, None] & is_column[None, :]
        place = row.to(tl.int64)
        if BACKWARD:
            gate = tl.load(gates + token * gate_row + expert, mask=there, other=0.0).to(tl.float32)
            h = tl.load(hidden + place[:, None] * hidden_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(d_gates + token * experts + expert, tl.sum(total * h, axis=1) * scaling, mask=there)
            total = total * (gate * scaling)[:, None]
        tl.store(small + place[:, None] * small_row + column[None, :], total.to(small.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["first_tile"])  # type: ignore[untyped-decorator]
    def _from_rank_kernel(  # type: ignore[no-untyped-def]
        small, tokens, tiles, w, out, gates, w1, out1, w2, out2, bias, bias1, bias2,
        first_tile, width, width1, width2, out_row, out_row1, out_row2,
        experts, small_row, w_linear, w_expert, w_rank, w_feature, gate_row, scaling,
        RANK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr,
        ADD: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, LINEARS: tl.constexpr,
    ):  # fmt: skip
        blocks = tl.cdiv(width, FEATURES)
        second = blocks
        if LINEARS > 1:
            blocks += tl.cdiv(width1, FEATURES)
        third = blocks
        if LINEARS > 2:
            blocks += tl.cdiv(width2, FEATURES)
        block, before = tl.program_id(0) % blocks, 0
        if LINEARS > 1:  # which of them
            other = block >= second
            w, out = tl.where(other, w1, w), tl.where(other, out1, out)
            if BIAS:
                bias = tl.where(other, bias1, bias)
            width, out_row = tl.where(other, width1, width), tl.where(other, out_row1, out_row)
            before = tl.where(other, second, before)
            small += tl.where(other, COLUMNS, 0)
        if LINEARS > 2:
            other = block >= third
            w, out = tl.where(other, w2, w), tl.where(other, out2, out)
            if BIAS:
                bias = tl.where(other, bias2, bias)
            width, out_row = tl.where(other, width2, width), tl.where(other, out_row2, out_row)
            before = tl.where(other, third, before)
            small += tl.where(other, COLUMNS, 0)
        tile = tiles + (first_tile + tl.program_id(0) // blocks) * 3
        expert = tl.load(tile)
        if expert < 0:
            return
        if ADD:
            if expert >= experts:  # else these rows begin as all do: from the bias, or from 0
                return
        row, end = tl.load(tile + 1) + tl.arange(0, TILE), tl.load(tile + 2)
        there = row < end
        columns = tl.where(expert < experts, COLUMNS, 0)  # the null index has none
        token = tl.load(tokens + row, mask=there, other=0).to(tl.int64)
        feature = (block - before) * FEATURES + tl.arange(0, FEATURES)
        is_feature = feature < width
        weight = w + expert.to(tl.int64) * w_expert
        source = small + row.to(tl.int64) * small_row
        factor = tl.full([TILE], 1.0, dtype=tl.float32)
        if GATED:
            factor = tl.load(
                gates + token * gate_row + expert, mask=row < tl.where(expert < experts, end, 0), other=0.0
            )
            factor = factor.to(tl.float32) * scaling
        total = tl.zeros([TILE, FEATURES], dtype=tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            is_column = column < columns
            left = tl.load(source[:, None] + column[None, :], mask=there[:, None] & is_column[None, :], other=0.0)
            at = weight + (column // RANK).to(tl.int64) * w_linear + column % RANK * w_rank
            right = tl.load(
                at[:, None] + feature[None, :] * w_feature, mask=is_column[:, None] & is_feature[None, :], other=0.0
            )
            if GATED:
                left = (left.to(tl.float32) * factor[:, None]).to(left.dtype)
            total = tl.dot(left, right, total, input_precision="ieee")
        if BIAS:
            total += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
        place = out + token[:, None] * out_row + feature[None, :]
        inside = there[:, None] & is_feature[None, :]
        if ADD:
            total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
        small, tokens, bounds, features, d_w, gates, features1, d_w1, features2, d_w2,
        width, width1, width2, features_row, features_row1, features_row2, w_expert, w_expert1, w_expert2,
        small_row, w_linear, w_rank, w_feature, gate_row, scaling,
        RANK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr,
        GATED: tl.constexpr, LINEARS: tl.constexpr,
    ):  # fmt: skip
        block, before = tl.program_id(1), 0
        if LINEARS > 1:  # which of them
            second = tl.cdiv(width, FEATURES)
            third = second + tl.cdiv(width1, FEATURES)
            other = block >= second
            features, d_w = tl.where(other, features1, features), tl.where(other, d_w1, d_w)
            width, features_row = tl.where(other, width1, width), tl.where(other, features_row1, features_row)
            w_expert, before = tl.where(other, w_expert1, w_expert), tl.where(other, second, before)
            small += tl.where(other, COLUMNS, 0)
            if LINEARS > 2:
                other = block >= third
                features, d_w = tl.where(other, features2, features), tl.where(other, d_w2, d_w)
                width, features_row = tl.where(other, width2, width), tl.where(other, features_row2, features_row)
                w_expert, before = tl.where(other, w_expert2, w_expert), tl.where(other, third, before)
                small += tl.where(other, COLUMNS, 0)
        expert = tl.program_id(0)
        first, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
        feature = (block - before) * FEATURES + tl.arange(0, FEATURES)
        is_feature = feature < width
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        is_column = column < COLUMNS
        total = tl.zeros([FEATURES, BLOCK], dtype=tl.float32)
        for start in range(first, end, TILE):
            row = start + tl.arange(0, TILE)
            there = row < end
            token = tl.load(tokens + row, mask=there, other=0).to(tl.int64)
            left = tl.load(
                features + token[None, :] * features_row + feature[:, None],
                mask=there[None, :] & is_feature[:, None], other=0.0,
            )  # fmt: skip
            right = tl.load(
                small + row.to(tl.int64)[:, None] * small_row + column[None, :],
                mask=there[:, None] & is_column[None, :], other=0.0,
            )  # fmt: skip
            if GATED:
                factor = tl.load(gates + token * gate_row + expert, mask=there, other=0.0).to(tl.float32) * scaling
                right = (right.to(tl.float32) * factor[:, None]).to(right.dtype)
            total = tl.dot(left, right, total, input_precision="ieee")
        at = expert.to(tl.int64) * w_expert + (column // RANK).to(tl.int64) * w_linear + column % RANK * w_rank
        at = d_w + at[None, :] + feature.to(tl.int64)[:, None] * w_feature
        tl.store(at, total.to(d_w.dtype.element_ty), mask=is_feature[:, None] & is_column[None, :])

    _launch_to_rank = Launcher(_to_rank_kernel, TENSORS["to_rank"])
    _launch_from_rank = Launcher(_from_rank_kernel, TENSORS["from_rank"])
    _launch_weight_gradient = Launcher(_weight_gradient_kernel, TENSORS["weight_gradient"])


def to_rank(features: Tensor, w: Tensor, order: PairOrder, small: Tensor) -> None:
    """As `pair_products.to_rank`."""
    _to_rank([features], [w], order, small, (), (0, 0, 0), 1.0)


def to_rank_backward(
    d_outs: Sequence[Tensor], ws: Sequence[Tensor], order: PairOrder, hidden: Tensor, gates: Tensor, scaling: float,
    d_hidden: Tensor, d_gates: Tensor,
) -> None:  # fmt: skip
    """As `pair_products.to_rank_backward`, of up to `LINEARS`."""
    rows = (hidden.stride(0), gates.stride(0), d_gates.stride(0))
    _to_rank(d_outs, ws, order, d_hidden, (gates, hidden, d_gates), rows, scaling)


def _to_rank(
    features: Sequence[Tensor], ws: Sequence[Tensor], order: PairOrder, small: Tensor,
    of_gates: tuple[Tensor, ...], rows_of_gates: tuple[int, int, int], scaling: float,
) -> None:  # fmt: skip
    """`of_gates`: in backward (gates, hidden, d_gates)."""
    w, n = ws[0], len(ws)
    linears, experts, rank, _ = shape = w.shape
    strides, columns = w.stride(), linears * rank
    block, unused = _power(columns, COLUMNS), UNUSED[n]
    widths, rows = [each.size(1) for each in features], [each.stride(0) for each in features]
    hidden_row, gate_row, d_gates_row = rows_of_gates
    small_row = small.stride(0)

    def rest() -> Rest:
        numbers = [
            *widths, *unused, *rows, *unused, experts, small_row, hidden_row, *strides, gate_row, float(scaling)
        ]  # fmt: skip
        constants = {
            "RANK": rank, "COLUMNS": columns, "BLOCK": block, "TILE": TILE, "FEATURES": FEATURES, "BACKWARD": bool(of_gates),
            "LINEARS": n,
        }  # fmt: skip
        return Rest(numbers, constants, {"num_warps": 4, "num_stages": _stages(w)})

    _launch_to_rank(
        (order.most_tiles, n if n > 1 else -(-columns // block), 1),
        [small, order.tokens, order.tiles, features[0], w, *of_gates, *_others(features, ws)],
        [((d_gates_row,), (*widths, *rows, shape, strides, small_row, hidden_row, gate_row, scaling), rest)],
    )


def from_rank(
    small: Tensor, ws: Sequence[Tensor], order: PairOrder, outs: Sequence[Tensor], biases: Sequence[Tensor | None], add: bool,
    gates: Tensor | None = None, scaling: float = 1.0,
) -> None:  # fmt: skip
    """As `pair_products.from_rank`, of up to `LINEARS`."""
    w, gated, biased, n = ws[0], gates is not None, biases[0] is not None, len(outs)
    linears, experts, rank, _ = shape = w.shape
    strides, columns, unused = w.stride(), linears * rank, UNUSED[n]
    block = _power(columns, FEATURES)
    widths, rows = [out.size(1) for out in outs], [out.stride(0) for out in outs]
    small_row, gate_row = small.stride(0), 0 if gates is None else gates.stride(0)

    def rest(adds: bool, begins: bool) -> Rest:
        numbers = [*widths, *unused, *rows, *unused, experts, small_row, *strides, gate_row, float(scaling)]
        constants = {
            "RANK": rank, "COLUMNS": columns, "BLOCK": block, "TILE": TILE, "FEATURES": WRITTEN, "ADD": adds, "GATED": gated,
            "BIAS": begins, "LINEARS": n,
        }  # fmt: skip
        # With gates the left factor is computed, so it is in registers, and ptxas before 13.3 may have these written to while
        # products of the steps before still read them (on Hopper, triton-lang/triton#9433): then one step at a time.
        return Rest(numbers, constants, {"num_warps": 4, "num_stages": 1 if gated and columns > block else 2})

    tensors = [small, order.tokens, order.slot_tiles, w, outs[0], small if gates is None else gates, *_others(ws, outs)]
    if biased:
        tensors += [w] * (2 * LINEARS - 2 * n)
        tensors += [each for each in biases if each is not None]
    most = order.most_slot_tiles
    key = (*widths, *rows, shape, strides, small_row, gate_row, scaling, gated)
    launches = []
    for slot in range(order.slots):
        flags = (add or slot > 0, biased and slot == 0)
        launches.append(((slot * most,), (key, flags), functools.partial(rest, *flags)))
    _launch_from_rank((most * sum([-(-width // WRITTEN) for width in widths]), 1, 1), tensors, launches)


def weight_gradient(
    features: Sequence[Tensor], small: Tensor, order: PairOrder, d_ws: Sequence[Tensor], gates: Tensor | None = None,
    scaling: float = 1.0,
) -> None:  # fmt: skip
    """As `pair_products.weight_gradient`, of up to `LINEARS`."""
    w, n, gated, factors = d_ws[0], len(d_ws), gates is not None, small if gates is None else gates
    linears, experts, rank, _ = shape = w.shape
    strides, columns = w.stride(), linears * rank
    unused, block = UNUSED[n], _power(columns, FEATURES)
    widths, rows = [each.size(1) for each in features], [each.stride(0) for each in features]
    steps = [each.stride(1) for each in d_ws]
    small_row, gate_row = small.stride(0), 0 if gates is None else gates.stride(0)

    def rest() -> Rest:
        linear, _, one, feature = strides
        numbers = [
            *widths, *unused, *rows, *unused, *steps, *unused, small_row, linear, one, feature, gate_row, float(scaling)
        ]  # fmt: skip
        constants = {
            "RANK": rank, "COLUMNS": columns, "BLOCK": block, "TILE": TILE, "FEATURES": WRITTEN, "GATED": gated,
            "LINEARS": n,
        }  # fmt: skip
        return Rest(numbers, constants, {"num_warps": 4, "num_stages": _stages(features[0])})

    _launch_weight_gradient(
        (experts, sum([-(-width // WRITTEN) for width in widths]), -(-columns // block)),
        [small, order.tokens, order.bounds, features[0], w, factors, *_others(features, d_ws)],
        [((), (*widths, *rows, *steps, shape, strides, small_row, gate_row, scaling, gated), rest)],
    )


def _others(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Two of each linear but the first."""
    return [] if len(some) == 1 else [each for i in range(1, len(some)) for each in (some[i], others[i])]


@functools.cache
def _power(columns: int, most: int) -> int:
    """The power of two that holds the columns, at least what a product of tiles takes."""
    return min(most, max(16, 1 << (columns - 1).bit_length()))


def _stages(features: Tensor) -> int:
    """Of tiles in flight: what shared memory holds."""
    return 4 if features.element_size() == 2 else 2
