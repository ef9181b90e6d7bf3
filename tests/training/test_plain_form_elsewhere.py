"""Where the fused training path (`training/fast_linears.py`) does not apply: the plain form runs, and that is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fast_linear_checks import NO_LOSSES, adapted, counted_calls, relative, step
from helpers import adapter_gradients, padded, tiny_llama
from peft_loraswitch import LoRASwitchLinear
from peft_loraswitch.training import fast_linears, group_plans

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    return counted_calls(monkeypatch)


@pytest.fixture
def said(monkeypatch, caplog) -> Callable[[], list[str]]:
    monkeypatch.setattr(group_plans, "_said", set())
    caplog.set_level(logging.WARNING, logger="peft_loraswitch")
    return lambda: [r.getMessage() for r in caplog.records if "plain form" in r.getMessage()]


def mixed_dtypes(model: Any) -> None:
    model.get_base_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "loraswitch_" in name:
            parameter.data = parameter.data.float()


def hooked_experts(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoRASwitchLinear):
            module.loraswitch_A["default"].register_forward_hook(lambda *_: None)


NOT_FUSED: dict[str, tuple[dict[str, Any], Callable[[Any], None], str]] = {
    "dropout": ({"lora_dropout": 0.5}, lambda model: None, "lora_dropout"),
    "dtypes": ({}, mixed_dtypes, "without autocast"),
    "hooks": ({}, hooked_experts, "hooked"),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_the_plain_form_runs_elsewhere_with_one_line_of_log(case, counted, said):
    config, change, words = NOT_FUSED[case]
    model = adapted(**config)
    change(model)
    for seed in range(2):
        torch.manual_seed(seed)
        _, gradients = step(model, padded([7, 4], seed=seed))
        torch.manual_seed(seed)
        with fast_linears.plain():
            _, exact = step(model, padded([7, 4], seed=seed))
        assert all(torch.equal(gradients[name], exact[name]) for name in exact)
    assert not counted and len(said()) == 1 and words in said()[0]


def test_base_layers_with_hooks_or_that_train_run_themselves(counted, said):
    model = adapted(tiny_llama(num_hidden_layers=1))
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.q_proj.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    layer.mlp.up_proj.base_layer.weight.requires_grad_()
    for seed in range(2):
        _, gradients = step(model, padded([7, 4], seed=seed))
        base = layer.mlp.up_proj.base_layer.weight.grad.clone()
        with fast_linears.plain():
            _, exact = step(model, padded([7, 4], seed=seed))
        torch.testing.assert_close(base, layer.mlp.up_proj.base_layer.weight.grad)
        assert all(relative(gradients[name], exact[name]) < 1e-5 for name in exact)
    assert counted and not said()


def test_second_derivatives():
    model = adapted(tiny_llama(num_hidden_layers=1), **NO_LOSSES)
    embedding = model.get_input_embeddings()(padded([5])["input_ids"]).detach()
    results = []
    for form in (nullcontext(), nullcontext(), fast_linears.plain()):
        model.zero_grad()
        x = embedding.clone().requires_grad_()
        with form, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(inputs_embeds=x, labels=padded([5])["input_ids"]).loss
            (d_x,) = torch.autograd.grad(loss, x, create_graph=True)
            d_x.square().sum().backward()
        results.append({name: g.clone() for name, g in adapter_gradients(model).items()})
    for name, exact in results[2].items():
        assert relative(results[1][name], exact) < 1e-4, name


def test_eval_mode_runs_the_plain_form(counted):
    model = adapted().eval()
    model(**padded([7, 4])).loss.backward()
    assert not counted and adapter_gradients(model)
