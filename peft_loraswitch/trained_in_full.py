"""Modules that an adapter trains besides its experts: `modules_to_save`, in full, and `trainable_token_indices`, some rows.

PEFT finds them by the ends of their names among all modules of the model, adapted linears included, whose own modules are
called `loraswitch_router` or `loraswitch_A`: `modules_to_save=["router"]` would find them as well as a backbone's routers. So
PEFT is shown a model without the modules inside of adapted linears.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, _get_input_embeddings_name, set_additional_trainable_modules
from torch import nn

from .layer import LoRASwitchLayer

if TYPE_CHECKING:
    from .config import LoRASwitchConfig


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

    Modules that other adapters train stay trainable, or not, as they were.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    flags = [(p, p.requires_grad) for wrapper in wrappers for p in wrapper.parameters()]
    yield
    set_additional_trainable_modules(
        model=BackboneView(model),
        peft_config=config,
        model_config=BaseTuner.get_model_config(tuner),
        adapter_name=adapter_name,
        activate_adapter=adapter_name in tuner.active_adapters,
    )
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def check_trained_in_full(model: nn.Module, config: LoRASwitchConfig, adapter_name: str) -> None:
    """Check, before anything is changed, what PEFT would find out later or not at all.

    Raises:
        ValueError: `trainable_token_indices` names no module, or tokens that it does not have; or an adapter is called as a
            part of the name of a module that is trained in full, whose weights PEFT would then lose when it saves.
    """
    modules = dict(BackboneView(model).named_modules(remove_duplicate=False))
    tokens = config.trainable_token_indices or {}
    if not isinstance(tokens, dict):
        tokens = {str(_get_input_embeddings_name(model, "embed_tokens")): tokens}
    for ending, indices in tokens.items():
        found = [name for name in modules if name.endswith(ending)]
        if not found:
            raise ValueError(f"trainable_token_indices: the model has no module whose name ends in '{ending}'.")
        rows = min(_rows(modules[name]) for name in found)
        if indices and max(indices) >= rows:
            raise ValueError(f"trainable_token_indices: '{ending}' has {rows} tokens, none of index {max(indices)}.")

    endings = (*(config.modules_to_save or ()), *tokens)
    in_full = [n for n, m in modules.items() if isinstance(m, AuxiliaryTrainingWrapper) or (n and n.endswith(endings))]
    adapters = {adapter_name, *(n for m in modules.values() if isinstance(m, LoRASwitchLayer) for n in m.loraswitch_A)}
    for name in in_full:
        clash = adapters.intersection(name.split("."))
        if clash:
            raise ValueError(
                f"The adapter name '{clash.pop()}' is part of the name of a module that modules_to_save (or "
                f"trainable_token_indices) takes, '{name}', whose weights PEFT would lose when it saves. Choose another "
                "adapter_name."
            )


def _rows(module: nn.Module) -> int:
    module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
    return getattr(getattr(module, "weight", None), "shape", (sys.maxsize,))[0]
