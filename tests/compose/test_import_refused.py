"""LoRAs that cannot be experts, and calls that make no sense: each refused by name, and nothing has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import adapted, tiny_bert, tiny_gpt2, tiny_llama
from loaders import configure, pickle_instead, rewrite, truncate
from loras import CONFIG, WEIGHTS, save_lora
from peft_loraswitch import from_loras
from unchanged import unchanged

pytestmark = pytest.mark.compat
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for seed, name in enumerate("ab"):
        save_lora(folder / name, tiny_llama(), seed)
    return folder


@pytest.fixture
def pair(good, tmp_path) -> list[Path]:
    return [Path(shutil.copytree(good / name, tmp_path / name)) for name in "ab"]


def refused(pair: list[Path], match: str, model: nn.Module | None = None, **kwargs) -> None:
    model = model or tiny_llama()
    with unchanged(model), pytest.raises(ValueError, match=match):
        from_loras(model, pair, **kwargs)


DAMAGE = {
    "truncated": (truncate, rf"b/{WEIGHTS} is truncated"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "b holds no weights"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"b is no adapter: there is no {CONFIG}"),
    "no json": (lambda folder: (folder / CONFIG).write_text("{"), f"b/{CONFIG}"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), f"b/{CONFIG} holds a JSON list"),
    "pickle": (pickle_instead, "adapter_model.bin is a pickle"),
    "no tensors": (rewrite(dict.clear), "b/.* holds no LoRA weights"),
    "NaN": (rewrite(lambda t: t[KEY + "A.weight"].fill_(float("nan"))), rf"b/.*{KEY}A.weight' holds NaN"),
    "Inf": (rewrite(lambda t: t[KEY + "B.weight"][0].fill_(float("inf"))), rf"b/.*{KEY}B.weight' holds NaN or Inf"),
    "whole numbers": (rewrite(lambda t: t.update({KEY + "A.weight": t[KEY + "A.weight"].long()})), "type I64"),
    "B missing": (rewrite(lambda t: t.pop(KEY + "B.weight")), "missing: .*layers.0.self_attn.q_proj.lora_B"),
    "a linear missing": (
        rewrite(lambda t: (t.pop(KEY + "A.weight"), t.pop(KEY + "B.weight"))),
        "missing: .*layers.0.self_attn.q_proj.lora_A",
    ),
    "a linear too many": (
        rewrite(lambda t: t.update({k.replace("q_proj", "k_proj"): v[:16].clone() for k, v in t.items() if KEY in k})),
        "k_proj.*target_modules.*does not name",
    ),
    "unknown linear": (
        rewrite(lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items()})),
        "not in the model: .*layers.9",
    ),
    "DoRA's tensors": (
        rewrite(lambda t: t.update({KEY + "magnitude_vector": torch.ones(32)})),
        "magnitude_vector.*DoRA",
    ),
    "a bias": (
        rewrite(lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        "bias of the backbone",
    ),
    "an embedding": (
        rewrite(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)})),
        "adapts an embedding",
    ),
    "a head": (
        rewrite(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(64, 32)})),
        "lm_head.weight' has no counterpart",
    ),
    "a convolution": (
        rewrite(lambda t: t.update({KEY + "A.weight": torch.ones(4, 32, 3, 3)})),
        r"\[4, 32, 3, 3\], of a convolution",
    ),
    "other inputs": (rewrite(lambda t: t.update({KEY + "A.weight": torch.ones(4, 48)})), "made for another backbone"),
    "other outputs": (rewrite(lambda t: t.update({KEY + "B.weight": torch.ones(48, 4)})), "made for another backbone"),
    "A of another rank": (rewrite(lambda t: t.update({KEY + "A.weight": torch.ones(5, 32)})), "rank 5.*r=4"),
    "B of another rank": (rewrite(lambda t: t.update({KEY + "B.weight": torch.ones(32, 3)})), "rank 3.*r=4"),
    "r changed": (configure(r=5), "rank 4.*r=5"),
    "r missing": (configure(r=None), "r is missing"),
    "r of a wrong type": (configure(r="4"), "r='4' must be a whole number"),
    "alpha of a wrong type": (configure(lora_alpha="8"), "lora_alpha='8'"),
    "alpha 0": (configure(lora_alpha=0), "lora_alpha=0"),
    "a slow pattern": (configure(target_modules="(model|mode|l)+(.|..)*x" + "(a|aa)+" * 9 + "$"), "target_modules"),
    "no such target": (configure(target_modules=["k_proj"]), "b/"),
    "dora": (configure(use_dora=True), "use_dora=True.*DoRA"),
    "bias": (configure(bias="all"), "bias='all'"),
    "lora_bias": (configure(lora_bias=True), "lora_bias=True"),
    "modules_to_save": (configure(modules_to_save=["lm_head"]), "modules_to_save"),
    "tokens": (configure(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "parameters": (configure(target_parameters=["x"]), "target_parameters"),
    "replication": (configure(layer_replication=[[0, 2]]), "layer_replication"),
    "aLoRA": (configure(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
    "arrow": (configure(arrow_config={"top_k": 1}), "arrow_config"),
    "a newer field": (configure(use_something=True), "use_something.*newer"),
    "a broken save": (configure(unfinished_save=True), "unfinished_save=True.*save again"),
    "pissa": (configure(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'.*backbone"),
    "IA3": (configure(peft_type="IA3"), "peft_type='IA3' is not LORA"),
    "no type": (configure(peft_type=None), "peft_type=None is not LORA"),
    "ours": (
        lambda folder: (shutil.rmtree(folder), adapted(tiny_llama()).save_pretrained(folder)),
        "a LoRA-Switch adapter already",
    ),
    "base": (configure(base_model_name_or_path=["x"]), r"base_model_name_or_path=\['x'\]"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_lora_that_cannot_be_an_expert(pair, problem):
    damage, match = DAMAGE[problem]
    damage(pair[1])
    refused(pair, match)


SAVED_BY_PEFT = {
    "DoRA": (LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA"),
    "bias": (LoraConfig(target_modules=["q_proj"], bias="lora_only"), "bias='lora_only'"),
    "lora_bias": (LoraConfig(target_modules=["q_proj"], lora_bias=True), "bias"),
    "modules_to_save": (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
    "tokens": (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "trainable_token_indices"),
    "embeddings": (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "embed_tokens.*has no counterpart"),
    "head": (LoraConfig(target_modules=["q_proj", "lm_head"]), "lm_head.*has no counterpart.*tensor of the backbone"),
    "IA3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
}


@pytest.mark.parametrize("kind", SAVED_BY_PEFT)
def test_what_peft_saves_and_no_expert_can_be(pair, kind):
    config, match = SAVED_BY_PEFT[kind]
    shutil.rmtree(pair[1])
    get_peft_model(tiny_llama(), config).save_pretrained(pair[1])
    refused(pair, match)


def test_the_output_embedding(pair):
    """Without the backbone's tensor, which PEFT saves with it unless it is told not to."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    model.save_pretrained(pair[1], save_embedding_layers=False)
    refused(pair, "b/.* adapts 'lm_head'.*output embedding")


def test_other_backbones(pair):
    refused(pair, "not in the model", tiny_gpt2())
    refused(pair, "not in the model", tiny_llama(num_hidden_layers=1))
    refused(pair, "wrong shape", tiny_llama(intermediate_size=64))
    refused(pair, "not in the model", tiny_bert())


def test_the_name_of_the_backbone(pair):
    configure(base_model_name_or_path="you/one")(pair[0])
    configure(base_model_name_or_path="you/two")(pair[1])
    refused(pair, "b/.*base_model_name_or_path='you/two', but that of .*a/.* is 'you/one'.*ignore_base_name=True")
    model = tiny_llama()
    model.name_or_path = "you/one"
    refused(pair, "base_model_name_or_path='you/two', but the model's name is 'you/one'", model)
    from_loras(model, pair, ignore_base_name=True)
    model = tiny_llama()
    model.name_or_path = "you/two"
    configure(base_model_name_or_path="you/two")(pair[0])
    from_loras(model, pair)
    configure(base_model_name_or_path=None)(pair[0])
    from_loras(tiny_llama(), pair)


CALLS = {
    "empty": ({"loras": []}, "loras names 0 LoRAs"),
    "one": ({"loras": ["a"]}, "names 1 LoRA: a router needs two or more.*PeftModel.from_pretrained"),
    "a text": ({"loras": "a"}, "must be a list"),
    "a number": ({"loras": ["a", 3]}, "loras holds 3"),
    "twice": ({"loras": ["a", "b", "./a"]}, "names '.*a' twice"),
    "missing folder": ({"loras": ["a", "nowhere/at/all/../b"]}, "nowhere"),
    "names twice": ({"expert_names": ["x", "x"]}, "every name once"),
    "too few names": ({"expert_names": ["x"]}, "1 names for num_experts=2"),
    "top_k": ({"top_k": 3}, "top_k=3 is larger than num_experts=2"),
    "r": ({"r": 8}, "takes no r:"),
    "unknown": ({"rank": 8}, "does not know rank"),
    "no such router": ({"router_module": "nope"}, "router_module='nope'"),
    "deep router": (
        {"router_module": "layers.1.self_attn.q_proj"},
        r"router_module='layers.1.self_attn.q_proj': linears before it .*a/.*layers.0",
    ),
    "dotted name": ({"adapter_name": "a.b"}, "adapter_name='a.b'"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_make_no_sense(good, monkeypatch, call):
    monkeypatch.chdir(good)
    arguments, match = CALLS[call]
    model = tiny_llama()
    with unchanged(model), pytest.raises(Exception, match=match):
        from_loras(model, **{"loras": ["a", "b"], **arguments})


def test_two_loras_of_the_same_name(good, tmp_path):
    shutil.copytree(good / "b", tmp_path / "a")
    refused([good / "a", tmp_path / "a"], "called 'a': give expert_names")
    from_loras(tiny_llama(), [good / "a", tmp_path / "a"], expert_names=["x", "y"])


def test_a_lora_called_as_the_base_expert_is(good, tmp_path):
    loras = [shutil.copytree(good / "a", tmp_path / "base"), shutil.copytree(good / "b", tmp_path / "code")]
    with pytest.raises(ValueError, match="expert_names holds 'base', which with base_expert=True"):
        from_loras(tiny_llama(), loras, base_expert=True)
    for given in ({"expert_names": ["maths", "code"], "base_expert": True}, {}):
        from_loras(tiny_llama(), loras, **given)


def test_beside_other_adapters(good):
    pair = [good / "a", good / "b"]
    refused(pair, "'default' exists already", adapted(tiny_llama()))
    plain = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    refused(pair, "Cannot combine adapters with different peft types", plain, adapter_name="new")


def test_a_scale_beyond_the_dtype(pair):
    """Found while the experts are written: what was made until then is gone."""
    for folder, alpha in zip(pair, (1e-30, 1e3), strict=True):
        configure(lora_alpha=alpha)(folder)
    tensors = {key: tensor * 1e10 for key, tensor in load_file(pair[1] / WEIGHTS).items()}
    save_file(tensors, pair[1] / WEIGHTS)
    refused(pair, "b/.*times.*beyond torch.float32")
    refused(pair, "b/.*times.*beyond torch.float32", adapted(tiny_llama()), adapter_name="new")
    assert json.loads((pair[1] / CONFIG).read_text())["lora_alpha"] == 1e3
