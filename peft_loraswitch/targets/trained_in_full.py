"""Modules that an adapter trains besides its experts: `modules_to_save`, in full, and `trainable_token_indices`, some rows.

PEFT finds them by the ends of their names among all modules of the model, adapted linears included, whose own modules are
called `loraswitch_router` or `loraswitch_A`: `modules_to_save=["router"]` would find them as well as a backbone's routers. So
PEFT is shown a model without the modules inside of adapted linears.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    TrainableTokensWrapper,
    set_additional_trainable_modules,
)
from torch import nn

from ..config import LoRASwitchConfig
from ..layer import LoRASwitchLayer
from ..loading.layout import owner, plain_name, without_wrapper
from ..peft_names import PREFIX
from .tied_embeddings import check_beside_others, tied_names, tokens_by_ending, trains_tokens_apart

TOKENS = "token_adapter.trainable_tokens_delta"


def tensors_of_trained_tokens(
    original: Callable[..., dict[str, Any]],
    wrapper: TrainableTokensWrapper,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """In place of what PEFT asks its wrapper of trainable tokens for an adapter's tensors: nothing, of an adapter that has none
    there, as that of `modules_to_save` says. PEFT names tensors that do not exist, so that neither save nor load of such an
    adapter works beside one that has some."""
    return original(wrapper, adapter_name, *args, **kwargs) if adapter_name in wrapper._adapters else {}


class BackboneView:
    """A model without the modules inside of adapted linears, for those who look modules up by name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        inside: tuple[str, ...] = ()
        for name, module in self._model.named_modules(*args, **kwargs):
            if inside and name.startswith(inside):
                continue
            inside = (f"{name}.",) if isinstance(module, LoRASwitchLayer) else ()
            yield name, module


@contextmanager
def train_in_full(tuner: BaseTuner, model: nn.Module, config: LoRASwitchConfig, adapter_name: str) -> Iterator[None]:
    """Around PEFT's injection of an adapter, which is not told of these modules: afterwards they are wrapped for it.

    What other adapters train stays trainable, or not, as it was (PEFT 0.20 does not see to it).
    """
    theirs = [m for m in model.modules() if isinstance(m, (LoRASwitchLayer, AuxiliaryTrainingWrapper))]
    flags = [(p, p.requires_grad) for module in theirs for p in module.parameters()]
    yield
    model_config = BaseTuner.get_model_config(tuner)
    if trains_tokens_apart(model, config) and not _names_input_embeddings(model, config):
        model_config = {**model_config, "tie_word_embeddings": False}  # else PEFT ties them if the input's are wrapped
    set_additional_trainable_modules(
        model=BackboneView(model),
        peft_config=config,
        model_config=model_config,
        adapter_name=adapter_name,
        activate_adapter=adapter_name in tuner.active_adapters,
    )
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def _names_input_embeddings(model: nn.Module, config: LoRASwitchConfig) -> bool:
    return any(name.endswith(tuple(tokens_by_ending(model, config))) for name in tied_names(model)[:1])


def within_trained_in_full(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Those of `names` that lie within a module that another adapter trains in full, each with the reason not to adapt it."""
    wrappers = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    reason = "it lies within a module that another adapter trains in full, by modules_to_save"
    return {name: reason for name in names if name.startswith(wrappers)} if wrappers else {}


def trained_shapes(model: nn.Module, config: LoRASwitchConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the file of an adapter must hold besides its experts, by `plain_name` of its key. Modules
    within a module that is trained in full are left out: their names depend on how PEFT wraps them."""
    modules = dict(BackboneView(model).named_modules())
    shapes: dict[str, tuple[int, ...]] = {}
    endings, tied = tuple(config.modules_to_save or ()), tied_names(model)[1:]
    outside = ""
    for name, module in modules.items():  # depth first
        if not endings or not name.endswith(endings) or (outside and name.startswith(outside)):
            continue
        outside = f"{name}."
        for key, tensor in without_wrapper(module).state_dict(prefix=outside).items():
            if owner(key) is None and isinstance(tensor, torch.Tensor):
                shapes[plain_name(PREFIX + key)] = tuple(tensor.shape)
    apart = trains_tokens_apart(model, config)
    for ending, indices in tokens_by_ending(model, config).items():
        for name in (n for n in modules if n.endswith(ending) and (apart or n not in tied)):
            weight = getattr(without_wrapper(modules[name]), "weight", None)
            if weight is not None:
                key = plain_name(f"{PREFIX}{name}.{TOKENS}")
                shapes.setdefault(key, (len(indices), *weight.shape[-1:]))
    return shapes


def check_trained_in_full(model: nn.Module, config: LoRASwitchConfig, adapter_name: str) -> None:
    """Check, before anything is changed, what PEFT would find out later or not at all.

    Raises:
        ValueError: `trainable_token_indices` names no module, or tokens that it does not have; `modules_to_save` names a module
            with linears that another adapter adapts; an adapter is called as a part of the name of a module that is trained
            in full. In the last two cases PEFT could not save the weights. Or see `check_beside_others`.
    """
    modules = dict(BackboneView(model).named_modules(remove_duplicate=False))
    tokens = tokens_by_ending(model, config)
    for ending, indices in tokens.items():
        found = [name for name in modules if name.endswith(ending)]
        if not found:
            raise ValueError(f"trainable_token_indices: the model has no module whose name ends in '{ending}'.")
        rows = min(_rows(modules[name]) for name in found)
        if indices and max(indices) >= rows:
            raise ValueError(f"trainable_token_indices: '{ending}' has {rows} tokens, none of index {max(indices)}.")
    check_beside_others(model, modules, config, adapter_name)

    endings = (*(config.modules_to_save or ()), *tokens)
    in_full = [n for n, m in modules.items() if n and (_is_wrapper(m) or n.endswith(endings))]
    _check_not_within(
        modules, [name for name in modules if name and name.endswith(tuple(config.modules_to_save or ()))]
    )
    adapters = {adapter_name, *(n for m in modules.values() if isinstance(m, LoRASwitchLayer) for n in m.loraswitch_A)}
    for layer in (n for n, m in modules.items() if isinstance(m, LoRASwitchLayer)):
        clashing = [name for name in in_full if f"{layer}.".startswith(f"{name}.") and not _is_wrapper(modules[name])]
        if clashing:
            raise ValueError(
                f"modules_to_save: '{clashing[0]}' cannot be trained in full, because another adapter has experts on '{layer}'. "
                "Leave it out, or use a model without that adapter."
            )
    for name in in_full:
        clash = adapters.intersection(name.split("."))
        if clash:
            raise ValueError(
                f"The adapter name '{clash.pop()}' is part of the name of a module that modules_to_save (or "
                f"trainable_token_indices) takes, '{name}', whose weights PEFT would lose when it saves. Choose another "
                "adapter_name."
            )


def _check_not_within(modules: dict[str, nn.Module], names: list[str]) -> None:
    """PEFT saves a module within another one under names that it does not find when it loads."""
    outside = ""
    for name in names:  # depth first
        if outside and name.startswith(f"{outside}."):
            if without_wrapper(modules[name]).state_dict():
                raise ValueError(
                    f"modules_to_save: '{name}' lies within '{outside}', which is trained in full as well: leave it out."
                )
        else:
            outside = name


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, AuxiliaryTrainingWrapper)


def _rows(module: nn.Module) -> int:
    return getattr(getattr(without_wrapper(module), "weight", None), "shape", (sys.maxsize,))[0]
