"""What "nothing has changed" means: everything that an injection or a load may touch, compared to the bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from helpers import tokens


def fingerprint(model: nn.Module, inputs: Any = None) -> dict[str, Any]:
    """Module tree, hooks, flags, configurations, values and outputs of `model`."""
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = next((m.routing_state for m in model.modules() if hasattr(m, "routing_state")), None)
    configs = getattr(backbone, "peft_config", None)
    with torch.no_grad():
        output = model(tokens() if inputs is None else inputs).logits
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "trainable": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "identities": [id(parameter) for parameter in model.parameters()],
        "configs": {name: config.to_dict() for name, config in configs.items()} if configs is not None else None,
        "active": [copy.copy(getattr(m, "_active_adapter", None)) for m in model.modules()],
        "settings": [dict(m.routing_options) for m in model.modules() if hasattr(m, "loraswitch_A")],
        "routers": sorted(state.router_layers) if state else None,
        "frame": state.frame if state else None,
        "transformers": getattr(backbone, "_hf_peft_config_loaded", None),
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "output": output,
    }


def check_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that `model` is what `fingerprint` saw."""
    now, old = fingerprint(model), dict(before)
    values, old_values = now.pop("values"), old.pop("values")
    assert values.keys() == old_values.keys()
    assert all(torch.equal(values[name], old_values[name]) for name in values)
    assert torch.equal(now.pop("output"), old.pop("output"))
    for key, value in old.items():
        assert now[key] == value, key


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Assert that what happens within leaves every model as it was."""
    before = [fingerprint(model) for model in models]
    yield
    for model, old in zip(models, before, strict=True):
        check_unchanged(model, old)
