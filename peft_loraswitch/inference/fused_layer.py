"""A fused layer: the class that `fuse_for_inference()` makes of an adapted linear, and the groups that such layers form.

The first linear of a group (linears that receive the same tensor) computes for all of them and leaves the others' results
where they pick them up, if they really receive that tensor. Whatever the ops do not serve (training, gradients, transforms of
torch.func, mixed batches, several active adapters, autocast) takes the unfused forward, which is always right.

Host time is what the forwards are written for. Eager: a group of linears must cost less than the calls it replaces. Under
`torch.compile`: dynamo guards, at every call, each object that a forward read while it was traced. Constants in the dictionary
of one object are nearly free, since the version of the dictionary stands for them; each tensor, object and dictionary on the
way costs a visit (docs/kernel_log.md). Where all of a decoder block is modules, dictionaries, tensors and constants, some
versions of torch guard it as one; an object of another kind, a list, or one object reached by two ways rules that out. So a
forward reads a few constants of its layer and one `FusedGroup`, which holds all else.

A forward that is not compiled looks at its group's fingerprint and has what is old made anew. Compiled code looks at nothing, so
whatever tells a layer of a change (its methods below, and `Experts.replaced`) has that done at once.
"""

from __future__ import annotations

import itertools
import threading
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..layer import LoRASwitchLinear
from ..routing.frame import RoutingFrame, current
from ..tensor_parallel import is_split
from ..transforms import more_than_gradients
from .capabilities import BaseFacts, base_of, device_of, facts_of
from .counted_writes import count_as_before
from .expert_casts import Casts, current_casts, served_dtype
from .four_bit import FourBitWeight, current_four_bit
from .fused_group import FusedGroup
from .group_outputs import compute
from .joined_weights import leave
from .live_linear import LiveLinear, live_linear
from .merged_weights import MergedWeights

_slots = itertools.count()
changing = threading.RLock()  # held while layers are fused, unfused or resolved


# ------------------------------------------------------------------------------------------------------------- layers


class Fusing:
    """What fusing keeps for one layer, at `layer.fusing`; no compiled forward looks at it.

    Attributes:
        members: the layers that this one computes for, itself first; for a layer that another computes for, itself.
        leader: the layer that computes for this one (perhaps itself).
        merging: the merged weights of strategy "merge", else None.
        casts: by adapter, the experts in the dtype in which they are served, if theirs is another.
        joined: by adapter, the matrix in which the weights of this layer's group lie (`joined_weights.py`).
        four_bit: the base layer's weight as the ops read it, if it has 4 bits and they can.
        seen: dtype of the input that the layer had when its model was fused; None: it had none.
    """

    def __init__(
        self, layer: LoRASwitchLinear, merging: MergedWeights | None = None, seen: torch.dtype | None = None
    ) -> None:
        self.members: list[Any] = [layer]
        self.leader: Any = layer
        self.merging, self.seen = merging, seen
        self.casts: dict[str, Casts] = {}
        self.joined: dict[str, Tensor] = {}
        self.four_bit: FourBitWeight | None = None
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles: their weights do not lie in a matrix
        apart = {adapter: casts for adapter, casts in self.casts.items() if not casts.joined}
        return {**self.__dict__, "joined": {}, "casts": apart}

    def watch(self, layer: LoRASwitchLinear) -> None:
        """Hear of it when weights are loaded, and before those that may be merged in place are read or loaded."""
        self.handles.append(layer.register_load_state_dict_post_hook(_loaded))  # type: ignore[no-untyped-call]
        if self.merging is not None:
            self.handles.append(layer.register_load_state_dict_pre_hook(_put_back))  # type: ignore[no-untyped-call]
            self.handles.append(layer.register_state_dict_pre_hook(_put_back))  # type: ignore[no-untyped-call]


class FusedLinear(LoRASwitchLinear):
    """A `LoRASwitchLinear` for as long as its model is fused: the class of the layer is changed, and changed back.

    It goes by that name as well: whoever looks at a model may tell what a layer is by the name of its class. (PEFT finds the
    adapted linears by "Linear" in it.)

    Attributes:
        fusing: see `Fusing`.
        fused_groups: by adapter, the group that this layer computes when it finds no result waiting.
        fused_group, fused_adapter: the one to use now, and its adapter (for followers, which need no more of it); None in
            training, with adapters disabled or with several of them active.
        fused_slot: number of the layer, under which its result waits.
    """

    fusing: Fusing
    fused_groups: dict[str, FusedGroup]
    fused_group: FusedGroup | None
    fused_adapter: str | None
    fused_slot: int

    def __init_subclass__(cls) -> None:
        cls.__name__ = LoRASwitchLinear.__name__  # pickle goes by __qualname__

    # ---------------------------------------------------------------------------- what changes a layer resolves it anew

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("base_layer", "scaling"):
            self._rebuilt()
        elif name in ("_active_adapter", "_disable_adapters", "training"):
            _select(self)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        self._rebuilt(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._rebuilt(adapter_name)

    def _rebuilt(self, adapter: str | None = None) -> None:
        """Modules and dictionaries that fingerprints look at are others now; of one adapter, or of all."""
        resolve(self)
        fusing = self.__dict__.get("fusing")
        merging = None if fusing is None else fusing.merging
        if merging is not None and adapter in (None, merging.adapter):
            merging.fingerprint.invalidate()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self.fusing.merging is not None:
            self.fusing.merging.put_back()
        before = [weight.dtype for weight in self.loraswitch_A.parameters()]
        result = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if [weight.dtype for weight in self.loraswitch_A.parameters()] != before:
            self.fusing.seen = None  # a model that is cast has other inputs, too
        resolve(self)
        return result

    def train(self, mode: bool = True) -> FusedLinear:
        trained = self.training and not mode
        super().train(mode)
        if not mode:
            invalidate(self, merged=trained)
        return self

    def resolve_experts(self) -> None:
        """What `Experts.replaced` calls."""
        resolve(self)

    def restored(self) -> None:
        """What `rollback.Snapshot` calls when it has put the layer's attributes and weights back."""
        invalidate(self)
        resolve(self)  # others have had its groups' numbers meanwhile


def _put_back(layer: Any, *_: Any) -> None:
    layer.fusing.merging.put_back()


def _loaded(layer: Any, incompatible_keys: Any) -> None:
    invalidate(layer)


class FusedLeader(FusedLinear):
    """The first of a group, or a single one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]"""
        group = self.fused_group
        if group is None or args or kwargs or more_than_gradients():
            return LoRASwitchLinear.forward(self, x, *args, **kwargs)
        frame = _running_frame(self, group.key)
        eager = not torch.compiler.is_compiling()
        if eager and frame is not None and group.direct is not None:
            results = group.direct.again(x, frame)
            if results is not None:
                return group.leave(x, results)
        routing = None if frame is None else group.routing(self, x, frame)
        if routing is None:
            return LoRASwitchLinear.forward(self, x)
        if eager and group.direct is not None:
            results = group.direct(x, routing)
            if results is not None:
                return group.leave(x, results)
        return compute(self, _checked(self, group), x, routing)


class FusedFollower(FusedLeader):
    """One of the others of a group."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]"""
        waiting = current.results.pop(self.fused_slot, None)
        if waiting is not None and waiting[0] is x and waiting[2] == self.fused_adapter and not (args or kwargs):
            if _still_fits(self, x, waiting[3]):
                result: Tensor = waiting[1]
                return result
        return FusedLeader.forward(self, x, *args, **kwargs)


class FusedMerged(FusedLinear):
    """A layer under strategy "merge"."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy or a pickle gets weights without experts
        _put_back(self)
        return super().__reduce_ex__(protocol)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]"""
        group = self.fused_group
        frame = _running_frame(self, self.routing_state.key)
        routing, merging = None, self.fusing.merging
        assert merging is not None
        if not (group is None or frame is None or args or kwargs or more_than_gradients()):
            routing = group.routing(self, x, frame)
        if group is None or frame is None or routing is None:
            merging.leave_out(frame)
            return LoRASwitchLinear.forward(self, x, *args, **kwargs)
        merged = merging.forward(self, group.adapter, x, routing, frame)
        return compute(self, _checked(self, group), x, routing) if merged is None else merged


def _running_frame(layer: LoRASwitchLinear, key: int) -> RoutingFrame | None:
    """The frame of the forward that this thread is in, as `RoutingState.running_frame` has it: not one that a KeyboardInterrupt
    has left open. Compiled code cannot tell."""
    frame = current.frames.get(key)
    if frame is None or torch.compiler.is_compiling():
        return frame
    return layer.routing_state.running_frame(False)


def _still_fits(layer: FusedLinear, x: Tensor, version: int | None) -> bool:
    """Whether a result that waits for `layer` is of x as it is now, and of a forward that runs.

    Args:
        version: of x, as `FusedGroup.leave` has it.
    """
    if torch.compiler.is_compiling():
        return version is None
    if version is not None and version != x._version:
        return False
    group = layer.fused_group
    return group is not None and _running_frame(layer, group.key) is not None


def _one(active: str | list[str]) -> str | None:
    """The only active adapter, or None if there are several or none."""
    if isinstance(active, str):
        return active
    return active[0] if len(active) == 1 else None


# --------------------------------------------------------------------------------------------- on, off, and up to date


def put_on(
    layer: LoRASwitchLinear, kind: type[FusedLinear], merging: MergedWeights | None = None,
    seen: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Make `layer` a fused one; `resolve()` has to follow."""
    if type(layer) is not LoRASwitchLinear:
        raise ValueError(f"'{layer.name}' is a {type(layer).__name__}: only a LoRASwitchLinear itself can be fused.")
    # The class comes last: a forward in another thread finds all that it looks at.
    layer.__dict__.update(fused_groups={}, fused_group=None, fused_adapter=None, fused_slot=next(_slots))
    layer.__dict__["fusing"] = Fusing(layer, merging, seen)
    layer.__dict__["fusing"].watch(layer)
    layer.__class__ = kind
    _rewrap(layer)


def take_off(layer: LoRASwitchLinear) -> None:
    """What it was before `put_on()`, or before the part of it that was done. May be repeated."""
    layer.__class__ = LoRASwitchLinear
    _rewrap(layer)
    fusing = layer.__dict__.get("fusing")
    if fusing is not None:
        for handle in fusing.handles:
            handle.remove()
    for experts in (*layer.loraswitch_A.values(), *layer.loraswitch_B.values()):
        experts.__dict__.pop("replaced", None)
        count_as_before(experts)
    current.results.pop(layer.__dict__.get("fused_slot", -1), None)  # of a forward that was interrupted
    for name in ("fusing", "fused_groups", "fused_group", "fused_adapter", "fused_slot"):
        layer.__dict__.pop(name, None)


def _rewrap(layer: LoRASwitchLinear) -> None:
    """accelerate's hook on the layer itself keeps the forward that it runs, and would keep that of another class."""
    if "_old_forward" in layer.__dict__:
        layer._old_forward = MethodType(type(layer).forward, layer)  # type: ignore[assignment]


def resolve(layer: FusedLinear) -> None:
    """Make the groups of the layer that computes for `layer` anew, and casts that are old: something of `layer` has changed."""
    with changing:
        fusing = layer.__dict__.get("fusing")
        if fusing is None:  # unfused by another thread
            return
        leader = fusing.leader
        _resolve(leader, leader.fusing.members)
        for member in leader.fusing.members[1:]:
            _resolve(member, [member])  # for when it receives another tensor than its leader did


def _resolve(layer: FusedLinear, members: list[FusedLinear]) -> None:
    facts = facts_of(layer)
    for member in members:
        member.fusing.four_bit = current_four_bit(member, facts_of(member).four_bit, member.fusing.four_bit)
    for adapter in [name for name in layer.fusing.joined if name not in layer.loraswitch_A]:
        leave(layer, adapter)
    groups = {}
    for adapter in layer.loraswitch_A:
        together = [m for m in members if m is layer or _same_launch(m, layer, adapter, facts)]
        before = layer.fused_groups.get(adapter)
        number, matrix = None if before is None else before.number, layer.fusing.joined.get(adapter)
        groups[adapter] = FusedGroup(_live(together, adapter), adapter, facts, number, matrix)
        if matrix is not None and groups[adapter].matrix is None:  # one of the weights has left it
            leave(layer, adapter)
            groups[adapter] = FusedGroup(_live(together, adapter), adapter, facts, number)
        for experts in (layer.loraswitch_A[adapter], layer.loraswitch_B[adapter]):
            experts.replaced = layer.resolve_experts
    layer.__dict__["fused_groups"] = groups
    _select(layer)
    for adapter in [name for name in layer.fusing.casts if name not in groups]:
        del layer.fusing.casts[adapter]


def _live(members: list[FusedLinear], adapter: str) -> list[LiveLinear]:
    return [
        live_linear(member, adapter, member.fusing.casts, member.fusing.seen, member.fusing.four_bit)
        for member in members
    ]


def invalidate(layer: FusedLinear, merged: bool = True) -> None:
    """Take up what has been written to the layer's weights, whether it shows in a fingerprint or not.

    Args:
        merged: also in weights that experts are merged into.
    """
    for casts in list(layer.fusing.casts.values()):
        casts.fingerprint.invalidate()
    four_bit = layer.fusing.four_bit
    if four_bit is not None and four_bit.dequantized:
        four_bit.fingerprint.invalidate()
    if merged and layer.fusing.merging is not None:
        layer.fusing.merging.fingerprint.invalidate()
    for adapter in layer.loraswitch_A:
        current_casts(layer, layer.fusing.casts, adapter, layer.fusing.seen)
    if not all(group.fingerprint.is_current() for group in layer.fused_groups.values()):
        resolve(layer)


def _checked(layer: FusedLinear, group: FusedGroup) -> FusedGroup:
    """`group`, up to date with what no method of the layer is told of, unless a compiler is at work: it does not look."""
    if not torch.compiler.is_compiling() and not group.fingerprint.is_current():
        resolve(layer)
        group = layer.__dict__.get("fused_groups", {}).get(group.adapter, group)
    return group


def _select(layer: FusedLinear) -> None:
    """The group that serves `layer` as it is set now."""
    adapter = None if layer.training or layer._disable_adapters else _one(layer._active_adapter)
    group = layer.fused_groups.get(adapter)  # type: ignore[arg-type]
    layer.__dict__.update(fused_group=group, fused_adapter=None if group is None else adapter)


def _same_launch(member: FusedLinear, leader: FusedLinear, adapter: str, facts: BaseFacts) -> bool:
    if adapter not in member.loraswitch_A or member.routing_options[adapter] != leader.routing_options[adapter]:
        return False
    if facts.hooked or facts_of(member) != facts:
        return False
    return _kind(member, adapter) == _kind(leader, adapter)


def _kind(layer: FusedLinear, adapter: str) -> tuple[Any, ...]:
    """What the linears of a group have in common: dtype and device of the tensors that the ops read, and whether several
    processes share the base layer."""
    base = base_of(layer)
    dtype = served_dtype(layer, adapter, layer.fusing.seen)
    return dtype, device_of(base), layer.loraswitch_A[adapter].weight.device, is_split(base)
