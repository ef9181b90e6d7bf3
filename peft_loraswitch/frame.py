"""Where a routing decision lives: in a `RoutingFrame`, one per forward of the backbone, never longer.

The first module of a forward that contains every adapted layer (usually the whole model) opens the frame and closes it,
by hooks. Layers in between find it through `RoutingState.frame`. The frame is thread-local, so two threads do not see
each other's routing; nothing is kept on a module, so nothing leaks into the next forward, into a compiled graph's
outputs, or into `copy.deepcopy(model)`.

Gradient checkpointing runs a block again during backward, long after its frame was closed, and on a GPU on autograd's own
thread. So the checkpointing function of each block is wrapped (`CheckpointWithRouting`): the second run sees the
decisions as they stood when the block first ran.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .balance import PendingBatches, RoutingRecord, add_auxiliary_losses
from .routing import Routing, jitter, route

if TYPE_CHECKING:
    from .layer import LoRASwitchLinear

NO_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for "no adapter on this sample"


class RoutingFrame:
    """The routing of one forward.

    Attributes:
        routings: the decisions taken so far, by adapter name.
        attention_mask: the forward's mask, if it had one: which tokens are real (for losses and statistics only).
        num_items_in_batch: what the trainer passed, see `balance.py`.
        adapter_names: adapter of each sample (mixed batches), or None.
        training: whether a loss may follow: model in train mode and gradients enabled when the frame was opened.
    """

    def __init__(self, owner: nn.Module | None, training: bool, adapter_names: Sequence[str] | None = None) -> None:
        self.owner = owner
        self.training = training
        self.adapter_names = adapter_names
        self.routings: dict[str, Routing] = {}
        self.attention_mask: torch.Tensor | None = None
        self.num_items_in_batch: Any = None
        self.replayed: RoutingFrame | None = None
        self._rows: dict[tuple[str, int], torch.Tensor] = {}

    def routing(self, adapter: str, layer: LoRASwitchLinear, x: torch.Tensor) -> Routing:
        """The decision of this forward for `adapter`; taken now, from x [..., in_features], if it is not there yet."""
        routing = self.routings.get(adapter)
        if routing is None:
            routing = self._decide(adapter, layer, x)
            self.routings[adapter] = routing
        return routing

    def _decide(self, adapter: str, layer: LoRASwitchLinear, x: torch.Tensor) -> Routing:
        router_layer = layer.routing_state.router_layer(adapter, layer)
        options = router_layer.routing_options[adapter]
        router = router_layer.loraswitch_router[adapter]
        recording = self.training or bool(layer.routing_state.recorders)
        routed = jitter(x, options.jitter) if options.jitter and layer.training else x
        logits = router(routed)
        if logits.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(logits).all():
            raise ValueError(
                f"NaN or Inf in the input of the router of adapter '{adapter}' (layer '{layer.name}'): the hidden states "
                "that reach it are broken. On a GPU, where a check would stall the device, the outputs become NaN instead."
            )
        routing = route(logits, options)
        if recording:
            routing.router_input = x.detach()
        if self.training and not torch.compiler.is_compiling():
            _prepare_relay(routing, None if self.replayed is None else self.replayed.routings.get(adapter))
        return routing

    def served_rows(self, adapter: str) -> tuple[int, torch.Tensor] | None:
        """(number of tokens in the batch, indices of those that `adapter` serves) in a mixed batch, else None."""
        return next(((total, rows) for (name, total), rows in self._rows.items() if name == adapter), None)

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


def _prepare_relay(routing: Routing, original: Routing | None) -> None:
    """Carry gradients to the router across reentrant checkpointing.

    Reentrant checkpointing runs blocks without gradients first and each again, on its own, in backward. Blocks after the
    router's would hand their gradient to a decision that has no graph. So they all use one leaf tensor (`relay`), whose
    `.grad` sums up what they send; the router's own block runs again last, and there the sum joins the gradient of the
    recomputed gates.
    """
    if not torch.is_grad_enabled():  # inside the first, gradient-free run of a reentrant checkpoint
        routing.relay = routing.dense_gates = routing.dense_gates.detach().requires_grad_()
        return
    source = original if original is not None else routing

    def add_relayed(grad: torch.Tensor) -> torch.Tensor | None:
        relay = source.relay
        if relay is None or relay.grad is None:
            return None
        relayed, relay.grad = relay.grad, None
        return grad + relayed

    if routing.dense_gates.requires_grad:
        routing.dense_gates.register_hook(add_relayed)


class RoutingState:
    """What all adapted layers of one backbone share: the current frame (per thread), the hooks, the statistics."""

    def __init__(self) -> None:
        self._local = threading.local()
        self.router_layers: dict[str, LoRASwitchLinear] = {}
        self.recorders: list[RoutingRecorder] = []  # `record_routing()` blocks in progress
        self.pending: dict[str, PendingBatches] = {}  # gradient accumulation in progress, see balance.py
        self._blocks: list[nn.Module] = []
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:  # copy.deepcopy and pickle: everything but the frames in flight
        return {**self.__dict__, "_local": None, "recorders": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    @property
    def frame(self) -> RoutingFrame | None:
        """The frame of the forward that this thread is in, or None."""
        return getattr(self._local, "frame", None)

    def require_frame(self, layer_name: str) -> RoutingFrame:
        frame = self.frame
        if frame is None:
            raise RuntimeError(
                f"The adapted layer '{layer_name}' was reached before any routing: LoRA-Switch decides once per forward of "
                "the model, and this layer was called outside of one. Call the model, not the layer; with FSDP's "
                "activation_checkpointing use the model's gradient_checkpointing_enable() instead."
            )
        return frame

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
        previous = getattr(self._local, "adapter_names", None)
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

    def connect(self, root: nn.Module, layers: Iterable[nn.Module]) -> None:
        """(Re-)register the hooks: on each module, from `root` down, that contains all `layers`."""
        self.disconnect()
        wanted = set(layers)
        if not wanted:
            return
        owners: list[nn.Module] = []
        module: nn.Module | None = root
        while module is not None:
            owners.append(module)
            module = next((child for child in module.children() if wanted <= set(child.modules())), None)
            if module in wanted:
                break
        for owner in owners:
            hook = _OwnerHooks(self, owner)
            self._handles.append(owner.register_forward_pre_hook(hook.before, with_kwargs=True))
            self._handles.append(owner.register_forward_hook(hook.after, always_call=True))
        self._blocks = [
            module
            for module in root.modules()
            if hasattr(module, "gradient_checkpointing") and not wanted.isdisjoint(module.modules())
        ]

    def disconnect(self) -> None:
        """Remove every hook and wrapper."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            function = getattr(block, "_gradient_checkpointing_func", None)
            if isinstance(function, CheckpointWithRouting):
                block._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]
        self._handles, self._blocks = [], []

    def open_frame(self, owner: nn.Module) -> RoutingFrame:
        training = owner.training and torch.is_grad_enabled()
        frame = RoutingFrame(owner, training, getattr(self._local, "adapter_names", None))
        if training and not torch.compiler.is_compiling():
            self._wrap_checkpointing()
        self._local.frame = frame
        return frame

    def close_frame(self) -> None:
        self._local.frame = None

    def _wrap_checkpointing(self) -> None:
        # At each forward, because gradient_checkpointing_enable() may come at any time, and replaces the function.
        for block in self._blocks:
            if block.gradient_checkpointing:
                function: Any = getattr(block, "_gradient_checkpointing_func", None)
                if function is not None and not isinstance(function, CheckpointWithRouting):
                    block._gradient_checkpointing_func = CheckpointWithRouting(self, function)  # type: ignore[assignment]


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
    """The two hooks of one module that contains all adapted layers (bound methods, so that deepcopy rebinds them)."""

    def __init__(self, state: RoutingState, owner: nn.Module) -> None:
        self.state = state
        self.owner = owner
        names = list(inspect.signature(owner.forward).parameters)
        self.mask_position = names.index("attention_mask") if "attention_mask" in names else None

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        frame = self.state.frame
        if frame is None:
            frame = self.state.open_frame(self.owner)
        if frame.attention_mask is None:
            frame.attention_mask = kwargs.get("attention_mask", None)
            if frame.attention_mask is None and self.mask_position is not None and len(args) > self.mask_position:
                frame.attention_mask = args[self.mask_position]
        if frame.num_items_in_batch is None:
            frame.num_items_in_batch = kwargs.get("num_items_in_batch", None)

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        frame = self.state.frame
        if frame is None or frame.owner is not self.owner:
            return None
        self.state.close_frame()
        if output is None or not frame.routings:  # an exception is on its way, or nothing was routed
            return None
        if frame.training or self.state.recorders:
            return add_auxiliary_losses(self.state, frame, output)
        return None


class CheckpointWithRouting:
    """Stands in for a block's `_gradient_checkpointing_func`; see the module's text."""

    def __init__(self, state: RoutingState, checkpoint: Callable[..., Any]) -> None:
        self.state = state
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = self.state.frame
        if frame is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(_RunAgain(self.state, frame, function), *args, **kwargs)


class _RunAgain:
    """Runs a block; from the second time on in a copy of the frame as it stood before the first."""

    def __init__(self, state: RoutingState, frame: RoutingFrame, function: Callable[..., Any]) -> None:
        self.state, self.frame, self.function = state, frame, function
        self.routings_before = dict(frame.routings)
        self.reentrant: bool | None = None  # None: has not run yet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reentrant is None:
            self.reentrant = not torch.is_grad_enabled()
            return self.function(*args, **kwargs)
        replay = RoutingFrame(None, self.frame.training, self.frame.adapter_names)
        replay.replayed = self.frame
        for adapter, routing in self.routings_before.items():
            replay.routings[adapter] = _for_reentrant_replay(routing) if self.reentrant else routing
        with self.state.within(replay):
            return self.function(*args, **kwargs)


def _for_reentrant_replay(routing: Routing) -> Routing:
    """The decision as blocks after the router's use it in their second run: with the relay instead of the graph."""
    if routing.relay is None:  # decided outside of any checkpoint
        routing.relay = routing.dense_gates.detach().requires_grad_()
    return Routing(routing.experts, routing.gates, routing.relay, relay=routing.relay)
