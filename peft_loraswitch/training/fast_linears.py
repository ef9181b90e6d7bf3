"""When an adapted linear trains by `group_function.py`, and with which others: those that receive the very same tensor.

Which these are is learned in the first forward that trains, by looking at the tensors; that forward goes by the usual names, so
that for most models it has the same bits as those after it. A forward keeps what it knew when it began, because a checkpointed
block has to run again as it ran before. The first linear of a group computes all of it and leaves the others' outputs for them.
If one of them then sees another tensor, it computes for itself, and leaves the group.

What decides whether and how a group is computed is looked up once and kept (`Plan`), with a fingerprint of everything that the
answer depends on. Looking at that takes some microseconds a linear; tensors are never kept.

Where this path does not apply, the layer's own form runs, with one line of log for each reason.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..fingerprint import Fingerprint
from ..routing.frame import RoutingFrame, RoutingState
from ..tensor_parallel import is_split
from ..transforms import more_than_gradients
from .four_bit_weights import four_bit_form, four_bit_weights
from .gate_hidden import Columns
from .gate_sum import GateSum, summed
from .group_function import autocast_dtype, run
from .group_layout import KeptByBlock, Spec
from .pair_order import PairOrder, order_of
from .pair_products import pays

logger = logging.getLogger(__name__)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Modules of bitsandbytes whose forward returns a tensor that nobody else holds.
FRESH = ("Linear4bit", "Linear8bitLt")
# Linears of one module that receive one tensor in most models, in the order they run.
USUAL = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
PRODUCTS = (nn.Linear, Conv1D)
Groups = dict[int, tuple[Any, ...]]  # by the id of the first linear of each: the others
_said: set[str] = set()
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


class KnownGroups:
    """What one forward that trained has shown. Never changed, but for `plans`: forwards hold on to it.

    Attributes:
        seen: ids of the linears that it reached.
        last: ids of the first linear of those groups with which a checkpointed block ends.
        plans: how the group of a linear is computed, by `_key()`.
    """

    def __init__(self, groups: Groups, seen: frozenset[int], last: frozenset[int] = frozenset()) -> None:
        self.groups, self.seen, self.last = groups, seen, last
        self.plans: dict[Any, Plan] = {}


class Looked(Fingerprint):
    """All that a plan depends on, besides what is part of its key."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        super().__init__()

    def _take(self) -> list[Any]:
        seen: list[Any] = []
        try:
            for layer in self.layers:
                _look_at(layer, seen)
        except (KeyError, AttributeError):  # an adapter has been deleted
            return [object()]
        return seen


def _look_at(layer: Any, seen: list[Any]) -> None:
    """Add everything that matters of one linear to `seen`. No tensor and no module is among it, so a plan keeps none alive."""
    attributes = layer.__dict__
    modules, active = attributes["_modules"], attributes["_active_adapter"]
    base = modules["base_layer"]
    seen += (
        type(layer),
        "forward" in attributes,
        attributes["_disable_adapters"],
        _active(layer),
        attributes["training"],
        attributes["cast_input_dtype_enabled"],
        type(base),
        _hooked(base),
    )
    weights: list[Any] = []
    if type(base) in PRODUCTS:
        parameters = base._parameters
        weights += (parameters["weight"], parameters["bias"])
    else:
        form = four_bit_form(base)
        seen.append(form)
        if form is None:
            seen.append(is_split(layer.get_base_layer()))
        else:  # a weight of one class alone, which is none that is split
            weights.append(base._parameters["bias"])
    a_of, b_of = modules["loraswitch_A"]._modules, modules["loraswitch_B"]._modules
    for adapter in (active,) if type(active) is str else active:
        if adapter not in a_of:
            continue
        options = attributes["routing_options"][adapter]
        dropout = modules["loraswitch_dropout"]._modules[adapter]
        seen += (adapter, attributes["scaling"][adapter], options, type(dropout))
        down, up = a_of[adapter], b_of[adapter]
        seen += (_hooked(down), down.alone, _hooked(up), up.alone)
        weights += (down._parameters["weight"], up._parameters["weight"])
    for weight in weights:
        seen += (None,) if weight is None else (
            # attributes: DeepSpeed marks its parameters with them
            type(weight), weight.dtype, weight.device, weight.shape, weight.requires_grad, tuple(weight.__dict__),
        )  # fmt: skip


def _active(layer: Any) -> str | tuple[str, ...]:
    """What `layer.active_adapters` is made of, to compare."""
    active = layer.__dict__["_active_adapter"]
    return active if type(active) is str else tuple(active)


class Plan:
    """How the linears that share their input with one are computed together.

    Attributes:
        looked: whether all of this is still right.
        adapters: those that are added, in this order; none where the layer's own form runs.
        layers: the linears; the first is the one that was asked for.
        own: their base layers' products are computed as well; packed: of weights in 4 bits.
        active: what the first one's adapters were taken from.
        routed, ranks: by adapter, whether there is a decision to follow, and the rank in each linear.
    """

    def __init__(
        self, looked: Looked, adapters: Sequence[str] = (), layers: Sequence[Any] = (), own: bool = False
    ) -> None:
        self.looked, self.adapters, self.layers, self.own = looked, adapters, layers, own
        self.packed = own and type(layers[0].base_layer) not in PRODUCTS
        self.active: str | tuple[str, ...] | None = _active(layers[0]) if layers else None
        self.routed = {adapter: bool(layers[0].routing_options[adapter].is_routed) for adapter in adapters}
        self.ranks = {
            adapter: tuple(one.loraswitch_A[adapter].weight.shape[1] for one in layers) for adapter in adapters
        }
        self._specs: dict[Any, Spec] = {}
        self.dtype: torch.dtype | None = None

    def spec(
        self, adapter: str, given: bool, in_place: tuple[bool, ...], checkpointed: bool, last: bool, slots: int
    ) -> Spec:
        key = (adapter, given, in_place, checkpointed, last, slots)
        found = self._specs.get(key)
        if found is None:
            columns, start = [], 0
            for one in self.layers:
                experts, rank, _ = one.loraswitch_A[adapter].weight.shape
                columns.append(Columns(start, experts, rank, float(one.scaling[adapter])))
                start = columns[-1].stop
            transposed = not given and type(self.layers[0].base_layer) is Conv1D
            assert self.dtype is not None
            packed = self.packed and not given
            found = Spec(self.dtype, tuple(columns), given, transposed, in_place, checkpointed, last, slots, packed)
            self._specs[key] = found
        return found


def usual_groups(layers: Iterable[Any]) -> KnownGroups:
    """By names alone."""
    places = {name: (number, place) for number, names in enumerate(USUAL) for place, name in enumerate(names)}
    siblings: dict[tuple[str, int], list[tuple[int, Any]]] = {}
    seen = []
    for layer in layers:
        parent, _, name = layer.name.rpartition(".")
        seen.append(id(layer))
        if name in places:
            number, place = places[name]
            siblings.setdefault((parent, number), []).append((place, layer))
    groups: Groups = {}
    for found in siblings.values():
        first, *others = (layer for _, layer in sorted(found, key=lambda pair: pair[0]))
        groups[id(first)] = tuple(others)
    return KnownGroups(groups, frozenset(seen))


class SharedInputs:
    """Of one forward: the groups that it goes by, the outputs that wait for their linears, and what it learns.

    Attributes:
        known: groups of an earlier forward, or by names.
        learning: whether what this one shows is noted down.
        checkpointed: it is within a checkpointed block now.
        newest: id of the first linear of the group that was computed last.
        plans: by which groups were computed; a checkpointed block's second run goes by them again.
        kept: what both runs of the checkpointed block that runs now use; None: it keeps nothing.
    """

    def __init__(self, state: RoutingState, known: KnownGroups, learning: bool) -> None:
        self.state, self.known, self.learning, self.checkpointed = state, known, learning, False
        self.plans: dict[Any, Plan] = {}
        self.second_run = False
        self.kept: KeptByBlock | None = None
        self.newest: int | None = None
        self._ends: set[int] = set()
        self._operands: dict[str, tuple[Any, ...]] = {}
        self._orders: dict[str, tuple[Tensor, torch.device, PairOrder]] = {}
        self.waiting: dict[int, tuple[Tensor, int, Tensor]] = {}  # by linear: input, its version, output
        self._last: tuple[Any, int, list[Any]] | None = None  # the newest input (weakly), its version, who received it
        self._runs: list[list[Any]] = []
        self._calls: dict[int, int] = {}

    def again(self, kept: KeptByBlock | None, routings: Mapping[str, Any]) -> SharedInputs:
        """For a checkpointed block's second run: the same groups, computed in the same way; of the gates those of `routings`,
        the decisions from before the block."""
        again = SharedInputs(self.state, self.known, False)
        again._operands = {name: made for name, made in self._operands.items() if made[0] is routings.get(name)}
        again.plans, again.second_run, again.checkpointed = self.plans, True, True
        again._orders, again.kept = self._orders, kept
        if kept is not None:
            kept.begin_second_run()
        return again

    @contextmanager
    def checkpointed_block(self, kept: KeptByBlock | None) -> Iterator[None]:
        """Within it a checkpointed block runs for the first time."""
        before = self.checkpointed, self.kept
        self.checkpointed, self.kept, self.newest = True, kept, None
        try:
            yield
        finally:
            self.checkpointed, self.kept = before
        if self.newest is not None:
            self._ends.add(self.newest)

    def operands(
        self, adapter: str, routing: Any, x: Tensor, layer_name: str
    ) -> tuple[Tensor, Tensor | None, GateSum | None]:
        """Gates [T, E], which experts are chosen [T, E] (None: all), and where the gradient of the gates is added up, made once
        for all linears that see the same tokens."""
        key = (x.shape[:-1], x.device, torch.is_grad_enabled())
        made = self._operands.get(adapter)
        if made is None or made[0] is not routing or made[1] != key:
            gates, chosen = routing.dense_gates_for(x, layer_name), routing.chosen_for(x, layer_name)
            if gates.dim() != 2:
                gates = gates.reshape(-1, gates.shape[-1])
                chosen = None if chosen is None else chosen.reshape(-1, chosen.shape[-1])
            gates, total = summed(gates)
            made = self._operands[adapter] = (routing, key, gates, chosen, total)
        return made[2], made[3], made[4]

    def order(self, adapter: str, routing: Any, experts: int, device: torch.device) -> PairOrder:
        """The (token, expert) pairs of a decision, sorted once for all linears that follow it, also in a checkpointed block's
        second run."""
        made = self._orders.get(adapter)
        if made is None or made[0] is not routing.experts or made[1] != device:
            chosen = routing.experts.reshape(-1, routing.experts.shape[-1]).to(device)
            made = self._orders[adapter] = (routing.experts, device, order_of(chosen, experts))
        return made[2]

    def others(self, layer: Any) -> tuple[Any, ...]:
        return self.known.groups.get(id(layer), ())

    def look(self, layer: Any, x: Tensor) -> None:
        """Note down that `layer` receives x."""
        if not self.learning:
            if id(layer) not in self.known.seen and self.state.training_groups is self.known:
                self.state.training_groups = None  # linears have come since: the next forward learns anew
            return
        self._calls[id(layer)] = self._calls.get(id(layer), 0) + 1
        if self._last is not None and self._last[0]() is x and self._last[1] == x._version:
            self._last[2].append(layer)
            return
        self._last = (weakref.ref(x), x._version, [layer])
        self._runs.append(self._last[2])

    def drop(self, *layers: int) -> None:
        """The linears of these ids do not see what their group sees: later forwards compute each by itself."""
        known = self.state.training_groups
        if known is None or self.learning:
            return
        groups = {first: tuple(o for o in others if id(o) not in layers) for first, others in known.groups.items()}
        self.state.training_groups = KnownGroups(groups, known.seen, known.last)

    def drop_waiting(self) -> None:
        if self.waiting:
            self.drop(*self.waiting)
            self.waiting.clear()

    def end(self, finished: bool) -> None:
        if finished:
            self.drop_waiting()
        self.waiting.clear()
        self._last = None
        self._operands.clear()
        if not finished:
            return
        if self.learning and self._runs:
            once = [[one for one in run if self._calls[id(one)] == 1] for run in self._runs]
            groups = {id(run[0]): tuple(run[1:]) for run in once if len(run) > 1}
            self.state.training_groups = KnownGroups(groups, frozenset(self._calls))
        known = self.state.training_groups
        if known is not None and not self._ends <= known.last:
            self.state.training_groups = KnownGroups(known.groups, known.seen, known.last | self._ends)


def shared_inputs_of(state: RoutingState, frame: RoutingFrame) -> SharedInputs:
    """That of `frame`, made now if it has none."""
    if frame.shared_inputs is None:
        known = state.training_groups
        layers = () if state.hooks is None else state.hooks.layers
        frame.shared_inputs = SharedInputs(state, known or usual_groups(layers), known is None)
        frame.at_close.append(frame.shared_inputs.end)
    return frame.shared_inputs


def forward(layer: Any, x: Tensor, frame: RoutingFrame) -> Tensor | None:
    """The output [..., out] of the adapted linear `layer` for x [..., in], in a forward that trains; None where its own form
    must be run."""
    if _plain:
        return None
    if frame.adapter_names is not None:
        return _plain_form("a batch has an adapter for each sample (adapter_names)")
    inputs: SharedInputs = frame.shared_inputs or shared_inputs_of(layer.routing_state, frame)
    number = id(layer)
    waiting = inputs.waiting.pop(number, None) if inputs.waiting else None
    if inputs.learning or number not in inputs.known.seen:
        inputs.look(layer, x)
    if waiting is not None:
        if waiting[0] is x and waiting[1] == x._version:
            return waiting[2]
        inputs.drop(number)
    if frame.given and any(adapter in frame.given for adapter in _adapters(layer)):
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
        if plan is not None and _active(layer) == plan.active:  # if not, the block's second run is refused
            return plan
    key = _key(place, x)
    plan = inputs.known.plans.get(key)
    if plan is None or not plan.looked.is_current():
        plan = inputs.known.plans[key] = _make_plan(layer, inputs.others(layer), x)
    if inputs.checkpointed:
        inputs.plans[place] = plan
    return plan


def _key(place: tuple[Any, ...], x: Tensor) -> Any:
    """All that a plan depends on, besides the linears themselves; `place` as `_plan` makes it."""
    hooked = bool(nn.modules.module._has_any_global_hook())
    return (place, type(x), x.dim() < 2, more_than_gradients(), hooked)


def _make_plan(layer: Any, others: Sequence[Any], x: Tensor) -> Plan:
    looked, adapters = Looked((layer, *others)), _adapters(layer)
    dtype = _dtype(layer, x, adapters)
    if dtype is None or not adapters:
        return Plan(looked)
    layers = [layer, *(one for one in others if _fits(one, layer, x, adapters, dtype))]
    own = all(_computable(one.base_layer, x, dtype) for one in layers)
    alike = own and all(type(one.base_layer) is type(layer.base_layer) for one in layers)
    plan = Plan(looked, adapters, layers, alike)
    plan.dtype = dtype
    return plan


def _adapters(layer: Any) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.loraswitch_A]


def _dtype(layer: Any, x: Tensor, adapters: list[str]) -> torch.dtype | None:
    """Of the products; None where this path does not apply."""
    if type(layer).__name__ != "LoRASwitchLinear":
        return _plain_form("the model is fused for inference")
    if type(x) not in (Tensor, nn.Parameter) or x.dim() < 2 or x.dtype not in FLOATS:
        return _plain_form("the input of a linear is no ordinary tensor")
    if is_split(layer.get_base_layer()):
        return _plain_form("the backbone's weights are split over processes (tensor parallel)")
    if more_than_gradients():
        return _plain_form("a transform of torch.func is at work")
    if nn.modules.module._has_any_global_hook():
        return _plain_form("there are hooks on all modules")
    dtype = autocast_dtype(x)
    for adapter in adapters:
        experts = (layer.loraswitch_A[adapter], layer.loraswitch_B[adapter])
        if not isinstance(layer.loraswitch_dropout[adapter], nn.Identity) and layer.training:
            return _plain_form("lora_dropout gives each linear an input of its own")
        for each in experts:
            if _hooked(each) or not _ordinary(each.weight, x):
                return _plain_form("the experts of a linear are spread, moved or hooked")
        wanted = {each.weight.dtype for each in experts}
        if dtype is None and len(wanted) == 1:
            dtype = wanted.pop()
    if dtype is None or dtype not in FLOATS or torch.float64 in (dtype, x.dtype) and x.dtype != dtype:
        return _plain_form("dtypes are mixed in a way that this path does not know")
    if dtype != x.dtype and autocast_dtype(x) is None:
        return _plain_form("experts and activations have different dtypes, without autocast")
    if not layer.cast_input_dtype_enabled:
        return _plain_form("the casting of inputs is switched off")
    return dtype


def _fits(one: Any, first: Any, x: Tensor, adapters: list[str], dtype: torch.dtype) -> bool:
    """Whether the linear `one` can be computed together with `first`."""
    return (
        "forward" not in vars(one)
        and one.disable_adapters == first.disable_adapters
        and _adapters(one) == adapters
        and all(one.routing_options[each].is_routed == first.routing_options[each].is_routed for each in adapters)
        and all(
            one.loraswitch_A[each].weight.dtype == first.loraswitch_A[each].weight.dtype
            and one.in_features == first.in_features
            for each in adapters
        )
        and _dtype(one, x, adapters) == dtype
    )


def _computable(base: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the base layer is a frozen product and nothing else, of a weight that is there or can be made."""
    if _hooked(base):
        return False
    if type(base) not in PRODUCTS:
        form = four_bit_form(base)
        # For the library, autocast changes no dtype. It casts the bias for good; here it is cast in each call.
        if form is None or form.device != x.device or (form.compute_dtype or x.dtype) != dtype:
            return False
        return base.bias is None or _frozen(base.bias, x)
    for each in (base.weight, base.bias):
        if each is not None and (not _frozen(each, x) or each.dtype != dtype and autocast_dtype(x) is None):
            return False
    return True


def _frozen(weight: Tensor, x: Tensor) -> bool:
    return _ordinary(weight, x) and not weight.requires_grad and weight.dtype in FLOATS


def _is_fresh(base: Any, result: Tensor) -> bool:
    known = type(base).__name__ in FRESH and type(base).__module__.startswith("bitsandbytes.")
    return known and not _hooked(base) and not result._is_view() and not (result.is_leaf and result.requires_grad)


def _ordinary(weight: Tensor, x: Tensor) -> bool:
    """A tensor that lies where x does, and nothing that only stands for one (shards, other libraries' classes)."""
    if type(weight) not in (nn.Parameter, Tensor) or weight.device != x.device or hasattr(weight, "ds_id"):
        return False
    return weight.numel() > 0


def _hooked(module: Any) -> bool:
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes  # accelerate's hooks
    )


def _plain_form(reason: str) -> Any:
    """None, and one line of log."""
    if reason not in _said:
        _said.add(reason)
        logger.warning(f"LoRA-Switch: linears are trained in their plain form, more slowly: {reason}.")
    return None
