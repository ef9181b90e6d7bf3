"""LoRA-RITE on stacks of experts: the numbers of the library's own class on each expert's A and B as a pair."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from helpers import adapted, randomize_adapter, switch_config, tiny_llama, tokens
from peft_loraswitch.adapted_layers import adapted_layers
from peft_loraswitch.lora_rite import create_lorarite_optimizer

FIELDS: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "num_shared_experts": 1}


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("pytorch_optimizer")


def a_model(**fields: Any) -> nn.Module:
    model = get_peft_model(tiny_llama(), switch_config(**{**FIELDS, **fields}))
    randomize_adapter(model)
    return model.train()


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()


def stacks(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [
        (layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight) for layer in adapted_layers(model)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"apply_escape": True, "balance_param": True}, {"weight_decay": 0.1, "update_capping": 0.5}]
)
def test_each_experts_pair_is_that_of_the_library(library, options):
    model = a_model(rank_pattern={"v_proj": 3}).double()  # second moments are tiny, so their roots show rounding
    optimizer = create_lorarite_optimizer(model, lr=0.01, **options)
    pairs = [(a[e], b[e]) for a, b in stacks(model) for e in range(len(a))]
    alone = [nn.Parameter(each.detach().clone()) for pair in pairs for each in pair]
    reference = library.LoRARite(alone, lr=0.01, **options)
    for seed in range(4):
        backward(model, seed)
        gradients: list[Tensor] = [g for a, b in stacks(model) for e in range(len(a)) for g in (a.grad[e], b.grad[e])]
        for one, gradient in zip(alone, gradients, strict=True):
            one.grad = gradient.clone()
        optimizer.step()
        reference.step()
    now = [each for a, b in stacks(model) for e in range(len(a)) for each in (a[e], b[e])]
    for one, each in zip(alone, now, strict=True):
        torch.testing.assert_close(each, one, rtol=1e-6, atol=1e-9)


def test_a_new_adapter_whose_b_is_zero_trains(library):
    model = get_peft_model(tiny_llama(), switch_config(**FIELDS)).train()
    optimizer = create_lorarite_optimizer(model, lr=0.02)
    losses = []
    for _ in range(12):
        backward(model, 0)
        losses.append(model(input_ids=tokens(seed=0), labels=tokens(seed=0)).loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05 and all(b.abs().max() > 0 for _, b in stacks(model))


def test_everything_else_gets_adamw_and_the_schedule_reaches_both(library):
    model = a_model(modules_to_save=["lm_head"])
    twin = copy.deepcopy(model)
    optimizer = create_lorarite_optimizer(model, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rest = {
        name: p for name, p in twin.named_parameters() if p.requires_grad and "_A." not in name and "_B." not in name
    }
    assert any("router" in name for name in rest) and any("lm_head" in name for name in rest)
    adamw = torch.optim.AdamW(rest.values(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for seed in range(3):
        backward(model, seed)
        for name, parameter in model.named_parameters():
            if name in rest:
                rest[name].grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        schedule.step()
        for group in adamw.param_groups:
            group["lr"] *= 0.5
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], parameter) for name, parameter in rest.items())
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 8] * 2


def test_a_saved_state_goes_on_where_it_was(library):
    model = a_model()
    optimizer = create_lorarite_optimizer(model, lr=0.01)
    backward(model, 0)
    optimizer.step()
    twin = copy.deepcopy(model)
    other = create_lorarite_optimizer(twin, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, other)):
        for seed in (1, 2):
            backward(each, seed)
            its.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_it_refuses(library):
    with pytest.raises(ValueError, match="whole stacks of experts"):
        create_lorarite_optimizer(a_model(num_shared_experts=0, trainable=[0]), lr=0.1)
    with pytest.raises(ValueError, match="rank 64 of adapter 'default' is above the features"):
        create_lorarite_optimizer(a_model(rank_pattern={"k_proj": 64}), lr=0.1)
    with pytest.raises(ValueError, match='no adapter that trains A and B.*trainable="router" there are none'):
        create_lorarite_optimizer(a_model(trainable="router"), lr=0.1)
    with pytest.raises(ValueError, match="no adapter that trains"):
        create_lorarite_optimizer(tiny_llama(), lr=0.1)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    for name in ("pytorch_optimizer", "pytorch_optimizer.optimizer.lora_rite"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install pytorch_optimizer"):
        create_lorarite_optimizer(adapted(tiny_llama()), lr=0.1)
