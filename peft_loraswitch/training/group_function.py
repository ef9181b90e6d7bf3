"""Forward and backward of adapted linears that share their input, as one autograd function: what training runs instead of the
operations in `layer.py`, which say what it computes.

Nine tenths of what an adapter costs a training step on a GPU are not its products but passes over activations: casts to
float32 and back, sums of two results, copies. So there is none here:

- the weights are cast (they are small), the activations are not;
- A of the whole group is one product: the input is read once;
- what the experts add is computed first, and the base layer's product adds to it (`addmm`, beta = 1) as it writes its result;
- the gradient of the input is one tensor to which each product of the group adds, where autograd would sum one a linear;
- gates, scaling and mask are one launch each way (`gate_hidden.py`);
- of many experts each token's own alone are multiplied, where that takes less time (`group_pairs.py`);
- for backward it keeps its input (only if A trains), the hidden, [tokens, E * r], from which the gated hidden is made again, and
  the weights as it has cast them; a checkpointed block keeps hidden and weights for both of its runs (`KeptByBlock`).

Base layers that it cannot compute itself (most quantised ones, with hooks, trained) give it their results, and get their own
gradient. Where a weight can be had in the dtype of the products (`PackedWeight`: bitsandbytes in 4 bits), it is made for each
product that reads it, and kept by none.

A GPU that waits for Python has gained nothing, so the operations are few: weights are cast into one piece of memory by one launch
(`cast_kernels.py`), views of it are made by stride and once, as a product reads them either way round, and the gradient of the
gates is one tensor to which all groups add (`gate_sum.py`). In a checkpointed block two tensors are kept, because a Python hook
is called for each.

**The last group of a checkpointed block.** The second run of a block ends as soon as everything that its backward needs is there
again. For a linear of the backbone that is before its product is computed (its weight is all that it keeps), and the block's last
linear is one of the largest. An autograd function of Python hands over what it keeps when its forward has run. So there a
function that computes nothing keeps it for the other one, and comes first.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from . import group_pairs
from .gate_hidden import gate, gate_backward
from .gate_sum import GateSum
from .group_layout import Casts, KeptByBlock, Spec, Weight
from .pair_order import PairOrder

WRITTEN = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: gates, experts or the base "
    "layers' weights of adapted linears were written to between a forward and its backward."
)


def run(
    spec: Spec,
    x: Tensor,
    gates: Tensor,
    chosen: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    base: Sequence[Weight],
    biases: Sequence[Tensor | None] = (),
    order: PairOrder | None = None,
    kept: tuple[KeptByBlock, Any] | None = None,
    total: GateSum | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [..., out] of each linear, for x [..., in].

    Args:
        gates: float32 [..., E]; chosen: bool [..., E], or None: all are.
        a: [E, r, in] each; b: [E, out, r] each.
        base: the base layers' weights, which ask for no gradient, or their results if `spec.given`.
        biases: of the base layers, unless `spec.given`.
        order: of the tokens' pairs, with `spec.slots`.
        kept: what the checkpointed block keeps, and the key of this group there; None: it is kept with what backward needs.
        total: where the gradient of the gates is added up; None: by autograd.
    """
    x, gates = unwrap_if_dead(x), unwrap_if_dead(gates)
    if gates.ndim != 2:
        gates = gates.flatten(0, -2)
    if chosen is not None and chosen.ndim != 2:
        chosen = chosen.flatten(0, -2)
    experts, trains = (*a, *b), False
    for each in experts:
        if each.requires_grad:
            trains = True
            break
    call, token = _Call(spec, a, b, trains, base, biases, order, kept, total), None
    if not spec.checkpointed and torch.is_grad_enabled():
        call.watches = trains or x.requires_grad or gates.requires_grad
    with _NoAutocast(x.device.type):
        if spec.last and torch.is_grad_enabled():
            anchor = next((each for each in (x, gates, *experts) if each.requires_grad), None)
            if anchor is not None:
                with torch.no_grad():
                    call.begin(x, any(each.requires_grad for each in a))
                token = _apply_keep(anchor, call)
        # What is no argument costs no time: experts that are frozen are none.
        outputs: tuple[Tensor, ...] = _apply_group(
            call, token, x, gates, chosen, *(experts if trains else ()), *(base if spec.given else ())
        )
    return outputs


class _Call:
    """What the steps of a forward hand to each other, arguments as in `run`.

    Attributes:
        trains: some experts ask for a gradient. If not, they are no arguments of the autograd function.
        keeper: the context of `_Keep`, if that has kept what backward needs.
        place: of the hidden in what the block keeps, if backward finds it there.
        hidden: None: it has not begun.
        watches: backward may follow, and looks whether anything has been written to (`_Left.written`).
    """

    def __init__(
        self,
        spec: Spec,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        trains: bool,
        base: Sequence[Weight],
        biases: Sequence[Tensor | None],
        order: PairOrder | None,
        kept: tuple[KeptByBlock, Any] | None,
        total: GateSum | None,
    ) -> None:
        self.a, self.b, self.trains, self.total = tuple(a), tuple(b), trains, total
        self.spec, self.base, self.biases, self.order, self.kept = spec, base, biases, order, kept
        self.keeper: Any = None
        self.place: tuple[Any, int] | None = None
        self.hidden: Tensor | None = None
        self.watches = False

    def begin(self, x: Tensor, keep_x: bool) -> None:
        """Everything up to the hidden, and what is kept for backward."""
        spec, order, kept = self.spec, self.order, self.kept
        self.rows = rows = _rows(x, spec.dtype)
        if kept is None:
            self.casts = Casts(self.a, self.b, spec)
        else:
            self.casts = kept[0].casts(kept[1], self.a, self.b, spec)
        if kept is None or not keep_x:
            self.hidden = _hidden(rows, self.casts, self.a, spec, order)
        else:  # backward asks for the input first: then the block has run again, and has the hidden
            self.place = kept[0].place(kept[1])
            if spec.packed:
                kept[0].keep_packed(self.place, self.base)
            self.hidden = kept[0].hidden.get(self.place)
            if self.hidden is None:
                self.hidden = _hidden(rows, self.casts, self.a, spec, order)
                kept[0].keep_hidden(self.place, self.hidden, rows)
        casts = self.casts.to_keep(self.a, spec) if kept is None else ()
        same = rows.data_ptr() == x.data_ptr()  # neither cast nor copied
        inputs = (rows if not same else None, x if same else None) if keep_x else (None, None)
        self.saved = (*inputs, self.hidden if self.place is None else None, *casts)

    def gated(self, gates: Tensor, chosen: Tensor | None) -> Tensor:
        """The gated hidden; by pairs, which apply the gates themselves, the hidden."""
        assert self.hidden is not None
        if self.order is not None:
            return self.hidden
        if self.kept is None or self.place is None:
            return gate(self.hidden, gates, chosen, self.spec.columns)
        gated = self.kept[0].gated.pop(self.place, None)
        if gated is None:
            gated = gate(self.hidden, gates, chosen, self.spec.columns)
            if not self.spec.last:  # which needs none in the second run
                self.kept[0].keep_gated(self.place, gated)
        return gated


class _Keep(torch.autograd.Function):
    """Keeps what a group needs in backward, and has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.saved)
        call.keeper = ctx
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[None, None]:
        return None, None


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        token: Tensor | None,
        x: Tensor,
        gates: Tensor,
        chosen: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        spec = call.spec
        n = spec.size if call.trains else 0
        ctx.set_materialize_grads(False)
        if call.hidden is None:
            call.begin(x, True in ctx.needs_input_grad[5 : 5 + n])
        gated = call.gated(gates, chosen)
        if spec.given:
            outputs = _added(ctx, tensors[2 * n :], gated, gates, call)
        else:
            outputs = _outputs(gated, gates, call, x.shape)
            if spec.packed and x.dtype != spec.dtype:
                outputs = [y.to(x.dtype) for y in outputs]
        left = ctx.call = _Left(call, x, gates, chosen, () if spec.given else call.base)
        if call.watches:
            left.written = left.versions()
        if call.keeper is None:
            ctx.save_for_backward(*call.saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        left: _Left = ctx.call
        spec, order = left.spec, left.order
        n, present = spec.size if left.trains else 0, [d for d in d_outputs if d is not None]
        if not present:
            return (None,) * len(ctx.needs_input_grad)
        if left.written is not None and left.written != left.versions():
            raise RuntimeError(WRITTEN)
        if torch.is_grad_enabled():
            return _backward_to_differentiate(ctx, d_outputs)
        rows, x, hidden, *kept = (left.keeper or ctx).saved_tensors
        gates, chosen, a, b = left.gates, left.chosen, left.a, left.b
        _, _, x_needed, gates_needed, _, *needed = ctx.needs_input_grad
        a_needed, b_needed = needed[:n], needed[n : 2 * n]
        d_a: list[Tensor | None] = [None] * n
        d_b: list[Tensor | None] = [None] * n
        d_x: Tensor | None = None
        d_gates: Tensor | None = None
        with _NoAutocast(present[0].device.type):
            if x is not None:
                rows = x if x.ndim == 2 else x.flatten(0, -2)
            d_rows = [None if d is None else _rows(d, spec.dtype) for d in d_outputs]
            block = None if left.block is None else left.block()
            casts = Casts(a, b, spec, kept or None) if block is None else block.casts(left.key, a, b, spec)
            if hidden is None:
                hidden = None if block is None else block.hidden.pop(left.place, None)
                if hidden is None:
                    hidden = _hidden(rows, casts, a, spec, order)
            gated: Tensor | None
            total = left.total if gates_needed and order is None else None
            if order is not None:
                gated, gates = None, group_pairs.side_by_side(gates)
                d_rows = [None if d is None else group_pairs.side_by_side(d) for d in d_rows]
                d_hidden, d_gates = group_pairs.hidden_backward(d_rows, hidden, gates, casts, spec, order)
            else:
                d_hidden, d_gates, gated = gate_backward(
                    _d_gated(d_rows, casts.wide_b(), spec),
                    hidden,
                    gates,
                    chosen,
                    spec.columns,
                    want_gates=gates_needed,
                    want_gated=True in b_needed,
                    total=None if total is None else total.so_far(gates.device),
                )
            if not gates_needed or total is not None and d_gates is not None and total.keep(d_gates):
                d_gates = None
            elif d_gates is not None and d_gates.dtype != gates.dtype:
                d_gates = d_gates.to(gates.dtype)
            if x_needed:
                if order is not None:
                    d_x = group_pairs.d_input(d_hidden, casts, a, order, gates.shape[0])
                else:
                    d_x = _d_input(d_hidden, casts.wide_a(a), spec)
                base = left.base if block is None or not spec.packed else block.packed.pop(left.place, left.base)
                _add_base(d_x, d_rows, base, spec)
                if d_x.dtype != left.x_dtype:
                    d_x = d_x.to(left.x_dtype)
                d_x = d_x.view(left.x_shape)
            if order is not None:
                if True in b_needed:
                    d_b = group_pairs.d_b(d_rows, hidden, gates, b, b_needed, casts, spec, order)
                if True in a_needed:
                    d_a = list(group_pairs.d_a(d_hidden, rows, a, spec, order))
            else:
                if gated is not None:
                    for i, (d, part) in enumerate(zip(d_rows, _parts(gated, spec), strict=True)):
                        if b_needed[i] and d is not None:
                            d_b[i] = _d_b(product(d.t(), part, b[i].dtype), b[i])
                if True in a_needed:
                    d_a = _d_a(d_hidden, rows, a, spec)
            if False in a_needed:
                d_a = [each if need else None for each, need in zip(d_a, a_needed, strict=True)]
        return (None, None, d_x, d_gates, None, *d_a, *d_b, *(d_outputs if spec.given else ()))


# `Function.apply` looks first, in Python, whether a transform of torch.func is at work, or has left behind any of the arguments.
# Where one is at work, a linear does not come here; what may have been left behind is seen to in `run`.
_apply_keep: Any = getattr(super(torch.autograd.Function, _Keep), "apply", _Keep.apply)
_apply_group: Any = getattr(super(torch.autograd.Function, _Group), "apply", _Group.apply)


class _Left:
    """What a forward leaves for its backward, besides what is kept as autograd keeps it. What lies outside of the function is
    referred to where it is. Of the block that keeps casts and hidden there is a weak reference only.

    Attributes:
        written: `versions()` at the forward. Writing to these tensors before backward is an error, as always in autograd, which
            would ask for more time to keep each of them. None in a checkpointed block: it computes by what is there. None
            where no backward follows, either: tensors of inference mode, which have no version, may come there.
    """

    __slots__ = (
        "spec", "order", "trains", "keeper", "a", "b", "base", "gates", "chosen", "x_shape", "x_dtype", "block", "key", "place",
        "total", "written",
    )  # fmt: skip

    def __init__(self, call: _Call, x: Tensor, gates: Tensor, chosen: Tensor | None, base: Sequence[Weight]) -> None:
        self.spec, self.order, self.trains, self.keeper, self.place, self.total = (
            call.spec, call.order, call.trains, call.keeper, call.place, call.total,
        )  # fmt: skip
        self.a, self.b, self.base, self.gates, self.chosen = call.a, call.b, base, gates, chosen
        self.x_shape, self.x_dtype = x.shape, x.dtype
        self.block: weakref.ref[KeptByBlock] | None = None
        self.key: Any = None
        self.written: list[int] | None = None
        if call.kept is not None:
            self.block, self.key = weakref.ref(call.kept[0]), call.kept[1]

    def versions(self) -> list[int]:
        """How often each has been written to."""
        watched: Any = (self.gates, *self.a, *self.b, *(() if self.spec.packed else self.base))
        found = [each._version for each in watched]
        if self.chosen is not None:
            found.append(self.chosen._version)
        return found


def product(left: Tensor, right: Tensor, wanted: torch.dtype) -> Tensor:
    """left @ right; where the library can write float32 from 16-bit factors and that is what is wanted, without rounding."""
    if left.is_cuda and wanted == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


@functools.cache
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What products are cast to on the device of x; None: they are not."""
    kind = x.device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class _NoAutocast:
    """Within it the dtypes are as written. (`torch.autocast(enabled=False)` does this and more, in ten times the time.)"""

    __slots__ = ("kind", "was_on")

    def __init__(self, kind: str) -> None:
        self.kind = kind  # of device

    def __enter__(self) -> None:
        self.was_on = _has_autocast(self.kind) and torch.is_autocast_enabled(self.kind)
        if self.was_on:
            torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            torch.set_autocast_enabled(self.kind, True)


def _rows(each: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., n] -> [T, n], in this dtype."""
    rows = each if each.ndim == 2 else each.flatten(0, -2)
    return rows if rows.dtype == dtype else rows.to(dtype)


def _matrix(weight: Any, spec: Spec) -> Tensor:
    """[in, out], of a `Weight`."""
    if weight.dtype != spec.dtype:  # float32 weights under autocast, and packed ones
        weight = weight.to(spec.dtype)
    matrix: Tensor = weight if spec.transposed else weight.t()
    return matrix


def _parts(each: Tensor, spec: Spec) -> Sequence[Tensor]:
    """The columns of each linear."""
    return (each,) if spec.size == 1 else each.split_with_sizes(spec.widths, -1)


def _hidden(rows: Tensor, casts: Casts, a: Sequence[Tensor], spec: Spec, order: PairOrder | None) -> Tensor:
    """[T, N], or by pairs [P, sum of r]."""
    if order is not None:
        return group_pairs.hidden_of(rows, casts, a, order)
    wide = casts.wide_a(a)
    if len(wide) == 1:
        return F.linear(rows, wide[0])
    hidden = rows.new_empty(rows.shape[0], spec.width)
    for place, each in zip(_parts(hidden, spec), wide, strict=True):
        torch.mm(rows, each.t(), out=place)
    return hidden


def _outputs(gated: Tensor, gates: Tensor, call: _Call, x_shape: torch.Size) -> list[Tensor]:
    """[..., out] of each linear: its experts' part and its bias, then the base layer's product added to it."""
    spec, rows, outputs, lead = call.spec, call.rows, [], x_shape[:-1]
    if call.order is not None:
        outputs = [rows.new_empty(rows.shape[0], each.shape[1]) for each in call.b]
        group_pairs.write_up(outputs, gated, group_pairs.side_by_side(gates), call.casts, spec, call.order, call.biases)
    else:
        # Of matrices: with an input of three dimensions it would fold and unfold, which takes the host longer than the product.
        for part, up, bias in zip(_parts(gated, spec), call.casts.wide_b(), call.biases, strict=True):
            outputs.append(F.linear(part, up, bias if bias is None else bias.to(up.dtype)))
    for y, weight in zip(outputs, call.base, strict=True):
        y.addmm_(rows, _matrix(weight, spec))
        if len(lead) != 1:
            y.resize_(*lead, y.shape[1])  # the same numbers; no view, because a model may write to its outputs
    return outputs


def _added(ctx: Any, results: Sequence[Tensor], gated: Tensor, gates: Tensor, call: _Call) -> list[Tensor]:
    """The base layers' results with what the experts add."""
    spec = call.spec
    outputs, dirty = [], []
    if call.order is not None:
        for result, in_place in zip(results, spec.in_place, strict=True):
            if result.dtype != spec.dtype:
                y = torch.zeros_like(result, dtype=spec.dtype, memory_format=torch.contiguous_format)
            elif in_place and result.is_contiguous():
                y = result
                dirty.append(result)
            else:
                y = result.clone(memory_format=torch.contiguous_format)
            outputs.append(y)
        flat = [y.view(-1, y.shape[-1]) for y in outputs]
        group_pairs.add_up(flat, gated, group_pairs.side_by_side(gates), call.casts, spec, call.order)
        ctx.mark_dirty(*dirty)
        return [y if y.dtype == r.dtype else r + y.to(r.dtype) for r, y in zip(results, outputs, strict=True)]
    ups = [each.t() for each in call.casts.wide_b()]
    for result, part, up, in_place in zip(results, _parts(gated, spec), ups, spec.in_place, strict=True):
        if result.dtype != spec.dtype:
            outputs.append(result + (part @ up).to(result.dtype).view(result.shape))
        elif in_place and result.is_contiguous():
            result.view(part.shape[0], result.shape[-1]).addmm_(part, up)
            outputs.append(result)
            dirty.append(result)
        else:
            y = torch.empty_like(result, memory_format=torch.contiguous_format)
            rows = result.reshape(part.shape[0], result.shape[-1])
            torch.addmm(rows, part, up, out=y.view(rows.shape))
            outputs.append(y)
    ctx.mark_dirty(*dirty)
    return outputs


def _d_gated(d_rows: list[Tensor | None], wide_b: Sequence[Tensor], spec: Spec) -> Tensor:
    """[T, N], zero for outputs without a gradient."""
    if spec.size == 1:
        assert d_rows[0] is not None
        return d_rows[0] @ wide_b[0]
    first = next(d for d in d_rows if d is not None)
    d_gated = first.new_empty(first.shape[0], spec.width)
    for place, d, up in zip(_parts(d_gated, spec), d_rows, wide_b, strict=True):
        if d is None:
            place.zero_()
        else:
            torch.mm(d, up, out=place)
    return d_gated


def _d_input(d_hidden: Tensor, wide_a: Sequence[Tensor], spec: Spec) -> Tensor:
    """[T, in], of the experts alone: the smallest product first, each other one added to it."""
    if len(wide_a) == 1:
        return d_hidden @ wide_a[0]
    first, *others = zip(_parts(d_hidden, spec), wide_a, strict=True)
    total = first[0] @ first[1]
    for part, each in others:
        total.addmm_(part, each)
    return total


def _add_base(total: Tensor, d_rows: list[Tensor | None], base: Sequence[Any], spec: Spec) -> None:
    """Adds to the gradient [T, in] what comes through the base layers, unless they have their own backward: no weights then."""
    for d, weight in zip(d_rows, base, strict=False):
        if d is not None:
            if weight.dtype != spec.dtype:
                weight = weight.to(spec.dtype)
            total.addmm_(d, weight.t() if spec.transposed else weight)


def _d_b(each: Tensor, b: Tensor) -> Tensor:
    """[out, E * r] -> [E, out, r] of B. Not contiguous if it has the dtype of B: `.grad` copies it as it takes or adds it."""
    experts, out, rank = b.shape
    each = each.as_strided((experts, out, rank), (rank, experts * rank, 1))
    return each if each.dtype == b.dtype else each.to(b.dtype, memory_format=torch.contiguous_format)


def _d_a(d_hidden: Tensor, rows: Tensor, a: Sequence[Tensor], spec: Spec) -> list[Tensor | None]:
    """[E, r, in] of each A: one product, of which each gets its rows; `.grad` takes these as they are, without a copy."""
    wanted, features = a[0].dtype, rows.shape[1]
    whole = product(d_hidden.t(), rows, wanted)
    if whole.dtype != wanted:
        whole = whole.to(wanted)
    return [
        whole.as_strided(each.shape, (each.shape[1] * features, features, 1), columns.start * features)
        for columns, each in zip(spec.columns, a, strict=True)
    ]


def _backward_to_differentiate(ctx: Any, d_outputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """`create_graph=True`: the same gradients from operations that autograd can differentiate again."""
    left: _Left = ctx.call
    spec, gates, chosen, a, b, base = left.spec, left.gates, left.chosen, left.a, left.b, left.base
    n = spec.size
    _, x, *_ = (left.keeper or ctx).saved_tensors
    if x is None:
        raise RuntimeError(
            "The backward of this adapted linear cannot be differentiated again (create_graph=True): LoRA-Switch has kept no "
            "input for it, because its experts are frozen, or because the input was cast or copied. Call the model without "
            "autocast, and with experts that train."
        )
    with torch.enable_grad(), _NoAutocast(x.device.type):
        # Views, because the gates may have been computed from x, and those paths are not this function's.
        inputs = [each.view_as(each) for each in (x, gates, *a, *b)]
        x, gates, *experts = inputs
        outputs = [_dense(spec, i, x, gates, chosen, experts[i], experts[n + i], base) for i in range(n)]
        wanted = [ctx.needs_input_grad[i] for i in (2, 3, *range(5, 5 + 2 * n))]
        pairs = [(y, d) for y, d in zip(outputs, d_outputs, strict=True) if d is not None]
        gradients = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [each for each, want in zip(inputs, wanted, strict=True) if want],
                [d.to(y.dtype) for y, d in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    d_x, d_gates, *d_experts = [next(gradients) if want else None for want in wanted]
    d_base = d_outputs if spec.given else ()
    return (None, None, d_x, d_gates, None, *d_experts, *d_base)


def _dense(
    spec: Spec, i: int, x: Tensor, gates: Tensor, chosen: Tensor | None, a: Tensor, b: Tensor, base: Sequence[Weight]
) -> Tensor:
    """What linear i adds to its base layer's result, with that unless it is given, up to the bias."""
    rows, columns = _rows(x, spec.dtype), spec.columns[i]  # gates have one row a token
    hidden = F.linear(rows, a.to(spec.dtype).flatten(0, 1)).unflatten(-1, a.shape[:2])
    if chosen is not None:
        hidden = hidden.where(chosen.unsqueeze(-1), 0.0)
    hidden = hidden * (gates * columns.scaling).to(spec.dtype).unsqueeze(-1)
    delta = hidden.flatten(-2) @ b.to(spec.dtype).transpose(1, 2).flatten(0, 1)
    result = delta if spec.given else delta + rows @ _matrix(base[i], spec)
    return result.view(*x.shape[:-1], -1)
