"""What a group computes: by one op for few tokens, by a packed call or dense products for many, or beside the base layer's own
forward where the ops cannot read its weight, or not for so many tokens (weights of 4 bits)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels, ops
from ..layer import LoRASwitchLinear
from ..routing.decision import Routing
from ..tensor_parallel import is_split
from .eager_launch import DirectDeltas, DirectFewTokens, DirectGroup, launchable
from .fused_group import FusedGroup, has_hooks, say_what_is_faster
from .joined_weights import expandable


def compute(layer: LoRASwitchLinear, group: FusedGroup, x: Tensor, routing: Routing) -> Tensor:
    """The output of `layer` with the group's adapter, unmerged; the outputs of the group's other linears are left for them.
    A compiler apart, the group is up to date."""
    reads_weights = group.plain or group.four_bit
    if torch.compiler.is_compiling() and reads_weights and has_hooks(group.number):
        return LoRASwitchLinear.forward(layer, x)
    most = group.compiled_tokens if torch.compiler.is_compiling() else group.few_tokens
    few = x.numel() // x.shape[-1] <= most and group.within
    if not reads_weights or (group.four_bit and not few):
        return _beside_base(layer, group, x, routing)
    fresh = None
    if group.kernels and group.within and not torch.compiler.is_compiling() and launchable(x):
        fresh = _made_direct(group, x, routing)
    if group.four_bit:
        return group.leave(x, ops.linear_4bit(x, routing.experts, routing.gates, *group.four_bit_parts()))
    if few:
        return group.leave(x, ops.linear(x, routing.experts, routing.gates, *group.parts(), group.transposed))
    results = None if fresh is None else fresh(x, routing)
    return group.leave(x, _dense(group, x, routing) if results is None else results)


def _made_direct(group: FusedGroup, x: Tensor, routing: Routing) -> DirectFewTokens | None:
    """`group.direct`, if it had to be made."""
    if group.direct is not None:
        return None
    how = group.fingerprint, group.adapter, group.few_tokens, group.routed
    if group.four_bit:
        group.direct = DirectFewTokens(group.pack_four_bits(), *how)
        return group.direct
    packed = _packed(x, routing, *group.parts(), group.transposed)
    if packed is None:
        return None
    group.direct = DirectGroup(packed, *how, group.live)
    return group.direct


def _packed(
    x: Tensor, routing: Routing, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], lora_a: list[Tensor],
    lora_b: list[Tensor], scalings: list[float], transposed: bool = False,
) -> kernels.PackedGroup | None:  # fmt: skip
    """A group as the kernels take it, with a line of log if they are slow for it; None if they cannot read it as it lies."""
    if not all(t.is_contiguous() for t in (*weights, *biases, *lora_a, *lora_b) if t is not None):
        return None
    packed = kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, transposed)
    kernels.warn_if_generic(packed, x.view(-1, x.shape[-1])[:1], routing.experts.flatten(0, -2)[:1])
    return packed


# Compiled code goes by `expand` for up to so many tokens, if `expand` takes so many ranks of all experts of a linear: one launch
# for a group, in place of a copy of B, a product and a sum for each linear.
_EXPANDED_TOKENS = 256


def _dense(group: FusedGroup, x: Tensor, routing: Routing) -> list[Tensor]:
    """The outputs of a group for many tokens: one shrink for the whole group, and a product more for each linear."""
    weights, biases, lora_a, lora_b, scalings = group.parts()
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() and rows.shape[0] <= _EXPANDED_TOKENS and _by_expand(group, lora_b):
        return _expanded(group, x, routing)
    results = []
    hidden = _hidden(rows, routing, lora_a, scalings)
    for h, weight, bias, b in zip(hidden, weights, biases, lora_b, strict=True):
        result = ops.dense_linear(rows, h, weight, bias, ops.wide(b), group.transposed)
        results.append(result.view(*x.shape[:-1], b.shape[1]))
    return results


def _by_expand(group: FusedGroup, lora_b: list[Tensor]) -> bool:
    return bool(group.kernels and group.within) and expandable(lora_b)


def _expanded(group: FusedGroup, x: Tensor, routing: Routing) -> list[Tensor]:
    """The same with gates, B, bias and sum in one launch; one product makes the rest if the weights lie in one matrix."""
    weights, biases, lora_a, lora_b, _ = group.parts()
    rows = x.reshape(-1, x.shape[-1])
    bases: list[Tensor]
    matrix = group.joined_matrix()
    if matrix is not None:
        outs = [b.shape[1] for b in lora_b]
        *bases, hidden = F.linear(rows, matrix).split([*outs, matrix.shape[0] - sum(outs)], dim=1)
    else:
        say_what_is_faster(group.number)
        hidden = ops.all_hidden(rows, lora_a)
        bases = [F.linear(rows, weight.T if group.transposed else weight) for weight in weights]
    return _add_experts(group, bases, hidden, biases, x, routing)


def _add_experts(
    group: FusedGroup, bases: list[Tensor], hidden: Tensor, biases: Sequence[Tensor | None], x: Tensor, routing: Routing
) -> list[Tensor]:  # fmt: skip
    """bases [T, out] each plus biases and what the experts make of their hidden [T, sum of E * r], in one launch."""
    _, lora_b, scalings = group.experts()
    experts, gates = (each.reshape(-1, each.shape[-1]) for each in (routing.experts, routing.gates))
    results = ops.expand(hidden, experts, gates, bases, biases, lora_b, scalings)
    return [result.view(*x.shape[:-1], b.shape[1]) for result, b in zip(results, lora_b, strict=True)]


def _hidden(rows: Tensor, routing: Routing, lora_a: list[Tensor], scalings: list[float]) -> list[Tensor]:
    """What the experts of each linear make of x [T, in], times gates and scaling: [T, E * r] each."""
    gates = [routing.scaled(scaling, rows.dtype) for scaling in scalings]
    shapes = [a.shape[:2] for a in lora_a]
    return ops.group_hidden(ops.all_hidden(rows, lora_a), shapes, gates, routing.chosen_rows())


def _beside_base(layer: LoRASwitchLinear, group: FusedGroup, x: Tensor, routing: Routing) -> Tensor:
    """The base layers' own forwards (quantised, hooked), one after the other, and what all their experts add."""
    base_layers, (lora_a, lora_b, scalings) = group.base_layers(), group.experts()
    # Casts of another dtype than before, since the base layer is not plain any more; or several processes share one; or
    # accelerate has the experts somewhere else.
    if group.offloaded or lora_a[0].dtype != x.dtype or any(is_split(base) for base in base_layers):
        return LoRASwitchLinear.forward(layer, x)
    bases = [base_layer(x) for base_layer in base_layers]
    fit = all(base.dtype == x.dtype and base.device == x.device for base in bases) and x.dtype in ops.FLOATS
    if x.numel() // x.shape[-1] <= group.few_tokens and group.within and fit:
        results = None
        if group.kernels and not torch.compiler.is_compiling() and launchable(x):
            direct = _deltas_of(group, x, routing)
            results = None if direct is None else direct(bases, x, routing)
        if results is None:
            results = ops.deltas(bases, x, routing.experts, routing.gates, lora_a, lora_b, scalings)
        return group.leave(x, results)
    rows = x.reshape(-1, x.shape[-1])
    if fit and _by_expand(group, lora_b):
        flat = [base.reshape(-1, base.shape[-1]) for base in bases]  # a quantised base layer may return a view
        hidden = ops.all_hidden(rows, lora_a)
        return group.leave(x, _add_experts(group, flat, hidden, [None] * len(flat), x, routing))
    hiddens = _hidden(rows, routing, lora_a, scalings)
    return group.leave(x, [_added(base, h, b) for base, h, b in zip(bases, hiddens, lora_b, strict=True)])


def _deltas_of(group: FusedGroup, x: Tensor, routing: Routing) -> DirectDeltas | None:
    """`group.deltas`, made if need be. The group is up to date, so what was packed is."""
    if group.deltas is None:
        nothing = [None] * group.size
        packed = _packed(x, routing, nothing, nothing, *group.experts())
        group.deltas = None if packed is None else DirectDeltas(packed)
    return group.deltas


def _added(base: Tensor, hidden: Tensor, lora_b: Tensor) -> Tensor:
    """base [..., out] plus what the experts make of `hidden` [T, E * r], in the dtype of the base."""
    if base.dtype != hidden.dtype:
        return base + (hidden @ ops.wide(lora_b).T).to(base.dtype).view(base.shape)
    # Out of place: a quantised base layer may return a view.
    return torch.addmm(base.reshape(-1, base.shape[-1]), hidden, ops.wide(lora_b).T).view(base.shape)
