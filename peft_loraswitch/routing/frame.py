"""Where a routing decision lives: in a `RoutingFrame`, one per forward of the backbone, never longer.

Hooks on the modules that contain every layer with routed experts (the whole model, and those inside it down to the
smallest: the owners) open the frame when the outermost is entered and close it when that is left. Layers in between find
it through `RoutingState.frame`. The frame is thread-local, so two threads do not see each other's routing; nothing is kept on a
module, so nothing leaks into the next forward, into a compiled graph's outputs, or into `copy.deepcopy(model)`.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..targets.unused_linears import UnusedLinears, keep_off_fast_paths
from ..training.gradient_checkpointing import SECOND_RUN, CheckpointedBlock, Relay, checkpointed_blocks
from ..training.loss_joining import join_at_decision
from ..training.losses import RoutingRecord, add_auxiliary_losses
from .decision import Routing, jitter, route, shared_routing

if TYPE_CHECKING:
    from ..layer import LoRASwitchLinear

NO_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for "no adapter on this sample"
OUTSIDE = -2  # what `RoutingFrame.opened_at` holds outside of any forward, where nothing may be decided


class RoutingFrame:
    """The routing of one forward.

    Attributes:
        routings: the decisions taken so far, by adapter name.
        attention_mask: the forward's mask, if it had one: which tokens are real (for losses and statistics only).
        num_items_in_batch: what the trainer passed, see `balance.py`.
        adapter_names: adapter of each sample (mixed batches), or None.
        training: whether a loss may follow: model in train mode and gradients enabled when the frame was opened.
        earlier: finished passes of the same forward, if an owner below the outermost runs several times (a model that
            encodes two sentences, one after the other): other tokens, so other decisions.
        shared: what linears follow that have shared experts only, by adapter name.
        used: adapters that a layer asked for; `trained`: those of them whose experts train.
        relays, paused: see `checkpointing.py`.
        previous: the frame of the forward within which this one runs (a hook that calls the model again), or None.
    """

    def __init__(self, training: bool, adapter_names: Sequence[str] | None = None) -> None:
        self.training = training
        self.previous: RoutingFrame | None = None
        self._callers: dict[int, FrameType] = {}  # by depth, the Python frame from which the owner's forward is called
        self.adapter_names = adapter_names
        self.routings: dict[str, Routing] = {}
        self.shared: dict[str, Routing] = {}
        self.attention_mask: torch.Tensor | None = None
        self.num_items_in_batch: Any = None
        self.earlier: tuple[RoutingFrame, ...] = ()
        self.opened_at = self.deepest = 0  # which owner opened it, which is the innermost entered since
        self.used: set[str] = set()
        self.trained: set[str] = set()
        self.paused: list[nn.Module] = []
        self.unused: UnusedLinears | None = None
        self.relays: dict[str, Relay] = {}
        self._rows: dict[tuple[str, int], torch.Tensor] = {}

    def called_from(self, depth: int, caller: FrameType) -> None:
        """The owner at `depth` has been called, from `caller`."""
        self._callers[depth] = caller

    def continues(self, earlier: RoutingFrame, depth: int) -> None:
        """This frame is of another pass, of the owner at `depth`, of the forward that `earlier` is of."""
        self.num_items_in_batch, self.unused = earlier.num_items_in_batch, earlier.unused
        self.earlier, self.paused = (*earlier.earlier, earlier), [*earlier.paused, *self.paused]
        self._callers = {outer: caller for outer, caller in earlier._callers.items() if outer < depth}

    def is_running(self) -> bool:
        """Whether the forward that this is the frame of is still running."""
        return self.opened_at < 0 or self.runs(self.opened_at)  # a block's second run ends within a `with`

    def runs(self, depth: int) -> bool:
        """Whether the forward of the owner at `depth` that this frame knows of is still running.

        No hook runs when a forward is left by a KeyboardInterrupt, so being open is not enough. Python refuses to clear the
        frame of a call that is running; where it is not, what the call left in memory is let go of. (Compiled forwards have
        no such frame: what is open runs.)
        """
        caller = self._callers.get(depth)
        if caller is None:
            return depth == self.opened_at
        try:
            caller.clear()
        except RuntimeError:
            return True
        del self._callers[depth]
        return False

    def routing(self, adapter: str, layer: LoRASwitchLinear, x: torch.Tensor) -> Routing:
        """What `layer` follows: this forward's decision for `adapter`, taken now, from x [..., in_features], if it is not
        there yet; if the layer has only shared experts, all of those.

        Raises:
            RuntimeError: there is something to decide, and no forward of the model.
        """
        if not torch.compiler.is_compiling():
            self.used.add(adapter)
            if self.training and layer.loraswitch_A[adapter].weight.requires_grad:
                self.trained.add(adapter)
        if layer.num_experts[adapter] == 0:
            return self.shared_routing(adapter, layer, x)
        routing = self.routings.get(adapter)
        if routing is None:
            if self.opened_at == OUTSIDE:
                raise RuntimeError(_outside_of_a_forward(layer.name))
            routing = self._decide(adapter, layer, x)
            self.routings[adapter] = routing
        return routing

    def shared_routing(self, adapter: str, layer: LoRASwitchLinear, x: torch.Tensor) -> Routing:
        """All shared experts, for a layer that has no others; made once, since it is the same for all such layers."""
        routing = self.shared.get(adapter)
        if routing is None or routing.token_shape != x.shape[:-1] or routing.gates.device != x.device:
            number, top_k = layer.num_shared_experts[adapter], layer.adapter_top_k[adapter]
            routing = shared_routing(number, top_k, x.shape[:-1], x.device)
            # a checkpointed block must not change what lies outside of it while it is compiled
            if not (self.training and torch.compiler.is_compiling()):
                self.shared[adapter] = routing
        return routing

    def _decide(self, adapter: str, layer: LoRASwitchLinear, x: torch.Tensor) -> Routing:
        router_layer = layer.routing_state.router_layer(adapter, layer)
        options = router_layer.routing_options[adapter]
        router = router_layer.loraswitch_router[adapter]
        recording = self.training or len(layer.routing_state.recorders) > 0
        routed = jitter(x, options.jitter) if options.jitter and router_layer.training else x
        logits = router(routed)
        if logits.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(logits).all():
            raise ValueError(_broken_logits(adapter, layer.name, routed, router.weight))
        routing = route(logits, options)
        if recording:
            routing.router_input = routed.detach()
        if self.training and router.weight.requires_grad and not torch.compiler.is_compiling():
            relay = self.relays.setdefault(adapter, Relay())
            if not torch.is_grad_enabled():  # the first, gradient-free run of a reentrant checkpoint
                routing.dense_gates = relay.stand_in(routing.dense_gates)
            elif routing.dense_gates.requires_grad:
                routing.dense_gates.register_hook(relay.join)
                join_at_decision(routing, router.weight)
        return routing

    def served_rows(self, adapter: str, num_served: int) -> tuple[int, torch.Tensor] | None:
        """(number of tokens in the batch, indices of the `num_served` that `adapter` serves) in a mixed batch, else None."""
        rows_by_total = ((total, rows) for (name, total), rows in self._rows.items() if name == adapter)
        return next(((total, rows) for total, rows in rows_by_total if rows.numel() == num_served), None)

    def rows(self, adapter: str, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Indices (int64) of the tokens that `adapter` serves in a mixed batch, of `num_tokens` tokens in all."""
        assert self.adapter_names is not None
        key = (adapter, num_tokens)
        if key not in self._rows:
            samples = len(self.adapter_names)
            if samples == 0 or num_tokens % samples:
                raise ValueError(
                    f"adapter_names has {samples} entries, but the batch holds {num_tokens} tokens: give one name per sample."
                )
            chosen = [sample for sample, name in enumerate(self.adapter_names) if name == adapter]
            each = num_tokens // samples  # tokens of one sample, beams included
            first = torch.tensor(chosen, dtype=torch.int64, device=device) * each
            self._rows[key] = (first.unsqueeze(-1) + torch.arange(each, device=device)).flatten()
        return self._rows[key]


class _ThreadState(threading.local):
    """Per thread (threading.local runs __init__ in each): the frame of the forward in flight, names for mixed batches."""

    def __init__(self) -> None:
        self.frame: RoutingFrame | None = None
        self.adapter_names: Sequence[str] | None = None


class _Current(threading.local):
    """Per thread, what fused layers look at, instead of at the state that they share: one object that is reached from every
    layer makes dynamo guard it once for each.

    Attributes:
        frames: of the fused models' forwards in flight, by `RoutingState.key`.
        results: what the first linear of a group has computed for the others, by `fused_slot`: (input, result, adapter).
    """

    def __init__(self) -> None:
        self.frames: dict[int, RoutingFrame] = {}
        self.results: dict[int, tuple[torch.Tensor, torch.Tensor, str]] = {}


current = _Current()


_tracing_context = torch._guards.TracingContext.try_get


@torch.compiler.assume_constant_result
def _traced() -> bool:
    """Whether a compiler is tracing this code. For hooks: where they are outside of what is compiled, dynamo leaves them to
    Python, but not if they ask torch.compiler.is_compiling(): it would then guard what they read, at every step. (No name here
    is a module of torch's, or dynamo would compile this function by itself.)"""
    return _tracing_context() is not None


_keys = itertools.count()


class RoutingState:
    """What all adapted layers of one backbone share: the current frame (per thread), the hooks, the statistics."""

    def __init__(self) -> None:
        self._local = _ThreadState()
        self.key = next(_keys)  # a copy of the model has it too: their forwards do not run within each other
        self.fused = False
        self.router_layers: dict[str, LoRASwitchLinear] = {}
        self.recorders: list[RoutingRecorder] = []  # `record_routing()` blocks in progress
        self._blocks: list[CheckpointedBlock] = []
        self._handles: list[Any] = []
        self._unused: UnusedLinears | None = None  # to look for in the next forward that trains

    def __getstate__(self) -> dict[str, Any]:  # copy.deepcopy and pickle: everything but the frames in flight
        return {**self.__dict__, "_local": None, "recorders": [], "_unused": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=_ThreadState())

    @property
    def frame(self) -> RoutingFrame | None:
        """The frame of the forward that this thread is in, or None."""
        return self._local.frame

    @property
    def adapter_names(self) -> Sequence[str] | None:
        """The names of the mixed batch that this thread is in, one per sample, or None."""
        return self._local.adapter_names

    def frame_or_outside(self) -> RoutingFrame:
        """The frame of the forward that this thread is in; if it is in none, one that is good for shared experts only
        (`generate` calls the encoder of an encoder-decoder model by itself)."""
        frame = self.running_frame()
        if frame is None:
            frame = self.new_frame(False, self._local.adapter_names)
            frame.opened_at = OUTSIDE
        return frame

    def running_frame(self) -> RoutingFrame | None:
        """The frame of the forward that this thread is in, or None. Frames of forwards that have ended without a word (a
        KeyboardInterrupt, a thread that was told to stop) are closed first."""
        frame = self._local.frame
        while not (frame is None or _traced() or frame.is_running()):
            self.close_frame(frame, False)
            frame = self._local.frame
        return frame

    def in_training(self) -> bool:
        """Whether a loss may follow a forward that begins now: the layers that route are in training mode (not the backbone:
        an adapter on a backbone in eval mode trains as well), and gradients are on."""
        return torch.is_grad_enabled() and any(layer.training for layer in self.router_layers.values())

    def router_layer(self, adapter: str, layer: LoRASwitchLinear) -> LoRASwitchLinear:
        """The layer that holds the router of `adapter`, given that `layer` is the first one reached."""
        if adapter in layer.loraswitch_router:
            return layer
        router_layer = self.router_layers[adapter]
        if router_layer.router_is_named[adapter] or router_layer.in_features != layer.in_features:
            raise RuntimeError(
                f"The adapted layer '{layer.name}' runs before the linear that routes, '{router_layer.name}'. Set "
                f"router_module='{layer.name}', or exclude this layer with exclude_modules."
            )
        # The modules' order is not the order they run in (OPT lists k, v, q and runs q first): the first to run decides.
        return router_layer

    @contextmanager
    def sample_adapters(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Within it, forwards of this thread use `adapter_names`, one per sample."""
        previous = self._local.adapter_names
        self._local.adapter_names = adapter_names
        try:
            yield
        finally:
            self._local.adapter_names = previous

    @contextmanager
    def within(self, frame: RoutingFrame) -> Iterator[None]:
        """Make `frame` this thread's frame."""
        previous = self.frame
        self._local.frame = frame
        try:
            yield
        finally:
            self._local.frame = previous

    # ------------------------------------------------------------------------------------------------ hooks

    def connect(self, root: nn.Module, layers: Iterable[LoRASwitchLinear]) -> None:
        """(Re-)register the hooks: on each module, from `root` down, that contains all `layers` with routed experts. (Those
        with shared ones only may see other tokens, whose mask is not that of the decision.)"""
        self.disconnect()
        adapted: set[nn.Module] = set(layers)
        wanted = {layer for layer in adapted if any(layer.num_experts.values())}  # type: ignore[union-attr, operator]
        if not wanted:
            return
        owners: list[nn.Module] = []
        module: nn.Module | None = root
        while module is not None:
            owners.append(module)
            module = next((child for child in module.children() if wanted <= set(child.modules())), None)
            if module in wanted:
                break
        for depth, owner in enumerate(owners):
            hook = _OwnerHooks(self, owner, depth)
            self._handles.append(owner.register_forward_pre_hook(hook.before, with_kwargs=True))
            self._handles.append(owner.register_forward_hook(hook.after, always_call=True))
        self._blocks = checkpointed_blocks(root, adapted)
        self._unused = UnusedLinears(root, adapted)
        self._handles += keep_off_fast_paths(root, adapted)

    def disconnect(self) -> None:
        """Remove every hook and wrapper."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.unwrap()
        self._handles, self._blocks, self._unused = [], [], None

    def new_frame(self, training: bool, adapter_names: Sequence[str] | None) -> RoutingFrame:
        return RoutingFrame(training, adapter_names)

    def open_frame(self, opened_at: int, training: bool, previous: RoutingFrame | None) -> RoutingFrame:
        """A frame for a forward that begins, of the owner at depth `opened_at`, within that of `previous`."""
        frame = self.new_frame(training, self._local.adapter_names)
        frame.opened_at, frame.previous = opened_at, previous
        if training:
            # at each forward, because gradient_checkpointing_enable() may come at any time
            for block in self._blocks:
                if torch.compiler.is_compiling():
                    block.pause(frame)
                else:
                    block.wrap(self)
            if self._unused is not None and not torch.compiler.is_compiling():
                frame.unused, self._unused = self._unused.begin(), None
        self._enter(frame)
        return frame

    def close_frame(self, frame: RoutingFrame, finished: bool) -> None:
        """Go back to the frame before it. `finished`: the forward has come to its end."""
        for module in frame.paused:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        self._enter(frame.previous)
        if self.fused:
            current.results.clear()
        if frame.unused is not None:
            frame.unused.end()
            if finished:
                frame.unused.warn()
            elif self._unused is None:
                self._unused = frame.unused  # it saw a part of a forward: the next one says

    def _enter(self, frame: RoutingFrame | None) -> None:
        self._local.frame = frame
        if not self.fused:
            return
        if frame is None:
            current.frames.pop(self.key, None)
        else:
            current.frames[self.key] = frame


def _outside_of_a_forward(layer_name: str) -> str:
    return (
        f"The adapted layer '{layer_name}' was reached before any routing: LoRA-Switch decides once per forward of "
        "the model, and this layer was called outside of one. Call the model, not the layer. In backward this means "
        "gradient checkpointing that LoRA-Switch cannot follow (torch.utils.checkpoint called by the model itself, "
        "FSDP's activation_checkpointing): use the model's gradient_checkpointing_enable() instead."
    )


def _broken_logits(adapter: str, layer_name: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why the router's logits are not finite, from its input x and its weight."""
    if not torch.isfinite(weight).all():
        what = (
            f"the weight of the router of adapter '{adapter}' (at '{layer_name}'): the adapter itself is broken, by a "
            "training that diverged or by its file. Load a checkpoint from before"
        )
    elif not torch.isfinite(x).all():
        what = (
            f"the input of the router of adapter '{adapter}' (layer '{layer_name}'): the hidden states there are broken"
        )
    else:
        what = (
            f"the logits of the router of adapter '{adapter}' (layer '{layer_name}'): hidden states and weight are "
            "finite, but their product is beyond float32"
        )
    return f"NaN or Inf in {what}. On a GPU, where a check would stall the device, the outputs become NaN instead."


class RoutingRecorder:
    """What `model.record_routing()` yields: statistics of every forward within the block, by adapter."""

    def __init__(self, state: RoutingState) -> None:
        self.records = {
            adapter: RoutingRecord(layer.num_experts[adapter], layer.loraswitch_router[adapter].weight.device)
            for adapter, layer in state.router_layers.items()
        }

    def summary(self, adapter_name: str | None = None) -> dict[str, Any]:
        """As `router_stats()`; `adapter_name` may be left out if only one adapter was used."""
        return summary_of(self.records, adapter_name)


def summary_of(records: dict[str, RoutingRecord], adapter_name: str | None) -> dict[str, Any]:
    """The summary of one record; without a name, of the only one, or of the only one that has counted anything."""
    if adapter_name is None:
        used = [name for name, record in records.items() if float(record.tokens) > 0] or list(records)
        if len(used) != 1:
            raise ValueError(f"adapter_name must be one of {', '.join(records) or 'no adapters: none is loaded'}.")
        adapter_name = used[0]
    if adapter_name not in records:
        raise ValueError(f"adapter_name={adapter_name!r} is unknown: choose from {', '.join(records)}.")
    return records[adapter_name].summary()


class _OwnerHooks:
    """The two hooks of one owner, at `depth` owners below the outermost (bound methods: `copy.deepcopy` rebinds them)."""

    def __init__(self, state: RoutingState, owner: nn.Module, depth: int) -> None:
        self.state = state
        self.depth = depth
        names = list(inspect.signature(owner.forward).parameters)
        self.mask_position = names.index("attention_mask") if "attention_mask" in names else None
        # a tower without a mask of its own, inside a model whose mask is that of another stream (CLIP's text)
        self.has_no_mask = self.mask_position is None and depth > 0 and isinstance(owner, PreTrainedModel)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        frame = self._frame()
        if frame is None:
            return
        if not _traced():
            frame.called_from(self.depth, sys._getframe(1))
        if self.mask_position is not None:
            mask = kwargs.get("attention_mask", args[self.mask_position] if len(args) > self.mask_position else None)
            # The innermost knows best, also by passing none (a T5 decoder's mask is not the encoder's). But the attention's
            # own mask [batch, 1, queries, keys] does not say which queries are padding if an outer one [batch, keys] did.
            if mask is None or _marks_tokens(mask) or not _marks_tokens(frame.attention_mask):
                frame.attention_mask = mask
        elif self.has_no_mask:
            frame.attention_mask = None
        if frame.num_items_in_batch is None:
            frame.num_items_in_batch = kwargs.get("num_items_in_batch", None)

    def _frame(self) -> RoutingFrame | None:
        """The frame that this forward of the owner belongs to; None in a checkpointed block's second run."""
        state, depth = self.state, self.depth
        frame = state.running_frame()
        if frame is not None and frame.opened_at == SECOND_RUN:
            return None
        if frame is None or (frame.opened_at >= depth and _traced()):  # compiled code cannot tell whether that one runs
            frame = state.open_frame(depth, state.in_training(), None)
        elif not _traced() and (
            frame.opened_at >= depth or frame.runs(depth)
        ):  # the model is called in its own forward
            frame = state.open_frame(depth, state.in_training(), frame)
        elif frame.deepest >= depth:  # a second pass of the same forward
            earlier = frame
            frame = state.open_frame(earlier.opened_at, earlier.training, earlier.previous)
            frame.continues(earlier, depth)
        frame.deepest = depth
        return frame

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        frame = self.state.running_frame()
        if frame is None or frame.opened_at != self.depth:
            # Nobody asks for the decision any more. torch 2.11 runs the hooks of the outermost module that it compiles outside
            # of the graph: what the frame still holds there becomes an output of the graph.
            if frame is not None and frame.deepest == self.depth and not (frame.training or self.state.recorders):
                frame.routings.clear()
                frame.shared.clear()
            return None
        self.state.close_frame(frame, output is not None)
        if output is None:  # an exception is on its way
            return None
        if frame.training or self.state.recorders:
            return add_auxiliary_losses(self.state, frame, output)
        return None


def _marks_tokens(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2
