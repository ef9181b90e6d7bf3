"""One rule for "training": the mode of the adapted layers decides on the router's losses, statistics, jitter and dropout alike,
and new layers take the mode of what the user holds: a PeftModel, or the backbone itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import randomize_adapter, router_layer, switch_config, switch_layers, tiny_llama, tokens
from peft_loraswitch import router_stats

pytestmark = pytest.mark.compat
NOISY: dict[str, Any] = {"router_jitter": 0.3, "lora_dropout": 0.3, "router_aux_loss_coef": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, switch_config(init_weights=False, task_type="CAUSAL_LM", **NOISY))
    model.save_pretrained(str(folder / "adapter"))
    return str(folder)


def backbone(saved: str, training: bool) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(f"{saved}/base").train(training)


def config() -> Any:
    return switch_config(init_weights=False, **NOISY)


def second(saved: str, training: bool) -> nn.Module:
    model = get_peft_model(backbone(saved, True), switch_config(target_modules=["q_proj"], init_weights=False))
    model.train(training)
    model.add_adapter("second", config())
    model.set_adapter("second")
    return model


def second_loaded(saved: str, training: bool) -> nn.Module:
    model = get_peft_model(backbone(saved, True), switch_config(target_modules=["q_proj"], init_weights=False))
    model.train(training)
    model.load_adapter(f"{saved}/adapter", "second", is_trainable=True)
    model.set_adapter("second")
    return model


def native(saved: str, training: bool) -> nn.Module:
    model = backbone(saved, training)
    model.add_adapter(config(), "first")
    return model


def native_second(saved: str, training: bool) -> nn.Module:
    model = backbone(saved, training)
    model.add_adapter(switch_config(target_modules=["q_proj"]), "first")
    model.add_adapter(config(), "second")
    model.set_adapter("second")
    return model


def native_loaded(saved: str, training: bool) -> nn.Module:
    model = backbone(saved, training)
    model.load_adapter(f"{saved}/adapter", is_trainable=True)
    return model


def injected(saved: str, training: bool) -> nn.Module:
    return inject_adapter_in_model(config(), backbone(saved, training), "first")


WAYS = {
    "get_peft_model": lambda saved, mode: get_peft_model(backbone(saved, mode), config()),
    "PeftModel.from_pretrained": lambda saved, mode: PeftModel.from_pretrained(
        backbone(saved, mode), f"{saved}/adapter", is_trainable=mode
    ),
    "AutoPeftModel": lambda saved, mode: AutoPeftModelForCausalLM.from_pretrained(
        f"{saved}/adapter", is_trainable=mode
    ),
    "PeftModel.add_adapter": second,
    "PeftModel.load_adapter": second_loaded,
    "model.add_adapter": native,
    "model.add_adapter twice": native_second,
    "model.load_adapter": native_loaded,
    "AutoModel of an adapter": lambda saved, mode: AutoModelForCausalLM.from_pretrained(f"{saved}/adapter"),
    "inject_adapter_in_model": injected,
}


def check(model: nn.Module) -> None:
    """Everything goes by `model.training`."""
    name = "second" if "second" in router_layer_names(model) else next(iter(router_layer_names(model)))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    randomize_adapter(model, name)
    ids = tokens(4, 9)
    router = router_layer(model, name)
    before = router_stats(model, name)["tokens"]
    first, again = (model(ids, labels=ids) for _ in range(2))
    counted = router_stats(model, name)["tokens"] - before
    assert counted == (72 if model.training else 0), "statistics"
    assert torch.equal(first.logits, again.logits) == (not model.training), "dropout or jitter"
    for amount in ("lora_dropout", "router_jitter"):  # each by itself
        with only(model, name, amount):
            assert torch.equal(model(ids).logits, model(ids).logits) == (not model.training), amount
    plain = nn.functional.cross_entropy(first.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    assert torch.isclose(first.loss, plain, atol=1e-5) == (not model.training), "losses"
    assert router.training == model.training


def router_layer_names(model: nn.Module) -> set[str]:
    return {name for layer in switch_layers(model).values() for name in layer.loraswitch_router}


class only:
    """Within it, of dropout and jitter there is only `amount`."""

    def __init__(self, model: nn.Module, adapter: str, amount: str) -> None:
        self.layers = list(switch_layers(model).values())
        self.adapter, self.amount = adapter, amount

    def __enter__(self) -> None:
        self.saved = [layer.loraswitch_dropout[self.adapter].p for layer in self.layers]
        router = next(layer for layer in self.layers if self.adapter in layer.loraswitch_router)
        self.router, self.options = router, router.routing_options[self.adapter]
        if self.amount != "lora_dropout":
            for layer in self.layers:
                layer.loraswitch_dropout[self.adapter].p = 0.0
        if self.amount != "router_jitter":
            router.routing_options[self.adapter] = replace(self.options, jitter=0.0)

    def __exit__(self, *exception: object) -> None:
        for layer, p in zip(self.layers, self.saved, strict=True):
            layer.loraswitch_dropout[self.adapter].p = p
        self.router.routing_options[self.adapter] = self.options


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_everything_goes_by_the_mode_of_the_model(saved, way, training):
    model = WAYS[way](saved, training)
    check(model)
    for mode in (True, False, True):
        check(model.train(mode))


@pytest.mark.parametrize("training", [True, False])
def test_a_backbone_in_eval_mode_stays_so(saved, training):
    """Attaching an adapter changes the mode of no module that was there."""
    base = backbone(saved, training)
    modes = {name: module.training for name, module in base.named_modules()}
    get_peft_model(base, config())
    for name, module in base.named_modules():
        plain = name.replace(".base_layer", "")
        if plain in modes and "loraswitch" not in name and module not in switch_layers(base).values():
            assert module.training == modes[plain], name


def test_gradients_off_means_no_losses(saved):
    model = get_peft_model(backbone(saved, True), config())
    with torch.no_grad():
        model(tokens())
    assert router_stats(model)["tokens"] == 0
