"""Which adapters are active, and whether they are on: the same for every module that an adapter has, whatever is called.

Besides the adapted linears these are PEFT's wrappers around modules that an adapter trains in full (`modules_to_save`,
trainable tokens). Each keeps a list of its own. PEFT and Transformers miss some of them, when an adapter is deleted above all:
a wrapper without the deleted adapter is not told which one is active now. `PeftModel` and Transformers' methods call what is
here in their place, on models with LoRA-Switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.tuners_utils import set_adapter as set_adapter_everywhere
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapted_layers import adapted_layers
from .layer import LoRASwitchLayer
from .peft_names import NAME


def _wrappers(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    return (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))


class NoConfigs(dict[str, Any]):
    """The configurations of a model whose last adapter has been deleted. `PeftModel` asks the one of the adapter that it takes
    for active how to call the model, and would stop: the last one still says how, until another adapter is active."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.last = last

    def __missing__(self, name: str) -> Any:
        return self.last

    def __reduce__(self) -> Any:
        return type(self), (self.last,), None, None, iter(self.items())


def check_can_be_active(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Check this before `set_adapter` changes the first module.

    Raises:
        ValueError: two of the adapters train the same module in full.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for wrapper in _wrappers(model) if names else ():
        wrapper.check_set_adapter(names)


def remove_adapter(model: nn.Module, adapter_name: str) -> list[str]:
    """Take an adapter out of every module; return the names of those that are active then.

    Those that were active beside it stay. If it was the only one, the first of the others (by name) is active in its place,
    and trains if the deleted one did.
    """
    layers = adapted_layers(model)
    before = list(layers[0].active_adapters) if layers else []
    trained = any(p.requires_grad for layer in layers for p in _parameters(layer, adapter_name))
    for layer in layers:
        layer.delete_adapter(adapter_name)
    active = list(layers[0].active_adapters) if layers else []
    for wrapper in _wrappers(model):
        if adapter_name in wrapper._adapters:
            here = [name for name in active if name in wrapper._adapters]
            wrapper.delete_adapter(adapter_name, new_active_adapters=here or None)
    _take_off_unused_wrappers(model)
    tell_wrappers(model, active)
    if active and before == [adapter_name]:
        modules: list[Any] = [*layers, *_wrappers(model)]
        for module in modules:
            module.set_requires_grad(active, trained)
    return active


def _take_off_unused_wrappers(model: nn.Module) -> None:
    """Put the modules back that no adapter trains any more: PEFT leaves a wrapper there, and the next adapter would get
    its kind."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AuxiliaryTrainingWrapper) and not child._adapters:
                setattr(module, name, child.original_module)


def tell_wrappers(model: nn.Module, active: list[str], inference_mode: bool = False) -> None:
    """Make those adapters active in PEFT's wrappers that are so in the adapted linears."""
    for wrapper in _wrappers(model):
        here = [name for name in active if name in wrapper._adapters]
        if (
            list(wrapper.active_adapters) != here or not here
        ):  # the layer within trainable tokens may have chosen another
            wrapper.set_adapter(here, inference_mode=inference_mode)


def _parameters(layer: LoRASwitchLayer, adapter_name: str) -> list[nn.Parameter]:
    parts = (layer.loraswitch_A, layer.loraswitch_router)  # the router also trains alone
    return [parameter for part in parts if adapter_name in part for parameter in part[adapter_name].parameters()]


def inherit_switched_off(model: nn.Module) -> None:
    """Switch off modules that have just been added to a model whose adapters are switched off."""
    modules = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(module.disable_adapters for module in modules if isinstance(module, LoRASwitchLayer)):
        _switch(model, enabled=False)


def _switch(model: nn.Module, enabled: bool) -> None:
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.enable_adapters(enabled)


# ---------------------------------------------------------------------------------------------- PeftModel, Transformers


def delete_in_peft_model(original: Callable[..., Any], model: PeftModel, adapter_name: str) -> None:
    """In place of `PeftModel.delete_adapter`."""
    original(model, adapter_name)
    # PEFT keeps a name of its own besides the active ones, and looks up the configuration by it at every forward
    if model.peft_config and model.active_adapter not in model.peft_config:
        model.active_adapter = next(iter(model.active_adapters), next(iter(model.peft_config)))


def _only_ours(model: nn.Module) -> bool:
    """Whether the adapters that Transformers has put on `model` are LoRA-Switch's."""
    configs = getattr(model, "peft_config", None)
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    return bool(loaded and configs and all(config.peft_type == NAME for config in configs.values()))


def active_in_transformers(original: Callable[..., Any], model: Any) -> list[str]:
    """In place of Transformers' `model.active_adapters()`."""
    # Transformers asks the first module of PEFT's that it finds, which may be an embedding with trainable tokens
    return list(adapted_layers(model)[0].active_adapters) if _only_ours(model) else original(model)


def set_in_transformers(original: Callable[..., Any], model: Any, adapter_name: str | list[str]) -> None:
    """In place of Transformers' `model.set_adapter()`."""
    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
    if not _only_ours(model) or not set(names) <= set(model.peft_config):
        return original(model, adapter_name)  # which says what is wrong
    check_can_be_active(model, names)
    set_adapter_everywhere(model, names, layer_cls=LoRASwitchLayer)


def delete_in_transformers(original: Callable[..., Any], model: Any, adapter_names: str | list[str]) -> None:
    """In place of Transformers' `model.delete_adapter()`."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if not _only_ours(model) or not set(names) <= set(model.peft_config):
        return original(model, adapter_names)
    for name in dict.fromkeys(names):
        remove_adapter(model, name)
        del model.peft_config[name]
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False


def disable_in_transformers(original: Callable[..., Any], model: Any) -> None:
    """In place of Transformers' `model.disable_adapters()`."""
    _switch(model, enabled=False) if _only_ours(model) else original(model)


def enable_in_transformers(original: Callable[..., Any], model: Any) -> None:
    """In place of Transformers' `model.enable_adapters()`."""
    _switch(model, enabled=True) if _only_ours(model) else original(model)
