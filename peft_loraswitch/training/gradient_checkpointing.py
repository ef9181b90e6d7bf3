"""Gradient checkpointing: a block that runs again in backward sees the decisions of its own forward.

By then the forward's frame is closed, other forwards may have come and gone, and on a GPU backward has its own thread. So
the checkpointing function of each block is wrapped (`CheckpointWithRouting`): the second run gets a frame of its own, with
the decisions as they stood before the first.

**Reentrant checkpointing** runs blocks without gradients first, and each again, on its own, in backward. Blocks after the
router's would hand their gradient to a decision that has no graph, and the router would silently train on its own block
alone. So they all use one leaf tensor in place of the gates, whose `.grad` sums up what they send (`frame.Relay`); the router's
own block runs again last, and there the sum joins the gradient of the recomputed gates.

**Under torch.compile** a checkpointed block may read what lies outside of it, but not change it: the block that takes the
decision runs without checkpointing, and its activations are kept. The others are checkpointed as usual.

Nothing here may hold on to the frame of the first run: its gates lead to the autograd graph, whose checkpoints lead back
here, and Python cannot collect a cycle through C++.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..routing.decision import Routing
from ..routing.frame import SECOND_RUN, RoutingFrame, RoutingState
from .group_layout import KeptByBlock
from .learned_groups import shared_inputs_of


class CheckpointedBlock:
    """A module of the backbone that knows gradient checkpointing; `routes`: a router is in it, and in none inside it."""

    def __init__(self, module: nn.Module, routes: bool) -> None:
        self.module = module
        self.routes = routes

    def wrap(self, state: RoutingState) -> None:
        function = getattr(self.module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CheckpointWithRouting):
            self.module._gradient_checkpointing_func = CheckpointWithRouting(state, function, self.routes)  # type: ignore

    def unwrap(self) -> None:
        function = getattr(self.module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointWithRouting):
            self.module._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]

    def pause(self, frame: RoutingFrame) -> None:
        """Run without checkpointing until the frame is closed."""
        if self.routes and self.module.training and self.module.gradient_checkpointing:
            self.module.gradient_checkpointing = False  # type: ignore[assignment]
            frame.paused.append(self.module)


def checkpointed_blocks(root: nn.Module, layers: set[nn.Module]) -> list[CheckpointedBlock]:
    """The modules below `root` that know gradient checkpointing and hold some of `layers` (adapted linears)."""
    modules = [m for m in root.modules() if hasattr(m, "gradient_checkpointing") and not layers.isdisjoint(m.modules())]
    routers = {layer for layer in layers if len(layer.loraswitch_router)}  # type: ignore[arg-type]
    holding = {module for module in modules if not routers.isdisjoint(module.modules())}
    return [
        CheckpointedBlock(module, module in holding and holding.isdisjoint(set(module.modules()) - {module}))
        for module in modules
    ]


class CheckpointWithRouting:
    """Stands in for a block's `_gradient_checkpointing_func`."""

    def __init__(self, state: RoutingState, checkpoint: Callable[..., Any], routes: bool) -> None:
        self.state = state
        self.checkpoint = checkpoint
        self.routes = routes

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = self.state.frame
        if torch.compiler.is_compiling() and self.routes:
            return function(*args, **kwargs)
        if torch.compiler.is_compiling() or frame is None:
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(_Block(self.state, frame, function), *args, **kwargs)


class _Block:
    """A block's forward: first in the open frame, then, in backward, in one that equals it."""

    def __init__(self, state: RoutingState, frame: RoutingFrame, function: Callable[..., Any]) -> None:
        self.state, self.function = state, function
        self.training, self.adapter_names, self.relays = frame.training, frame.adapter_names, frame.relays
        self.given = frame.given
        self.routings_before = dict(frame.routings)
        self.inputs = frame.inputs.for_second_run()
        self.shared_inputs = shared_inputs_of(state, frame).again(None, self.routings_before)
        self.kept: KeptByBlock | None = None
        self.used: set[str] | None = None  # adapters that the first run used; None: it has not run yet
        self.trained: set[str] = set()
        self.reentrant = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = self.state.frame
        if self.used is None and frame is not None:
            return self._run(frame, *args, **kwargs)
        return self._run_again(*args, **kwargs)

    def _run(self, frame: RoutingFrame, *args: Any, **kwargs: Any) -> Any:
        self.reentrant = not torch.is_grad_enabled()
        before, frame.used = frame.used, set()
        # Reentrant checkpointing holds on to the block as long as there is a loss, not until its backward is over.
        self.kept = None if self.reentrant else KeptByBlock()
        with shared_inputs_of(self.state, frame).checkpointed_block(self.kept):
            output = self.function(*args, **kwargs)
        self.used, frame.used = frame.used, before | frame.used
        self.trained = set(frame.trained)
        if self.reentrant and self.used & frame.trained and not any(map(_needs_gradient, args)):
            raise RuntimeError(
                "Reentrant gradient checkpointing passes no gradient through a block whose inputs need none, so router and "
                "experts of LoRA-Switch would silently learn nothing from it: call model.enable_input_require_grads() before "
                "training, or use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        return output

    def _run_again(self, *args: Any, **kwargs: Any) -> Any:
        again = RoutingFrame(self.training, self.adapter_names)
        again.opened_at, again.relays, again.given = SECOND_RUN, self.relays, self.given
        again.trained = self.trained
        again.inputs, again.shared_inputs = self.inputs, self.shared_inputs.again(self.kept, self.routings_before)
        for adapter, routing in self.routings_before.items():
            again.routings[adapter] = self._relayed(adapter, routing) if self.reentrant else routing
        used, finished = self.used or set(), False
        try:
            with self.state.within(again):
                output = self.function(*args, **kwargs)
            finished = True
        finally:  # torch stops the second run, by an exception, as soon as it has all that it needs
            if again.used != used if finished else not again.used <= used:
                raise RuntimeError(
                    f"A checkpointed block ran with the adapter(s) {sorted(used)} and runs again, in backward, with "
                    f"{sorted(again.used)}: its gradients would be wrong. Switch adapters (set_adapter, disable_adapter) "
                    "after backward."
                )
        return output

    def _relayed(self, adapter: str, routing: Routing) -> Routing:
        if adapter not in self.relays:
            return routing
        return replace(routing, dense_gates=self.relays[adapter].stand_in(routing.dense_gates))


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
