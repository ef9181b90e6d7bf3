"""What may happen to the weights and layers of a model after `fuse_for_inference()`. Nothing here asserts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fusing import adapted
from helpers import tiny_llama


def made(**settings: Any) -> nn.Module:
    return adapted(tiny_llama(attention_bias=True), **settings)


@torch.no_grad()
def moved(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1


@torch.no_grad()
def assigned(model: nn.Module) -> None:
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


def another_parameter(model: nn.Module) -> None:
    layer = model.base_model.model.model.layers[-1].self_attn.v_proj
    layer.loraswitch_B["default"].weight = nn.Parameter(torch.randn_like(layer.loraswitch_B["default"].weight))


def another_base_layer(model: nn.Module) -> None:
    layer = model.base_model.model.model.layers[-1].mlp.up_proj
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.weight.data.mul_(2)


def another_kind_of_base_layer(model: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = model.base_model.model.model.layers[-1].mlp.up_proj
    doubled = Doubled(layer.in_features, layer.out_features, bias=False)
    doubled.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = doubled


def hook_on_base_layer(model: nn.Module) -> None:
    model.base_model.model.model.layers[-1].self_attn.v_proj.base_layer.register_forward_hook(lambda m, a, out: out * 2)


def another_scaling(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.v_proj.scaling["default"] *= 3


def another_dictionary_of_scalings(model: nn.Module) -> None:
    """As `peft.helpers.rescale_adapter_scale` does with layers of LoRA."""
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.scaling = {name: value * 3 for name, value in layer.scaling.items()}


def first_bias_of_a_layer(model: nn.Module) -> None:
    layer = model.base_model.model.model.layers[-1].mlp.up_proj.base_layer
    assert layer.bias is None
    layer.bias = nn.Parameter(torch.ones(layer.out_features))


def one_layer_disabled(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.v_proj.enable_adapters(False)


def first_of_a_group_disabled(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].mlp.gate_proj.enable_adapters(False)


def adapter_taken_off_one_layer(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.v_proj.delete_adapter("default")


def layer_in_training(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].mlp.up_proj.train()


CHANGES = [
    moved, assigned, in_place, another_parameter, another_base_layer, another_kind_of_base_layer, hook_on_base_layer,
    another_scaling, another_dictionary_of_scalings, first_bias_of_a_layer, one_layer_disabled, first_of_a_group_disabled,
    adapter_taken_off_one_layer, layer_in_training,
]  # fmt: skip


def a_plain_base_layer_in_the_dictionary(layer: Any) -> None:
    """Of one layer, in bf16, as the next two."""
    new = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16, bias=False)
    layer._modules["base_layer"] = new.requires_grad_(False)


def bias_replaced(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(torch.ones(layer.out_features, dtype=torch.bfloat16), requires_grad=False)


def hook(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, out: out * 2)


def weight_put_into_a_dictionary(model: nn.Module) -> None:
    """As accelerate places weights. No method is told, so compiled code does not see it before the next eager forward."""
    experts = model.base_model.model.model.layers[-1].self_attn.v_proj.loraswitch_A["default"]
    experts._parameters["weight"] = nn.Parameter(torch.randn_like(experts.weight))
