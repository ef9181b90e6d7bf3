"""Architectures: whatever the order, the shape or the sharing of its linears, each model computes the definition."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

import oracle
from architectures import CAUSAL, ENCODERS, build
from helpers import adapted, padded, randomize_adapter, switch_config, switch_layers, tokens
from peft_loraswitch import LoRASwitchConfig, LoRASwitchModel

pytestmark = pytest.mark.filterwarnings("ignore:'all-linear' leaves out")


def expected(backbone: nn.Module, model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """First output of the bare backbone with the definition added by hooks: the first adapted linear that runs decides."""
    backbone = copy.deepcopy(backbone)
    decision: oracle.Decision = []
    layers = {name.removeprefix("base_model.model."): layer for name, layer in switch_layers(model).items()}
    router = next(n.loraswitch_router["default"].weight for n in layers.values() if "default" in n.loraswitch_router)
    config = model.peft_config["default"]

    def add(layer: Any) -> Any:
        a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
        scaling = config.lora_alpha / config.r

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if not decision:
                decision[:] = oracle.decide(args[0], router, config.top_k, config.normalize_gates)
            return output + oracle.delta(args[0], a, b, decision, scaling).to(output.dtype)

        return hook

    for name, layer in layers.items():
        backbone.get_submodule(name).register_forward_hook(add(layer))
    with torch.no_grad():
        return backbone(**inputs)[0]


def check(backbone: nn.Module, model: PeftModel, inputs: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    backbone.requires_grad_(False)  # as in the model: where gradients may come, Mamba's scan rounds differently
    with torch.no_grad():
        plain, actual = backbone(**inputs)[0], model(**inputs)[0]
        with model.disable_adapter():
            disabled = model(**inputs)[0]
    scale = plain.abs().max()
    assert torch.equal(plain, disabled)
    assert (actual - plain).abs().max() > 1e-3 * scale, "the adapter does nothing: this test would not see a thing"
    wanted = expected(backbone, model, inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == actual.shape[:2]:  # the embedding of padding is zero: a tie between experts
        actual, wanted = actual[mask.bool()], wanted[mask.bool()]
    torch.testing.assert_close(actual, wanted, rtol=0, atol=float(tolerance * scale))
    assert all(layer.routing_state.frame is None for layer in switch_layers(model).values())


def test_a_linear_behind_the_blocks_that_is_listed_first():
    """OPT of 350m lists `project_out`, then `project_in`, which runs first, then the blocks."""
    backbone = build("opt", tf.AutoModelForCausalLM, word_embed_proj_dim=16)
    model = adapted(copy.deepcopy(backbone), target_modules="all-linear")
    check(backbone, model, {"input_ids": tokens(2, 8)})
    (router,) = (name for name, layer in switch_layers(model).items() if "default" in layer.loraswitch_router)
    assert router.endswith("project_in")


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["default", "all"])
@pytest.mark.parametrize("model_type", [*CAUSAL, *ENCODERS])
def test_computes_the_definition(model_type: str, targets: str | None):
    auto = tf.AutoModelForCausalLM if model_type in CAUSAL else tf.AutoModelForMaskedLM
    backbone = build(model_type, auto)
    model = adapted(copy.deepcopy(backbone), target_modules=targets)
    layers = switch_layers(model)
    check(backbone, model, {"input_ids": tokens(2, 8)})
    default = LoRASwitchModel.target_module_mapping.get(model_type)
    if targets is None and default is not None:
        assert {name.rpartition(".")[2] for name in layers} <= {name.rpartition(".")[2] for name in default}

    model.train()
    model(input_ids=tokens(2, 8), labels=tokens(2, 8, seed=1)).loss.backward()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(parameters) == 2 * len(layers) + 1
    without = [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert not without, "an adapted linear that is never called as a module"


@pytest.mark.parametrize("model_type", CAUSAL)
def test_cached_decoding_equals_the_full_forward(model_type: str):
    model = adapted(build(model_type, tf.AutoModelForCausalLM))
    prompt = tokens(2, 6)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        full = model(input_ids=out.sequences).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, rtol=1e-4, atol=1e-4 * float(full.abs().max()))


HEADS = {
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": tf.AutoModel,
}
HEADED = ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert", "convbert", "llama", "gpt2"]


HEAD_CASES = [
    (model_type, task_type, targets)
    for model_type in HEADED
    for task_type, targets in [("SEQ_CLS", None), *((task, "all-linear") for task in HEADS)]
    if (model_type, task_type)
    != ("modernbert", "QUESTION_ANS")  # PEFT looks for `qa_outputs`, this head is `classifier`
]


@pytest.mark.parametrize(("model_type", "task_type", "targets"), HEAD_CASES)
def test_heads_train_and_are_saved(model_type: str, task_type: str, targets: str | None, tmp_path):
    labels = 2 if task_type == "QUESTION_ANS" else 3
    backbone = build(model_type, HEADS[task_type], num_labels=labels)
    model = adapted(copy.deepcopy(backbone), target_modules=targets, task_type=task_type)
    batch = {key: value for key, value in padded([8, 5]).items() if key != "labels"}
    check(backbone, model, batch)

    heads = [n for n, p in model.named_parameters() if p.requires_grad and "loraswitch_" not in n]
    assert bool(heads) == (task_type != "FEATURE_EXTRACTION")
    assert all("modules_to_save.default" in name for name in heads)
    model.train()
    out = model(**batch)
    out[0].float().square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.eval()
    with torch.no_grad():
        wanted = model(**batch)[0]
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch)[0], wanted)


def test_every_default_of_peft_is_accepted():
    """The architectures above cover the defaults that PEFT has for models whose code is in transformers."""
    elsewhere = {"chatglm", "RefinedWebModel", "RefinedWeb", "btlm", "rwkv7"}  # remote code
    streams = {"t5", "mt5", "bart", "blip-2", "gemma4"}  # several token streams: refused, or tested with their refusals
    same_classes = {"llama4": "llama", "rwkv": "rwkv"}
    missing = (
        set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING) - set(CAUSAL) - set(ENCODERS) - elsewhere - streams
    )
    assert missing <= set(same_classes), missing


def test_rwkv_default_targets():
    """(RWKV's own cached decoding differs from its full forward, so it is not in the table above.)"""
    backbone = build("rwkv", tf.AutoModelForCausalLM, attention_hidden_size=32, context_length=128)
    check(backbone, adapted(copy.deepcopy(backbone), target_modules=None), {"input_ids": tokens(2, 8)})


REFUSED = [
    ("llama", tf.AutoModelForCausalLM, ["lm_head"], r"'lm_head' .*output embedding.*modules_to_save=\['lm_head'\]"),
    ("bert", tf.AutoModel, ["query", "pooler.dense"], "'pooler.dense' .*one vector per sequence"),
    ("deberta-v2", tf.AutoModel, ["query_proj"], "query_proj' and 1 more .*table of relative positions"),
    ("longformer", tf.AutoModel, ["query"], r"another order, \(sequence, batch\)"),
    ("deepseek_v3", tf.AutoModelForCausalLM, ["kv_b_proj"], "from the cache"),
    ("mamba", tf.AutoModelForCausalLM, ["in_proj", "dt_proj"], "reads its weight without calling it"),
    ("mamba2", tf.AutoModelForCausalLM, ["out_proj"], "reads its weight without calling it"),
    ("mamba", tf.AutoModelForCausalLM, ["conv1d"], "is a Conv1d; LoRA-Switch adapts linears"),
    ("bert", tf.AutoModel, ["word_embeddings"], "is a Embedding; LoRA-Switch adapts linears"),
]


@pytest.mark.parametrize(("model_type", "auto", "targets", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_linears_that_see_something_else_are_refused_by_name(model_type: str, auto: Any, targets: list, message: str):
    backbone = build(model_type, auto)
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(backbone, switch_config(target_modules=targets))
    assert [name for name, _ in backbone.named_modules()] == names


def test_llama4_router_is_not_a_plain_linear():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from transformers.models.llama4.modeling_llama4 import Llama4Router

            self.proj = nn.Linear(8, 8)
            config = tf.Llama4TextConfig(hidden_size=8, num_local_experts=2)
            self.router = Llama4Router(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    with pytest.warns(UserWarning, match="leaves out 'router' .a Llama4Router is not a plain linear"):
        model = get_peft_model(Block(), switch_config())
    assert list(switch_layers(model)) == ["base_model.model.proj"]


def test_what_all_linear_leaves_out_is_said_once_by_reason():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(build("roberta", tf.AutoModelForSequenceClassification), switch_config())
    messages = [str(w.message) for w in caught if "leaves out" in str(w.message)]
    assert len(messages) == 1 and "'classifier.dense' and 1 more (it is part of the head;" in messages[0]


def test_tied_embeddings(tmp_path):
    """Tied input and output embeddings stay tied, also when one of them is trained in full."""
    backbone = build("llama", tf.AutoModelForCausalLM, tie_word_embeddings=True)
    assert backbone.lm_head.weight is backbone.model.embed_tokens.weight
    model = adapted(copy.deepcopy(backbone))
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    check(backbone, model, {"input_ids": tokens()})

    config = switch_config(modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    model = randomize_adapter(get_peft_model(copy.deepcopy(backbone), config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    wanted = model.eval()(input_ids=tokens()).logits
    reloaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    torch.testing.assert_close(reloaded(input_ids=tokens()).logits, wanted, rtol=0, atol=0)


def test_shared_layers_are_adapted_once():
    """ALBERT runs one layer three times: one set of experts, one decision for all three runs."""
    backbone = build("albert", tf.AutoModel)
    model = adapted(copy.deepcopy(backbone))
    assert len(switch_layers(model)) == 1 + 6  # the embedding's projection and the linears of one layer
    calls = []
    layer = next(layer for name, layer in switch_layers(model).items() if name.endswith("attention.query"))
    layer.register_forward_hook(lambda *args: calls.append(layer.routing_state.frame.routings["default"]))
    model(input_ids=tokens())
    assert len(calls) == 3 and calls[0] is calls[1] is calls[2]


class Mlp(nn.Module):
    """Not from transformers, no config, no attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.compat
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 2, 3, 6)])
def test_any_module(shape: tuple[int, ...]):
    config = LoRASwitchConfig(r=2, num_experts=3, top_k=2, target_modules=["first", "second"])
    backbone = Mlp()
    model = randomize_adapter(get_peft_model(copy.deepcopy(backbone), config)).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layers = switch_layers(model)
    first, second = layers["base_model.model.first"], layers["base_model.model.second"]
    decision = oracle.decide(x, first.loraswitch_router["default"].weight, 2, True)

    def run(layer: Any, base: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
        return oracle.base_output(base, x) + oracle.delta(x, a, b, decision, 8 / 2)

    wanted = run(second, backbone.second, torch.relu(run(first, backbone.first, x)))
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert math.prod(shape[:-1]) == len(decision)
