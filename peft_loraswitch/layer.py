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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from .balance import PendingBatches, RoutingRecord
from .config import LoRASwitchConfig
from .frame import NO_ADAPTER, RoutingFrame, RoutingState
from .ordinary import OrdinaryParameters
from .routing import Router, Routing, RoutingOptions


class Experts(OrdinaryParameters):
    """The weights of all experts of one linear, stacked.

    Attributes:
        replaced: called when `weight` has become another parameter; a fused layer, which keeps hold of it, wants to know.
    """

    replaced: Callable[[], None] | None = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:  # assignment ends here
        super().register_parameter(name, param)
        if self.replaced is not None:
            self.replaced()


class ExpertsA(Experts):
    """Down-projections of all experts. `weight` [num_experts, r, in_features]."""

    def __init__(self, num_experts: int, r: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, r, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> hidden [..., num_experts, r]"""
        num_experts, r, _ = self.weight.shape
        return F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, (num_experts, r))


class ExpertsB(Experts):
    """Up-projections of all experts. `weight` [num_experts, out_features, r]."""

    def __init__(self, num_experts: int, out_features: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, r))

    def forward(self, hidden: torch.Tensor, result: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [..., num_experts, r] -> sum over experts of B[e] hidden[e]: [..., out_features]; with `result`, of that
        shape, their sum in the dtype of `result`."""
        hidden, wide = hidden.flatten(-2), self.weight.transpose(1, 2).flatten(0, 1)  # [..., E * r] and [E * r, out]
        if result is None:
            return hidden @ wide
        if result.dtype != hidden.dtype:  # float32 experts on a bf16 backbone
            return result + (hidden @ wide).to(result.dtype)
        # A product that starts from `result` saves a pass over it, a third of the adapter's time on a CPU. Out of place:
        # a quantised base layer may return a view.
        return torch.addmm(result.reshape(-1, wide.shape[1]), hidden.reshape(-1, wide.shape[0]), wide).view(
            result.shape
        )


class LoRASwitchLayer(BaseTunerLayer):
    """State of one adapted linear: per adapter the experts, their settings, and on the layer that routes the router."""

    adapter_layer_names = ("loraswitch_A", "loraswitch_B", "loraswitch_router")
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "top_k",
        "adapter_top_k",
        "num_experts",
        "num_shared_experts",
        "routing_options",
        "router_is_named",
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
        self.quantization_backend = _quantization_backend(self.get_base_layer(), **kwargs)
        self.loraswitch_A = nn.ModuleDict()
        self.loraswitch_B = nn.ModuleDict()
        self.loraswitch_router = nn.ModuleDict()
        self.loraswitch_dropout = nn.ModuleDict()
        self.loraswitch_record = nn.ModuleDict()
        self.loraswitch_pending = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.top_k: dict[str, int] = {}  # this and num_experts: 0 on a linear before the one that routes
        self.num_experts: dict[str, int] = {}
        self.adapter_top_k: dict[str, int] = {}  # of the linears that are routed, wherever this one is
        self.num_shared_experts: dict[str, int] = {}
        self.routing_options: dict[str, RoutingOptions] = {}
        self.router_is_named: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        features: tuple[Any, Any] = _get_in_out_features(self.get_base_layer())
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
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = config.scale(lora_alpha, r)
        self.top_k[adapter_name], self.num_experts[adapter_name] = (
            (config.top_k, config.num_experts) if is_routed else (0, 0)
        )
        self.adapter_top_k[adapter_name] = config.top_k
        self.num_shared_experts[adapter_name] = config.num_shared_experts
        stacked = self.num_experts[adapter_name] + config.num_shared_experts
        self.loraswitch_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        )
        self.loraswitch_A[adapter_name] = ExpertsA(stacked, r, self.in_features)
        self.loraswitch_B[adapter_name] = ExpertsB(stacked, self.out_features, r)
        if is_router:
            self.routing_options[adapter_name] = config.routing_options()
            self.router_is_named[adapter_name] = config.router_module is not None
            self.loraswitch_router[adapter_name] = Router(self.in_features, config.num_experts)
            self.loraswitch_record[adapter_name] = RoutingRecord(config.num_experts)
            self.loraswitch_pending[adapter_name] = PendingBatches()
            self.routing_state.router_layers[adapter_name] = self  # type: ignore[assignment]
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
        super().set_adapter(adapter_names, *args, **kwargs)
        # One name is kept as a string: a list that all layers share is one that dynamo guards once for each of them.
        if isinstance(self._active_adapter, list) and len(self._active_adapter) == 1:
            self._active_adapter = self._active_adapter[0]

    def delete_adapter(self, adapter_name: str) -> None:
        left = sorted(set(self.routing_state.router_layers) - {adapter_name})
        if list(self.active_adapters) == [adapter_name] and left:
            # PEFT lets each layer choose from the adapters on it; they may differ, and all layers must agree
            warnings.warn(f"Adapter {adapter_name} was active and is deleted now. Setting active adapter to {left[0]}.")
            self.set_adapter(left[0])
        if self.routing_state.router_layers.get(adapter_name) is self:
            del self.routing_state.router_layers[adapter_name]
        super().delete_adapter(adapter_name)

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
    """A linear (`nn.Linear`, GPT-2's `Conv1D` or a quantised one that PEFT resolves) with routed LoRA experts."""

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
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        frame = self.routing_state.frame_or_outside()
        if frame.adapter_names is not None:
            return self._forward_mixed(x, result, frame)
        for adapter in self.active_adapters:
            if adapter in self.loraswitch_A:
                hidden = self.gated_hidden(adapter, x, frame.routing(adapter, self, x))
                result = self.loraswitch_B[adapter](hidden, result)
        return result

    def gated_hidden(self, adapter: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """s * g_te A[e] x for every expert e, 0 where e was not chosen: x [..., in_features] -> [..., E, r]."""
        experts_a: Any = self.loraswitch_A[adapter]
        gates = routing.dense_gates_for(x, self.name) * self.scaling[adapter]  # [..., E]
        chosen = routing.chosen_for(x, self.name)  # [..., E]
        inputs: Any = self._cast_input_dtype(self.loraswitch_dropout[adapter](x), experts_a.weight.dtype)
        hidden = experts_a(inputs)
        if chosen is not None:
            # Not by the gate: Inf * 0 is NaN, and a chosen expert whose gate is 0 (an underflow) keeps its gradient.
            hidden = hidden.where(chosen.unsqueeze(-1), 0.0)
        return hidden * gates.to(hidden.dtype).unsqueeze(-1)

    def _forward_mixed(self, x: torch.Tensor, result: torch.Tensor, frame: RoutingFrame) -> torch.Tensor:
        """Each sample with the adapter that `adapter_names` gives it."""
        tokens = x.flatten(0, -2)  # [T, in]
        shape, result = result.shape, result.flatten(0, -2)
        assert frame.adapter_names is not None
        for adapter in dict.fromkeys(frame.adapter_names):
            if adapter == NO_ADAPTER or adapter not in self.loraswitch_A:
                continue
            rows = frame.rows(adapter, tokens.shape[0], tokens.device)
            chosen = tokens[rows]
            hidden = self.gated_hidden(adapter, chosen, frame.routing(adapter, self, chosen))
            delta = self.loraswitch_B[adapter](hidden)
            result = result.index_add(0, rows, delta.to(result.dtype))
        return result.view(shape)

    def __repr__(self) -> str:
        return "loraswitch." + super().__repr__()


def _quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
    """PEFT's handle on a quantised linear, or None for a plain one (or where PEFT is too old to have such handles)."""
    try:
        from peft.utils import resolve_quantization_backend
    except ImportError:
        return None
    return resolve_quantization_backend(base_layer, **kwargs)
