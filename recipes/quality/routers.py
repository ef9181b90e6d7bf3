"""Routers other than the package's, for the comparison: modules that take the place of `peft_loraswitch.routing.Router`."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_loraswitch.layer import LoRASwitchLayer


def replace(model: nn.Module, router: nn.Module) -> None:
    """Put `router` in the place of the router of the adapter 'default', on its device."""
    for module in model.modules():
        if isinstance(module, LoRASwitchLayer) and "default" in module.loraswitch_router:
            old: Any = module.loraswitch_router["default"]
            module.loraswitch_router["default"] = router.to(old.weight.device)
            return
    raise ValueError("the model carries no LoRA-Switch adapter.")
