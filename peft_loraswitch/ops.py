"""Every op's contract on one page: schema, checks, fake, PyTorch implementation. The kernels (kernels.py) only implement.

    route   x, router                                   -> experts, gates
    linear  x, experts, gates, a group of linears       -> their outputs, experts included
    expand  all experts' hidden, a group of linears     -> what their chosen experts add, plus the biases (many tokens)
    delta   base, x, experts, gates, one linear's experts -> base plus what the experts add
    merge   weights, sources, a model's experts         -> weights = sources + the chosen experts (written in place)

The PyTorch implementations are the definition, the CPU path, and the path of any GPU tensor that the kernels do not serve.
Registered with `Library.define` and `impl`, which cost a few microseconds a call where `custom_op` costs tens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .routing.decision import decide

_library = torch.library.Library("loraswitch", "DEF")
_library.define("route(Tensor x, Tensor router, int top_k, bool normalize) -> (Tensor, Tensor)")
_library.define(
    "linear(Tensor x, Tensor experts, Tensor gates, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, "
    "float[] scalings, bool transposed=False) -> Tensor[]"
)
_library.define(
    "expand(Tensor hidden, Tensor experts, Tensor gates, Tensor?[] biases, Tensor[] lora_b, float[] scalings) -> Tensor[]"
)
_library.define(
    "delta(Tensor base, Tensor x, Tensor experts, Tensor gates, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor"
)
_library.define(
    "merge(Tensor(a!)[] weights, Tensor[] sources, Tensor[] lora_a, Tensor[] lora_b, float[] scalings, bool[] transposed, "
    "Tensor experts, Tensor gates, Tensor? old_experts=None, Tensor? old_gates=None) -> ()"
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------- checks


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_route(x: Tensor, router: Tensor, top_k: int) -> None:
    _require(x.dim() >= 1 and router.dim() == 2, f"route: x must be [..., in], router [E, in], not {router.dim()}-d")
    _require(x.shape[-1] == router.shape[1], f"route: x has {x.shape[-1]} features, router {router.shape[1]}")
    limit = min(router.shape[0], kernels.MAX_TOP_K)
    _require(router.shape[0] <= kernels.MAX_EXPERTS, f"route: {router.shape[0]} experts, at most {kernels.MAX_EXPERTS}")
    _require(1 <= top_k <= limit, f"route: top_k={top_k} must be between 1 and {limit}")
    _require(
        x.dtype in FLOATS and router.dtype in FLOATS, f"route: {x.dtype} and {router.dtype} must be float32 or 16-bit"
    )


def _check_experts(op: str, x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    _require(
        experts.dtype == torch.int64 and gates.dtype == torch.float32, f"{op}: experts must be int64, gates float32"
    )
    _require(
        experts.shape == gates.shape,
        f"{op}: experts {list(experts.shape)} and gates {list(gates.shape)} differ in shape",
    )
    _require(
        1 <= experts.shape[-1] <= kernels.MAX_TOP_K, f"{op}: top_k={experts.shape[-1]} must be 1 to {kernels.MAX_TOP_K}"
    )
    _require(
        experts.shape[:-1].numel() == x.shape[:-1].numel(), f"{op}: experts are of another number of tokens than x"
    )
    _require(lora_a.dim() == 3 and lora_b.dim() == 3, f"{op}: lora_a must be [E, r, in], lora_b [E, out, r]")
    agree = lora_a.shape[0] == lora_b.shape[0] and lora_a.shape[1] == lora_b.shape[2] and lora_a.shape[2] == x.shape[-1]
    _require(agree, f"{op}: lora_a {list(lora_a.shape)}, lora_b {list(lora_b.shape)} and x {list(x.shape)} do not fit")
    _require(lora_a.shape[0] <= kernels.MAX_EXPERTS, f"{op}: {lora_a.shape[0]} experts, at most {kernels.MAX_EXPERTS}")
    _require(lora_a.shape[1] <= kernels.MAX_RANK, f"{op}: rank {lora_a.shape[1]}, at most {kernels.MAX_RANK}")
    same = x.dtype in FLOATS and x.dtype == lora_a.dtype == lora_b.dtype
    _require(same, f"{op}: x is {x.dtype}, experts {lora_a.dtype}, {lora_b.dtype}: must be one of {FLOATS}")
    devices = {t.device for t in (x, experts, gates, lora_a, lora_b)}
    _require(len(devices) == 1, f"{op}: tensors are on several devices: {devices}")


def _check_linear(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool,
) -> None:  # fmt: skip
    n = len(weights)
    _require(1 <= n <= kernels.MAX_GROUP, f"linear: a group has 1 to {kernels.MAX_GROUP} linears, not {n}")
    _require(n == len(biases) == len(lora_a) == len(lora_b) == len(scalings), "linear: the lists differ in length")
    for weight, bias, a, b in zip(weights, biases, lora_a, lora_b, strict=True):
        _check_experts("linear", x, experts, gates, a, b)
        _require(
            a.shape[0] == lora_a[0].shape[0], "linear: the linears of a group must have the same number of experts"
        )
        shape = (x.shape[-1], b.shape[1]) if transposed else (b.shape[1], x.shape[-1])
        _require(weight.shape == shape, f"linear: a weight is {list(weight.shape)}, the experts ask for {list(shape)}")
        _require(
            weight.dtype == x.dtype and weight.device == x.device,
            "linear: a weight is of another dtype or device than x",
        )
        if bias is not None:
            _require(
                bias.shape == (b.shape[1],) and bias.dtype == x.dtype, "linear: a bias must be [out], in the dtype of x"
            )


def _check_expand(
    hidden: Tensor, experts: Tensor, gates: Tensor, biases: Sequence[Tensor | None], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> None:  # fmt: skip
    n = len(lora_b)
    _require(1 <= n <= kernels.MAX_GROUP, f"expand: a group has 1 to {kernels.MAX_GROUP} linears, not {n}")
    _require(n == len(biases) == len(scalings), "expand: the lists differ in length")
    _require(
        experts.dtype == torch.int64 and gates.dtype == torch.float32, "expand: experts must be int64, gates float32"
    )
    shapes = [list(t.shape) for t in (hidden, experts, gates)]
    fit = hidden.dim() == experts.dim() == 2 and experts.shape == gates.shape and len(experts) == len(hidden)
    _require(fit, f"expand: hidden, experts, gates must be [T, n], [T, k], [T, k], not {shapes}")
    top_k = experts.shape[1]
    _require(1 <= top_k <= kernels.MAX_TOP_K, f"expand: top_k={top_k} must be 1 to {kernels.MAX_TOP_K}")
    _require(hidden.dtype in FLOATS, f"expand: hidden is {hidden.dtype}: must be one of {FLOATS}")
    width = 0
    for b, bias in zip(lora_b, biases, strict=True):
        same = b.dim() == 3 and b.shape[0] == lora_b[0].shape[0]
        _require(same, "expand: every lora_b must be [E, out, r], with the same number of experts")
        num_experts, out, rank = b.shape
        _require(
            num_experts <= kernels.MAX_EXPERTS and rank <= kernels.MAX_RANK,
            f"expand: {num_experts} experts of rank {rank}, at most {kernels.MAX_EXPERTS} and {kernels.MAX_RANK}",
        )
        _require(
            b.dtype == hidden.dtype and b.device == hidden.device,
            "expand: a lora_b is of another dtype or device than hidden",
        )
        if bias is not None:
            fits = bias.dtype == hidden.dtype and bias.shape == (out,) and bias.device == hidden.device
            _require(fits, "expand: a bias must be [out], in the dtype of hidden")
        width += num_experts * rank
    _require(width == hidden.shape[1], f"expand: hidden has {hidden.shape[1]} columns, the experts have {width} ranks")
    _require(hidden.device == experts.device == gates.device, "expand: tensors are on several devices")


def _check_delta(base: Tensor, x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    _check_experts("delta", x, experts, gates, lora_a, lora_b)
    _require(
        base.shape == (*x.shape[:-1], lora_b.shape[1]), f"delta: base {list(base.shape)} does not fit x and lora_b"
    )
    _require(base.dtype == x.dtype and base.device == x.device, "delta: base is of another dtype or device than x")


def _check_merge(
    weights: Sequence[Tensor], sources: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float], transposed: Sequence[bool], experts: Tensor, gates: Tensor,
    old_experts: Tensor | None = None, old_gates: Tensor | None = None,
) -> None:  # fmt: skip
    lengths = {len(entries) for entries in (weights, sources, lora_a, lora_b, scalings, transposed)}
    _require(len(lengths) == 1, "merge: the lists differ in length")
    _require(experts.dim() == 1 and experts.shape == gates.shape, "merge: experts and gates must be [k], of one token")
    _require((old_experts is None) == (old_gates is None), "merge: old_experts and old_gates go together")
    for weight, source, a, b, swapped in zip(weights, sources, lora_a, lora_b, transposed, strict=True):
        _check_experts("merge", a.new_empty(1, a.shape[2]), experts, gates, a, b)
        shape = (a.shape[2], b.shape[1]) if swapped else (b.shape[1], a.shape[2])
        _require(weight.shape == source.shape == shape, f"merge: a weight is {list(weight.shape)}, not {list(shape)}")
        _require(weight.dtype == source.dtype == a.dtype, f"merge: a weight is {weight.dtype}, its experts {a.dtype}")


# ------------------------------------------------------------------------------------------- PyTorch implementations


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
    if experts.numel() < lora_a.shape[0]:
        return _add_chosen(x, experts, gates, lora_a, lora_b, scaling)
    factors, chosen = dense(experts, gates, lora_a.shape[0])
    hidden = gated(all_hidden(x, [lora_a]), (factors * scaling).to(x.dtype), chosen, lora_a.shape[1])
    return hidden @ wide(lora_b).T


def _route_pytorch(x: Tensor, router: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    _check_route(x, router, top_k)
    with torch.autocast(device_type=x.device.type, enabled=False):
        return decide(F.linear(x.float(), router.float()), top_k, normalize)


def _linear_pytorch(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool = False,
) -> list[Tensor]:  # fmt: skip
    _check_linear(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    tokens = x.reshape(-1, x.shape[-1])
    experts, gates = (t.reshape(-1, t.shape[-1]) for t in (experts, gates))
    results = []
    for weight, bias, a, b, scaling in zip(weights, biases, lora_a, lora_b, scalings, strict=True):
        base = F.linear(tokens, weight.T if transposed else weight, bias)
        result = base + _experts_reference(tokens, experts, gates, a, b, scaling)
        results.append(result.view(*x.shape[:-1], b.shape[1]))
    return results


def _expand_pytorch(
    hidden: Tensor, experts: Tensor, gates: Tensor, biases: Sequence[Tensor | None], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    _check_expand(hidden, experts, gates, biases, lora_b, scalings)
    factors, chosen = dense(experts, gates, lora_b[0].shape[0])
    parts = hidden.split([b.shape[0] * b.shape[2] for b in lora_b], dim=1)
    results = []
    for h, bias, b, scaling in zip(parts, biases, lora_b, scalings, strict=True):
        h, up = gated(h, (factors * scaling).to(h.dtype), chosen, b.shape[2]), wide(b).T
        results.append(h @ up if bias is None else torch.addmm(bias, h, up))
    return results


def _delta_pytorch(
    base: Tensor, x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    _check_delta(base, x, experts, gates, lora_a, lora_b)
    tokens = x.reshape(-1, x.shape[-1])
    experts, gates = (t.reshape(-1, t.shape[-1]) for t in (experts, gates))
    return base + _experts_reference(tokens, experts, gates, lora_a, lora_b, scaling).view(base.shape)


def _merge_pytorch(
    weights: Sequence[Tensor], sources: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float], transposed: Sequence[bool], experts: Tensor, gates: Tensor,
    old_experts: Tensor | None = None, old_gates: Tensor | None = None,
) -> None:  # fmt: skip
    _check_merge(weights, sources, lora_a, lora_b, scalings, transposed, experts, gates, old_experts, old_gates)
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
    ("route", _route_pytorch), ("linear", _linear_pytorch), ("expand", _expand_pytorch), ("delta", _delta_pytorch),
    ("merge", _merge_pytorch),
):  # fmt: skip
    _library.impl(_name, _function, "CPU")


# ------------------------------------------------------------------------------------------------------------ fakes


def _route_fake(x: Tensor, router: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    _check_route(x, router, top_k)
    shape = (*x.shape[:-1], top_k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


def _linear_fake(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool = False,
) -> list[Tensor]:  # fmt: skip
    _check_linear(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    return [x.new_empty((*x.shape[:-1], b.shape[1])) for b in lora_b]


def _expand_fake(
    hidden: Tensor, experts: Tensor, gates: Tensor, biases: Sequence[Tensor | None], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    _check_expand(hidden, experts, gates, biases, lora_b, scalings)
    return [hidden.new_empty((hidden.shape[0], b.shape[1])) for b in lora_b]


def _delta_fake(
    base: Tensor, x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    _check_delta(base, x, experts, gates, lora_a, lora_b)
    return x.new_empty(base.shape)


for _name, _fake in (
    ("route", _route_fake), ("linear", _linear_fake), ("expand", _expand_fake), ("delta", _delta_fake), ("merge", _check_merge)
):  # fmt: skip
    torch.library.register_fake(f"loraswitch::{_name}", _fake, lib=_library)


# ---------------------------------------------------------------------------------------------------- CUDA: kernels


def _usable(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors) and kernels.available(tensors[0].get_device())


def _route_cuda(x: Tensor, router: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    if not kernels.available(x.get_device()):
        return _route_pytorch(x, router, top_k, normalize)
    _check_route(x, router, top_k)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    experts, gates = kernels.router(tokens, router.contiguous(), top_k, normalize)
    return experts.view(*x.shape[:-1], top_k), gates.view(*x.shape[:-1], top_k)


def _linear_cuda(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool = False,
) -> list[Tensor]:  # fmt: skip
    present = [bias for bias in biases if bias is not None]
    if x.numel() == 0 or not _usable(*weights, *present, *lora_a, *lora_b):
        return _linear_pytorch(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    _check_linear(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    packed = kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, transposed)
    x, experts, gates = x.contiguous(), experts.contiguous(), gates.contiguous()
    kernels.warn_if_generic(packed, x, experts)
    return packed(x, experts, gates)


def _expand_cuda(
    hidden: Tensor, experts: Tensor, gates: Tensor, biases: Sequence[Tensor | None], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    _check_expand(hidden, experts, gates, biases, lora_b, scalings)
    if hidden.numel() and _usable(*lora_b, *[bias for bias in biases if bias is not None]):
        hidden, experts, gates = hidden.contiguous(), experts.contiguous(), gates.contiguous()
        group = kernels.expansion(lora_b, biases, scalings, experts.shape[1])
        if group.expands and hidden.data_ptr() % 16 == 0:
            return kernels.expand(group, hidden, experts, gates)
    return _expand_pytorch(hidden, experts, gates, biases, lora_b, scalings)


def _delta_cuda(
    base: Tensor, x: Tensor, experts: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    if x.numel() == 0 or not _usable(lora_a, lora_b):
        return _delta_pytorch(base, x, experts, gates, lora_a, lora_b, scaling)
    _check_delta(base, x, experts, gates, lora_a, lora_b)
    packed = kernels.PackedGroup([None], [None], [lora_a], [lora_b], [scaling])
    x, experts, gates = x.contiguous(), experts.contiguous(), gates.contiguous()
    kernels.warn_if_generic(packed, x, experts)
    return packed(x, experts, gates, [base.contiguous()])[0]


_tables: list[kernels.MergeTable] = []  # of the last models merged: a CUDA graph cannot make one while it is captured


def merge_table(*arguments: Any) -> kernels.MergeTable:
    """The table for `weights, sources, lora_a, lora_b, scalings, transposed`, made once and kept."""
    pointers = [t.data_ptr() for tensors in arguments[:4] for t in tensors]
    for table in _tables:
        if table.pointers == pointers and table.scalings == list(arguments[4]):
            return table
    table = kernels.MergeTable(*arguments)
    _tables[:] = [*_tables[-7:], table]
    return table


def drop_merge_tables(weights: Sequence[Tensor]) -> None:
    """Forget the tables that write `weights`, and with them the memory they hold on to."""
    _tables[:] = [table for table in _tables if not weights or table.pointers[0] != weights[0].data_ptr()]


def _merge_cuda(
    weights: Sequence[Tensor], sources: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float], transposed: Sequence[bool], experts: Tensor, gates: Tensor,
    old_experts: Tensor | None = None, old_gates: Tensor | None = None,
) -> None:  # fmt: skip
    if not weights or not _usable(*weights, *sources, *lora_a, *lora_b):
        _merge_pytorch(weights, sources, lora_a, lora_b, scalings, transposed, experts, gates, old_experts, old_gates)
        return
    _check_merge(weights, sources, lora_a, lora_b, scalings, transposed, experts, gates, old_experts, old_gates)
    table = merge_table(weights, sources, lora_a, lora_b, scalings, transposed)
    table(experts, gates, old_experts, old_gates)


for _name, _function in (
    ("route", _route_cuda), ("linear", _linear_cuda), ("expand", _expand_cuda), ("delta", _delta_cuda), ("merge", _merge_cuda)
):  # fmt: skip
    _library.impl(_name, _function, "CUDA")

route = torch.ops.loraswitch.route.default
linear = torch.ops.loraswitch.linear.default
expand = torch.ops.loraswitch.expand.default
delta = torch.ops.loraswitch.delta.default
merge = torch.ops.loraswitch.merge.default
