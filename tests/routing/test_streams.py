"""Several token streams in one model: refused with a `target_modules` that works, or right. Never silently wrong."""

from __future__ import annotations

import ast
import copy
import re
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertModel

import multistream
from helpers import adapted, randomize_adapter, switch_config, switch_layers, tiny_bert, tiny_llama, tiny_t5, tokens
from multistream import SEQ2SEQ, SEVERAL_STREAMS
from oracle import Oracle
from peft_loraswitch.targets.streams import check_streams


def suggestion(error: Exception) -> str | list[str]:
    found = re.search(r"This works: target_modules=(.+)$", str(error))
    assert found, str(error)
    return ast.literal_eval(found[1])


def refusal(model: nn.Module, **config) -> ValueError:
    with pytest.raises(ValueError, match="target_modules") as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, switch_config(**config))
    return raised.value


def oracle_of(model: nn.Module) -> Oracle:
    oracle = Oracle(model)
    for layer in oracle.layers.values():
        layer.weight = layer.base.weight  # T5's feed-forward asks its linears for their dtype
    return oracle


def assert_equals_oracle(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    oracle = oracle_of(model)
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        found, wanted = model(**inputs), oracle(**doubled)
        with model.disable_adapter():
            without = model(**inputs)
    key = "logits" if "logits" in found else "logits_per_image"
    torch.testing.assert_close(found[key].double(), wanted[key], rtol=2e-4, atol=2e-4)
    assert (without[key] - found[key]).abs().max() > 2e-3  # else the comparison above says nothing


@pytest.mark.parametrize("target_modules", ["all-linear", None], ids=["all", "default"])
@pytest.mark.parametrize("name", SEVERAL_STREAMS)
def test_refused_and_what_the_message_suggests_is_right(name, target_modules):
    build, inputs, _ = SEVERAL_STREAMS[name]
    model, inputs = build(), inputs()
    before = copy.deepcopy(model)
    if name == "encoder_decoder" and target_modules is None:
        target_modules = ["query", "key", "value"]  # PEFT has no default for it
    error = refusal(model, target_modules=target_modules)
    assert "different tokens" in str(error)
    assert_untouched(model, before, inputs)

    target_modules = suggestion(error)
    assert len(str(target_modules)) < 500  # a pattern, not an enumeration
    model = adapted(model, target_modules=target_modules)
    names = list(switch_layers(model.get_base_model()))
    assert all(re.search("decoder|language_model|text_model", name) for name in names)  # what people adapt
    assert not any("expert" in name for name in names)
    assert_equals_oracle(model, inputs)


def assert_untouched(model: nn.Module, before: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    with torch.no_grad():
        found, wanted = model(**inputs), before(**inputs)
    key = "logits" if "logits" in found else "logits_per_image"
    assert torch.equal(found[key], wanted[key])


@pytest.mark.parametrize("name", SEVERAL_STREAMS)
def test_the_other_stream_alone_is_right(name):
    build, inputs, target_modules = SEVERAL_STREAMS[name]
    model = adapted(build(), target_modules=target_modules)
    assert_equals_oracle(model, inputs())


@pytest.mark.parametrize("stream", ["decoder", "encoder"])
@pytest.mark.parametrize("name", [name for name in SEQ2SEQ if name not in ("switch_transformers", "fsmt")])
def test_one_stream_generates_the_same_with_and_without_cache(name, stream):
    """`generate` calls the encoder outside of the model's forward, once; then the decoder, token by token.
    (FSMT's tokens depend on `use_cache` without any adapter.)"""
    build, inputs, encoder_modules = SEQ2SEQ[name]
    model, inputs = build(), inputs()
    target_modules = encoder_modules if stream == "encoder" else suggestion(refusal(model))
    model = randomize_adapter(adapted(model, target_modules=target_modules), std=1.0)
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    for search in ({}, {"num_beams": 3, "length_penalty": 0.0}):
        kwargs = {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            **search,
        }
        cached = model.generate(**prompt, **kwargs)
        recomputed = model.generate(**prompt, **kwargs, use_cache=False)
        assert torch.equal(cached.sequences, recomputed.sequences)
        torch.testing.assert_close(cached.logits, recomputed.logits, rtol=1e-3, atol=1e-3)
        with model.disable_adapter():
            plain = model.generate(**prompt, **kwargs)
        assert (plain.logits[0] - cached.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_greedy_tokens_are_those_of_the_oracle(name):
    build, inputs, _ = SEQ2SEQ[name]
    model, inputs = build(), inputs()
    model = adapted(model, target_modules=suggestion(refusal(model)))
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    generated = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    oracle = oracle_of(model)
    with torch.no_grad():
        logits = oracle(**prompt, decoder_input_ids=generated[:, :-1]).logits
    logits[..., 2] = -torch.inf  # min_new_tokens forbids the end token
    assert torch.equal(logits.argmax(-1), generated[:, 1:])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_keys_and_values_alone(name):
    """They all see the encoder's tokens: one stream. In cached decoding they run in the first step only."""
    build, inputs, _ = SEQ2SEQ[name]
    pattern = r".*(EncDecAttention\.(k|v)|encoder_attn\.(k_proj|v_proj))"
    model, inputs = adapted(build(), target_modules=pattern), inputs()
    assert_equals_oracle(model, inputs)
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    cached = model.generate(**prompt, max_new_tokens=6, num_beams=2)
    assert torch.equal(cached, model.generate(**prompt, max_new_tokens=6, num_beams=2, use_cache=False))


def test_cross_attention_with_its_own_encoder_is_refused():
    """The encoder runs by itself in `generate`: its decision would be gone when the cross-attention runs."""
    error = refusal(tiny_t5(), target_modules=r"encoder\..*\.(q|k|v)|.*EncDecAttention\.(k|v)")
    model = adapted(tiny_t5(), target_modules=suggestion(error))
    assert all(name.startswith("encoder.") for name in switch_layers(model.get_base_model()))


@pytest.mark.parametrize("name", SEVERAL_STREAMS)
def test_a_stream_trains(name):
    build, inputs, _ = SEVERAL_STREAMS[name]
    model, inputs = build(), inputs()
    model = get_peft_model(model, switch_config(target_modules=suggestion(refusal(model)))).train()
    randomize_adapter(model)
    if name == "clip":
        inputs["return_loss"] = True
    else:
        inputs["labels"] = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]
    model(**inputs).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    router = next(p for n, p in model.named_parameters() if "loraswitch_router" in n)
    assert router.grad.abs().sum() > 0
    if name == "fsmt":
        return  # its encoder and decoder have (sequence, batch) inside, its mask (batch, sequence): not counted rightly
    assert (
        model.router_stats()["tokens"]
        == inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"].numel()
    )


def test_text_tower_outside_of_the_forward():
    """CLIP's `get_text_features` calls the tower, not the model."""
    model = adapted(multistream.clip(), target_modules=r"text_model\..*\.(q_proj|v_proj|fc1)")
    inputs = multistream.clip_inputs()
    with torch.no_grad():
        whole = model(**inputs).text_embeds
        tower = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    tower = getattr(tower, "pooler_output", tower)
    torch.testing.assert_close(tower / tower.norm(dim=-1, keepdim=True), whole)


def test_image_tokens_are_routed_like_text():
    """One decision for each position of the language model, image or text; another picture changes decisions."""
    model = adapted(multistream.llava(), target_modules=r"model\.language_model\..*proj")
    inputs = multistream.llava_inputs()
    with torch.no_grad(), model.record_routing() as recorded:
        model(**inputs)
    assert recorded.summary()["tokens"] == inputs["input_ids"].numel()
    with torch.no_grad(), model.record_routing() as other:
        model(**{**inputs, "pixel_values": -3 * inputs["pixel_values"]})
    assert (
        other.summary()["load"] != recorded.summary()["load"]
        or other.summary()["entropy"] != recorded.summary()["entropy"]
    )


# ------------------------------------------------------------------------------------- one stream, or not from names


def test_single_streams_of_patches_and_sound():
    for build, inputs in (
        (multistream.vit, {"pixel_values": multistream.noise(2, 3, 16, 16)}),
        (multistream.wav2vec2, {"input_values": multistream.noise(2, 64)}),
    ):
        model = randomize_adapter(adapted(build()), std=1.0)
        assert_equals_oracle(model, inputs)


@pytest.mark.parametrize("config", [{"target_modules": ["dense"]}, {"target_modules": r".*dense"}])
def test_a_pooler_named_by_the_user_is_refused_and_the_advice_works(config):
    error = refusal(tiny_bert(BertModel), **config)
    exclude = ast.literal_eval(re.search(r"exclude_modules=(\[.*?\])", str(error))[1])
    assert exclude == ["pooler.dense"]
    model = adapted(tiny_bert(BertModel), **config, exclude_modules=exclude)
    with torch.no_grad():
        found, wanted = model(tokens()), Oracle(model)(tokens())
    torch.testing.assert_close(found.last_hidden_state.double(), wanted.last_hidden_state, rtol=2e-4, atol=2e-4)


def test_all_linear_leaves_a_pooler_out_and_says_so():
    with pytest.warns(UserWarning, match=r"pooler\.dense"):
        model = get_peft_model(tiny_bert(BertModel), switch_config())
    assert "pooler.dense" not in switch_layers(model.get_base_model())


def test_an_output_embedding_is_refused_and_the_advice_works():
    error = refusal(tiny_llama(), target_modules=["q_proj", "lm_head"])
    advice = ast.literal_eval(re.search(r"modules_to_save=(\[.*?\])", str(error))[1])
    model = get_peft_model(tiny_llama(), switch_config(target_modules=["q_proj"], modules_to_save=advice))
    assert any("lm_head.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


class Experts(nn.Module):
    """A mixture of experts as modules: each sees the tokens that its own router sends there."""

    def __init__(self, hidden: int, num: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, num)
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        chosen, result = self.gate(tokens).argmax(-1), torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            result = result.index_add(0, rows, expert(tokens[rows]))
        return result.view_as(x)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.moe = Experts(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(self.project(x))


def test_experts_of_a_backbone_are_other_tokens():
    torch.manual_seed(0)
    model = get_peft_model(Mixture(), switch_config())
    x = torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match=r"'moe\.experts\.0' sees \(\d+,\).*exclude_modules"):
        model(x)
    with model.disable_adapter():  # the failed forward left nothing behind
        assert torch.equal(model(x), model.unload()(x))
    model = adapted(Mixture(), exclude_modules=r".*experts\.\d+")
    assert set(switch_layers(model.get_base_model())) == {"project", "moe.gate"}
    torch.testing.assert_close(model(x).double(), Oracle(model)(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        ["encoder.layers.0.fc", "decoder.layers.0.fc"],  # encoder next to decoder, plain modules
        ["layers.0.fc", "vision_embed.layers.0.fc"],  # another modality without a model of its own
        ["layers.0.fc", "perceiver_resampler.proj"],
    ],
)
def test_streams_told_apart_by_names(names):
    model = nn.Module()
    for name in names:
        parent = model
        *path, last = name.split(".")
        for component in path:
            if component not in parent._modules:
                parent.add_module(component, nn.Module())
            parent = parent.get_submodule(component)
        parent.add_module(last, nn.Linear(4, 4))
    with pytest.raises(ValueError, match="different tokens"):
        check_streams(model, names)
    for name in names:
        check_streams(model, [name])
