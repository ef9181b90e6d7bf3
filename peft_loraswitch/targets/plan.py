"""What an adapter will change, settled before the first module is replaced: which linears, which of them routes, their ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..config import LoRASwitchConfig
from ..layer import LoRASwitchLayer
from ..loading.layout import LIST_AT_MOST, embeddings_of
from ..patterns import TimeLimit, shown
from ..peft_names import PREFIX
from ..routing.frame import NO_ADAPTER, TIME_FIRST
from ..tensor_parallel import features_of
from .linears import is_supported_linear, is_time_first, left_out, refused
from .selection import module_names, selects
from .streams import check_streams
from .trained_in_full import check_trained_in_full, within_trained_in_full


@dataclass
class InjectionPlan:
    """What an adapter will change, settled before the first module is replaced."""

    adapted: list[str]  # full names, in module order
    router: str  # the name of the linear that holds the router
    before: list[str]  # adapted linears that run before the router and have shared experts only
    ranks: dict[str, int] = field(default_factory=dict)  # by name, of those whose rank is not `r`
    alphas: dict[str, float] = field(default_factory=dict)  # by name, of those whose alpha is not `lora_alpha`


def plan_injection(
    model: nn.Module, config: LoRASwitchConfig, adapter_name: str, state_dict: dict[str, torch.Tensor] | None = None
) -> InjectionPlan:
    """Settle which linears are adapted and which one routes; every refusal happens here, before any change.

    Args:
        state_dict: PEFT's alternative to `target_modules`: adapt what the keys name.

    Raises:
        ValueError: names the field (`target_modules`, `router_module`, the adapter's name) and what to do.
    """
    _check_adapter_name(model, adapter_name)
    check_trained_in_full(model, config, adapter_name)
    if config.router_decay and is_time_first(model):
        raise ValueError(f"router_decay={config.router_decay}: {TIME_FIRST}. Set it to 0.")
    limit = TimeLimit()
    names = _selected(model, config, state_dict, limit)
    _check_linears(model, names)
    router, before, names = _placed_router(model, config, names)
    check_streams(model, names)  # those before the router follow no decision: they may see any tokens
    if config.num_shared_experts == 0:
        before = []
    adapted = [*before, *names]
    ranks, alphas = (_values_by_name(config, name, adapted, limit) for name in ("rank_pattern", "alpha_pattern"))
    return InjectionPlan(adapted, router, before, ranks, alphas)


def _selected(
    model: nn.Module, config: LoRASwitchConfig, state_dict: dict[str, torch.Tensor] | None, limit: TimeLimit
) -> list[str]:
    """Names of the modules that the configuration, or the keys of `state_dict`, select; at least one."""
    every_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    names = module_names(model)
    if state_dict is not None:
        keys = {key.rsplit(".loraswitch_", 1)[0].removeprefix(PREFIX) for key in state_dict if ".loraswitch_" in key}
        names = [name for name in names if name in keys]
    else:
        names = [name for name in names if selects(config, name, limit)]
    taken = within_trained_in_full(model, names)
    if taken and not every_linear:
        raise ValueError(
            f"target_modules: {_some_reasons(taken)}: experts there would be lost when the adapter is saved. Leave it out, or "
            "add it to exclude_modules."
        )
    if every_linear:
        outside = {**left_out(model, [name for name in names if name not in taken]), **taken}
        names = [name for name in names if name not in outside]
        assert isinstance(config.target_modules, set)
        config.target_modules -= set(outside)
        if outside:
            warnings.warn(f"'all-linear' leaves out {_some_reasons(outside)}.")
    if not names:
        excluded = f", exclude_modules={shown(config.exclude_modules)}" if config.exclude_modules else ""
        raise ValueError(
            f"target_modules={shown(config.target_modules)}{excluded}, layers_to_transform="
            f"{shown(config.layers_to_transform)} leave no module to adapt. Print model.named_modules() to see the names; "
            "modules in modules_to_save are not adapted either."
        )
    return names


def _check_linears(model: nn.Module, names: list[str]) -> None:
    """Whether each is a linear that can follow the routing decision."""
    for name in names:
        module = model.get_submodule(name)
        base = _base(module)
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoRASwitchLayer):
            raise ValueError(f"target_modules: '{name}' already carries another PEFT method ({type(module).__name__}).")
        if not is_supported_linear(base):
            raise ValueError(
                f"target_modules: '{name}' is a {type(base).__name__}; LoRA-Switch adapts linears (nn.Linear, Conv1D and "
                "quantised linears). Leave it out, or add it to exclude_modules."
            )
    unfit = refused(model, names)
    if unfit:
        raise ValueError(
            f"target_modules: {_some_reasons(unfit)}; these cannot follow the routing decision. Add exclude_modules="
            f"{sorted(unfit) if len(unfit) <= LIST_AT_MOST else sorted({n.rpartition('.')[2] for n in unfit})}."
        )


def _placed_router(model: nn.Module, config: LoRASwitchConfig, names: list[str]) -> tuple[str, list[str], list[str]]:
    """The linear that holds the router, those before it, and it and those after it."""
    if config.router_module is None:
        return _first_to_run(model, names), [], names
    found = [n for n in names if n == config.router_module or n.endswith("." + config.router_module)]
    if len(found) != 1:
        raise ValueError(
            f"router_module='{config.router_module}' must name exactly one adapted linear, but it names "
            f"{len(found)}{': ' + ', '.join(found[:3]) if found else ''}. Adapted are for instance "
            f"{', '.join(names[:3])}, ..., {names[-1]}."
        )
    at = names.index(found[0])
    return found[0], names[:at], names[at:]


def _first_to_run(model: nn.Module, names: list[str]) -> str:
    """The first in module order, but for a pair before all blocks that takes embeddings to another width and back: OPT of 350m
    lists `project_out`, which runs behind the blocks, before `project_in`.
    """
    width = getattr(embeddings_of(model, "input"), "embedding_dim", None)
    outside = takewhile(lambda name: not any(part.isdecimal() for part in name.split(".")), names)
    features = {name: features_of(_base(model.get_submodule(name))) for name in outside}
    back = features.get(names[0])
    if back is not None and back[0] != width == back[1]:
        return next((name for name, each in features.items() if each == back[::-1]), names[0])
    return names[0]


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _values_by_name(config: LoRASwitchConfig, pattern: str, names: list[str], limit: TimeLimit) -> dict[str, Any]:
    """What `rank_pattern` or `alpha_pattern` says of those of `names` that it matches."""
    keys = {name: config.matching_key(pattern, name, limit) for name in names}
    unused = sorted(set(getattr(config, pattern)) - {key for key in keys.values() if key is not None})
    if unused:
        warnings.warn(
            f"{pattern}: {shown(unused)} match no adapted linear (or only some that an earlier key matches) and are ignored.",
            RuntimeWarning,
        )
    return {name: getattr(config, pattern)[key] for name, key in keys.items() if key is not None}


def _some_reasons(reasons: dict[str, str]) -> str:
    """One name for each reason, and how many more have it."""
    first: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        first.setdefault(reason, []).append(name)
    return "; ".join(
        f"'{names[0]}'{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
        for reason, names in first.items()
    )


def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            f"adapter_name={adapter_name!r} must not be empty or contain a dot: it becomes a module's name."
        )
    if adapter_name == NO_ADAPTER or adapter_name.startswith("loraswitch_"):
        raise ValueError(f"adapter_name={adapter_name!r} has a meaning of its own here: choose another one.")
    if hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} is the name of an attribute of every module: choose another one."
        )
    if any(adapter_name in name.split(".") for name, _ in model.named_modules() if "loraswitch_" not in name):
        warnings.warn(
            f"The adapter name '{adapter_name}' is also part of a module's name in this model; PEFT may drop weights when it "
            "saves such an adapter. Choose another name."
        )
