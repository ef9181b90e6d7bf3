"""The adapted linears of a model."""

from __future__ import annotations

from torch import nn

from .layer import LoRASwitchLinear


def adapted_layers(model: nn.Module) -> list[LoRASwitchLinear]:
    """All of them, in module order, whichever adapters they carry."""
    return [module for module in model.modules() if isinstance(module, LoRASwitchLinear)]
