"""What the tests of joining share: models with large losses, the definition of their gradient, and objectives of any outputs.

The definition is computed in float64 (`trainer_tools.auxiliary_gradient`) from what the router saw; the rest of the router's
gradient is that of a twin whose losses have coefficients of 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from helpers import (
    HIDDEN,
    adapted,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    tiny_gpt2,
    tiny_llama,
    without_losses,
)
from trainer_tools import auxiliary_gradient

AUX, Z = 0.5, 0.125
Objective = Callable[[Any], torch.Tensor]


def trained(model: nn.Module | None = None, **config: Any) -> nn.Module:
    model = tiny_llama() if model is None else model
    return adapted(model, **{"router_aux_loss_coef": AUX, "router_z_loss_coef": Z, **config}).train()


def router(model: nn.Module, adapter: str = "default") -> nn.Parameter:
    return router_layer(model, adapter).loraswitch_router[adapter].weight


def seen_by_router(model: nn.Module, batch: dict[str, Any], adapter: str = "default") -> torch.Tensor:
    """[real tokens, in_features]: the input of the linear that routes, in a forward of a copy."""
    model, seen = copy.deepcopy(model), []
    router_layer(model, adapter).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    mask = batch.get("attention_mask")
    return seen[0].flatten(0, -2) if mask is None else seen[0][mask.bool()]


def definition(model: nn.Module, batch: dict[str, Any], adapter: str = "default") -> torch.Tensor:
    """Gradient of both losses on this batch with respect to the router's weight."""
    gradient = auxiliary_gradient(model, seen_by_router(model, batch, adapter), AUX, Z, adapter)
    assert gradient.norm() > 0.05
    return gradient


def assert_share(actual: torch.Tensor, task: torch.Tensor, expected: torch.Tensor) -> None:
    """The router's gradient is the task's and this much of the losses'."""
    error = (actual - task - expected).norm()
    assert error <= 1e-5 * max(task.norm(), expected.norm(), 1), (error, task.norm(), expected.norm())


SPECIAL = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}


def differentiable(output: Any) -> dict[str, torch.Tensor]:
    """Every differentiable tensor of an output, by a name that says where it is."""
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}")
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                walk(item, f"{name}.{index}")
        elif hasattr(value, "layers"):  # a cache
            for index, layer in enumerate(value.layers):
                walk([layer.keys, layer.values], f"{name}.layers.{index}")

    walk(output, "")
    return found


def is_loss(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 0 and name in (".loss", ".0")


def weighted(weights: dict[str, float]) -> Objective:
    """The sum over named outputs of weight * the output times fixed noise; the loss is taken as it is."""

    def objective(output: Any) -> torch.Tensor:
        terms = []
        tensors = differentiable(output)
        for name, weight in weights.items():
            tensor = tensors[name]
            if not is_loss(name, tensor):
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
                tensor = (tensor * noise).sum() / tensor.numel() ** 0.5
            terms.append(weight * tensor)
        return torch.stack(terms).sum()

    return objective


def plain(model: nn.Module) -> nn.Module:
    return model


def checkpointed(reentrant: bool) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    return prepare


def make_llama(**config: Any) -> nn.Module:
    model = trained(**config)
    model.base_model.model.set_attn_implementation("eager")  # the one that returns attentions
    return model


def two_adapters(**config: Any) -> nn.Module:
    model = make_llama(**config)
    settings = {"num_experts": 3, "top_k": 1, "router_aux_loss_coef": AUX, "router_z_loss_coef": Z}
    model.add_adapter("other", switch_config(**settings))
    randomize_adapter(model, "other", seed=5)
    return model


def both(model: nn.Module) -> nn.Module:
    model.base_model.set_adapter(["default", "other"])
    return model


NO_CACHE = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
FORMS: dict[str, tuple[Callable[..., nn.Module], Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    "plain": (make_llama, plain, SPECIAL),
    "checkpointed": (make_llama, checkpointed(False), NO_CACHE),
    "reentrant": (make_llama, checkpointed(True), {"output_hidden_states": True, "use_cache": False}),
    "two adapters": (two_adapters, both, SPECIAL),
    "top 1": (lambda: make_llama(top_k=1), plain, SPECIAL),
    "shared experts": (lambda: make_llama(num_shared_experts=1), plain, SPECIAL),
    "gpt2": (lambda: trained(tiny_gpt2()), plain, {"output_hidden_states": True}),
}


class Case:
    """A model, its twin without losses, and the definition of the losses' gradients, by adapter."""

    def __init__(self, form: str, labels: bool = True, return_dict: bool = True) -> None:
        make, prepare, flags = FORMS[form]
        model = make()
        self.twin, self.model = prepare(without_losses(model)), prepare(model)
        self.batch = {**padded([7, 4, 1], seed=3), **flags, "return_dict": return_dict}
        if not labels:
            del self.batch["labels"]
        self.adapters = list(self.model.active_adapters)
        self.definitions = {name: definition(self.model, self.batch, name) for name in self.adapters}
        output = differentiable(self.model(**self.batch))
        # what is upstream of the routing trains no router: the embeddings, where they are made to need a gradient
        first = {name for name, tensor in output.items() if name.endswith(".0") and tensor.shape[-1:] == (HIDDEN,)}
        self.names = [name for name in output if name not in first]

    def loss_name(self) -> str | None:
        output = differentiable(self.twin(**self.batch))
        return next((name for name, tensor in output.items() if is_loss(name, tensor)), None)

    def check(self, objective: Objective, scale: float) -> None:
        for model in (self.model, self.twin):
            model.zero_grad()
            objective(model(**self.batch)).backward()
        for adapter in self.adapters:
            expected = scale * self.definitions[adapter]
            assert_share(router(self.model, adapter).grad, router(self.twin, adapter).grad, expected)
        pairs = zip(self.model.named_parameters(), self.twin.parameters(), strict=True)
        for (name, parameter), other in pairs:
            if parameter.grad is not None and "loraswitch_router" not in name:
                assert torch.equal(parameter.grad, other.grad), name  # the losses train the router and nothing else
