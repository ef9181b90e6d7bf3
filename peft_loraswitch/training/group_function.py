"""Forward and backward of adapted linears that share their input, as one autograd function: what training runs instead of the
operations in `layer.py`, which say what it computes.

Nine tenths of what an adapter costs a training step on a GPU are not its products but passes over activations: casts to
float32 and back, sums of two results, copies. So there is none here:

- the weights are cast (they are small), the activations are not;
- A of the whole group is one product: the input is read once;
- what the experts add is computed first, and the base layer's product adds to it (`addmm`, beta = 1) as it writes its result;
- the gradient of the input is one tensor to which each product of the group adds, where autograd would sum one a linear;
- gates, scaling and mask are one launch each way (`gate_hidden.py`);
- for backward it keeps its input (only if A trains) and the hidden, [tokens, E * r], from which the gated hidden is made again.

Base layers that it cannot compute itself (quantised, with hooks, trained) give it their results, and get their own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gate_hidden import Columns, gate, gate_backward


@dataclass(frozen=True)
class Spec:
    """What a call is, besides its tensors.

    Attributes:
        dtype: of the products.
        columns: of each linear in the group's hidden.
        given: the base layers have run: their results are among the tensors, not their weights.
        transposed: their weights are [in, out] (Conv1D).
        in_place: with `given`, whether each result may be added to.
    """

    dtype: torch.dtype
    columns: tuple[Columns, ...]
    given: bool
    transposed: bool = False
    in_place: tuple[bool, ...] = ()

    @property
    def size(self) -> int:
        return len(self.columns)


def run(
    spec: Spec,
    x: Tensor,
    gates: Tensor,
    chosen: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    base: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """The outputs [..., out] of each linear, for x [..., in].

    Args:
        gates: float32 [..., E]; chosen: bool [..., E], or None: all are.
        a: [E, r, in] each; b: [E, out, r] each.
        base: the base layers' weights, which ask for no gradient, or their results if `spec.given`.
        biases: of the base layers, unless `spec.given`.
    """
    outputs: tuple[Tensor, ...] = _Group.apply(spec, x, gates, chosen, *a, *b, *base, *biases)  # type: ignore[no-untyped-call]
    return outputs


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, x: Tensor, gates: Tensor, chosen: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = spec.size
        a, b, base, biases = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]
        with _as_written(x):
            rows = x.reshape(-1, x.shape[-1]).to(spec.dtype)
            gate_rows, chosen_rows = _by_token(gates), None if chosen is None else _by_token(chosen)
            wide_a = _side_by_side(a, spec, rows.is_cuda)
            wide_b = [_one_matrix(each, spec.dtype) for each in b]
            hidden = _hidden(rows, wide_a, spec)
            gated = gate(hidden, gate_rows, chosen_rows, spec.columns)
            parts = [gated[:, c.start : c.stop] for c in spec.columns]
            if spec.given:
                outputs = _added(ctx, base, parts, wide_b, spec)
            else:
                outputs = []
                for part, up, weight, bias in zip(parts, wide_b, base, biases, strict=True):
                    matrix = _matrix(weight, spec)
                    y = rows.new_empty((*x.shape[:-1], matrix.shape[1]))  # no view: a model may write to it
                    y_rows = y.view(rows.shape[0], matrix.shape[1])
                    if bias is None:
                        torch.mm(part, up.t(), out=y_rows)
                    else:
                        torch.addmm(bias.to(spec.dtype), part, up.t(), out=y_rows)
                    y_rows.addmm_(rows, matrix)
                    outputs.append(y)
        _, x_needed, gates_needed, _, *needed = ctx.needs_input_grad
        a_trains, b_trains = any(needed[:n]), any(needed[n : 2 * n])
        keep_hidden = b_trains or gates_needed
        same = rows.data_ptr() == x.data_ptr()  # neither cast nor copied
        ctx.spec, ctx.x_shape, ctx.x_dtype, ctx.count_a = spec, x.shape, x.dtype, len(wide_a)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            rows if a_trains and not same else None,
            x if a_trains and same else None,
            hidden if keep_hidden else None,
            gates,
            chosen,
            *a,
            *b,
            *wide_a,
            *wide_b,
            *(() if spec.given else base),
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        spec: Spec = ctx.spec
        n, present = spec.size, [d for d in d_outputs if d is not None]
        if not present:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return _backward_to_differentiate(ctx, d_outputs)
        rows, x, hidden, gates, chosen, *others = ctx.saved_tensors
        a, b, wide_a, wide_b, base = _split(others, n, n, ctx.count_a, n)
        _, x_needed, gates_needed, _, *needed = ctx.needs_input_grad
        a_needed, b_needed = needed[:n], needed[n : 2 * n]
        d_a: list[Tensor | None] = [None] * n
        d_b: list[Tensor | None] = [None] * n
        d_x = d_gates = None
        with _as_written(present[0]):
            if x is not None and rows is None:
                rows = x.reshape(-1, x.shape[-1])
            d_rows = [None if d is None else d.reshape(-1, d.shape[-1]).to(spec.dtype) for d in d_outputs]
            d_gated = _d_gated(d_rows, wide_b, spec)
            gate_rows, chosen_rows = _by_token(gates), None if chosen is None else _by_token(chosen)
            d_hidden, d_gate_rows, gated = gate_backward(
                d_gated,
                d_gated if hidden is None else hidden,
                gate_rows,
                chosen_rows,
                spec.columns,
                want_gates=gates_needed,
                want_gated=any(b_needed),
            )
            if d_gate_rows is not None:
                d_gates = d_gate_rows.to(gates.dtype).view(gates.shape)
            if x_needed:
                d_x = _d_input(d_hidden, d_rows, wide_a, base, spec).view(ctx.x_shape).to(ctx.x_dtype)
            for i, (columns, d) in enumerate(zip(spec.columns, d_rows, strict=True)):
                if b_needed[i] and d is not None:
                    each = product(d.t(), gated[:, columns.start : columns.stop], b[i].dtype)  # type: ignore[index]
                    each = each.unflatten(1, (columns.experts, columns.rank)).transpose(0, 1)
                    d_b[i] = each.to(b[i].dtype, memory_format=torch.contiguous_format)
            if any(a_needed):
                for i, each in enumerate(_d_a(d_hidden, rows, a[0].dtype, spec)):
                    if a_needed[i]:
                        d_a[i] = each.to(a[i].dtype).view(a[i].shape)
        d_base = d_outputs if spec.given else (None,) * (2 * n)
        return (None, d_x, d_gates, None, *d_a, *d_b, *d_base)


def product(left: Tensor, right: Tensor, wanted: torch.dtype) -> Tensor:
    """left @ right; where the library can write float32 from 16-bit factors and that is what is wanted, without rounding."""
    if left.is_cuda and wanted == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What products are cast to on the device of x; None: they are not."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _as_written(x: Tensor) -> Any:
    """No autocast: the dtypes are decided already."""
    if autocast_dtype(x) is not None:
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _by_token(each: Tensor) -> Tensor:
    return each if each.dim() == 2 else each.reshape(-1, each.shape[-1])


def _matrix(weight: Tensor, spec: Spec) -> Tensor:
    """[in, out]"""
    weight = weight.to(spec.dtype)  # float32 weights under autocast
    return weight if spec.transposed else weight.t()


def _side_by_side(a: Sequence[Tensor], spec: Spec, together: bool) -> list[Tensor]:
    """A of all linears as one matrix [N, in]. On a CPU, where copying it costs more than the launches that it saves, one
    [E * r, in] each."""
    if len(a) == 1 or not (together or any(each.dtype != spec.dtype for each in a)):
        return [each.to(spec.dtype).flatten(0, 1) for each in a]
    whole = torch.empty(spec.columns[-1].stop, a[0].shape[-1], dtype=spec.dtype, device=a[0].device)
    places = [whole[c.start : c.stop].view(each.shape) for c, each in zip(spec.columns, a, strict=True)]
    torch._foreach_copy_(places, [each.detach() for each in a])
    return [whole]


def _one_matrix(b: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, out, r] -> [out, E * r]"""
    experts, out, rank = b.shape
    if experts == 1:
        return b.to(dtype).view(out, rank)
    whole = torch.empty(out, experts, rank, dtype=dtype, device=b.device)
    return whole.copy_(b.transpose(0, 1)).view(out, experts * rank)


def _hidden(rows: Tensor, wide_a: list[Tensor], spec: Spec) -> Tensor:
    if len(wide_a) == 1:
        return rows @ wide_a[0].t()
    hidden = rows.new_empty(rows.shape[0], spec.columns[-1].stop)
    for columns, each in zip(spec.columns, wide_a, strict=True):
        torch.mm(rows, each.t(), out=hidden[:, columns.start : columns.stop])
    return hidden


def _added(ctx: Any, results: Sequence[Tensor], parts: list[Tensor], wide_b: list[Tensor], spec: Spec) -> list[Tensor]:
    """The base layers' results with what the experts add."""
    outputs, dirty = [], []
    for result, part, up, in_place in zip(results, parts, wide_b, spec.in_place, strict=True):
        if result.dtype != spec.dtype:
            outputs.append(result + (part @ up.t()).to(result.dtype).view(result.shape))
        elif in_place and result.is_contiguous():
            result.view(part.shape[0], result.shape[-1]).addmm_(part, up.t())
            outputs.append(result)
            dirty.append(result)
        else:
            y = torch.empty_like(result, memory_format=torch.contiguous_format)
            rows = result.reshape(part.shape[0], result.shape[-1])
            torch.addmm(rows, part, up.t(), out=y.view(rows.shape))
            outputs.append(y)
    ctx.mark_dirty(*dirty)
    return outputs


def _d_gated(d_rows: list[Tensor | None], wide_b: Sequence[Tensor], spec: Spec) -> Tensor:
    """[T, N], zero for outputs without a gradient."""
    if spec.size == 1:
        assert d_rows[0] is not None
        return d_rows[0] @ wide_b[0]
    first = next(d for d in d_rows if d is not None)
    d_gated = first.new_empty(first.shape[0], spec.columns[-1].stop)
    for columns, d, up in zip(spec.columns, d_rows, wide_b, strict=True):
        place = d_gated[:, columns.start : columns.stop]
        if d is None:
            place.zero_()
        else:
            torch.mm(d, up, out=place)
    return d_gated


def _d_input(
    d_hidden: Tensor, d_rows: list[Tensor | None], wide_a: Sequence[Tensor], base: Sequence[Tensor], spec: Spec
) -> Tensor:
    """[T, in]: the smallest product first, each other one added to it."""
    if len(wide_a) == 1:
        total = d_hidden @ wide_a[0]
    else:
        first, *others = zip(spec.columns, wide_a, strict=True)
        total = d_hidden[:, first[0].start : first[0].stop] @ first[1]
        for columns, each in others:
            total.addmm_(d_hidden[:, columns.start : columns.stop], each)
    for d, weight in zip(d_rows, base, strict=False):  # no weights if the base layers have their own backward
        if d is not None:
            total.addmm_(d, _matrix(weight, spec).t())
    return total


def _d_a(d_hidden: Tensor, rows: Tensor, wanted: torch.dtype, spec: Spec) -> list[Tensor]:
    if rows.is_cuda:  # one product, of which each linear gets its rows
        whole = product(d_hidden.t(), rows, wanted)
        return [whole[c.start : c.stop] for c in spec.columns]
    return [product(d_hidden[:, c.start : c.stop].t(), rows, wanted) for c in spec.columns]


def _split(tensors: Sequence[Tensor], *counts: int) -> list[Sequence[Tensor]]:
    found, start = [], 0
    for count in counts:
        found.append(tensors[start : start + count])
        start += count
    return [*found, tensors[start:]]


def _backward_to_differentiate(ctx: Any, d_outputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """`create_graph=True`: the same gradients from operations that autograd can differentiate again."""
    spec: Spec = ctx.spec
    n = spec.size
    _, x, _, gates, chosen, *others = ctx.saved_tensors
    a, b, _, _, base = _split(others, n, n, ctx.count_a, n)
    if x is None:
        raise RuntimeError(
            "The backward of this adapted linear cannot be differentiated again (create_graph=True): LoRA-Switch has kept no "
            "input for it, because its experts are frozen, or because the input was cast or copied. Call the model without "
            "autocast, and with experts that train."
        )
    with torch.enable_grad(), _as_written(x):
        # Views, because the gates may have been computed from x, and those paths are not this function's.
        inputs = [each.view_as(each) for each in (x, gates, *a, *b)]
        x, gates, *experts = inputs
        outputs = [_dense(spec, i, x, gates, chosen, experts[i], experts[n + i], base) for i in range(n)]
        wanted = [ctx.needs_input_grad[i] for i in (1, 2, *range(4, 4 + 2 * n))]
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
    d_base = d_outputs if spec.given else (None,) * (2 * n)
    return (None, d_x, d_gates, None, *d_experts, *d_base)


def _dense(
    spec: Spec, i: int, x: Tensor, gates: Tensor, chosen: Tensor | None, a: Tensor, b: Tensor, base: Sequence[Tensor]
) -> Tensor:
    """What linear i adds to its base layer's result, with that unless it is given, up to the bias."""
    rows, columns = x.to(spec.dtype), spec.columns[i]
    hidden = F.linear(rows, a.to(spec.dtype).flatten(0, 1)).unflatten(-1, a.shape[:2])
    if chosen is not None:
        hidden = hidden.where(chosen.unsqueeze(-1), 0.0)
    hidden = hidden * (gates * columns.scaling).to(spec.dtype).unsqueeze(-1)
    delta = hidden.flatten(-2) @ b.to(spec.dtype).transpose(1, 2).flatten(0, 1)
    return delta if spec.given else delta + rows @ _matrix(base[i], spec)
