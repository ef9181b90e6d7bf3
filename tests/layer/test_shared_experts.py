"""Shared experts (`num_shared_experts`): every token uses them, beside the routed ones, and alone before the router.

The maths of every layer, in every dtype, is in `test_layer.py` (configurations "shared" and "shared-before-router").
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import generating
import multistream
from fresh import LIBRARIES, run_python
from helpers import (
    HIDDEN,
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    switch_layers,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    tokens,
)
from layer_checks import MODELS, assert_layers_equal_oracle, check_model_gradients
from oracle import Oracle
from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.routing.decision import route, shared_routing
from peft_loraswitch.routing.options import RoutingOptions
from peft_loraswitch.saving.model_card import BEGIN
from shared_experts import CONFIGS, DEEP, by_name, close, each_config, llama, llava_with_both_streams, logits

NO_LOSSES = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


# --------------------------------------------------------------------------------------------------- decision and maths


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_decision_carries_the_shared_experts_behind_the_chosen_ones(normalize, shape):
    values = torch.randn(*shape, 5, requires_grad=True)
    plain = route(values, RoutingOptions(5, 2, normalize))
    both = route(values, RoutingOptions(5, 2, normalize, num_shared_experts=3))
    assert both.experts.shape == both.gates.shape == (*shape, 5) and both.dense_gates.shape == (*shape, 8)
    assert both.experts.dtype == torch.int64 and both.gates.dtype == both.dense_gates.dtype == torch.float32
    assert torch.equal(both.experts[..., :2], plain.experts) and torch.equal(both.gates[..., :2], plain.gates)
    assert torch.equal(both.experts[..., 2:], torch.tensor([5, 6, 7]).expand(*shape, 3))
    assert (both.gates[..., 2:] == 0.5).all() and (both.dense_gates[..., 5:] == 0.5).all()
    assert torch.equal(both.dense_gates[..., :5], plain.dense_gates)
    assert both.experts.is_contiguous() and both.gates.is_contiguous()  # the kernels read them as they lie
    weights = torch.randn(5)
    gradients = [torch.autograd.grad((r.dense_gates[..., :5] * weights).sum(), values)[0] for r in (plain, both)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_the_shared_experts_alone(shape):
    routing = shared_routing(3, 4, torch.Size(shape), torch.device("cpu"))
    assert routing.token_shape == torch.Size(shape) and routing.experts.is_contiguous()
    assert torch.equal(routing.experts, torch.arange(3).expand(*shape, 3))
    assert torch.equal(routing.gates, torch.full((*shape, 3), 0.25)) and torch.equal(routing.dense_gates, routing.gates)


@pytest.mark.compat
@each_config
def test_every_layer_equals_the_oracle(config):
    model = llama(**config)
    batch = {k: v for k, v in padded([7, 4], side="left").items() if k != "labels"}
    assert_layers_equal_oracle(model, lambda: model(**batch))


@pytest.mark.compat
@each_config
def test_gradients_equal_the_oracles(config):
    check_model_gradients(llama(**config, **NO_LOSSES))


@pytest.mark.parametrize("make, router", [(tiny_gpt2, "h.1.attn.c_attn"), (tiny_opt, "layers.1.self_attn.q_proj")])
def test_gradients_of_other_architectures_equal_the_oracles(make, router):
    """OPT lists k and v before q, which runs first: they have the shared experts alone, wherever they run."""
    check_model_gradients(adapted(make(), num_shared_experts=1, router_module=router, **NO_LOSSES))


@pytest.mark.parametrize("name", MODELS)
def test_without_shared_experts_nothing_changes(name):
    """To the bit: the same adapter, with one shared expert that is zero, and without."""
    task = "SEQ_CLS" if name in ("bert", "llama-classifier") else None
    plain = adapted(MODELS[name](), task_type=task)
    shared = adapted(MODELS[name](), task_type=task, num_shared_experts=1)
    for layer, twin in zip(switch_layers(shared).values(), switch_layers(plain).values(), strict=True):
        for part in ("loraswitch_A", "loraswitch_B"):
            weight, other = (getattr(each, part)["default"].weight.data for each in (layer, twin))
            weight.zero_()[:4] = other
        if len(layer.loraswitch_router):
            layer.loraswitch_router.load_state_dict(twin.loraswitch_router.state_dict())
    assert close(logits(shared, tokens()), logits(plain, tokens()), 1e-6)


@pytest.mark.parametrize("rank, shared", [(3, 1), (2, 3)])
def test_one_routed_expert_and_shared_ones_are_pefts_lora_of_their_rank(rank, shared):
    """With E = 1 the routed expert's gate is 1 too: (1 + S) * r from the router on, S * r before it."""
    ours = llama(r=rank, num_experts=1, top_k=1, num_shared_experts=shared, router_module=DEEP, **NO_LOSSES).train()
    layers = by_name(ours)
    ranks = {
        f".*{re.escape(name)}": layer.loraswitch_A["default"].weight.shape[0] * rank for name, layer in layers.items()
    }
    assert set(ranks.values()) == {rank * shared, rank * (1 + shared)}
    alphas = {name: 6 / rank * value for name, value in ranks.items()}
    config = LoraConfig(target_modules="all-linear", rank_pattern=ranks, alpha_pattern=alphas)
    theirs = get_peft_model(tiny_llama(), config).train()
    for name, layer in switch_layers(ours).items():
        twin = theirs.get_submodule(name)
        twin.lora_A["default"].weight.data.copy_(layer.loraswitch_A["default"].weight.flatten(0, 1))
        twin.lora_B["default"].weight.data.copy_(layer.loraswitch_B["default"].weight.transpose(0, 1).flatten(1))
        assert twin.scaling["default"] == pytest.approx(layer.scaling["default"])
    batch = padded([7, 4])
    found, wanted = (model(**batch) for model in (ours, theirs))
    assert close(found.logits, wanted.logits, 2e-6)
    found.loss.backward()
    wanted.loss.backward()
    for name, layer in switch_layers(ours).items():
        gradient = layer.loraswitch_A["default"].weight.grad.flatten(0, 1)
        assert close(gradient, theirs.get_submodule(name).lora_A["default"].weight.grad, 1e-5)


def test_a_fresh_adapter_changes_no_bit():
    ids = tokens()
    before = logits(tiny_llama(), ids)
    model = get_peft_model(tiny_llama(), switch_config(num_shared_experts=2, router_module=DEEP)).eval()
    assert torch.equal(logits(model, ids), before)


# ------------------------------------------------------------------------------------------------- what has which experts


def test_which_linears_have_which_experts():
    model = llama(num_experts=5, num_shared_experts=2, router_module=DEEP, rank_pattern={"layers.0.mlp.up_proj": 9})
    layers = by_name(model)
    before = [name for name in layers if name.startswith("layers.0.")] + ["layers.1.self_attn.q_proj"]
    assert len(layers) == 14 and len(before) == 8
    count = HIDDEN * 5  # the router
    for name, layer in layers.items():
        stacked, rank = 2 if name in before else 7, 9 if name == "layers.0.mlp.up_proj" else 3
        assert layer.loraswitch_A["default"].weight.shape == (stacked, rank, layer.in_features)
        assert layer.loraswitch_B["default"].weight.shape == (stacked, layer.out_features, rank)
        assert bool(layer.loraswitch_router) == (name == DEEP)
        count += stacked * rank * (layer.in_features + layer.out_features)
    assert model.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize(
    "fields, names",
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, [1, 2]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"}, [2]),
        ({"target_modules": r".*\.q_proj", "exclude_modules": r".*layers\.1\..*"}, [0, 2]),
    ],
    ids=str,
)
def test_together_with_the_fields_that_select_layers(fields, names):
    config = switch_config(num_shared_experts=1, router_module="layers.2.self_attn.q_proj", **fields)
    model = get_peft_model(tiny_llama(num_hidden_layers=3), config)
    stacked = {name: len(layer.loraswitch_A["default"].weight) for name, layer in by_name(model).items()}
    assert stacked == {f"layers.{i}.self_attn.q_proj": 5 if i == 2 else 1 for i in names}


def test_statistics_and_losses_are_those_of_the_routed_experts():
    """The same routing with and without shared experts gives the same losses, load and entropy."""
    coefs = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    found = []
    for shared in (0, 3):
        model = adapted(tiny_llama(), num_shared_experts=shared, **coefs).train()
        for parameter_name, parameter in model.named_parameters():
            if "loraswitch_B" in parameter_name:
                parameter.data.zero_()  # so that the model's own loss is the same
            elif "loraswitch_router" in parameter_name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        output = model(**padded([7, 4]))
        output.loss.backward()
        with model.record_routing() as recorded:
            model(**padded([7, 4]))
        found.append((output.loss, router_layer(model).loraswitch_router["default"].weight.grad, model.router_stats()))
        assert recorded.summary()["load"] == pytest.approx(found[-1][2]["load"])
    (loss, gradient, stats), (other_loss, other_gradient, other_stats) = found
    assert torch.equal(loss, other_loss) and close(gradient, other_gradient, 1e-6) and gradient.any()
    assert len(stats["load"]) == 4 and stats["load"] == pytest.approx(other_stats["load"])
    assert stats["entropy"] == pytest.approx(other_stats["entropy"]) and stats["tokens"] == other_stats["tokens"] == 22
    assert stats["balance_loss"] == pytest.approx(other_stats["balance_loss"])


def test_gradients_reach_every_part():
    gradients = adapter_gradients(_backward(llama(**CONFIGS["before"]).train()))
    assert len(gradients) == 2 * 14 + 1
    for name, gradient in gradients.items():
        for part in gradient if "router" not in name else [gradient]:
            assert part.any() or gradient.shape[0] == 6, name  # a routed expert that no token chose has none
        assert gradient[-2:].any()  # the shared ones are chosen always


def _backward(model: nn.Module) -> nn.Module:
    model(**padded([7, 4])).loss.backward()
    return model


# -------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.compat
@pytest.mark.parametrize("cache", generating.CACHES)
def test_each_step_of_generate_has_the_logits_of_a_full_forward(cache):
    model = adapted(tiny_llama(num_hidden_layers=3), task_type="CAUSAL_LM", **CONFIGS["before"])
    prompt = tokens(2, 5)
    torch.manual_seed(3)
    out = generating.generate(model, prompt, **generating.CACHES[cache])
    generating.check_logits(model, out, prompt)


def test_left_padding_and_beams():
    model = adapted(tiny_llama(num_hidden_layers=3), task_type="CAUSAL_LM", **CONFIGS["before"])
    batch = padded([6, 2, 4], side="left")
    out = generating.generate(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    for row, length in enumerate([6, 2, 4]):
        alone = generating.generate(model, batch["input_ids"][row : row + 1, -length:])
        assert torch.equal(alone.sequences[0], out.sequences[row, -length - generating.NEW :])
    beams = [generating.generate(model, tokens(2, 5), num_beams=3, use_cache=cache) for cache in (True, False)]
    assert torch.equal(beams[0].sequences, beams[1].sequences)


# ------------------------------------------------------------------------------------------------------ saving and loading

LOAD = """
import sys, torch
import peft_loraswitch
from helpers import tiny_llama, tokens
from peft import PeftModel
for low in (True, False):
    model = PeftModel.from_pretrained(tiny_llama(), sys.argv[1], low_cpu_mem_usage=low)
    torch.save(model(input_ids=tokens()).logits.detach(), f"{sys.argv[1]}/{low}.pt")
"""


@pytest.mark.compat
def test_saved_and_loaded_by_a_fresh_process(tmp_path):
    model = llama(**CONFIGS["before"])
    model.save_pretrained(tmp_path)
    run_python(LOAD, str(tmp_path), libraries=LIBRARIES)
    for low in (True, False):
        assert torch.equal(torch.load(tmp_path / f"{low}.pt"), logits(model, tokens()))


@pytest.mark.compat
@each_config
def test_saved_and_loaded(config, tmp_path):
    model = llama(**config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert {name: getattr(again.peft_config["default"], name) for name in config} == config
    transformers_model = tiny_llama()
    transformers_model.load_adapter(str(tmp_path))
    assert torch.equal(logits(transformers_model, tokens()), logits(model, tokens()))


def test_a_configuration_without_the_field_and_the_field_without_use(tmp_path):
    """Older versions do not know the field: an adapter that does not use it stays readable for them."""
    LoRASwitchConfig(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert "num_shared_experts" not in saved
    assert PeftConfig.from_pretrained(tmp_path).num_shared_experts == 0
    path.write_text(json.dumps({**saved, "num_shared_experts": 0}))
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == LoRASwitchConfig(r=4).to_dict()
    LoRASwitchConfig(num_shared_experts=2).save_pretrained(tmp_path)
    assert json.loads(path.read_text())["num_shared_experts"] == 2
    assert LoRASwitchConfig.from_pretrained(tmp_path).num_shared_experts == 2


@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True, 10**6, [1]])
def test_bad_values(value):
    with pytest.raises(
        ValueError, match=re.escape(f"num_shared_experts={value!r} must be a whole number from 0 to 4096")
    ):
        LoRASwitchConfig(num_shared_experts=value)


@pytest.mark.parametrize("saved, configured", [(0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("router", [None, DEEP])
def test_a_file_with_another_number_of_shared_experts(saved, configured, router, tmp_path):
    llama(num_shared_experts=saved, router_module=router).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_shared_experts": configured}))
    with pytest.raises(ValueError, match="experts|not in the model|missing"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    if router is None:
        with pytest.raises(ValueError, match=f"holds {4 + saved} experts.*num_experts=4"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_file_in_which_a_linear_has_the_other_kind_of_stack(tmp_path):
    """S experts where E + S belong: each is a possible size, but not there."""
    llama(**CONFIGS["before"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for part in "AB":
        key = f"base_model.model.model.layers.1.mlp.up_proj.loraswitch_{part}.weight"
        tensors[key] = tensors[key][:2].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"wrong shape: .*up_proj.* is \[2, "):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_the_card_says_so(tmp_path):
    for config, wanted in [
        ({}, None),
        ({"num_shared_experts": 1}, "1 more, used by every token |"),
        (
            CONFIGS["before"],
            "2 more, used by every token; the adapted modules before the routing layer have these alone |",
        ),
    ]:
        llama(**config).save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert BEGIN in text and text.count("| shared experts |") == (wanted is not None)
        assert wanted is None or f"| shared experts | {wanted}" in text


# ------------------------------------------------------------------------------------------- several adapters, no forward


def three_adapters() -> PeftModel:
    """default: routed everywhere; before: shared experts alone up to q of layer 1; few: on two linears before that."""
    model = llama()
    model.add_adapter("before", switch_config(num_experts=3, r=2, **CONFIGS["before"]))
    model.add_adapter(
        "few", switch_config(target_modules=["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"], num_shared_experts=1)
    )
    for seed, name in enumerate(("before", "few"), start=3):
        randomize_adapter(model, name, seed=seed)
    return model.eval()


@pytest.mark.parametrize("fused", [False, True])
def test_switching_adapters(fused):
    model, ids = three_adapters().requires_grad_(False), tokens(2, 4)
    wanted = {}
    for name in ("default", "before", "few"):
        model.set_adapter(name)
        model.requires_grad_(False)
        with torch.no_grad():
            wanted[name] = Oracle(model, name)(input_ids=ids).logits
    with model.fuse_for_inference("fused") if fused else warnings.catch_warnings():
        for name in ("before", "default", "few", "before"):
            model.set_adapter(name)
            model.requires_grad_(False)
            assert close(logits(model, ids).double(), wanted[name])
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    model.delete_adapter("before")
    model.set_adapter("few")
    assert close(logits(model, ids).double(), wanted["few"])


def test_several_adapters_at_once():
    model, ids = three_adapters(), tokens(2, 4)
    alone, x = {}, torch.randn(2, 3, HIDDEN)
    for names in (["before"], ["few"], ["before", "few"]):
        model.base_model.set_adapter(names)
        layer = by_name(model)["layers.0.mlp.up_proj"]
        alone[tuple(names)] = layer.loraswitch_A  # only to show that the layer holds both
        logits(model, ids)
    assert set(layer.loraswitch_A) == {"default", "before", "few"}
    # on a linear that has shared experts only, both updates are added; it needs no forward of the model
    model.base_model.set_adapter(["before"])
    q_proj = by_name(model)["layers.0.self_attn.q_proj"]
    found, base = q_proj(x), q_proj.base_layer(x)
    a, b = q_proj.loraswitch_A["before"].weight, q_proj.loraswitch_B["before"].weight
    update = (
        sum(x @ a[i].T @ b[i].T for i in range(2)) * q_proj.scaling["before"] / q_proj.routing_options["before"].top_k
    )
    assert close(found, base + update)


def test_mixed_batches():
    names = ["before", "__base__", "default", "few", "before"]
    model, ids = three_adapters(), tokens(5, 6)
    mixed = logits(model, ids, adapter_names=names)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(input_ids=ids, adapter_names=names, **settings)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                wanted = logits(model, ids[row : row + 1])
        else:
            model.set_adapter(name)
            wanted = logits(model, ids[row : row + 1])
            alone = model.generate(input_ids=ids[row : row + 1], **settings)
            assert torch.equal(generated[row : row + 1], alone)
        assert close(mixed[row : row + 1], wanted)


def test_a_layer_that_routes_still_needs_a_forward():
    model = llama(**CONFIGS["before"])
    layers = by_name(model)
    assert layers["layers.0.mlp.up_proj"](torch.randn(2, HIDDEN)).shape == (2, 48)
    with pytest.raises(RuntimeError, match="'model.layers.1.mlp.up_proj' was reached before any routing"):
        layers["layers.1.mlp.up_proj"](torch.randn(2, HIDDEN))


@pytest.mark.parametrize("config", [{"num_experts": 1, "top_k": 1}, {}], ids=str)
def test_it_cannot_be_merged_into_the_weights(config):
    model = llama(num_shared_experts=1, **config)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model.unload(), tokens()), logits(tiny_llama(), tokens()))


# -------------------------------------------------------------------------------------------------------- several streams


def t5_with_both_streams(**config: Any) -> PeftModel:
    """The encoder, before the decoder's first linear, and of the decoder what sees the decoder's tokens."""
    targets = r"encoder\..*\.(q|k|v|o|wi|wo)|decoder\..*(SelfAttention\.(q|k|v|o)|EncDecAttention\.(q|o)|wi|wo)"
    router = "decoder.block.0.layer.0.SelfAttention.q"
    return adapted(tiny_t5(), target_modules=targets, num_shared_experts=2, router_module=router, **config)


STREAMS = {
    "llava": (llava_with_both_streams, multistream.llava_inputs),
    "t5": (t5_with_both_streams, multistream.seq2seq_inputs),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_before_the_routers_follow_no_decision(name):
    """One adapter on a vision tower and the language model, or on encoder and decoder."""
    model, inputs = (make() for make in STREAMS[name])
    oracle = Oracle(model)
    for layer in oracle.layers.values():
        layer.weight = layer.base.weight  # T5's feed-forward asks its linears for their dtype
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits.double(), oracle(**doubled).logits, rtol=2e-4, atol=2e-4)
    other = "vision_tower" if name == "llava" else "encoder.block"
    layers = {n: layer for n, layer in switch_layers(model).items() if other in n}
    assert len(layers) >= 12 and not any(
        any(o.is_routed for o in layer.routing_options.values()) for layer in layers.values()
    )


def test_what_counts_as_a_token_is_the_routed_streams_business():
    """The encoder's mask and its number of tokens say nothing about the decoder's tokens."""
    model, inputs = t5_with_both_streams().train(), multistream.seq2seq_inputs()
    assert inputs["attention_mask"].sum() == 10
    model(**inputs, labels=tokens(2, 6, seed=1)).loss.backward()
    assert model.router_stats()["tokens"] == 12
    assert all(gradient.any() for gradient in adapter_gradients(model).values())
    short = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :4]}
    with torch.no_grad(), model.eval().record_routing() as recorded:
        model(**short, adapter_names=["default", "__base__"])
    assert recorded.summary()["tokens"] == 4


@pytest.mark.parametrize("names", [None, ["default", "__base__", "other"]], ids=["one", "mixed"])
def test_generate_calls_the_encoder_outside_of_a_forward(names):
    model = t5_with_both_streams()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    randomize_adapter(model, "other", seed=9)
    model.eval()
    source = tokens(3, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    found = model.generate(input_ids=source, **settings, **({"adapter_names": names} if names else {}))
    for row, name in enumerate(names or ["default"] * 3):
        ids = source[row : row + 1]
        if name == "__base__":
            with model.disable_adapter():
                wanted = model.generate(input_ids=ids, use_cache=False, **settings)
        else:
            model.set_adapter(name)
            wanted = model.generate(input_ids=ids, use_cache=False, **settings)
        assert torch.equal(found[row : row + 1], wanted)


def test_two_routed_streams_are_refused_as_before():
    with pytest.raises(ValueError, match="different tokens"):
        get_peft_model(multistream.llava(), switch_config(num_shared_experts=1))
