"""PEFT's options: which linears an adapter takes, with which rank and scale, and what trains and is saved besides."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from architectures import build
from helpers import (
    adapted,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
    tokens,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
NEW_PEFT = Version(peft.__version__) >= Version("0.21")


def names(model: torch.nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.model.layers.") for name in switch_layers(model)}


def blocks(*indices: int, ends: tuple[str, ...] = ("self_attn.q_proj",)) -> set[str]:
    return {f"{i}.{end}" for i in indices for end in ends}


SELECTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "names": ({"target_modules": ["q_proj", "o_proj"]}, blocks(0, 1, 2, ends=("self_attn.q_proj", "self_attn.o_proj"))),
    "endings": ({"target_modules": ["self_attn.q_proj"]}, blocks(0, 1, 2)),
    "full_name": ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, blocks(1)),
    "regex": ({"target_modules": r".*\.[02]\..*q_proj"}, blocks(0, 2)),
    "all": (
        {"target_modules": "all-linear"},
        blocks(0, 1, 2, ends=(*(f"self_attn.{n}" for n in ATTENTION), *(f"mlp.{n}" for n in MLP))),
    ),
    "all_any_case": (
        {"target_modules": "All-Linear", "exclude_modules": [*MLP, "k_proj", "v_proj", "o_proj"]},
        blocks(0, 1, 2),
    ),
    "default": ({"target_modules": None}, blocks(0, 1, 2, ends=("self_attn.q_proj", "self_attn.v_proj"))),
    "exclude_names": ({"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}, blocks(0, 2)),
    "exclude_regex": ({"target_modules": ["q_proj"], "exclude_modules": r".*\.[01]\..*"}, blocks(2)),
    "exclude_from_all": ({"target_modules": "all-linear", "exclude_modules": r"(?!.*q_proj).*"}, blocks(0, 1, 2)),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, blocks(0, 2)),
    "layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, blocks(1)),
    "pattern": ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, blocks(1)),
    "patterns": ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}, blocks(1)),
    "deeper_router": (
        {"target_modules": ["q_proj"], "router_module": "layers.1.self_attn.q_proj"},
        blocks(1, 2),
    ),
}


@pytest.mark.compat
@pytest.mark.parametrize("option", SELECTIONS)
def test_selection(option: str, tmp_path):
    settings, wanted = SELECTIONS[option]
    backbone = tiny_llama(num_hidden_layers=3)
    model = adapted(copy.deepcopy(backbone), **settings)
    assert names(model) == wanted
    assert sum(len(layer.loraswitch_router) for layer in switch_layers(model).values()) == 1
    assert not torch.equal(model(input_ids=tokens()).logits, backbone(input_ids=tokens()).logits)

    model.save_pretrained(tmp_path)
    assert {key.split(".loraswitch_")[0] for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        f"base_model.model.model.layers.{name}" for name in wanted
    }
    reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    assert names(reloaded) == wanted
    assert torch.equal(reloaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_block_list_with_an_unusual_name():
    """gpt2 calls it `h`, which PEFT knows; a list it does not know is named by layers_pattern."""
    model = get_peft_model(tiny_gpt2(), switch_config(target_modules=["c_attn"], layers_to_transform=[1]))
    assert [name.rpartition("transformer.")[2] for name in switch_layers(model)] == ["h.1.attn.c_attn"]

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.floors = torch.nn.ModuleList(torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 4)}) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for floor in self.floors:
                x = floor["lin"](x)
            return x

    config = switch_config(target_modules=["lin"], layers_to_transform=[2], layers_pattern="floors")
    assert list(switch_layers(get_peft_model(Tower(), config))) == ["base_model.model.floors.2.lin"]


@pytest.mark.compat
@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_alpha_patterns(use_rslora: bool, tmp_path):
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"down_proj": 9, r".*\.1\.self_attn\.q_proj": 5, "^model.layers.0.mlp.up_proj": 2},
        "alpha_pattern": {"down_proj": 27, "layers.0.mlp.up_proj": 3},
        "use_rslora": use_rslora,
    }
    backbone = tiny_llama()
    model = adapted(copy.deepcopy(backbone), **settings)
    wanted = {
        "1.self_attn.q_proj": (5, 8),
        "0.mlp.down_proj": (9, 27),
        "1.mlp.down_proj": (9, 27),
        "0.mlp.up_proj": (2, 3),
    }
    for name, layer in switch_layers(model).items():
        rank, alpha = wanted.get(name.removeprefix("base_model.model.model.layers."), (4, 8))
        assert layer.loraswitch_A["default"].weight.shape == (4, rank, layer.in_features)
        assert layer.loraswitch_B["default"].weight.shape == (4, layer.out_features, rank)
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha)
        assert layer.scaling["default"] == pytest.approx(alpha / (rank**0.5 if use_rslora else rank))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.rank_pattern, config.alpha_pattern) == (settings["rank_pattern"], settings["alpha_pattern"])
    reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    assert torch.equal(reloaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.skipif(not NEW_PEFT, reason="PEFT 0.20 says nothing about patterns that match nothing")
def test_pattern_that_matches_nothing_is_reported():
    with pytest.warns(RuntimeWarning, match="no_such"):
        get_peft_model(tiny_llama(), switch_config(rank_pattern={"no_such_module": 2}))


@pytest.mark.skipif(not NEW_PEFT, reason="refused there: see the next test")
@pytest.mark.parametrize("bias", ["none", "all", "loraswitch_only"])
@pytest.mark.parametrize("make", [tiny_opt, tiny_gpt2])
def test_bias(make: Any, bias: str, tmp_path):
    backbone = make()
    model = adapted(copy.deepcopy(backbone), target_modules=["k_proj", "q_proj", "c_attn"], bias=bias)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    of_adapted = {n for n in every if "base_layer" in n}
    assert of_adapted and of_adapted < every
    assert trained == {"none": set(), "all": every, "loraswitch_only": of_adapted}[bias]

    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    # the gradient of a key's bias is zero: softmax does not see what all keys have in common
    assert {n for n in changed if n.endswith("bias")} | {n for n in trained if "k_proj" in n} == trained
    assert all("loraswitch_" in n or n in trained for n in changed)

    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    assert torch.equal(reloaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    if bias == "none":
        return
    # the backbone's own biases come back where the adapter goes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
            model.add_adapter("second", switch_config(bias="all"))
    assert list(model.peft_config) == ["default"]


@pytest.mark.compat
@pytest.mark.skipif(NEW_PEFT, reason="PEFT 0.21 saves the biases")
def test_bias_is_refused_where_peft_would_lose_it():
    with pytest.raises(ValueError, match="bias.*0.21"):
        get_peft_model(tiny_opt(), switch_config(bias="all"))


@pytest.mark.compat
def test_modules_to_save(tmp_path):
    backbone = tiny_llama()
    config = switch_config(target_modules=ATTENTION, modules_to_save=["lm_head", "model.norm"])
    model = randomize_adapter(get_peft_model(copy.deepcopy(backbone), config))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "loraswitch_" not in n}
    assert trained == {
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.norm.modules_to_save.default.weight",
    }
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    model.eval()
    trained_logits = model(input_ids=tokens()).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, backbone(input_ids=tokens()).logits)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"} < keys
    for low in (False, True):
        reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(reloaded(input_ids=tokens()).logits, trained_logits)


@pytest.mark.compat
@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 5]}], ids=["list", "dict"])
@pytest.mark.parametrize("tied", [False, True])
def test_trainable_token_indices(indices: Any, tied: bool, tmp_path):
    backbone = tiny_llama(tie_word_embeddings=tied)
    config = switch_config(target_modules=ATTENTION, trainable_token_indices=indices)
    model = randomize_adapter(get_peft_model(copy.deepcopy(backbone), config))
    batch = tokens()
    batch[0, :2] = torch.tensor([3, 5])
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    model.train()(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    model.eval()
    embedded = model.get_input_embeddings()(torch.arange(64))
    original = backbone.get_input_embeddings()(torch.arange(64))
    moved = (embedded != original).any(-1).nonzero().flatten().tolist()
    assert moved == [3, 5]
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    assert torch.equal(reloaded(input_ids=batch).logits, model(input_ids=batch).logits)


@pytest.mark.compat
def test_sequence_classification_head_is_saved(tmp_path):
    """The task type is enough for PEFT to train and save the head (`score`)."""
    backbone = tiny_llama_classifier()
    model = adapted(copy.deepcopy(backbone), task_type="SEQ_CLS")
    assert not any("score" in name for name in switch_layers(model))
    with torch.no_grad():
        model.get_parameter("base_model.model.score.modules_to_save.default.weight").add_(0.5)
    model.save_pretrained(tmp_path)
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    assert torch.equal(reloaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_dropout_is_on_the_experts_not_on_the_router():
    model = adapted(tiny_llama(), lora_dropout=0.5).train()
    with model.record_routing() as first:
        one = model(input_ids=tokens()).logits
    with model.record_routing() as second:
        two = model(input_ids=tokens()).logits
    assert not torch.equal(one, two)
    # layer 0's input is the embedding: the router sees the same with and without dropout
    assert first.summary() == second.summary()
    model.eval()
    assert torch.equal(model(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("init_weights", [True, "gaussian"])
def test_fresh_adapter_changes_no_bit(init_weights: Any):
    for auto, model_type in ((tf.AutoModelForCausalLM, "qwen3"), (tf.AutoModelForTokenClassification, "bert")):
        backbone = build(model_type, auto).requires_grad_(False)
        model = get_peft_model(copy.deepcopy(backbone), switch_config(init_weights=init_weights)).eval()
        assert torch.equal(model(input_ids=tokens()).logits, backbone(input_ids=tokens()).logits)
        assert all(layer.loraswitch_A["default"].weight.std() > 0 for layer in switch_layers(model).values())


def test_random_weights_for_tests_and_benchmarks():
    model = get_peft_model(tiny_llama(), switch_config(init_weights=False)).eval()
    assert all(layer.loraswitch_B["default"].weight.std() > 0 for layer in switch_layers(model).values())
    assert not torch.equal(model(input_ids=tokens()).logits, tiny_llama()(input_ids=tokens()).logits)
