"""`add_expert` and `remove_expert`: an adapter in a model grows and shrinks, and what the other experts are stays the same."""

from __future__ import annotations

import copy
import math
import os
import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import LoRASwitchConfig, check_expert_names
from ..layer import LoRASwitchLinear
from ..loading.layout import backbone_of, some
from ..loading.rollback import all_or_nothing
from ..routing.options import RoutingOptions
from ..routing.statistics import RoutingRecord
from ..training.losses import PendingBatches
from .experts import adapted_linears, check_in_memory, config_of, index_of, router_layer
from .lora_files import PlainLora, check_base, folded_b
from .stacks import padded, rank_and_alpha, used_rows

NEW_ROW = 0.1  # of the width that a fresh router's rows have: small, but it breaks ties
Stack = tuple[torch.Tensor, torch.Tensor]  # A [experts, r, in] and B [experts, out, r]


def add_expert(
    model: nn.Module,
    lora: str | os.PathLike[str] | None = None,
    name: str | None = None,
    adapter_name: str | None = None,
    router_row: torch.Tensor | None = None,
    ignore_base_name: bool = False,
    hub: dict[str, Any] | None = None,
) -> int:
    """Add an expert to an adapter, behind the other routed ones.

    The other experts keep their weights and their rows of the router to the bit; where the new one has a larger rank, they get
    zeros beyond theirs. Tokens may choose the new one from now on: with a small random row of the router a few do.

    The stacks of experts and the router become **new parameters**, and the configuration a new object,
    `model.peft_config[adapter]`. An optimizer made before holds the old parameters, and would train those to no effect: make a
    new one (there is a warning where something still holds old ones). The state of the old optimizer and a Trainer's checkpoint
    with another number of experts do not fit, and loading refuses the latter by name. Statistics (`router_stats`) begin anew.

    Args:
        model: a model with LoRA-Switch adapters.
        lora: folder or Hub name of a plain LoRA, as in `from_loras`; it may adapt linears that the adapter adapts. None: a fresh
            expert, A random and B zero, which computes nothing until it is trained.
        name: of the expert. None: the last part of the LoRA's folder or Hub name; or no name, if the adapter's have none. If only
            the new one has a name, the others are called expert_0, expert_1, ...
        adapter_name: which adapter; may be left out if there is only one.
        router_row: [in_features of the routing linear], its row of the router. None: uniform with mean zero, a tenth as wide as
            those of a fresh router.
        ignore_base_name, hub: as in `from_loras`.

    Returns:
        int: the index of the expert.

    Raises:
        ValueError: the LoRA cannot be an expert of this adapter, or a name, adapter or row does not fit. The model is as it was.
        RuntimeError: the model is fused, offloaded, in a forward or within `use_experts()` or `record_routing()`.
    """
    adapter, config = config_of(model, adapter_name)
    backbone = backbone_of(model)
    linears = adapted_linears(backbone, adapter)
    _check_at_rest(linears)
    plain = None if lora is None else PlainLora(backbone, lora, hub or {})
    changed = copy.copy(config)
    changed.expert_names = _names_with(config, name, plain)
    changed.num_experts += 1
    changed.check()
    if plain is not None:
        if not ignore_base_name:
            check_base(backbone, [plain])
        _check_linears(plain, linears, adapter)
        plain.check_finite()
    row = _row(linears, adapter, router_row)
    new = _new_experts(plain, linears, adapter)
    stacks = {name: _with(linears[name], adapter, expert) for name, expert in new.items()}
    rows, behind = _router(linears, adapter).weight.detach(), config.num_experts  # a base expert's row stays the last
    rows = torch.cat([rows[:behind], row[None], rows[behind:]])
    _replace(model, changed, adapter, linears, stacks, rows)
    return changed.num_experts - 1


def remove_expert(model: nn.Module, expert: str | int, adapter_name: str | None = None) -> None:
    """Take a routed expert out of an adapter; the ones behind it move up by one.

    The other experts keep their weights and their rows of the router to the bit. (Components that are zero for all of them are
    left out, so that the rank is that of the largest expert left.) For optimizers and checkpoints see `add_expert`.

    Args:
        model: a model with LoRA-Switch adapters.
        expert: its name or index.
        adapter_name: which adapter; may be left out if there is only one.

    Raises:
        ValueError: the expert is unknown, or fewer than `top_k` would be left. The model is as it was.
        RuntimeError: the model is fused, offloaded, in a forward or within `use_experts()` or `record_routing()`.
    """
    adapter, config = config_of(model, adapter_name)
    linears = adapted_linears(backbone_of(model), adapter)
    _check_at_rest(linears)
    index = index_of(config, expert)
    if config.num_experts == 1:
        raise ValueError(f"expert {expert!r} is the last of adapter '{adapter}': delete_adapter removes the adapter.")
    if config.num_experts <= config.top_k:
        raise ValueError(
            f"expert {expert!r} cannot be removed: every token uses top_k={config.top_k} of the {config.num_experts} experts. "
            "Make an adapter with a lower top_k (in its adapter_config.json) first."
        )
    changed = copy.copy(config)
    if config.expert_names is not None:
        changed.expert_names = [name for i, name in enumerate(config.expert_names) if i != index]
    changed.num_experts -= 1
    changed.trainable = _trainable_without(config, index)
    stacks = {
        name: _without(layer, adapter, index)
        for name, layer in linears.items()
        if layer.routing_options[adapter].is_routed
    }
    router = _router(linears, adapter)
    _replace(model, changed, adapter, linears, stacks, _all_but(router.weight.detach(), index))


# ------------------------------------------------------------------------------------------------------------- checks


def _check_at_rest(linears: dict[str, LoRASwitchLinear]) -> None:
    check_in_memory(linears.values())
    state = next(iter(linears.values())).routing_state
    if state.fused:
        raise RuntimeError("This model is fused: call unfuse() before experts come or go, and fuse it again.")
    if state.running_frame() is not None:
        raise RuntimeError("The model is in a forward: experts cannot come or go meanwhile.")
    if state.given:
        raise RuntimeError("Experts cannot come or go within use_experts(), which goes by the indices that are there.")
    if state.recorders:
        raise RuntimeError("Experts cannot come or go within record_routing(), which counts the ones that are there.")


def _names_with(config: LoRASwitchConfig, name: str | None, lora: PlainLora | None) -> list[str] | None:
    names = config.expert_names
    if names is None and name is None:
        return None
    if name is None and lora is None:
        raise ValueError("name is missing: the other experts of this adapter have names.")
    new = lora.default_name if name is None and lora is not None else name
    if names is None:
        names = [f"expert_{index}" for index in range(config.num_experts)]
    check_expert_names("name", [new], 1, config.base_expert)
    if new in names:
        raise ValueError(f"name={new!r} is the name of another expert: choose another one.")
    return [*names, str(new)]


def _trainable_without(config: LoRASwitchConfig, index: int) -> Any:
    """`trainable` where the expert has gone."""
    if isinstance(config.trainable, str):
        return config.trainable
    names = config.expert_names or []
    left = [
        expert for expert in config.trainable if expert != index and not (expert in names and names[index] == expert)
    ]
    if not left:
        raise ValueError(
            f"expert {index} is the one that trains (trainable={config.trainable}): change trainable first."
        )
    return [expert - (expert > index) if isinstance(expert, int) else expert for expert in left]


def _check_linears(lora: PlainLora, linears: dict[str, LoRASwitchLinear], adapter: str) -> None:
    routed = {name for name, layer in linears.items() if layer.routing_options[adapter].is_routed}
    lost = [name for name in lora.linears if name not in routed]
    if lost:
        raise ValueError(
            f"{lora.path} adapts {some(lost)}, where adapter '{adapter}' has no routed experts: make a new adapter of all LoRAs "
            "with from_loras (export_expert writes those that are in this one)."
        )


def _router(linears: dict[str, LoRASwitchLinear], adapter: str) -> Any:
    return router_layer(linears, adapter).loraswitch_router[adapter]


def _row(linears: dict[str, LoRASwitchLinear], adapter: str, given: torch.Tensor | None) -> torch.Tensor:
    weight = _router(linears, adapter).weight
    if given is None:
        bound = NEW_ROW * weight.shape[1] ** -0.5
        return torch.empty_like(weight[0].detach()).uniform_(-bound, bound)
    if not isinstance(given, torch.Tensor) or given.shape != weight.shape[1:] or not given.is_floating_point():
        shape = list(given.shape) if isinstance(given, torch.Tensor) else given
        raise ValueError(f"router_row is {shape}; it must be a floating-point tensor [{weight.shape[1]}].")
    row = given.detach().to(weight.device, weight.dtype)
    if not torch.isfinite(row).all():
        raise ValueError("router_row holds NaN or Inf.")
    return row


# --------------------------------------------------------------------------------------------------------- new stacks


def _weights(layer: LoRASwitchLinear, adapter: str) -> Stack:
    return layer.loraswitch_A[adapter].weight.detach(), layer.loraswitch_B[adapter].weight.detach()


def _new_experts(lora: PlainLora | None, linears: dict[str, LoRASwitchLinear], adapter: str) -> dict[str, Stack]:
    """A [r, in] and B [out, r] of the new expert, for each linear with routed experts."""
    experts: dict[str, Stack] = {}
    for name, layer in linears.items():
        if layer.routing_options[adapter].is_routed:
            a, b = _weights(layer, adapter)
            experts[name] = torch.zeros_like(a[0]), torch.zeros_like(b[0])
            if lora is None:
                bound = 1 / math.sqrt(layer.in_features)  # as in a fresh adapter
                experts[name][0].uniform_(-bound, bound)
    if lora is None:
        return experts
    for name, a, b in lora.weights():
        like, scale = experts[name][0], linears[name].scaling[adapter]
        b = folded_b(lora, name, b, scale, like.dtype)
        experts[name] = a.to(like.device, like.dtype), b.to(like.device)
    return experts


def _with(layer: LoRASwitchLinear, adapter: str, expert: Stack) -> Stack:
    """The stack with one more expert behind the routed ones."""
    a, b = _weights(layer, adapter)
    rank = max(a.shape[1], expert[0].shape[0])
    (a, b), (new_a, new_b) = padded(a, b, rank), padded(*expert, rank)
    routed = layer.routing_options[adapter].num_experts
    return torch.cat([a[:routed], new_a[None], a[routed:]]), torch.cat([b[:routed], new_b[None], b[routed:]])


def _without(layer: LoRASwitchLinear, adapter: str, index: int) -> Stack:
    """The stack without one expert, and without components behind the last that is not zero."""
    a, b = (_all_but(weight, index) for weight in _weights(layer, adapter))
    used = used_rows(a, b).nonzero()
    rank = int(used[-1]) + 1 if len(used) else 1
    return a[:, :rank].contiguous(), b[..., :rank].contiguous()


def _all_but(rows: torch.Tensor, index: int) -> torch.Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]])


# ---------------------------------------------------------------------------------------------------------- replacing


def _replace(
    model: nn.Module,
    changed: LoRASwitchConfig,
    adapter: str,
    linears: dict[str, LoRASwitchLinear],
    stacks: dict[str, Stack],
    router_weight: torch.Tensor,
) -> None:
    """Have the adapter be what `changed` says, with these weights; all or nothing."""
    ranks = {name: layer.r[adapter] for name, layer in linears.items()}
    new_ranks = {**ranks, **{name: a.shape[1] for name, (a, _) in stacks.items()}}
    if new_ranks != ranks:  # the scales stay
        scales = {name: layer.scaling[adapter] for name, layer in linears.items()}
        vars(changed).update(rank_and_alpha(new_ranks, scales), use_rslora=False)
    changed.check()
    old: list[weakref.ref[Any]] = []
    with all_or_nothing(model), torch.inference_mode(False):
        # In place of the old one, which may be that of other adapters and models, too: PEFT keeps what it was given.
        for holder in (model, getattr(model, "base_model", None), backbone_of(model)):
            configs: Any = getattr(holder, "peft_config", {})
            if adapter in configs:
                configs[adapter] = changed
        for name, layer in linears.items():
            layer.adapter_config[adapter] = changed
            if name in stacks:
                for module, stack in zip((layer.loraswitch_A, layer.loraswitch_B), stacks[name], strict=True):
                    old += map(weakref.ref, module[adapter].parameters())
                    module[adapter].train_alone(None)  # until take_up_trainable: the indices are those of the new stack
                    _set_weight(module[adapter], stack)
                layer.routing_options[adapter] = _next_edition(layer, adapter, changed)
            if new_ranks != ranks:
                layer.r[adapter], layer.lora_alpha[adapter] = new_ranks[name], changed.alpha_of(name)
                layer.scaling[adapter] = changed.scale_of(name)
            if adapter in layer.loraswitch_router:
                old += map(weakref.ref, layer.loraswitch_router[adapter].parameters())
                _set_weight(layer.loraswitch_router[adapter], router_weight)
                record = RoutingRecord(
                    changed.num_experts, router_weight.device, changed.expert_names, changed.base_expert
                )
                layer.loraswitch_record[adapter] = record
                layer.loraswitch_pending[adapter] = PendingBatches()
            layer.take_up_trainable(adapter)
    _warn_of_holders(old)


def _next_edition(layer: LoRASwitchLinear, adapter: str, config: LoRASwitchConfig) -> RoutingOptions:
    """As the layer was made, whatever has been edited in the configuration since."""
    options = layer.routing_options[adapter]
    return replace(options, num_experts=config.num_experts, edition=options.edition + 1)


def _set_weight(module: Any, value: torch.Tensor) -> None:
    asks = module.weight.requires_grad
    module.weight = nn.Parameter(value.clone() if value.is_inference() else value, requires_grad=asks)


def _warn_of_holders(old: list[weakref.ref[Any]]) -> None:
    if any(reference() is not None for reference in old):
        warnings.warn(
            "The experts have become new parameters, but something still holds the old ones. If it is an optimizer, make a new "
            "one: it would train the old parameters, which the model does not use any more."
        )
