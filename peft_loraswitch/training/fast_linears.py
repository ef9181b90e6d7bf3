"""When an adapted linear trains by `group_function.py`, and with which others: those that receive the very same tensor.

The first linear of a group computes all of it and leaves the others' outputs for them (`learned_groups.py` says which those are,
`group_plans.py` how they are computed). If one of them then sees another tensor, it computes for itself, and leaves the group.

Where this path does not apply, the layer's own form runs, with one line of log for each reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..routing.frame import RoutingFrame
from .four_bit_weights import four_bit_weights
from .group_function import autocast_dtype, run
from .group_plans import Plan, active_of, adapters_of, is_hooked, key_of, make_plan, plain_form
from .learned_groups import SharedInputs, shared_inputs_of
from .pair_products import pays

# Modules of bitsandbytes whose forward returns a tensor that nobody else holds.
FRESH = ("Linear4bit", "Linear8bitLt")
_plain = 0


@contextmanager
def plain() -> Iterator[None]:
    """Within it, linears train in the layer's own form, to compare with."""
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1


def forward(layer: Any, x: Tensor, frame: RoutingFrame) -> Tensor | None:
    """The output [..., out] of the adapted linear `layer` for x [..., in], in a forward that trains; None where its own form
    must be run."""
    if _plain:
        return None
    if frame.adapter_names is not None:
        return plain_form("a batch has an adapter for each sample (adapter_names)")
    inputs: SharedInputs = frame.shared_inputs or shared_inputs_of(layer.routing_state, frame)
    number = id(layer)
    waiting = inputs.waiting.pop(number, None) if inputs.waiting else None
    if inputs.learning or number not in inputs.known.seen:
        inputs.look(layer, x)
    if waiting is not None:
        if waiting[0] is x and waiting[1] == x._version:
            return waiting[2]
        inputs.drop(number)
    if frame.given and any(adapter in frame.given for adapter in adapters_of(layer)):
        return None  # the layer multiplies each sample by its own expert alone, which is less work
    plan = _plan(layer, inputs, x)
    if not plan.adapters:
        return None
    if inputs.waiting:  # for linears of a group that was not asked for all of its outputs
        inputs.drop_waiting()
    inputs.newest = number
    results: Sequence[Tensor] | None = None if plan.own else [one.base_layer(x) for one in plan.layers]
    for adapter in plan.adapters:
        results = _with_adapter(adapter, plan, x, frame, inputs, results)
    assert results is not None
    for one, result in zip(plan.layers[1:], results[1:], strict=True):
        inputs.waiting[id(one)] = (x, x._version, result)
    return results[0]


def _with_adapter(
    adapter: str, plan: Plan, x: Tensor, frame: RoutingFrame, inputs: SharedInputs, results: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    """The outputs of the plan's linears with one adapter, added to `results`, or to what their base layers make of x."""
    layers, first = plan.layers, plan.layers[0]
    routing = None
    if adapter in frame.used and adapter in frame.trained and plan.routed[adapter]:  # nothing to note down any more
        routing = frame.routings.get(adapter)
    if routing is None:
        routing = first.routing_for(adapter, frame, x)
        if adapter not in frame.trained and any(one.trains(adapter) for one in layers[1:]):
            frame.trained.add(adapter)
    gates, chosen, total = inputs.operands(adapter, routing, x, first.name)
    downs = [one._modules["loraswitch_A"]._modules[adapter] for one in layers]
    ups = [one._modules["loraswitch_B"]._modules[adapter] for one in layers]
    a = [each._parameters["weight"] if each.alone is None else each.whole() for each in downs]
    b = [each._parameters["weight"] if each.alone is None else each.whole() for each in ups]
    experts, slots, order = gates.shape[1], routing.experts.shape[-1], None
    assert plan.dtype is not None
    if pays(x.device, plan.dtype, gates.shape[0], slots, experts, plan.ranks[adapter]):
        order = inputs.order(adapter, routing, experts, x.device)
    slots = 0 if order is None else slots
    kept = None if inputs.kept is None else (inputs.kept, (plan, adapter, slots))
    if results is None:
        last = inputs.checkpointed and id(first) in inputs.known.last
        spec = plan.spec(adapter, False, (), inputs.checkpointed, last, slots)
        bases = [one._modules["base_layer"]._parameters for one in layers]
        weights, biases = [base["weight"] for base in bases], [base["bias"] for base in bases]
        if plan.packed:
            weights = four_bit_weights(weights, inputs.second_run)
        return run(spec, x, gates, chosen, a, b, weights, biases, order, kept, total)
    # What this path has computed itself may be added to; of a base layer's result it must be known that nobody holds it.
    again = plan.own or adapter != plan.adapters[0]
    free = tuple(again or _is_fresh(one.base_layer, y) for one, y in zip(layers, results, strict=True))
    spec = plan.spec(adapter, True, free, inputs.checkpointed, False, slots)
    return run(spec, x, gates, chosen, a, b, results, (), order, kept, total)


def _plan(layer: Any, inputs: SharedInputs, x: Tensor) -> Plan:
    """That of the group of `layer`, for an input like x, here and now."""
    place = (id(layer), x.dtype, x.device, autocast_dtype(x))
    if inputs.second_run:
        plan = inputs.plans.get(place)
        if plan is not None and active_of(layer) == plan.active:  # if not, the block's second run is refused
            return plan
    key = key_of(place, x)
    plan = inputs.known.plans.get(key)
    if plan is None or not plan.looked.is_current():
        plan = inputs.known.plans[key] = make_plan(layer, inputs.others(layer), x)
    if inputs.checkpointed:
        inputs.plans[place] = plan
    return plan


def _is_fresh(base: Any, result: Tensor) -> bool:
    known = type(base).__name__ in FRESH and type(base).__module__.startswith("bitsandbytes.")
    return known and not is_hooked(base) and not result._is_view() and not (result.is_leaf and result.requires_grad)
