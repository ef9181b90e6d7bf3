"""The adapted linear, in plain PyTorch: the definition of the maths.

    y = W x + b + s * sum_j g_tj B[e_tj] A[e_tj] x          for each token t, with the forward's one decision (e, g)

Experts are stacked: `num_experts` routed ones, then `num_shared_experts` that every token uses. A linear before
the one that routes has the shared ones only, and follows no decision.

No loop over experts and no wait for the device: A of all experts is one wide matrix, the hidden of experts that were not
chosen is set to zero, and B of all experts is one wide matrix again: two dense products, whatever the routing.

Chosen experts alone decide. Whatever the weights of the others make of a token, Inf and NaN included, forward or backward,
reaches neither its output nor a gradient, as long as those weights themselves are finite. Weights that are Inf or NaN are a
broken adapter, which loading refuses: 0 * Inf is NaN, so in B they reach the outputs of tokens that did not choose that
expert, and in A the gradient of the layer's input. Looking for them would cost a pass over all experts in each forward.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import LoRASwitchConfig
from .experts import ExpertsA, ExpertsB
from .routing.context import Context
from .routing.decision import Routing, route, shared_routing
from .routing.frame import NO_ADAPTER, OUTSIDE, TIME_FIRST, Relay, RoutingFrame, RoutingState
from .routing.given import GivenExperts, given_routing
from .routing.options import RoutingOptions
from .routing.router import Router, full_precision, jitter
from .routing.statistics import RoutingRecord
from .tensor_parallel import Split, features_of, split_of
from .training import fast_linears
from .training.loss_joining import join_at_decision
from .training.losses import PendingBatches
from .transforms import under_transform, under_vmap


class LoRASwitchLayer(BaseTunerLayer):
    """State of one adapted linear: per adapter the experts, their settings, and on the layer that routes the router."""

    adapter_layer_names = ("loraswitch_A", "loraswitch_B", "loraswitch_router")
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "routing_options",
        "router_is_named",
        "adapter_config",
        "loraswitch_dropout",
        "loraswitch_record",
        "loraswitch_pending",
    )

    in_features: int
    out_features: int
    training: bool  # this class is always an nn.Module as well
    # nn.ModuleDicts by adapter name. Any, because a type checker sees no more than Module in them.
    loraswitch_A: Any  # of ExpertsA
    loraswitch_B: Any  # of ExpertsB
    loraswitch_router: Any  # of Router
    loraswitch_dropout: Any
    loraswitch_record: Any  # of RoutingRecord
    loraswitch_pending: Any  # of PendingBatches

    def __init__(self, base_layer: nn.Module, name: str, routing_state: RoutingState, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.name = name
        self.routing_state = routing_state
        self.quantization_backend = quantization_backend(self.get_base_layer(), **kwargs)
        self.loraswitch_A = nn.ModuleDict()
        self.loraswitch_B = nn.ModuleDict()
        self.loraswitch_router = nn.ModuleDict()
        self.loraswitch_dropout = nn.ModuleDict()
        self.loraswitch_record = nn.ModuleDict()
        self.loraswitch_pending = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.routing_options: dict[str, RoutingOptions] = {}
        self.router_is_named: dict[str, bool] = {}
        self.adapter_config: dict[str, LoRASwitchConfig] = {}  # the model's own, which says what trains when asked
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        features = features_of(self.get_base_layer())
        self.in_features: int = features[0]
        self.out_features: int = features[1]

    def update_layer(
        self,
        adapter_name: str,
        config: LoRASwitchConfig,
        r: int,
        lora_alpha: float,
        is_router: bool,
        is_routed: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter to this layer; with `is_router` also its router, without `is_routed` only its shared experts."""
        self.adapter_config[adapter_name] = config
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = config.scale(lora_alpha, r)
        options = config.routing_options() if is_routed else config.routing_options().shared_only()
        self.routing_options[adapter_name] = options
        self.loraswitch_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        )
        self.loraswitch_A[adapter_name] = ExpertsA(options.num_stacked, r, self.in_features)
        self.loraswitch_B[adapter_name] = ExpertsB(options.num_stacked, self.out_features, r)
        if is_router:
            self.router_is_named[adapter_name] = config.router_module is not None
            self.loraswitch_router[adapter_name] = Router(self.in_features, options.num_choices)
            self.loraswitch_record[adapter_name] = RoutingRecord(
                options.num_experts, expert_names=config.expert_names, base_expert=config.base_expert
            )
            self.loraswitch_pending[adapter_name] = PendingBatches()
            self.routing_state.router_layers[adapter_name] = self
        for name in (*self.adapter_layer_names, "loraswitch_dropout"):
            if adapter_name in getattr(self, name):
                getattr(self, name)[adapter_name].train(
                    self.training
                )  # new modules are in training mode, whatever holds them
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        a: Any = self.loraswitch_A[adapter_name].weight
        b: Any = self.loraswitch_B[adapter_name].weight
        if a.device.type == "meta":
            return
        if init_weights == "gaussian":
            nn.init.normal_(a, std=1 / self.r[adapter_name])
        else:
            # what kaiming_uniform_(a=sqrt(5)) gives each expert's [r, in] matrix, as in LoRA
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(a, -bound, bound)
        if init_weights is False:
            nn.init.normal_(b, std=0.02)
        else:
            nn.init.zeros_(b)
        if adapter_name in self.loraswitch_router:
            router: Any = self.loraswitch_router[adapter_name]
            router.reset_parameters()

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        trained = self._trained_experts()  # first: an error here leaves everything as it was
        super().set_adapter(adapter_names, *args, **kwargs)
        self._train_only(trained)
        # One name is kept as a string: a list that all layers share is one that dynamo guards once for each of them.
        if isinstance(self._active_adapter, list) and len(self._active_adapter) == 1:
            self._active_adapter = self._active_adapter[0]

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        trained = self._trained_experts()
        super().set_requires_grad(*args, **kwargs)
        self._train_only(trained)

    def _trained_experts(self) -> dict[str, list[int] | None]:
        """By adapter, the experts that train; None: all of them do. See `LoRASwitchConfig.trainable`."""
        return {
            name: config.trained_experts for name, config in self.adapter_config.items() if name in self.loraswitch_A
        }

    def _train_only(self, trained: dict[str, list[int] | None]) -> None:
        """Freeze what does not train of the adapters that PEFT has made trainable."""
        for name, indices in trained.items():
            routed = self.routing_options[name].is_routed
            for experts in (self.loraswitch_A[name], self.loraswitch_B[name]):
                experts.train_alone(indices if routed or indices is None else [])
            if indices and name in self.loraswitch_router:
                self.loraswitch_router[name].requires_grad_(False)

    def tie_to_stack(self) -> None:
        """After something has cast every parameter for itself: see `Experts.tie_to_stack`."""
        for experts in (*self.loraswitch_A.values(), *self.loraswitch_B.values()):
            experts.tie_to_stack()

    def take_up_trainable(self, adapter: str) -> None:
        """After experts have come or gone, see `compose/resize.py`."""
        self._train_only({adapter: self.adapter_config[adapter].trained_experts})

    def trains(self, adapter: str) -> bool:
        """Whether anything of `adapter` that this layer computes with asks for gradients: its experts here, and, if it is
        routed, the router, wherever that is."""
        modules = [self.loraswitch_A[adapter], self.loraswitch_B[adapter]]
        router_layer = (
            self.routing_state.router_layers.get(adapter) if self.routing_options[adapter].is_routed else None
        )
        if router_layer is not None:
            modules.append(router_layer.loraswitch_router[adapter])
        return any(weight.requires_grad for module in modules for weight in module.parameters())

    def delete_adapter(self, adapter_name: str) -> None:
        left = sorted(set(self.routing_state.router_layers) - {adapter_name})
        if list(self.active_adapters) == [adapter_name] and left:
            # PEFT lets each layer choose from the adapters on it; they may differ, and all layers must agree
            warnings.warn(f"Adapter {adapter_name} was active and is deleted now. Setting active adapter to {left[0]}.")
            self.set_adapter(left[0])
        if self.routing_state.router_layers.get(adapter_name) is self:
            del self.routing_state.router_layers[adapter_name]
        super().delete_adapter(adapter_name)

    # ------------------------------------------------------------------------------------------------ deciding

    def routing_for(self, adapter: str, frame: RoutingFrame, x: torch.Tensor) -> Routing:
        """What this layer follows: the forward's decision for `adapter`, taken now, from x [..., in_features], if it is not
        there yet; if the layer has only shared experts, all of those.

        Raises:
            RuntimeError: there is something to decide, and no forward of the model.
        """
        if not torch.compiler.is_compiling():
            frame.used.add(adapter)
            if frame.training and adapter not in frame.trained and self.trains(adapter):
                frame.trained.add(adapter)
        if not self.routing_options[adapter].is_routed:
            return self.shared_routing(adapter, frame, x)
        routing = frame.routings.get(adapter)
        if routing is None:
            if frame.opened_at == OUTSIDE:
                raise RuntimeError(_outside_of_a_forward(self.name))
            given = frame.given.get(adapter)
            if given is None:
                routing = self.router_layer(adapter).decide(adapter, frame, x, self.name)
            else:
                routing = self.router_layer(adapter).follow(adapter, frame, x, given)
            frame.routings[adapter] = routing
        return routing

    def shared_routing(self, adapter: str, frame: RoutingFrame, x: torch.Tensor) -> Routing:
        """All shared experts, for a layer that has no others; made once, since it is the same for all such layers."""
        routing = frame.shared.get(adapter)
        if routing is None or routing.token_shape != x.shape[:-1] or routing.gates.device != x.device:
            options = self.routing_options[adapter]
            routing = shared_routing(options.num_shared_experts, options.top_k, x.shape[:-1], x.device)
            # a checkpointed block must not change what lies outside of it while it is compiled
            if not (frame.training and torch.compiler.is_compiling()):
                frame.shared[adapter] = routing
        return routing

    def router_layer(self, adapter: str) -> LoRASwitchLayer:
        """The layer that holds the router of `adapter`, given that this one is the first reached."""
        if adapter in self.loraswitch_router:
            return self
        router_layer: LoRASwitchLayer = self.routing_state.router_layers[adapter]
        if router_layer.router_is_named[adapter] or router_layer.in_features != self.in_features:
            raise RuntimeError(
                f"The adapted layer '{self.name}' runs before the linear that routes, '{router_layer.name}'. Set "
                f"router_module='{self.name}', or exclude this layer with exclude_modules."
            )
        # The modules' order is not the order they run in (OPT lists k, v, q and runs q first): the first to run decides.
        return router_layer

    def decide(self, adapter: str, frame: RoutingFrame, x: torch.Tensor, asked_by: str) -> Routing:
        """The decision of this forward, by the router that this layer holds.

        Args:
            x: [..., in_features], of the layer named `asked_by`.

        Raises:
            ValueError: NaN or Inf among the logits (on a CPU).
        """
        options = self.routing_options[adapter]
        router = self.loraswitch_router[adapter]
        recording = frame.training or len(self.routing_state.recorders) > 0
        routed = jitter(x, options.jitter) if options.jitter and self.training else x
        logits = router(routed)
        context = None
        if options.decay:
            context = frame.context(adapter, options, logits.shape[:-1], logits.device)
            logits = context.logits(logits)
        readable = logits.device.type == "cpu" and not torch.compiler.is_compiling() and not under_vmap()
        if readable and not torch.isfinite(logits).all():
            why = None if context is None else context.broken_past()
            raise ValueError(why or _broken_logits(adapter, asked_by, routed, router.weight))
        routing = route(logits, options)
        if recording:
            routing.router_input = routed.detach()
            if context is not None:
                routing.logits = logits.detach()
                if frame.training:
                    routing.router_input = self._mean_input(adapter, context, routed)
        # Under a transform of torch.func blocks cannot be checkpointed, and losses are a part of the output's alone.
        traced = torch.compiler.is_compiling() or under_transform()
        if frame.training and router.weight.requires_grad and not traced:
            relay = frame.relays.setdefault(adapter, Relay())
            if not torch.is_grad_enabled():  # the first, gradient-free run of a reentrant checkpoint
                routing.dense_gates = relay.stand_in(routing.dense_gates)
            elif routing.dense_gates.requires_grad:
                routing.dense_gates.register_hook(relay.join)
                if options.aux_loss_coef or options.z_loss_coef:
                    join_at_decision(routing, router.weight)
        return routing

    def _mean_input(self, adapter: str, context: Context, x: torch.Tensor) -> torch.Tensor:
        """What the router has seen of each token and its context, detached: the input of the router's losses."""
        options = self.routing_options[adapter]
        if context.previous is not None and (options.aux_loss_coef or options.z_loss_coef):
            raise ValueError(
                f"The adapter '{adapter}' has router_decay, and the router's losses need the inputs of all tokens, which a cache "
                "does not hold: train without past_key_values, or set router_aux_loss_coef and router_z_loss_coef to 0."
            )
        with torch.no_grad(), full_precision(x.device):
            return context.mean(x.detach())

    def follow(self, adapter: str, frame: RoutingFrame, x: torch.Tensor, given: GivenExperts) -> Routing:
        """The decision of this forward where the experts are given; the router is not asked.

        Args:
            x: [..., in_features], of the layer that is reached first.

        Raises:
            ValueError: they are those of another batch.
        """
        if frame.adapter_names is not None and given.choices.dim():
            raise ValueError("experts are given per sample, and so are adapters (adapter_names): use one of the two.")
        if frame.time_first and given.choices.dim():
            raise ValueError(f"use_experts: {TIME_FIRST}. Give one expert for the whole batch.")
        options = self.routing_options[adapter]
        if given.num_choices not in (None, options.num_choices):
            raise ValueError(
                f"The experts of use_experts() are those of an adapter '{adapter}' with {given.num_choices} choices; the one of "
                f"that name has {options.num_choices} now: begin the block anew."
            )
        routing = given_routing(given.of_tokens(x, frame.training), options)
        samples = given.of_samples()
        if (
            samples is not None and options.num_stacked == options.num_experts == options.num_choices
        ):  # no shared experts, no base expert
            routing.samples = samples.to(x.device, non_blocking=True)
        if frame.training or self.routing_state.recorders:
            routing.router_input = x.detach()  # for the statistics
        return routing

    # ------------------------------------------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        warnings.warn("Already unmerged. Nothing to do.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


CANNOT_MERGE = (
    "A LoRA-Switch adapter picks experts for every token, so no single weight matrix equals it and it cannot be merged. "
    "For speed use model.fuse_for_inference(), to get the backbone back use model.unload(), to switch the adapter off for "
    "a while use model.disable_adapter()."
)


class LoRASwitchLinear(nn.Module, LoRASwitchLayer):
    """A linear (`nn.Linear`, GPT-2's `Conv1D` or a quantised one that PEFT resolves) with routed LoRA experts (arXiv 2405.17741).

    It computes `y = W x + b + s * sum_j g_j B[e_j] A[e_j] x` with the experts e and gates g that the forward of the model has
    chosen for each token: x [..., in_features] -> y [..., out_features], in the dtype that the base layer returns. It works only
    within a forward of the model that holds it. `get_peft_model` makes these layers; there is no need to construct one.

    Attributes:
        base_layer: the linear of the backbone, unchanged.
        loraswitch_A: by adapter name; `.weight` [num_experts + num_shared_experts, r, in_features].
        loraswitch_B: by adapter name; `.weight` [num_experts + num_shared_experts, out_features, r].
        loraswitch_router: by adapter name, on the one linear that routes; `.weight` [num_choices, in_features]: the
            experts, and the base expert if there is one.
        scaling: by adapter name, the factor s.

    Raises:
        RuntimeError: in a forward: the layer is called outside of a forward of the model, or sees other tokens than were routed.
        ValueError: in a forward, on a CPU: NaN or Inf among the router's logits.
    """

    # Of a fused layer (inference/fused_layer.py). Here for a forward that another thread unfuses while it runs.
    fused_group: Any = None
    fused_adapter: str | None = None
    fused_slot: int = -1

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        name: str,
        routing_state: RoutingState,
        config: LoRASwitchConfig,
        r: int,
        lora_alpha: float,
        is_router: bool,
        is_routed: bool = True,
        training: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.training = training
        LoRASwitchLayer.__init__(self, base_layer, name, routing_state, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha, is_router, is_routed)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features], in the dtype that the base layer returns."""
        if not (self._disable_adapters or args or kwargs or torch.compiler.is_compiling()):
            frame = self.routing_state.frame_or_outside(False)
            faster = fast_linears.forward(self, x, frame) if frame.training else None
            if faster is not None:
                return faster
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        frame = self.routing_state.frame_or_outside()
        split = self._split(x, result)
        if frame.adapter_names is not None:
            return self._forward_mixed(x, result, frame, split)
        for adapter in self.active_adapters:
            if adapter in self.loraswitch_A:
                routing = self._routing_here(adapter, frame, x, split)
                if (
                    split is None
                    and routing.samples is not None
                    and x.dim() == 3
                    and x.shape[0] == len(routing.samples)
                ):
                    result = result + self.one_each(adapter, x, routing).to(result.dtype)
                    continue
                hidden = self.gated_hidden(adapter, x, routing, split)
                result = self.loraswitch_B[adapter](hidden, result, split)
        return result

    def one_each(self, adapter: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """s * B[e] A[e] x with each sample's own expert e alone, x [samples, sequence, in_features] -> [..., out_features]: the
        work of one expert a token, where the wide product of `gated_hidden` does that of all."""
        assert routing.samples is not None
        routing.dense_gates_for(x, self.name)  # the tokens that were routed, or an error
        samples = routing.samples.to(x.device)
        a, b = (experts[adapter].whole().index_select(0, samples) for experts in (self.loraswitch_A, self.loraswitch_B))
        inputs: Any = self._cast_input_dtype(self.loraswitch_dropout[adapter](x), a.dtype)
        return torch.bmm(torch.bmm(inputs, a.transpose(1, 2)) * self.scaling[adapter], b.transpose(1, 2))

    def _split(self, x: torch.Tensor, result: torch.Tensor) -> Split | None:
        """Which part of the base layer this process computes, where several share it; else None."""
        of_inputs = x.shape[-1] != self.in_features
        if not of_inputs and result.shape[-1] == self.out_features:
            return None
        return split_of(self.get_base_layer(), of_inputs)

    def _routing_here(self, adapter: str, frame: RoutingFrame, x: torch.Tensor, split: Split | None) -> Routing:
        """`routing_for`, which is taken from the whole input."""
        if split is not None and self.routing_options[adapter].is_routed and adapter not in frame.routings:
            x = split.whole_input(x, self.in_features)
        return self.routing_for(adapter, frame, x)

    def gated_hidden(self, adapter: str, x: torch.Tensor, routing: Routing, split: Split | None = None) -> torch.Tensor:
        """s * g_te A[e] x for every expert e, 0 where e was not chosen: x [..., in_features] -> [..., E, r]."""
        experts_a: Any = self.loraswitch_A[adapter]
        gates = routing.dense_gates_for(x, self.name) * self.scaling[adapter]  # [..., E]
        chosen = routing.chosen_for(x, self.name)  # [..., E]
        inputs: Any = self._cast_input_dtype(self.loraswitch_dropout[adapter](x), experts_a.weight.dtype)
        hidden: torch.Tensor = experts_a(inputs, split)
        if chosen is not None:
            # Not by the gate: Inf * 0 is NaN, and a chosen expert whose gate is 0 (an underflow) keeps its gradient.
            hidden = hidden.where(chosen.unsqueeze(-1), 0.0)
        return hidden * gates.to(hidden.dtype).unsqueeze(-1)

    def _forward_mixed(
        self, x: torch.Tensor, result: torch.Tensor, frame: RoutingFrame, split: Split | None
    ) -> torch.Tensor:
        """Each sample with the adapter that `adapter_names` gives it."""
        tokens = x.flatten(0, -2)  # [T, in]
        shape, result = result.shape, result.flatten(0, -2)
        assert frame.adapter_names is not None
        for adapter in dict.fromkeys(frame.adapter_names):
            if adapter == NO_ADAPTER or adapter not in self.loraswitch_A:
                continue
            rows = frame.rows(adapter, tokens.shape[0], tokens.device)
            chosen = tokens[rows]
            routing = self._routing_here(adapter, frame, chosen, split)
            delta = self.loraswitch_B[adapter](self.gated_hidden(adapter, chosen, routing, split), split=split)
            result = result.index_add(0, rows, delta.to(result.dtype))
        return result.view(shape)

    def __repr__(self) -> str:
        return "loraswitch." + super().__repr__()


def quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
    """PEFT's handle on a quantised linear, or None for a plain one (or where PEFT is too old to have such handles)."""
    try:
        from peft.utils import resolve_quantization_backend
    except ImportError:
        return None
    return resolve_quantization_backend(base_layer, **kwargs)


def _outside_of_a_forward(layer_name: str) -> str:
    return (
        f"The adapted layer '{layer_name}' was reached before any routing: LoRA-Switch decides once per forward of "
        "the model, and this layer was called outside of one. Call the model, not the layer. In backward this means "
        "gradient checkpointing that LoRA-Switch cannot follow (torch.utils.checkpoint called by the model itself, "
        "FSDP's activation_checkpointing): use the model's gradient_checkpointing_enable() instead. With torch.compile it "
        "may be a graph break within a checkpointed block: TORCH_LOGS=graph_breaks shows where."
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
