"""The contract of every op: schema, what it checks, and its fake (shapes and dtypes of the results, for compilers).

    route   x, router                                   -> experts, gates (top_p < 1: id E, gate 0 for those left out)
    route_context  x, router, sums so far, decay        -> experts, gates by context, and the sums with x (`router_decay`)
    linear  x, experts, gates, a group of linears       -> their outputs, experts included
    linear_4bit  the same of weights in 4 bits with scales, as bitsandbytes keeps NF4 and FP4, and torchao int4 (no code)
    expand  all experts' hidden, bases, a group of linears -> each base plus what its chosen experts add, and biases (many tokens)
    deltas  bases, x, experts, gates, a group's experts -> each base plus what its experts add
    merge   weights, sources, a model's experts         -> weights = sources + the chosen experts (written in place)

Registered with `Library.define` and `impl`, which cost a few microseconds a call where `custom_op` costs tens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..op_library import only_library

library = only_library("loraswitch")
library.define("route(Tensor x, Tensor router, int top_k, bool normalize, float top_p=1.0) -> (Tensor, Tensor)")
library.define(
    "route_context(Tensor x, Tensor router, Tensor previous, float decay, int top_k, bool normalize, Tensor? real=None, "
    "float top_p=1.0) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "linear(Tensor x, Tensor experts, Tensor gates, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, "
    "float[] scalings, bool transposed=False) -> Tensor[]"
)
library.define(
    "linear_4bit(Tensor x, Tensor experts, Tensor gates, Tensor[] weights, Tensor[] scales, Tensor? code, Tensor?[] biases, "
    "Tensor[] lora_a, Tensor[] lora_b, float[] scalings) -> Tensor[]"
)
library.define(
    "expand(Tensor hidden, Tensor experts, Tensor gates, Tensor[] bases, Tensor?[] biases, Tensor[] lora_b, float[] scalings) "
    "-> Tensor[]"
)
library.define(
    "deltas(Tensor[] bases, Tensor x, Tensor experts, Tensor gates, Tensor[] lora_a, Tensor[] lora_b, float[] scalings) "
    "-> Tensor[]"
)
library.define(
    "merge(Tensor(a!)[] weights, Tensor[] sources, Tensor[] lora_a, Tensor[] lora_b, float[] scalings, bool[] transposed, "
    "Tensor experts, Tensor gates, Tensor? old_experts=None, Tensor? old_gates=None) -> ()"
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FEATURES_OF_A_SCALE = 64  # or a multiple: of weights in 4 bits that have a code
INT4_GROUPS = (32, 64, 128, 256)  # features that share scale and zero, of those in tiles


# ----------------------------------------------------------------------------------------------------------- checks


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_alike(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A kernel takes addresses: it would read whatever lies there on its own device."""
    _require(
        tensor.dtype == other.dtype and tensor.device == other.device,
        f"{op}: {name} is {tensor.dtype} on {tensor.device}, {other_name} {other.dtype} on {other.device}",
    )


def check_route(x: Tensor, router: Tensor, top_k: int, top_p: float) -> None:
    _require(x.dim() >= 1 and router.dim() == 2, f"route: x must be [..., in], router [E, in], not {router.dim()}-d")
    _require(x.shape[-1] == router.shape[1], f"route: x has {x.shape[-1]} features, router {router.shape[1]}")
    limit = min(router.shape[0], kernels.MAX_TOP_K)
    _require(router.shape[0] <= kernels.MAX_EXPERTS, f"route: {router.shape[0]} experts, at most {kernels.MAX_EXPERTS}")
    _require(1 <= top_k <= limit, f"route: top_k={top_k} must be between 1 and {limit}")
    _require(0 < top_p <= 1, f"route: top_p={top_p} must be above 0 and at most 1")
    _require(
        x.dtype in FLOATS and router.dtype in FLOATS, f"route: {x.dtype} and {router.dtype} must be float32 or 16-bit"
    )
    _require(x.device == router.device, f"route: x is on {x.device}, router on {router.device}")


def check_route_context(
    x: Tensor, router: Tensor, previous: Tensor, decay: float, top_k: int, real: Tensor | None, top_p: float
) -> None:
    check_route(x, router, top_k, top_p)
    width, tokens = router.shape[0] + 1, x.shape[:-1].numel()
    _require(
        previous.dtype == torch.float32 and previous.shape == (tokens, width),
        f"route_context: previous must be float32 [{tokens}, {width}], not {previous.dtype} {list(previous.shape)}",
    )
    _require(0 <= decay <= 1, f"route_context: decay={decay} must be between 0 and 1")
    fits = real is None or (real.dtype == torch.bool and real.shape == (tokens,))
    _require(fits, f"route_context: real must be bool [{tokens}]")
    devices = {t.device for t in (x, router, previous, *([] if real is None else [real]))}
    _require(len(devices) == 1, f"route_context: tensors are on several devices: {devices}")


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


def _check_group(
    op: str, x: Tensor, experts: Tensor, gates: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    *others: Sequence[object],
) -> None:  # fmt: skip
    """A group of linears, as many of them as `others` have entries each."""
    n = len(lora_a)
    _require(1 <= n <= kernels.MAX_GROUP, f"{op}: a group has 1 to {kernels.MAX_GROUP} linears, not {n}")
    _require(all(len(entries) == n for entries in (lora_b, *others)), f"{op}: the lists differ in length")
    for a, b in zip(lora_a, lora_b, strict=True):
        _check_experts(op, x, experts, gates, a, b)
        _require(a.shape[0] == lora_a[0].shape[0], f"{op}: the linears of a group must have the same number of experts")


def check_linear(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool,
) -> None:  # fmt: skip
    _check_group("linear", x, experts, gates, lora_a, lora_b, weights, biases, scalings)
    for weight, bias, b in zip(weights, biases, lora_b, strict=True):
        shape = (x.shape[-1], b.shape[1]) if transposed else (b.shape[1], x.shape[-1])
        _require(weight.shape == shape, f"linear: a weight is {list(weight.shape)}, the experts ask for {list(shape)}")
        _check_alike("linear", "a weight", weight, "x", x)
        _check_bias("linear", x, bias, b)


def _check_bias(op: str, x: Tensor, bias: Tensor | None, lora_b: Tensor) -> None:
    if bias is not None:
        _require(bias.shape == (lora_b.shape[1],), f"{op}: a bias is {list(bias.shape)}, must be [{lora_b.shape[1]}]")
        _check_alike(op, "a bias", bias, "x", x)


def check_linear_4bit(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], code: Tensor | None,
    biases: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> None:  # fmt: skip
    op = "linear_4bit"
    _check_group(op, x, experts, gates, lora_a, lora_b, weights, scales, biases, scalings)
    outs = [b.shape[1] for b in lora_b]
    if code is None:
        _check_tiles(op, x, weights, scales, outs)
    else:
        _check_coded(op, x, weights, scales, code, outs)
    for bias, b in zip(biases, lora_b, strict=True):
        _check_bias(op, x, bias, b)


def _check_coded(
    op: str, x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], code: Tensor, outs: Sequence[int]
) -> None:
    width = x.shape[-1]
    _require(
        code.dtype == torch.float32 and code.shape == (16,) and code.device == x.device,
        f"{op}: code must be float32 [16] on the device of x, not {code.dtype} {list(code.shape)} on {code.device}",
    )
    blocks = scales[0].shape[-1] if scales[0].dim() else 0
    _require(
        blocks > 0 and width % blocks == 0 and width // blocks % FEATURES_OF_A_SCALE == 0,
        f"{op}: scales is {list(scales[0].shape)} for {width} features: each scale must stand for the same number of them, a "
        f"multiple of {FEATURES_OF_A_SCALE}",
    )
    for weight, scale, out in zip(weights, scales, outs, strict=True):
        shape = (out, width // 2)
        _require(
            weight.dtype == torch.uint8 and weight.shape == shape and weight.device == x.device,
            f"{op}: a weight must be uint8 {list(shape)} on the device of x, two features in a byte, not {weight.dtype} "
            f"{list(weight.shape)} on {weight.device}",
        )
        shape = (out, blocks)
        _require(
            scale.dtype == torch.float32 and scale.shape == shape and scale.device == x.device,
            f"{op}: scales must be float32 {list(shape)} on the device of x for every linear of the group, not {scale.dtype} "
            f"{list(scale.shape)} on {scale.device}: dequantise scales that are quantised themselves",
        )


def padded_to_tiles(out: int, in_features: int) -> tuple[int, int]:
    """The sizes of a weight of int4, as torchao pads it."""
    rows, features = kernels.INT4_ROWS, kernels.INT4_FEATURES
    return -(-out // rows) * rows, -(-in_features // features) * features


def _check_tiles(op: str, x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], outs: Sequence[int]) -> None:
    _, width = padded_to_tiles(1, x.shape[-1])
    groups = scales[0].shape[0] if scales[0].dim() else 0
    _require(
        groups > 0 and width % groups == 0 and width // groups in INT4_GROUPS,
        f"{op}: scales is {list(scales[0].shape)} for {x.shape[-1]} features, padded to {width}: one must stand for "
        f"{', '.join(map(str, INT4_GROUPS))} of them",
    )
    for weight, scale, out in zip(weights, scales, outs, strict=True):
        rows, _ = padded_to_tiles(out, x.shape[-1])
        shape: tuple[int, ...] = (rows // kernels.INT4_ROWS, width // 128, 32, 4)
        _require(
            weight.dtype == torch.int32 and weight.shape == shape and weight.device == x.device,
            f"{op}: without a code a weight must be int32 {list(shape)} on the device of x, in torchao's tiles, not "
            f"{weight.dtype} {list(weight.shape)} on {weight.device}",
        )
        shape = (groups, rows, 2)
        _require(
            scale.dtype == torch.bfloat16 and scale.shape == shape and scale.device == x.device,
            f"{op}: without a code scales must be bfloat16 {list(shape)} (scale, zero) on the device of x for every linear of "
            f"the group, not {scale.dtype} {list(scale.shape)} on {scale.device}",
        )


def check_expand(
    hidden: Tensor, experts: Tensor, gates: Tensor, bases: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> None:  # fmt: skip
    n = len(lora_b)
    _require(1 <= n <= kernels.MAX_GROUP, f"expand: a group has 1 to {kernels.MAX_GROUP} linears, not {n}")
    _require(n == len(bases) == len(biases) == len(scalings), "expand: the lists differ in length")
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
    for b, base, bias in zip(lora_b, bases, biases, strict=True):
        same = b.dim() == 3 and b.shape[0] == lora_b[0].shape[0]
        _require(same, "expand: every lora_b must be [E, out, r], with the same number of experts")
        num_experts, out, rank = b.shape
        _require(
            num_experts <= kernels.MAX_EXPERTS and rank <= kernels.MAX_RANK,
            f"expand: {num_experts} experts of rank {rank}, at most {kernels.MAX_EXPERTS} and {kernels.MAX_RANK}",
        )
        _check_alike("expand", "a lora_b", b, "hidden", hidden)
        _check_bias("expand", hidden, bias, b)
        fits = base.dtype == hidden.dtype and base.shape == (len(hidden), out) and base.device == hidden.device
        _require(fits, f"expand: a base must be [{len(hidden)}, {out}], in the dtype of hidden, not {list(base.shape)}")
        width += num_experts * rank
    _require(width == hidden.shape[1], f"expand: hidden has {hidden.shape[1]} columns, the experts have {width} ranks")
    _require(hidden.device == experts.device == gates.device, "expand: tensors are on several devices")


def check_deltas(
    bases: Sequence[Tensor], x: Tensor, experts: Tensor, gates: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> None:  # fmt: skip
    _check_group("deltas", x, experts, gates, lora_a, lora_b, bases, scalings)
    for base, b in zip(bases, lora_b, strict=True):
        _require(
            base.shape == (*x.shape[:-1], b.shape[1]), f"deltas: a base {list(base.shape)} does not fit x and lora_b"
        )
        _check_alike("deltas", "a base", base, "x", x)


def check_merge(
    weights: Sequence[Tensor], sources: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float], transposed: Sequence[bool], experts: Tensor, gates: Tensor,
    old_experts: Tensor | None = None, old_gates: Tensor | None = None,
) -> None:  # fmt: skip
    lengths = {len(entries) for entries in (weights, sources, lora_a, lora_b, scalings, transposed)}
    _require(len(lengths) == 1, "merge: the lists differ in length")
    _require(experts.dim() == 1 and experts.shape == gates.shape, "merge: experts and gates must be [k], of one token")
    _require((old_experts is None) == (old_gates is None), "merge: old_experts and old_gates go together")
    if old_experts is not None and old_gates is not None:
        same = old_experts.shape == experts.shape and old_gates.shape == gates.shape
        _require(same, f"merge: old_experts and old_gates must be {list(experts.shape)}, as the new ones")
        _check_alike("merge", "old_experts", old_experts, "experts", experts)
        _check_alike("merge", "old_gates", old_gates, "gates", gates)
    for weight, source, a, b, swapped in zip(weights, sources, lora_a, lora_b, transposed, strict=True):
        _check_experts("merge", a.new_empty(1, a.shape[2]), experts, gates, a, b)
        shape = (a.shape[2], b.shape[1]) if swapped else (b.shape[1], a.shape[2])
        _require(weight.shape == source.shape == shape, f"merge: a weight is {list(weight.shape)}, not {list(shape)}")
        for name, each in (("a weight", weight), ("a source", source)):
            _check_alike("merge", name, each, "its experts", a)


# ------------------------------------------------------------------------------------------------------------ fakes


def _route_fake(x: Tensor, router: Tensor, top_k: int, normalize: bool, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    check_route(x, router, top_k, top_p)
    shape = (*x.shape[:-1], top_k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


def _route_context_fake(
    x: Tensor, router: Tensor, previous: Tensor, decay: float, top_k: int, normalize: bool, real: Tensor | None = None,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_route_context(x, router, previous, decay, top_k, real, top_p)
    experts, gates = _route_fake(x, router, top_k, normalize, top_p)
    return experts, gates, previous.new_empty(previous.shape)


def _linear_fake(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float], transposed: bool = False,
) -> list[Tensor]:  # fmt: skip
    check_linear(x, experts, gates, weights, biases, lora_a, lora_b, scalings, transposed)
    return [x.new_empty((*x.shape[:-1], b.shape[1])) for b in lora_b]


def _linear_4bit_fake(
    x: Tensor, experts: Tensor, gates: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], code: Tensor | None,
    biases: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_linear_4bit(x, experts, gates, weights, scales, code, biases, lora_a, lora_b, scalings)
    return [x.new_empty((*x.shape[:-1], b.shape[1])) for b in lora_b]


def _expand_fake(
    hidden: Tensor, experts: Tensor, gates: Tensor, bases: Sequence[Tensor], biases: Sequence[Tensor | None],
    lora_b: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_expand(hidden, experts, gates, bases, biases, lora_b, scalings)
    return [hidden.new_empty((hidden.shape[0], b.shape[1])) for b in lora_b]


def _deltas_fake(
    bases: Sequence[Tensor], x: Tensor, experts: Tensor, gates: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    check_deltas(bases, x, experts, gates, lora_a, lora_b, scalings)
    return [x.new_empty(base.shape) for base in bases]


for _name, _fake in (
    ("route", _route_fake), ("route_context", _route_context_fake), ("linear", _linear_fake),
    ("linear_4bit", _linear_4bit_fake), ("expand", _expand_fake), ("deltas", _deltas_fake), ("merge", check_merge),
):  # fmt: skip
    torch.library.register_fake(f"loraswitch::{_name}", _fake, lib=library)
