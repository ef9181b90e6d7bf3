"""The hooks that open a `RoutingFrame` when a forward of the backbone begins, and close it when that ends.

They stand on the modules that contain every layer with routed experts: the whole model, and those inside it down to the
smallest (the owners). The outermost owner that is called opens the frame; an inner one may be called by itself, as `generate`
does with an encoder, and opens it then.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .compose.given_experts import experts_of_batch
from .layer import LoRASwitchLinear
from .mixed import check_given
from .routing.cached_sums import own_cache
from .routing.context import ForwardInputs
from .routing.frame import SECOND_RUN, RoutingFrame, RoutingState, traced
from .targets.streams import is_cross_key_or_value
from .targets.unused_linears import UnusedLinears, keep_off_fast_paths
from .training.end_of_forward import finish_forward
from .training.gradient_checkpointing import checkpointed_blocks


def connect(state: RoutingState, root: nn.Module, layers: Iterable[LoRASwitchLinear]) -> None:
    """(Re-)register the hooks: on each module, from `root` down, that contains all `layers` with routed experts. (Those
    with shared ones only may see other tokens, whose mask is not that of the decision.)"""
    disconnect(state)
    adapted = list(layers)
    routed: set[nn.Module] = {layer for layer in adapted if any(o.is_routed for o in layer.routing_options.values())}
    if routed:
        state.hooks = Hooks(state, root, adapted, routed)


def disconnect(state: RoutingState) -> None:
    """Remove every hook and wrapper."""
    if state.hooks is not None:
        state.hooks.remove()
        state.hooks = None


class Hooks:
    """All hooks on one backbone.

    Args:
        root: the backbone.
        layers: its adapted linears, in module order (kept as an attribute); `routed`: those with routed experts.
    """

    def __init__(self, state: RoutingState, root: nn.Module, layers: Sequence[Any], routed: set[nn.Module]) -> None:
        self.state = state
        self._handles: list[Any] = []
        owners = _owners(root, routed)
        models = [depth for depth, owner in enumerate(owners) if isinstance(owner, PreTrainedModel)]
        self.innermost_model = max(models, default=0)
        self.see_context = {
            name for layer in layers for name, options in layer.routing_options.items() if options.decay
        }
        # either all see the encoder's tokens or none: targets/streams.py
        crosses = any(layer in routed and is_cross_key_or_value(root, name) for name, layer in root.named_modules())
        for depth, owner in enumerate(owners):
            hook = _OwnerHooks(self, owner, depth, routed, crosses)
            self._handles.append(owner.register_forward_pre_hook(hook.before, with_kwargs=True))
            self._handles.append(owner.register_forward_hook(hook.after, always_call=True))
        self._blocks = checkpointed_blocks(root, set(layers))
        # to look for in the next forward that trains
        self._unused: UnusedLinears | None = UnusedLinears(root, layers)
        self.layers: Sequence[Any] = layers
        self._looked_at_experts = False
        self._handles += keep_off_fast_paths(root, set(layers))

    def __getstate__(self) -> dict[str, Any]:  # copy.deepcopy and pickle
        return {**self.__dict__, "_unused": None}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.unwrap()

    def in_training(self) -> bool:
        """Whether a loss may follow a forward that begins now: the layers that route are in training mode (not the backbone:
        an adapter on a backbone in eval mode trains as well), and gradients are on."""
        return torch.is_grad_enabled() and any(layer.training for layer in self.state.router_layers.values())

    def open_frame(self, opened_at: int, training: bool, previous: RoutingFrame | None) -> RoutingFrame:
        """A frame for a forward that begins, of the owner at depth `opened_at`, within that of `previous`."""
        frame = RoutingFrame(training, self.state.adapter_names)
        frame.opened_at, frame.previous, frame.given = opened_at, previous, self.state.given
        frame.time_first = self.state.time_first
        # At each forward, because gradient_checkpointing_enable() may come at any time. Compiled, a block in training mode is
        # checkpointed without gradients as well, and dynamo would give up on its code for good.
        if torch.compiler.is_compiling():
            for block in self._blocks:
                block.pause(frame)
        elif training:
            for block in self._blocks:
                block.wrap(self.state)
            if self._unused is not None:
                self._look_for_unused(frame)
            if not self._looked_at_experts:
                self._looked_at_experts = True
                self._look_for_empty_experts()
        self.state.enter(frame)
        return frame

    def _look_for_unused(self, frame: RoutingFrame) -> None:
        assert self._unused is not None
        unused, self._unused = self._unused.begin(), None
        if unused is None:
            return

        def end(finished: bool) -> None:
            unused.end()
            if finished:
                unused.warn()
            elif self._unused is None:
                self._unused = unused  # it saw a part of a forward: the next one says

        frame.at_close.append(end)

    def _look_for_empty_experts(self) -> None:
        """Warn, once, if a router is trained alone above experts whose B is zero everywhere, as that of a fresh adapter is."""
        for adapter, router_layer in self.state.router_layers.items():
            if (
                adapter not in router_layer.active_adapters
                or router_layer.adapter_config[adapter].trainable != "router"
            ):
                continue
            weights = [layer.loraswitch_B[adapter].weight for layer in self.layers if adapter in layer.loraswitch_B]
            if router_layer.trains(adapter) and all(map(_is_zero, weights)):
                warnings.warn(
                    f"The adapter '{adapter}' has trainable='router', but its experts add nothing (their B is zero), so the "
                    "router gets no gradient through them: load or import experts first, or set trainable='all'.",
                    stacklevel=2,
                )


def _is_zero(weight: torch.Tensor) -> bool:
    """False where it cannot be seen from here: shards, the meta device."""
    here = weight.numel() > 0 and weight.device.type != "meta" and not hasattr(weight, "full_tensor")
    return here and not bool(weight.detach().any())


def _owners(root: nn.Module, routed: set[nn.Module]) -> list[nn.Module]:
    """The modules that contain all of `routed`, from the outermost to the smallest."""
    owners: list[nn.Module] = []
    module: nn.Module | None = root
    while module is not None:
        owners.append(module)
        module = next((child for child in module.children() if routed <= set(child.modules())), None)
        if module in routed:
            break
    return owners


EXPERTS = "experts"  # the argument of a forward that says which expert each sample is for


class _OwnerHooks:
    """The two hooks of one owner, at `depth` owners below the outermost (bound methods: `copy.deepcopy` rebinds them)."""

    def __init__(self, hooks: Hooks, owner: nn.Module, depth: int, routed: set[nn.Module], crosses: bool) -> None:
        self.hooks, self.state = hooks, hooks.state
        self.depth = depth
        parameters = inspect.signature(owner.forward).parameters
        names = list(parameters)
        mask = _mask_argument(owner, names, routed, crosses)
        self.mask_name, self.mask_position = mask or "", None if mask is None else names.index(mask)
        self.takes_experts = depth == 0 and EXPERTS not in names
        # a tower without a mask of its own, inside a model whose mask is that of another stream (CLIP's text)
        is_tower = depth > 0 and isinstance(owner, PreTrainedModel)
        self.has_no_mask = self.mask_position is None and is_tower
        takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        # the encoder of an encoder-decoder model
        self.has_no_cache = is_tower and not takes_more and set(names).isdisjoint(_PASTS)
        self.positions = {name: i for i, name in enumerate(names)}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        experts = kwargs.pop(EXPERTS, None) if self.takes_experts else None
        frame = self._frame()
        if frame is None:
            return
        if experts is not None:
            given = experts_of_batch(self.state, experts)
            for each in given.values():
                check_given(each, args, kwargs)
            self.state.give_with_batch(frame, given)
        if not traced():
            frame.called_from(self.depth, sys._getframe(1))
        if self.mask_position is not None:
            mask = kwargs.get(self.mask_name, args[self.mask_position] if len(args) > self.mask_position else None)
            # The innermost knows best, also by passing none (a T5 decoder's mask is not the encoder's). But the attention's
            # own mask [batch, 1, queries, keys] does not say which queries are padding if an outer one [batch, keys] did.
            if mask is None or _marks_tokens(mask) or not _marks_tokens(frame.attention_mask):
                frame.attention_mask = mask
        elif self.has_no_mask:
            frame.attention_mask = None
        if self.hooks.see_context:
            is_model = self.depth <= self.hooks.innermost_model  # blocks within see what it made of its inputs
            # but a mask of tokens is one there, too: wav2vec 2's model is given one of samples, its encoder one of frames
            if is_model or _marks_tokens(frame.attention_mask):
                frame.inputs.mask = frame.attention_mask
            if is_model:
                self._see_inputs(frame.inputs, args, kwargs)
        if frame.num_items_in_batch is None:
            frame.num_items_in_batch = kwargs.get("num_items_in_batch", None)

    def _see_inputs(self, inputs: ForwardInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What routers that see context need. The innermost owner knows best."""

        def passed(names: Iterable[str]) -> Any:
            for name in names:
                position = self.positions.get(name, len(args))
                value = args[position] if position < len(args) else kwargs.get(name)
                if value is not None:
                    return value
            return None

        tokens = passed(_TOKENS)
        if isinstance(tokens, torch.Tensor):
            inputs.batch = tokens.shape[0]
        positions = passed(("position_ids",))
        if isinstance(positions, torch.Tensor):
            inputs.position_ids = positions
        past = own_cache(passed(_PASTS))
        if past is not None:
            inputs.see_cache(past, self.hooks.see_context)
        elif self.has_no_cache:
            inputs.see_cache(None, self.hooks.see_context)

    def _frame(self) -> RoutingFrame | None:
        """The frame that this forward of the owner belongs to; None in a checkpointed block's second run."""
        state, depth = self.state, self.depth
        frame = state.running_frame()
        if frame is not None and frame.opened_at == SECOND_RUN:
            return None
        if frame is None or (frame.opened_at >= depth and traced()):  # compiled code cannot tell whether that one runs
            frame = self.hooks.open_frame(depth, self.hooks.in_training(), None)
        elif not traced() and (frame.opened_at >= depth or frame.runs(depth)):  # the model is called in its own forward
            frame = self.hooks.open_frame(depth, self.hooks.in_training(), frame)
        elif frame.deepest >= depth:  # a second pass of the same forward
            earlier = frame
            frame = self.hooks.open_frame(earlier.opened_at, earlier.training, earlier.previous)
            frame.continues(earlier, depth)
        frame.deepest = depth
        return frame

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        frame = self.state.running_frame()
        if frame is not None and self.depth == self.hooks.innermost_model and self.hooks.see_context:
            if output is not None and frame.opened_at != SECOND_RUN:
                frame.inputs.end(None if self.has_no_cache else output)
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
            return finish_forward(self.state, frame, output)
        return None


# Names of what holds a batch of tokens, the decoder's first, and of what holds past ones.
_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "hidden_states", "pixel_values")
_PASTS = ("cache", "cache_params", "layer_past", "mems", "past_key_value", "past_key_values")


def _mask_argument(owner: nn.Module, names: Sequence[str], routed: set[nn.Module], crosses: bool) -> str | None:
    """Which of an owner's arguments says what tokens of the routed stream are padding. An encoder-decoder model takes that of the
    encoder as `attention_mask`, its decoder as `encoder_attention_mask`. `crosses`: the layers see the encoder's tokens."""
    if crosses and "encoder_hidden_states" in names:  # Whisper's decoder knows of no padding there
        return "encoder_attention_mask" if "encoder_attention_mask" in names else None
    if not crosses and "decoder_attention_mask" in names and hasattr(owner, "get_decoder"):
        decoder: nn.Module | None = owner.get_decoder()  # type: ignore[operator]
        if decoder is not None and decoder is not owner and routed <= set(decoder.modules()):
            return "decoder_attention_mask"
    return "attention_mask" if "attention_mask" in names else None


def _marks_tokens(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2
