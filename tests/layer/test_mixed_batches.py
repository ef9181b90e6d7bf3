"""`adapter_names=`: each sample of a batch with its own adapter. The reference is each sample alone with its adapter."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from architectures import build
from helpers import adapted, padded, randomize_adapter, switch_config, switch_layers, tiny_llama, tokens

BASE = "__base__"
NAMES = ["other", BASE, "default", "other", "deep", "default"]


def model_with(backbone: Any, **config: Any) -> PeftModel:
    """default on all linears; other with another E, k, r on two of them only; deep routes in the second layer."""
    model = adapted(backbone, **config)
    ends = {n.rpartition(".")[2] for n in switch_layers(model)}
    some = sorted(ends & {"v_proj", "down_proj", "c_proj", "fc1", "value"})
    first_to_run = ("q_proj", "query", "c_attn")
    router = next(n for n in switch_layers(model) if ".1." in n and n.endswith(first_to_run))
    router = router.removeprefix("base_model.model.")
    config.pop("task_type", None)
    model.add_adapter("other", switch_config(num_experts=3, top_k=1, r=2, target_modules=some))
    model.add_adapter("deep", switch_config(router_module=router))
    for seed, name in enumerate(("other", "deep"), start=3):
        randomize_adapter(model, name, seed=seed)
    return model.eval()


def one_by_one(model: PeftModel, names: list[str], run: Any, **batch: torch.Tensor) -> list[torch.Tensor]:
    results = []
    for i, name in enumerate(names):
        sample = {key: value[i : i + 1] for key, value in batch.items()}
        if name == BASE:
            with model.disable_adapter():
                results.append(run(model, **sample))
        else:
            model.set_adapter(name)
            results.append(run(model, **sample))
    model.set_adapter("default")
    return results


def forward(model: PeftModel, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs)[0]


CAUSAL = [("llama", "CAUSAL_LM"), ("llama", None), ("gpt2", "CAUSAL_LM"), ("opt", "CAUSAL_LM"), ("gptj", None)]


@pytest.mark.compat
@pytest.mark.parametrize(("model_type", "task_type"), CAUSAL)
def test_forward(model_type: str, task_type: str | None):
    model = model_with(build(model_type, tf.AutoModelForCausalLM), task_type=task_type)
    batch = {"input_ids": tokens(len(NAMES), 5)}
    mixed = forward(model, **batch, adapter_names=NAMES)
    wanted = one_by_one(model, NAMES, forward, **batch)
    torch.testing.assert_close(mixed, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert len({tuple(w.flatten()[:4].tolist()) for w in wanted}) == len(NAMES), "the adapters differ"
    assert all(layer.routing_state.frame is None for layer in switch_layers(model).values())
    # the names are gone with the call
    plain = torch.cat(one_by_one(model, ["default"] * len(NAMES), forward, **batch))
    torch.testing.assert_close(forward(model, **batch), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("auto", [tf.AutoModelForTokenClassification, tf.AutoModelForSequenceClassification])
def test_encoder_with_padding(auto: Any):
    model = model_with(build("bert", auto))
    batch = {key: value for key, value in padded([6, 4, 3, 6, 5, 2]).items() if key != "labels"}
    mixed = forward(model, **batch, adapter_names=NAMES)
    wanted = torch.cat(one_by_one(model, NAMES, forward, **batch))
    real = batch["attention_mask"].bool() if mixed.dim() == 3 else slice(None)
    torch.testing.assert_close(mixed[real], wanted[real], rtol=1e-4, atol=1e-5)


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2},
    "static_cache": {"cache_implementation": "static", "disable_compile": True},
    "no_cache": {"use_cache": False},
}


@pytest.mark.compat
@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_generate(how: str, task_type: str | None):
    model = model_with(tiny_llama(), task_type=task_type)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **GENERATE[how]}

    def run(model: PeftModel, **kwargs: Any) -> torch.Tensor:
        return model.generate(**kwargs, **settings)

    # left padding: samples of one batch differ in length
    batch = {key: value for key, value in padded([6, 4, 3, 6, 5, 2], side="left").items() if key != "labels"}
    mixed = run(model, **batch, adapter_names=NAMES)
    wanted = torch.cat(one_by_one(model, NAMES, run, **batch))
    assert torch.equal(mixed, wanted)


@pytest.mark.compat
def test_heads_of_their_own():
    """modules_to_save: each sample with the head of its adapter, also if the active adapter has none."""
    backbone = build("llama", tf.AutoModelForSequenceClassification)
    head = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    model = get_peft_model(backbone, switch_config(target_modules=["q_proj", "o_proj"]))
    for name in ("b", "c"):
        model.add_adapter(name, switch_config(**head))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += torch.randn_like(parameter)
    randomize_adapter(model).eval()
    names = ["c", "default", "b", BASE]
    batch = {"input_ids": tokens(4, 5)}
    wanted = torch.cat(one_by_one(model, names, forward, **batch))
    for active in ("default", "b"):
        model.set_adapter(active)
        torch.testing.assert_close(forward(model, **batch, adapter_names=names), wanted, rtol=1e-4, atol=1e-5)
    # one hook, put there by the first mixed batch, and not one more for each
    assert all(len(module._forward_hooks) <= 1 for n, module in model.named_modules() if n.endswith("score"))


def test_a_module_that_cannot_be_mixed():
    """PEFT mixes linears, embeddings and convolutions. Of others a batch may hold rows of one adapter, or of none."""
    model = get_peft_model(tiny_llama(), switch_config(modules_to_save=["norm"]))
    model.add_adapter("b", switch_config(modules_to_save=["norm"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += torch.rand_like(parameter)
    randomize_adapter(model).eval()
    randomize_adapter(model, "b", seed=4)
    groups = len(model.fuse_for_inference("fused").groups)
    model.unfuse()
    batch = {"input_ids": tokens(3, 4)}
    with pytest.raises(TypeError, match="Mixed batching"):
        forward(model, **batch, adapter_names=["b", BASE, "default"])
    for name in ("b", BASE, "default"):
        wanted = torch.cat(one_by_one(model, [name] * 3, forward, **batch))
        torch.testing.assert_close(forward(model, **batch, adapter_names=[name] * 3), wanted, rtol=1e-4, atol=1e-5)
    assert len(model.fuse_for_inference("fused").groups) == groups


def test_trainable_tokens_of_their_own():
    config = switch_config(target_modules=["q_proj", "v_proj"], trainable_token_indices=[5, 6])
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("b", switch_config(target_modules=["q_proj"], trainable_token_indices=[5, 7]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn_like(parameter)
    randomize_adapter(model).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]] * 3)}
    names = ["b", BASE, "default"]
    wanted = torch.cat(one_by_one(model, names, forward, **batch))
    torch.testing.assert_close(forward(model, **batch, adapter_names=names), wanted, rtol=1e-4, atol=1e-5)


def test_a_frozen_state_after_an_exception():
    model = model_with(tiny_llama(), task_type="CAUSAL_LM")
    wanted = forward(model, input_ids=tokens())
    with pytest.raises(IndexError):
        model(input_ids=torch.full((2, 4), 999), adapter_names=["other", "default"])
    assert torch.equal(forward(model, input_ids=tokens()), wanted)


def test_other_threads_do_not_see_the_names():
    model = model_with(tiny_llama())
    ids = tokens(2, 6)
    wanted = forward(model, input_ids=ids)
    inside, leave, seen = threading.Event(), threading.Event(), []

    def pause(module: Any, args: Any, output: Any) -> None:
        if threading.current_thread() is other:
            inside.set()
            leave.wait(20)

    next(iter(switch_layers(model).values())).register_forward_hook(pause)
    other = threading.Thread(target=lambda: seen.append(forward(model, input_ids=ids, adapter_names=["other", BASE])))
    other.start()
    assert inside.wait(20)
    here = forward(model, input_ids=ids)
    leave.set()
    other.join()
    assert torch.equal(here, wanted)
    assert torch.equal(seen[0], forward(model, input_ids=ids, adapter_names=["other", BASE]))


WRONG: dict[str, tuple[list[str] | str, str]] = {
    "unknown": (["default", "nobody"], r"\['nobody'\].*not loaded.*'__base__', 'deep', 'default', 'other'"),
    "too_few": (["default"], "1 entries.*2 samples"),
    "too_many": (["default", "other", "other", "other"], "4 entries.*2 samples"),
    "none": ([], "empty"),
    "no list": ("default", "adapter_names='default' must be a list"),
}


@pytest.mark.compat
@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_names(mistake: str, task_type: str | None, method: str):
    model = model_with(tiny_llama(), task_type=task_type)
    names, message = WRONG[mistake]
    call = model if method == "forward" else model.generate
    with pytest.raises(ValueError, match=message):
        call(input_ids=tokens(2, 4), adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        call(input_ids=tokens(2, 4), adapter_names=["default", "other"])
