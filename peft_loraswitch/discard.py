"""Takes a half-loaded adapter off again, whatever it was put on."""

from __future__ import annotations

from peft import PeftModel
from torch import nn


def discard_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove `adapter_name` from `model` (a `PeftModel` or a bare backbone), as if it had never been added."""
    from .model import LoRASwitchLayer, routing_state

    backbone = model.get_base_model() if isinstance(model, PeftModel) else model
    state = routing_state(backbone)
    for name, layer in list(backbone.named_modules()):
        if not isinstance(layer, LoRASwitchLayer) or adapter_name not in layer.loraswitch_A:
            continue
        layer.delete_adapter(adapter_name)
        if len(layer.loraswitch_A) == 0:
            parent_name, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent_name) if parent_name else backbone, child, layer.base_layer)
    left = [module for module in backbone.modules() if isinstance(module, LoRASwitchLayer)]
    if state is not None:
        state.connect(backbone, left)
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict):
        configs.pop(adapter_name, None)
