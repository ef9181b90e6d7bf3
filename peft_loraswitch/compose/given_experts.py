"""`use_experts`: forwards that follow the experts they are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..config import LoRASwitchConfig
from ..loading.layout import backbone_of
from ..routing.frame import RoutingState
from ..routing.given import GivenExperts
from .experts import adapted_linears, config_of, index_of, means_base, router_layer

Given = str | int | Sequence[str | int] | torch.Tensor


@contextmanager
def use_experts(model: nn.Module, experts: Given, adapter_name: str | None = None) -> Iterator[None]:
    """Within it, forwards and `generate` of this thread do not ask the router: every sample uses the expert that is given for it.

    That expert has the gate 1, exactly, and gets the gradients; the router gets none and adds no losses. Shared experts stay.
    Other adapters ask their routers as ever, and so do other threads. Also on a fused or a compiled model.

    Args:
        model: a model with LoRA-Switch adapters.
        experts: the name or index of one expert for all samples; a list with one for each sample (beams repeat them); or an
            integer tensor [samples] or, for single tokens, [samples, sequence]. With `base_expert`, "base" or the index
            num_experts is the choice to add nothing. A tensor on a GPU is looked at once, which waits for the device.
        adapter_name: which adapter; may be left out if there is only one.

    Raises:
        ValueError: there is no such adapter or expert; in a forward: as many samples as experts are not there.

    Example:
        ```py
        from peft_loraswitch import use_experts

        with use_experts(model, [2, 0]):  # of a batch of two; or their names
            model.generate(**batch)
        ```
    """
    adapter, config = config_of(model, adapter_name)
    choices = expert_indices(config, experts)
    _check_range(config, choices)
    linear = router_layer(adapted_linears(backbone_of(model), adapter), adapter)
    device = linear.loraswitch_router[adapter].weight.device
    given = GivenExperts(choices.to(device), linear.routing_options[adapter].num_choices)
    with linear.routing_state.given_experts({adapter: given}):
        yield


def expert_indices(config: LoRASwitchConfig, experts: Given) -> torch.Tensor:
    """int64 [], [samples] or [samples, sequence]: the indices of `experts`, as `use_experts` takes them.

    Raises:
        ValueError: there is no such expert.
    """
    if isinstance(experts, torch.Tensor):
        if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool or experts.dim() > 2:
            raise ValueError(
                f"experts is a tensor {tuple(experts.shape)} of {experts.dtype}; it must hold whole numbers, one per sample "
                "[samples] or per token [samples, sequence]."
            )
        return experts.long()
    if isinstance(experts, str | int):
        return torch.tensor(choice_of(config, experts))
    if not isinstance(experts, Iterable):
        raise ValueError(f"experts={experts!r} must be the name or index of an expert, a list of these, or a tensor.")
    return torch.tensor([choice_of(config, expert) for expert in experts], dtype=torch.int64)


def _check_range(config: LoRASwitchConfig, choices: torch.Tensor) -> None:
    last = config.routing_options().num_choices - 1
    if choices.numel() and not 0 <= int(choices.min()) <= int(choices.max()) <= last:
        raise ValueError(
            f"experts holds indices from {int(choices.min())} to {int(choices.max())}; the adapter has 0 to {last}."
        )


def experts_of_batch(state: RoutingState, experts: Given) -> dict[str, GivenExperts]:
    """`experts` as they come with a batch, model(..., experts=...), for the active adapter; none if no adapter is active. A
    tensor on a GPU is not looked at, which would wait for the device.

    Raises:
        ValueError: several adapters are active, or there is no such expert.
    """
    layers = {a: layer for a, layer in state.router_layers.items() if a in layer.active_adapters}
    if any(layer.disable_adapters for layer in layers.values()):
        return {}
    if len(layers) > 1:
        raise ValueError(f"experts is given, but the adapters {', '.join(layers)} are active: set one of them active.")
    given = {}
    for adapter, layer in layers.items():
        choices = expert_indices(layer.adapter_config[adapter], experts)
        if choices.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(layer.adapter_config[adapter], choices)
        given[adapter] = GivenExperts(choices)
    return given


def choice_of(config: LoRASwitchConfig, expert: str | int) -> int:
    """The index of an expert, or `num_experts` for the base expert.

    Raises:
        ValueError: there is no such expert.
    """
    is_index = isinstance(expert, int) and not isinstance(expert, bool) and expert == config.num_experts
    if means_base(config, expert) or (config.base_expert and is_index):
        return config.num_experts
    return index_of(config, expert)
