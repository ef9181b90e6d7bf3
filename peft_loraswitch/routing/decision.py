"""The routing decision: which experts a token uses, and with which gates.

`route` turns the router's logits into a `Routing`, taken once per token (by `decide`) and followed by every adapted layer.
LoRA-Switch, arXiv 2405.17741: softmax, top-k. With `top_p` a token that is sure of fewer experts takes fewer (nucleus sampling's
rule, arXiv 1904.09751; for experts arXiv 2403.07652).

Shared experts (DeepSeekMoE, arXiv 2401.06066) are experts that every token uses, with the gate 1 / top_k: what even routing
gives a chosen one, so that both kinds learn at the same pace. In a layer's stack they come after the routed ones, and in a
`Routing` after the chosen ones, so that layers and kernels need not tell them apart.

The base expert (a null expert, AdaMoE, arXiv 2406.13233) is the choice to add nothing. The router has a last logit for it, but
no layer has weights: in a `Routing` its index is the first behind the layers' stack, and whoever looks up an expert there
finds none. Of equal logits its is the last one. Experts that `top_p` leaves out have that index, too, with gate 0: no layer and
no kernel reads anything for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .options import RoutingOptions


class JoinPoint(NamedTuple):
    """Where the losses of one decision join: the gradient to deliver (see `training/loss_joining.py`), and the scalar zero that
    `output.loss` needs added."""

    gradient: Any
    loss_scale: torch.Tensor


@dataclass
class Routing:
    """One decision for the tokens in flight.

    Attributes:
        experts: int64 [*token_shape, top_k + num_shared_experts], indices of the chosen experts, best first, then those of
            the shared ones. Behind all of them, their number, is the null index: the base expert's, and that of each expert
            that `top_p` has left out.
        gates: float32, same shape, their weights; those of the shared experts are 1 / top_k.
        dense_gates: float32 [*token_shape, num_experts + num_shared_experts], the gates scattered over all experts, 0
            where not chosen. This is what layers multiply with, and the one path by which gradients reach the router.
        router_input: [*token_shape, in_features], detached; what the balance losses are computed from. None outside of
            training, where nothing needs it.
        has_null_index: the null index may be among `experts`.
        logits: float32 [*token_shape, choices], detached, if they are not what the router makes of `router_input` alone (a
            context that begins in a cache); else None.
        is_given: no router took it; it has the one chosen expert first (see `routing/given.py`).
        samples: int64 [samples]: all that a token of this sample uses is this expert, with gate 1. None if it is not so.
        join_point: where the router's losses join, see `training/loss_joining.py`; None if they join elsewhere, or not.
    """

    experts: torch.Tensor
    gates: torch.Tensor
    dense_gates: torch.Tensor
    router_input: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    join_point: JoinPoint | None = None
    has_null_index: bool = False
    is_given: bool = False
    samples: torch.Tensor | None = None
    _scaled: dict[tuple[float, torch.dtype], torch.Tensor] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )
    _elsewhere: dict[torch.device, Routing] = field(init=False, default_factory=dict, repr=False, compare=False)
    _chosen: torch.Tensor | None = field(init=False, default=None, repr=False, compare=False)

    @property
    def token_shape(self) -> torch.Size:
        return self.experts.shape[:-1]

    def dense_gates_for(self, x: torch.Tensor, layer_name: str) -> torch.Tensor:
        """`dense_gates` in token shape and device of a layer's input x [..., in_features], checked: [..., all experts].

        Raises:
            RuntimeError: x does not hold the tokens that were routed.
        """
        return self._as_seen(self.dense_gates, x, layer_name)

    def chosen(self) -> torch.Tensor | None:
        """bool [*token_shape, all experts]: which experts the token chose, also those whose gate is 0. None if every token
        chose all of them. Made once for all layers."""
        stacked = self.dense_gates.shape[-1]
        if self.experts.shape[-1] == stacked and not self.has_null_index:
            return None
        if self._chosen is None:
            # a column for the null index, which is cut off; numbers, because torch.jit.trace takes no bool for one
            columns = stacked + int(self.has_null_index)
            chosen = self.dense_gates.new_zeros((*self.token_shape, columns), dtype=torch.bool)
            self._chosen = chosen.scatter(-1, self.experts, 1)[..., :stacked]
        return self._chosen

    def chosen_for(self, x: torch.Tensor, layer_name: str) -> torch.Tensor | None:
        """`chosen()`, as `dense_gates_for` gives the gates."""
        chosen = self.chosen()
        return None if chosen is None else self._as_seen(chosen, x, layer_name)

    def chosen_rows(self) -> torch.Tensor | None:
        """`chosen()` as [tokens, all experts]."""
        chosen = self.chosen()
        return None if chosen is None else chosen.reshape(-1, chosen.shape[-1])

    def _as_seen(self, each: torch.Tensor, x: torch.Tensor, layer_name: str) -> torch.Tensor:
        """`each` [*token_shape, all experts] in token shape and device of x."""
        shape = x.shape[:-1]
        if each.device != x.device:
            each = each.to(x.device)
        if shape == self.token_shape:
            return each
        # Some models flatten (batch, sequence) on the way (OPT's decoder); a same-rank difference is other tokens.
        if len(shape) != len(self.token_shape) and shape.numel() == self.token_shape.numel():
            return each.reshape(*shape, each.shape[-1])
        raise RuntimeError(
            f"LoRA-Switch routed tokens of shape {tuple(self.token_shape)}, but the adapted layer '{layer_name}' sees "
            f"{tuple(shape)}: it does not process the tokens that were routed (a pooler, cross-attention, a table of "
            "positions or an expert of the backbone does not). Exclude it with exclude_modules."
        )

    def on(self, device: torch.device) -> Routing:
        """This decision on another device, for the layers that a model spread over several (`device_map`) has there; copied
        once for all of them."""
        if self.experts.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Routing(
                self.experts.to(device),
                self.gates.to(device),
                self.dense_gates.to(device),
                has_null_index=self.has_null_index,
                is_given=self.is_given,
                samples=None if self.samples is None else self.samples.to(device),
            )
        return self._elsewhere[device]

    def scaled(self, scaling: float, dtype: torch.dtype) -> torch.Tensor:
        """`scaling * dense_gates` in `dtype`, [tokens, all experts]: made once for all layers that ask for the same."""
        scaled = self._scaled.get((scaling, dtype))
        if scaled is None:
            scaled = (self.dense_gates.reshape(-1, self.dense_gates.shape[-1]) * scaling).to(dtype)
            self._scaled[scaling, dtype] = scaled
        return scaled


def decide(logits: torch.Tensor, top_k: int, normalize: bool, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts, and their gates. The rule is the same on every device, in the kernels, and in compiled and exported
    code: the highest logits, best first; of equal ones the lowest expert index first.

    0.0 and -0.0 are equal. NaN and Inf count as the largest finite number, -Inf as the smallest. A token with NaN or Inf
    among its logits, or with nothing but -Inf, gets valid experts, and NaN for each of its gates, so that its outputs show it.

    One expert with a normalised gate is the hard gate: exactly 1, so that a token gets what its expert computes and no fraction
    of it. The router learns all the same: in backward the gate counts as the softmax that it stands for (a straight-through
    gradient, arXiv 1308.3432), as it would with `normalize=False`. So it is for a token of which `top_p` leaves one expert.

    Args:
        logits: float32 [..., num_experts].
        normalize: rescale the gates, which are the experts' softmax, to sum 1 over those that are taken.
        top_p: experts are taken, best first, until their softmax sums to at least this; at least one, at most `top_k`. In
            (0, 1]; 1 takes `top_k`. In place of each expert that is not taken stands the index num_experts, with gate 0.

    Returns:
        (experts int64 [..., top_k], gates float32 [..., top_k]); gradients flow through the gates.
    """
    # By logits: the exponentials of different ones may be equal. Not by topk, which leaves the order of equal values open,
    # but by argmax, which returns the first of them; a stable sort is slower for many experts, and exporters do not know it.
    heights = torch.nan_to_num(logits.detach(), nan=torch.finfo(logits.dtype).max)
    best = [heights.argmax(dim=-1, keepdim=True)]
    while len(best) < top_k:
        heights = heights.scatter(-1, best[-1], -math.inf)  # not again
        best.append(heights.argmax(dim=-1, keepdim=True))
    experts = torch.cat(best, dim=-1)
    gates = torch.softmax(logits, dim=-1).gather(-1, experts)
    if top_p < 1 and top_k > 1:
        taken = _taken(gates.detach(), top_p)
        experts, gates = experts.where(taken, logits.shape[-1]), gates.where(taken, 0.0)
    if not normalize:
        return experts, gates
    if top_k == 1:
        return experts, _hard(gates)
    normalized = gates / gates.sum(dim=-1, keepdim=True)
    if top_p < 1:
        normalized = torch.where(
            taken[..., 1:2], normalized, torch.cat([_hard(gates[..., :1]), gates[..., 1:]], dim=-1)
        )
    return experts, normalized


def _taken(gates: torch.Tensor, top_p: float) -> torch.Tensor:
    """bool, the shape of gates [..., top_k], which are the softmax of the chosen, best first: which of them are taken. With NaN
    all are, so that it shows. One addition after the other, as the kernels do it, for sums to be the same everywhere."""
    reached, taken = gates[..., :1], [torch.ones_like(gates[..., :1], dtype=torch.bool)]
    for j in range(1, gates.shape[-1]):
        taken.append(~(reached >= top_p))
        reached = reached + gates[..., j : j + 1]
    return torch.cat(taken, dim=-1)


def _hard(gates: torch.Tensor) -> torch.Tensor:
    """1 in value, the softmax in its gradient. Not gates / gates: compilers divide by approximations on some devices, and its
    gradient is zero."""
    return 1.0 + (gates - gates.detach())


def route(logits: torch.Tensor, options: RoutingOptions) -> Routing:
    """`decide()` by these options, and the shared experts.

    Args:
        logits: float32 [*token_shape, options.num_choices].
    """
    experts, gates = decide(logits, options.top_k, options.normalize_gates, options.top_p)
    routing = routing_of(experts, gates, options)
    routing.chosen()  # here, because a checkpointed block that is compiled must not change what lies outside of it
    return routing


def routing_of(experts: torch.Tensor, gates: torch.Tensor, options: RoutingOptions) -> Routing:
    """The decision for these choices and gates, [*token_shape, top_k] each, and the shared experts.

    Args:
        experts: as `decide` returns them: with `options.base_expert`, `options.num_experts` is the base expert; with
            `options.top_p` below 1, `options.num_choices` stands for those that are not taken.
    """
    has_null_index = options.base_expert or options.top_p < 1
    if options.base_expert:
        # A token that could not be decided has NaN for its gates, and must show it: the base expert would hide it.
        undecided = gates.isnan() & (experts == options.num_experts)
        experts = experts.where(~undecided, 0)
    columns = options.num_choices + (options.top_p < 1)
    dense_gates = gates.new_zeros((*gates.shape[:-1], columns)).scatter(-1, experts, gates)
    if has_null_index:
        dense_gates = dense_gates[..., : options.num_experts]
        experts = experts.where(experts < options.num_experts, options.num_stacked)
    routing = Routing(experts=experts, gates=gates, dense_gates=dense_gates, has_null_index=has_null_index)
    if options.num_shared_experts == 0:
        return routing
    shared = shared_routing(options.num_shared_experts, options.top_k, routing.token_shape, routing.experts.device)
    return Routing(
        experts=torch.cat([routing.experts, shared.experts + options.num_experts], dim=-1),
        gates=torch.cat([routing.gates, shared.gates], dim=-1),
        dense_gates=torch.cat([routing.dense_gates, shared.dense_gates], dim=-1),
        has_null_index=has_null_index,
    )


def shared_routing(num_shared_experts: int, top_k: int, token_shape: torch.Size, device: torch.device) -> Routing:
    """All shared experts for every token: what a linear follows that has no others (see `LoRASwitchConfig.router_module`)."""
    gates = torch.full((*token_shape, num_shared_experts), 1 / top_k, dtype=torch.float32, device=device)
    experts = torch.arange(num_shared_experts, device=device).expand(gates.shape).contiguous()
    return Routing(experts=experts, gates=gates, dense_gates=gates)
