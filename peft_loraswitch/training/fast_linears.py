"""When an adapted linear trains by `group_function.py`, and with which others: those that receive the very same tensor.

Which these are is learned in the first forward that trains, by looking at the tensors; that forward goes by the usual names, so
that for most models it has the same bits as those after it. A forward keeps what it knew when it began, because a checkpointed
block has to run again as it ran before. The first linear of a group computes all of it and leaves the others' outputs for them.
If one of them then sees another tensor, it computes for itself, and leaves the group.

Where this path does not apply, the layer's own form runs, with one line of log for each reason.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..routing.frame import RoutingFrame, RoutingState
from ..tensor_parallel import is_split
from .gate_hidden import Columns
from .group_function import Spec, autocast_dtype, run

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # pragma: no cover

    class Conv1D: ...  # type: ignore[no-redef]


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
    """What one forward that trained has shown. Never changed: forwards hold on to it."""

    def __init__(self, groups: Groups, seen: frozenset[int]) -> None:
        self.groups, self.seen = groups, seen


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
    """

    def __init__(self, state: RoutingState, known: KnownGroups, learning: bool) -> None:
        self.state, self.known, self.learning = state, known, learning
        self.waiting: dict[int, tuple[Tensor, int, Tensor]] = {}  # by linear: input, its version, output
        self._last: tuple[Any, int, list[Any]] | None = None  # the newest input (weakly), its version, who received it
        self._runs: list[list[Any]] = []
        self._calls: dict[int, int] = {}

    def again(self) -> SharedInputs:
        """For a checkpointed block's second run: the same groups."""
        return SharedInputs(self.state, self.known, False)

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
        self.state.training_groups = KnownGroups(groups, known.seen)

    def drop_waiting(self) -> None:
        if self.waiting:
            self.drop(*self.waiting)
            self.waiting.clear()

    def end(self, finished: bool) -> None:
        if finished:
            self.drop_waiting()
        self.waiting.clear()
        self._last = None
        if finished and self.learning and self._runs:
            once = [[one for one in run if self._calls[id(one)] == 1] for run in self._runs]
            groups = {id(run[0]): tuple(run[1:]) for run in once if len(run) > 1}
            self.state.training_groups = KnownGroups(groups, frozenset(self._calls))


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
    inputs = shared_inputs_of(layer.routing_state, frame)
    waiting = inputs.waiting.pop(id(layer), None)
    inputs.look(layer, x)
    if waiting is not None:
        if waiting[0] is x and waiting[1] == x._version:
            return waiting[2]
        inputs.drop(id(layer))
    adapters = _adapters(layer)
    if any(adapter in frame.given for adapter in adapters):
        return None  # the layer multiplies each sample by its own expert alone, which is less work
    dtype = _dtype(layer, x, adapters)
    if dtype is None or not adapters:
        return None
    layers = [layer, *(one for one in inputs.others(layer) if _fits(one, layer, x, adapters, dtype))]
    inputs.drop_waiting()  # of a group that was not asked for all of its outputs
    own = all(_computable(one.base_layer, x, dtype) for one in layers)
    alike = own and all(type(one.base_layer) is type(layer.base_layer) for one in layers)
    results = None if alike else [one.base_layer(x) for one in layers]
    for adapter in adapters:
        results = _with_adapter(adapter, layers, x, frame, dtype, results, first=adapter == adapters[0])
    assert results is not None
    for one, result in zip(layers[1:], results[1:], strict=True):
        inputs.waiting[id(one)] = (x, x._version, result)
    return results[0]


def _with_adapter(
    adapter: str,
    layers: list[Any],
    x: Tensor,
    frame: RoutingFrame,
    dtype: torch.dtype,
    results: list[Tensor] | None,
    first: bool,
) -> list[Tensor]:
    """The outputs of `layers` with one adapter, added to `results`, or to what their base layers make of x."""
    for one in layers:
        routing = one.routing_for(adapter, frame, x)
    gates, chosen = routing.dense_gates_for(x, layers[0].name), routing.chosen_for(x, layers[0].name)
    a = [one.loraswitch_A[adapter].whole() for one in layers]
    b = [one.loraswitch_B[adapter].whole() for one in layers]
    columns, start = [], 0
    for one, weight in zip(layers, a, strict=True):
        columns.append(Columns(start, weight.shape[0], weight.shape[1], float(one.scaling[adapter])))
        start = columns[-1].stop
    if results is None:
        bases = [one.base_layer for one in layers]
        spec = Spec(dtype, tuple(columns), given=False, transposed=type(bases[0]) is Conv1D)
        return list(run(spec, x, gates, chosen, a, b, [base.weight for base in bases], [base.bias for base in bases]))
    # What this path has computed itself may be added to; of a base layer's result it must be known that nobody holds it.
    free = [not first or _is_fresh(one.base_layer, y) for one, y in zip(layers, results, strict=True)]
    spec = Spec(dtype, tuple(columns), given=True, in_place=tuple(free))
    return list(run(spec, x, gates, chosen, a, b, results))


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
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
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
    """Whether the base layer is a frozen product and nothing else."""
    if type(base) not in (nn.Linear, Conv1D) or _hooked(base):
        return False
    weight, bias = base.weight, base.bias
    for each in (weight, bias):
        if each is None:
            continue
        if not _ordinary(each, x) or each.requires_grad or each.dtype not in FLOATS:
            return False
        if each.dtype != dtype and autocast_dtype(x) is None:
            return False
    return True


def _is_fresh(base: Any, result: Tensor) -> bool:
    known = type(base).__name__ in FRESH and type(base).__module__.startswith("bitsandbytes.")
    return known and not _hooked(base) and not result._is_view() and not (result.is_leaf and result.requires_grad)


def _ordinary(weight: Tensor, x: Tensor) -> bool:
    """A tensor that lies where x does, and nothing that only stands for one (shards, other libraries' classes)."""
    if type(weight) not in (nn.Parameter, Tensor) or weight.device != x.device or hasattr(weight, "ds_id"):
        return False
    return weight.numel() > 0


def _hooked(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)  # accelerate's hooks
    )


def _plain_form(reason: str) -> Any:
    """None, and one line of log."""
    if reason not in _said:
        _said.add(reason)
        logger.warning(f"LoRA-Switch: linears are trained in their plain form, more slowly: {reason}.")
    return None
