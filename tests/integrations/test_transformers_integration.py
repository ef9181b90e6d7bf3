"""Adapters through Transformers itself: the model stays a plain `PreTrainedModel`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers import (
    adapted,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
    tokens,
)
from peft_loraswitch import record_routing, router_stats

pytestmark = pytest.mark.compat
heads_are_loaded = pytest.mark.skipif(
    Version(tf.__version__) < Version("5.23"),
    reason="older loaders of transformers leave the heads of an adapter folder out, stock LoRA's too (PEFT's loads them)",
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def with_adapter(backbone: Any, name: str = "default", seed: int = 1, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone.add_adapter(switch_config(**config), adapter_name=name)
    return randomize_adapter(backbone, name, seed=seed).eval()


def on_disk(model: Any, folder: Path) -> Any:
    """`model` saved and loaded again: its config then knows where it lies, and adapters remember that."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt, tiny_bert, tiny_llama_classifier])
def test_equals_the_peft_model(make: Any):
    model = with_adapter(make())
    assert isinstance(model, tf.PreTrainedModel) and switch_layers(model)
    assert torch.equal(logits(model), logits(adapted(make())))


def test_the_life_of_two_adapters():
    base = logits(tiny_llama())
    model = with_adapter(tiny_llama())
    assert model.active_adapters() == ["default"]
    first = logits(model)
    with_adapter(model, "b", num_experts=3, top_k=1, r=2, target_modules=["o_proj", "down_proj"], seed=2)
    assert model.active_adapters() == ["b"]  # transformers switches to the one that came last
    second = logits(model)
    assert not torch.equal(first, second)

    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter(["default", "b"])
    assert model.active_adapters() == ["default", "b"]
    both = logits(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)

    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.set_adapter("b")
    assert torch.equal(logits(model), second)
    with pytest.raises(ValueError, match="not"):
        model.set_adapter("nobody")

    model.delete_adapter("b")
    assert model.active_adapters() == ["default"] and torch.equal(logits(model), first)
    assert not any(".b." in name for name in model.state_dict())
    model.delete_adapter("default")
    assert not any("loraswitch_" in name for name in model.state_dict())
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(with_adapter(model, "new")), first)


def test_two_active_adapters_equal_pefts():
    def two(model: Any) -> Any:
        model = with_adapter(model) if isinstance(model, tf.PreTrainedModel) else model
        torch.manual_seed(5)
        if isinstance(model, PeftModel):
            model.add_adapter("b", switch_config(num_experts=2, target_modules=["o_proj"]))
        else:
            model.add_adapter(switch_config(num_experts=2, target_modules=["o_proj"]), adapter_name="b")
        return randomize_adapter(model, "b", seed=5)

    peft_model = two(adapted(tiny_llama()))
    peft_model.base_model.set_adapter(["default", "b"])
    model = two(tiny_llama())
    model.set_adapter(["default", "b"])
    assert torch.equal(logits(model), logits(peft_model))


def test_training_step():
    model = with_adapter(tiny_llama()).train()
    out = model(input_ids=tokens(), labels=tokens())
    plain = copy.deepcopy(model).eval()(input_ids=tokens(), labels=tokens())
    assert out.loss > plain.loss, "load-balance and z-loss have joined"
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients and all("loraswitch_" in n and g is not None and g.any() for n, g in gradients.items())
    assert router_stats(model)["tokens"] == tokens().numel()
    with record_routing(model.eval()) as recorded:
        logits(model)
    assert recorded.summary()["tokens"] == tokens().numel()


@pytest.mark.parametrize("saved_by", ["transformers", "peft"])
def test_from_pretrained_on_an_adapter_folder(saved_by: str, tmp_path: Path):
    base = on_disk(tiny_llama(), tmp_path / "base")
    model = with_adapter(base) if saved_by == "transformers" else adapted(base)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files

    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is tf.LlamaForCausalLM and loaded.active_adapters() == ["default"]
    assert torch.equal(logits(loaded), wanted)
    with_map = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", device_map="cpu")
    assert torch.equal(logits(with_map), wanted)
    half = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert (logits(half).float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    # and PEFT reads what transformers wrote, and the other way round
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()), wanted)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_load_adapter(tmp_path: Path):
    source = adapted(tiny_llama(), num_experts=5, r=2)
    wanted = logits(source)
    source.save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(tmp_path, adapter_name="x")
    assert model.active_adapters() == ["x"] and torch.equal(logits(model.eval()), wanted)
    # beside another one, with other layers, into a model in use
    live = with_adapter(tiny_llama(), target_modules=["q_proj"])
    first = logits(live)
    live.load_adapter(tmp_path, adapter_name="x")
    live.eval().set_adapter("x")
    assert torch.equal(logits(live), wanted)
    live.set_adapter("default")
    assert torch.equal(logits(live), first)
    # from memory
    state = {
        k.removeprefix("base_model.model."): v for k, v in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    memory = tiny_llama()
    memory.load_adapter(peft_config=switch_config(num_experts=5, r=2), adapter_state_dict=state)
    assert torch.equal(logits(memory.eval()), wanted)
    assert set(memory.get_adapter_state_dict()) == set(state)


@heads_are_loaded
def test_classification_head_travels_with_the_adapter(tmp_path: Path):
    base = on_disk(tiny_llama_classifier(), tmp_path / "base")
    model = adapted(base, task_type="SEQ_CLS")
    with torch.no_grad():
        model.get_parameter("base_model.model.score.modules_to_save.default.weight").add_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(loaded), logits(model))


def test_copy_and_save_of_the_whole(tmp_path: Path):
    model = with_adapter(tiny_llama())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), logits(adapted(tiny_llama())))
    assert not logits(other).any()


def test_generate():
    model = with_adapter(tiny_llama())
    out = model.generate(tokens(2, 5), max_new_tokens=6, do_sample=False)
    assert torch.equal(out, adapted(tiny_llama()).generate(tokens(2, 5), max_new_tokens=6, do_sample=False))


# ------------------------------------------------------------------------------------------------------ pipeline


def tokenizer() -> tf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", padding_side="left"
    )


PIPELINES = {
    "text-generation": (tiny_llama, "CAUSAL_LM", {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}),
    "text-classification": (tiny_llama_classifier, "SEQ_CLS", {}),
    "token-classification": (lambda: tiny_bert(tf.BertForTokenClassification), "TOKEN_CLS", {}),
    "feature-extraction": (lambda: tiny_bert(tf.BertModel), "FEATURE_EXTRACTION", {}),
    "fill-mask": (lambda: tiny_bert(tf.BertForMaskedLM), None, {"top_k": 3}),
}


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=heads_are_loaded) if "classification" in task else task for task in PIPELINES],
)
def test_pipeline(task: str, tmp_path: Path):
    make, task_type, settings = PIPELINES[task]
    words = tokenizer()
    if task == "fill-mask":
        words.add_special_tokens({"mask_token": "w9"})
    base = on_disk(make(), tmp_path / "base")
    model = adapted(base, task_type=task_type)
    model.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "base")  # where pipeline looks for it
    texts = ["w40 w9 w41", "w8 w45 w9 w50"]
    # a PeftModel, an adapter folder through transformers, and the backbone with the adapter switched off
    answer = tf.pipeline(task, model=model, tokenizer=words)(texts, batch_size=2, **settings)
    if task == "text-classification":  # its labels are those of the base's config
        loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
        from_folder = tf.pipeline(task, model=loaded, tokenizer=words)
    else:
        from_folder = tf.pipeline(task, model=str(tmp_path / "adapter"))
    assert str(from_folder(texts, batch_size=2, **settings)) == str(answer)
    with model.disable_adapter():
        assert str(tf.pipeline(task, model=model, tokenizer=words)(texts, batch_size=2, **settings)) != str(answer)
