"""Adapters read without PEFT are what PEFT reads; needs no vLLM."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from peft import get_peft_model

from helpers import tiny_llama
from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.loading.layout import OUR_KEY
from peft_loraswitch.peft_names import NAME, PREFIX
from peft_loraswitch.vllm_plugin import adapter_folder
from peft_loraswitch.vllm_plugin.adapter_folder import CONFIG_FILE, read_adapter, read_settings
from peft_loraswitch.vllm_plugin.options import ServingOptions

SETTINGS = {
    "paper": {},
    "shared and deep": {
        "num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj", "use_rslora": True,
        "rank_pattern": {"down_proj": 5, r"layers\.0\..*": 3}, "alpha_pattern": {"q_proj": 3},
    },
    "hard gate": {"top_k": 1, "normalize_gates": True, "base_expert": True, "expert_names": ["a", "b", "c", "d"]},
    "one choice": {"top_k": 1},
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    def save(**settings):
        config = LoRASwitchConfig(
            **{"r": 4, "num_experts": 4, "target_modules": "all-linear", "init_weights": False, **settings}
        )
        model = get_peft_model(tiny_llama(), config)
        model.save_pretrained(tmp_path)
        return model

    return save


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_what_peft_has(saved, tmp_path, name):
    model = saved(**SETTINGS[name])
    config = model.peft_config["default"]
    adapter = read_adapter(str(tmp_path), read_settings(str(tmp_path)))
    for field in ("num_experts", "top_k", "normalize_gates", "num_shared_experts", "base_expert"):
        assert getattr(adapter.options, field) == getattr(config.routing_options(), field)
    layers = {
        n.removeprefix(PREFIX): m for n, m in model.named_modules() if hasattr(m, "loraswitch_A") and n.count(PREFIX)
    }
    assert set(adapter.experts) == {linear for linear, layer in layers.items() if "default" in layer.loraswitch_A}
    for linear, experts in adapter.experts.items():
        assert torch.equal(experts.a, layers[linear].loraswitch_A["default"].weight)
        assert torch.equal(experts.b, layers[linear].loraswitch_B["default"].weight)
        assert experts.scale == pytest.approx(layers[linear].scaling["default"])
    assert torch.equal(adapter.router, layers[adapter.router_linear].loraswitch_router["default"].weight)


def test_every_field_is_known():
    known = adapter_folder.WITHOUT_EFFECT | set(adapter_folder.READ) | set(adapter_folder.REFUSED)
    assert {field.name for field in fields(LoRASwitchConfig)} <= known
    defaults = {field.name: field.default for field in fields(LoRASwitchConfig) if field.name in adapter_folder.READ}
    patterns = {"rank_pattern", "alpha_pattern"}
    assert {name: value for name, value in adapter_folder.READ.items() if name not in patterns} == {
        name: value for name, value in defaults.items() if name not in patterns
    }


def test_names_are_the_packages():
    assert adapter_folder.NAME == NAME
    for part in ("A", "B", "router"):
        key = f"{PREFIX}model.x.loraswitch_{part}.weight"
        assert adapter_folder.KEY.fullmatch(key)["linear"] == OUR_KEY.fullmatch(key)["module"].removeprefix(PREFIX)


def test_other_folders_are_left_to_vllm(tmp_path):
    assert read_settings(str(tmp_path)) is None
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    assert read_settings(str(tmp_path)) is None


@pytest.mark.parametrize(
    "given",
    [
        {"routers": []},
        {"router_modules": "q_proj"},
        {"router_modules": [1]},
        {"max_experts": 0},
        {"max_experts": True},
        3,
    ],
)
def test_wrong_options_are_named(given):
    with pytest.raises(ValueError, match="--additional-config: loraswitch"):
        ServingOptions.read({"loraswitch": given})


def test_options():
    assert ServingOptions.read({}) == ServingOptions.read(None) == ServingOptions((), 32)
    assert ServingOptions.read({"loraswitch": {"router_modules": ["a"], "max_experts": 4}}) == ServingOptions(("a",), 4)


def test_advice_keeps_what_is_set():
    started_with = ServingOptions(("a.q_proj",), 40)
    _, given = started_with.advice(router_module="b.q_proj").split(" ", 1)
    read = ServingOptions.read(json.loads(given.strip("'")))
    assert read == ServingOptions(("a.q_proj", "b.q_proj"), 40)
    assert ServingOptions().advice(max_experts=33) == """--additional-config '{"loraswitch": {"max_experts": 33}}'"""
