"""Which expert is meant, and where its weights are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import BASE, LoRASwitchConfig
from ..layer import LoRASwitchLinear
from ..loading.layout import backbone_of
from ..patterns import shown


def adapted_linears(backbone: nn.Module, adapter: str) -> dict[str, LoRASwitchLinear]:
    """The linears that `adapter` adapts, by full name, in the backbone's order."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, LoRASwitchLinear) and adapter in module.loraswitch_A
    }


def router_layer(linears: dict[str, LoRASwitchLinear], adapter: str) -> LoRASwitchLinear:
    """The one of the linears that `adapter` adapts which holds its router."""
    return next(layer for layer in linears.values() if adapter in layer.loraswitch_router)


def check_in_memory(layers: Iterable[LoRASwitchLinear]) -> None:
    """Whether weights of experts and router can be read here.

    Raises:
        RuntimeError: some are on the meta device: accelerate has offloaded them, or they are not loaded yet.
    """
    for layer in layers:
        for kind in (layer.loraswitch_A, layer.loraswitch_B, layer.loraswitch_router):
            if any(weight.is_meta for weight in kind.parameters()):
                raise RuntimeError(
                    f"The adapter's weights at '{layer.name}' are not in memory (meta device). If accelerate has offloaded "
                    "them, load the model without offloading for this, or take its hooks off: "
                    "accelerate.hooks.remove_hook_from_submodules(model)."
                )


def config_of(model: nn.Module, adapter_name: str | None) -> tuple[str, LoRASwitchConfig]:
    """Name and configuration of an adapter of `model`; without a name, of the only one.

    Raises:
        ValueError: there is none, several, or none of that name.
    """
    configs: Any = getattr(backbone_of(model), "peft_config", None) or {}
    ours = {name: config for name, config in configs.items() if isinstance(config, LoRASwitchConfig)}
    if not ours:
        raise ValueError(f"{type(model).__name__} carries no LoRA-Switch adapter.")
    if adapter_name is None and len(ours) > 1:
        raise ValueError(f"adapter_name must be one of {', '.join(ours)}.")
    name = next(iter(ours)) if adapter_name is None else adapter_name
    if name not in ours:
        raise ValueError(f"adapter_name={shown(adapter_name)} is unknown: choose from {', '.join(ours)}.")
    return name, ours[name]


def index_of(config: LoRASwitchConfig, expert: str | int) -> int:
    """The index of an expert that is meant by its name or index.

    Raises:
        ValueError: there is no such expert.
    """
    names = config.expert_names
    if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < config.num_experts:
        return expert
    if names is not None and expert in names:
        return names.index(str(expert))
    known = f"the names {', '.join(names)} and " if names else "no names, but "
    raise ValueError(
        f"expert {shown(expert)} is unknown: the adapter has {known}indices 0 to {config.num_experts - 1}."
    )


def means_base(config: LoRASwitchConfig, expert: Any) -> bool:
    """Whether `expert` is the name of the base expert."""
    return config.base_expert and bool(expert == BASE)


def choice_name(config: LoRASwitchConfig, index: int) -> str:
    """The name of a choice of the router, by its row: an expert, or behind them all the base expert."""
    if index == config.num_experts:
        return BASE
    return config.expert_names[index] if config.expert_names is not None else f"expert_{index}"
