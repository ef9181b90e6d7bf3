"""The end of a forward: its tokens are counted, and in training the router's losses join its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..routing.decision import JoinPoint, Routing
from ..routing.frame import RoutingFrame, RoutingState
from ..routing.options import RoutingOptions
from ..routing.router import full_precision
from ..routing.statistics import RoutedTokens
from ..tensor_parallel import num_sharing
from ..transforms import is_transformed, under_transform
from .loss_joining import RouterGradient, add_to_loss, add_under_transform, join_at_outputs
from .losses import Losses, losses_of, value_of, whole_weight


def finish_forward(state: RoutingState, frame: RoutingFrame, output: Any) -> Any:
    """At the end of a forward: count the routed tokens, and in training join the losses to `output` (returned)."""
    passes = (*frame.earlier, frame)
    if not torch.compiler.is_compiling() and under_transform():
        return _finish_under_transform(state, passes, output)
    for adapter in dict.fromkeys(name for each in passes for name in each.routings):
        router_layer = state.router_layers.get(adapter)
        routed = [(each, each.routings[adapter]) for each in passes if adapter in each.routings]
        if router_layer is None or any(routing.router_input is None for _, routing in routed):
            continue  # decided before anybody wanted to know
        options = router_layer.routing_options[adapter]
        router = router_layer.loraswitch_router[adapter]
        own = router_layer.loraswitch_record[adapter]
        records = [recorder.record_like(adapter, own) for recorder in state.recorders]
        if frame.training:
            records.append(own)
        losses = None
        with torch.no_grad(), full_precision(router.weight.device):
            weight = whole_weight(router)
            batches = [_routed_tokens(each, adapter, routing, weight, options) for each, routing in routed]
            for record in records:
                for batch in batches:
                    record.add(batch)
            asked = not all(routing.is_given for _, routing in routed)
            if (
                asked
                and frame.training
                and router.weight.requires_grad
                and (options.aux_loss_coef or options.z_loss_coef)
            ):
                losses = losses_of(router_layer.loraswitch_pending[adapter], router.weight, options, batches)
        if losses is not None:
            points = [routing.join_point for _, routing in routed]
            output = _join(output, losses, points, router, _weight_in_loss(state, frame, losses.micro_batches))
    return output


def _finish_under_transform(state: RoutingState, passes: Sequence[RoutingFrame], output: Any) -> Any:
    """The same under a transform of torch.func, which refuses writes to what lies outside of it: nothing is counted, and losses
    are those of this forward alone, whatever gradients are accumulated outside."""
    frame = passes[-1]
    for adapter in dict.fromkeys(name for each in passes for name in each.routings):
        router_layer = state.router_layers.get(adapter)
        routed = [(each, each.routings[adapter]) for each in passes if adapter in each.routings]
        if router_layer is None or not frame.training or all(routing.is_given for _, routing in routed):
            continue
        options, weight = router_layer.routing_options[adapter], router_layer.loraswitch_router[adapter].weight
        trains = weight.requires_grad or is_transformed(weight)  # jvp asks for no gradient
        if trains and (options.aux_loss_coef or options.z_loss_coef):
            with full_precision(weight.device):
                # by logits with a graph to the weight, not those of the decision
                asked = [(each, replace(routing, logits=None)) for each, routing in routed]
                batches = [_routed_tokens(each, adapter, routing, weight, options) for each, routing in asked]
                value = _weight_in_loss(state, frame, 1.0) * value_of(options, batches)
            output = add_under_transform(output, value)
    return output


def _routed_tokens(
    frame: RoutingFrame, adapter: str, routing: Routing, weight: torch.Tensor, options: RoutingOptions
) -> RoutedTokens:
    assert routing.router_input is not None
    picks = 1 if routing.is_given else options.top_k
    chosen = routing.experts[..., :picks]  # without the shared experts, which nobody chose
    if options.base_expert:
        chosen = chosen.clamp(max=options.num_experts)  # its index is behind the shared ones' as well
    if options.top_p < 1:  # which leaves experts out by gate 0
        chosen = chosen.where(routing.gates[..., :picks] != 0, options.num_choices)
    x, experts = (each.reshape(-1, each.shape[-1]) for each in (routing.router_input, chosen))
    logits = None if routing.logits is None else routing.logits.reshape(-1, options.num_choices)
    return RoutedTokens(x, experts, frame.real_tokens(adapter, routing), options.num_choices, weight, logits)


def _join(
    output: Any,
    losses: Losses,
    points: Sequence[JoinPoint | None],
    router: nn.Module,
    weight_in_loss: torch.Tensor | float,
) -> Any:
    """`output` with the losses joined to what is differentiated of it."""
    fp16 = _is_fp16_autocast(losses.value.device.type)
    here = [point for point in points if point is not None]
    if len(here) == len(points):
        for point, gradient, differentiable in zip(here, losses.gradients, losses.differentiable, strict=True):
            point.gradient.complete(gradient, differentiable, fp16)
        zero = torch.stack([point.loss_scale for point in here]).sum()
    else:
        whole = RouterGradient()
        whole.complete(torch.stack(losses.gradients).sum(0), None, fp16)
        output, zero = join_at_outputs(output, whole_weight(router), whole)
    return add_to_loss(output, weight_in_loss * (losses.value + zero))


def _weight_in_loss(
    state: RoutingState, frame: RoutingFrame, micro_batches: torch.Tensor | float
) -> torch.Tensor | float:
    """What the losses are multiplied with so that they count once in the trainer's total.

    Trainers that pass `num_items_in_batch` sum the micro-batches' losses, and multiply by the number of batches that are computed
    at once (gradients are averaged over them): one in each process, or in each group that shares a model by tensor parallelism.
    The others divide each loss by the number of micro-batches. Whether a trainer has been told not to multiply
    (`average_tokens_across_devices=False`) cannot be seen from here.
    """
    if frame.num_items_in_batch is None:
        return micro_batches
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        sharing = max((num_sharing(layer.get_base_layer()) for layer in state.hooks.layers), default=1)
        return sharing / distributed.get_world_size()
    return 1.0


def _is_fp16_autocast(device_type: str) -> bool:
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
