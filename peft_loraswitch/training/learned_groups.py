"""Which linears of a model receive the very same tensor, and what one forward that trains keeps about them.

This is learned in the first forward that trains, by looking at the tensors; that forward goes by the usual names, so that for
most models it has the same bits as those after it. A forward keeps what it knew when it began, because a checkpointed block has
to run again as it ran before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..routing.frame import RoutingFrame, RoutingState
from .gate_sum import GateSum, summed
from .group_layout import KeptByBlock
from .group_plans import Plan
from .pair_order import PairOrder, order_of

# Linears of one module that receive one tensor in most models, in the order they run.
USUAL = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
Groups = dict[int, tuple[Any, ...]]  # by the id of the first linear of each: the others


class KnownGroups:
    """What one forward that trained has shown. Never changed, but for `plans`: forwards hold on to it.

    Attributes:
        seen: ids of the linears that it reached.
        last: ids of the first linear of those groups with which a checkpointed block ends.
        plans: how the group of a linear is computed, by `group_plans.key_of()`.
    """

    def __init__(self, groups: Groups, seen: frozenset[int], last: frozenset[int] = frozenset()) -> None:
        self.groups, self.seen, self.last = groups, seen, last
        self.plans: dict[Any, Plan] = {}


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
