"""`top_p`: a token takes experts, the likeliest first, until their probabilities sum to it. What is left out costs nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import oracle
from fusing import check_fused, check_fused_in_16_bit, check_merged
from helpers import (
    adapted,
    adapter_gradients,
    gradients_with_and_without_checkpointing,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    tiny_gpt2,
    tiny_llama,
    tokens,
    without_losses,
)
from layer_checks import assert_layers_equal_oracle, check_model_gradients
from peft_loraswitch import (
    LoRASwitchConfig,
    RouterStatsCallback,
    record_routing,
    router_stats,
    routing_report,
    use_experts,
)
from peft_loraswitch.routing.decision import decide, route
from peft_loraswitch.routing.options import RoutingOptions
from peft_loraswitch.vllm_plugin.adapter_folder import read_adapter, read_settings
from trainer_tools import OrderedTrainer, arguments, collate, samples, sentence, tokenizer

BATCH = {"input_ids": tokens(), "labels": tokens()}
NAN = float("nan")
TOKENIZER = tokenizer()
KINDS: dict[str, dict[str, Any]] = {
    "top-2": {"top_p": 0.6},
    "top-3, raw gates": {"top_k": 3, "top_p": 0.75, "normalize_gates": False},
    "all": {"num_experts": 5, "top_k": 5, "top_p": 0.8},
    "base": {"top_k": 3, "top_p": 0.7, "base_expert": True},
    "shared": {"top_p": 0.6, "num_shared_experts": 2},
    "shared, deep": {"top_p": 0.6, "num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj"},
    "context": {"top_k": 3, "top_p": 0.6, "router_decay": 0.6},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, backbone: Any = None, **overrides: Any) -> nn.Module:
    model = adapted(tiny_llama() if backbone is None else backbone, **KINDS[kind], **overrides)
    router_layer(model).loraswitch_router["default"].weight.data.mul_(0.3)  # sure of some tokens, not of others
    return model


# ----------------------------------------------------------------------------------------------------------- the decision

PROBABILITIES = [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    ("top_p", "top_k", "taken"),
    [
        (0.4, 3, 1),
        (0.5, 3, 1),
        (0.51, 3, 2),
        (0.75, 3, 2),
        (0.76, 3, 3),
        (0.99, 3, 3),
        (1e-9, 4, 1),
        (1.0, 4, 4),
        (0.9, 1, 1),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_by_hand(top_p, top_k, taken, normalize):
    """Sums that are reached exactly are reached."""
    logits = torch.tensor([PROBABILITIES, PROBABILITIES[::-1]]).log()
    experts, gates = decide(logits, top_k, normalize, top_p)
    total = sum(PROBABILITIES[:taken]) if normalize else 1.0
    expected = [p / total for p in PROBABILITIES[:taken]] + [0.0] * (top_k - taken)
    torch.testing.assert_close(gates, torch.tensor([expected, expected]))
    order = [[0, 1, 2, 3], [3, 2, 0, 1]]
    assert experts.tolist() == [row[:taken] + [4] * (top_k - taken) for row in order]


def test_off_is_what_it_was():
    logits = torch.randn(500, 8)
    for normalize in (False, True):
        for ours, before in zip(decide(logits, 3, normalize, 1.0), decide(logits, 3, normalize), strict=True):
            assert torch.equal(ours, before)
    plain, off = (route(logits, RoutingOptions(8, 3, True, **p)) for p in ({}, {"top_p": 1.0}))
    assert torch.equal(plain.dense_gates, off.dense_gates) and not off.has_null_index
    sure = torch.tensor([[200.0, 0, 0]])  # a probability of exactly 1
    assert decide(sure, 2, True, 1.0)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.95])
def test_equals_the_oracle(normalize, top_p):
    x, router = torch.randn(200, 12), torch.randn(7, 12) * 0.7
    experts, gates = decide(x @ router.T, 5, normalize, top_p)
    for row, weights, token in zip(experts.tolist(), gates, oracle.decide(x, router, 5, normalize, top_p), strict=True):
        left = len(token)
        assert row == [e for e, _ in token] + [7] * (5 - left)
        torch.testing.assert_close(
            weights[:left].double(), torch.stack([g for _, g in token]).double(), rtol=1e-5, atol=1e-6
        )
        assert not weights[left:].any()


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_the_oracles(normalize):
    """Through the gates that are taken; a token with one expert and normalised gates has the hard gate's."""
    logits = (torch.randn(60, 6) * 1.5).requires_grad_()
    weight = torch.randn(60, 6)
    dense = route(logits, RoutingOptions(6, 4, normalize, top_p=0.7)).dense_gates
    (found,) = torch.autograd.grad((dense * weight).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    decision = oracle.decide(exact, torch.eye(6), 4, normalize, 0.7)
    assert {len(token) for token in decision} == {1, 2, 3, 4}
    loss = sum((gate * weight[t, e]) for t, token in enumerate(decision) for e, gate in token)
    (expected,) = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    single = torch.tensor([len(token) == 1 for token in decision])
    assert found[single].abs().sum(-1).min() > 0


@pytest.mark.parametrize("broken", [[NAN, 0.0, 0, 0], [float("inf"), 0, 0, 0], [-float("inf")] * 4])
@pytest.mark.parametrize("base", [False, True])
def test_a_token_that_cannot_be_decided_shows_it(broken, base):
    options = RoutingOptions(4 - base, 3, True, base_expert=base, top_p=0.5)
    routing = route(torch.tensor([broken]), options)
    assert routing.gates.isnan().all() and routing.dense_gates.isnan().any() and (routing.experts < 4).all()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_what_is_left_out_has_the_index_behind_the_stack(base, shared):
    options = RoutingOptions(4, 3, True, num_shared_experts=shared, base_expert=base, top_p=0.4)
    routing = route(torch.randn(300, 4 + base), options)
    left_out = routing.gates[:, :3] == 0
    assert 0 < left_out.sum() < 600 and (routing.experts[:, :3][left_out] == 4 + shared).all()
    assert torch.equal(routing.chosen()[:, :4], routing.dense_gates[:, :4] != 0)
    assert routing.experts[:, 3:].tolist() == [[4 + i for i in range(shared)]] * 300
    assert (routing.gates[:, 3:] == torch.tensor(1 / 3)).all()  # of shared experts 1 / top_k, as without it


@pytest.mark.slow
def test_compiled_and_exported():
    torch._dynamo.reset()
    logits = torch.randn(50, 7)
    compiled = torch.compile(lambda values: decide(values, 4, True, 0.6), fullgraph=True)
    for found, expected in zip(compiled(logits), decide(logits, 4, True, 0.6), strict=True):
        torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------ configuration and files


def test_saved_only_where_it_is_used(tmp_path):
    for value in (1.0, 0.8):
        LoRASwitchConfig(top_p=value).save_pretrained(tmp_path)
        assert ("top_p" in json.loads((tmp_path / "adapter_config.json").read_text())) is (value < 1)
        assert LoRASwitchConfig.from_pretrained(tmp_path).top_p == value


def test_with_one_expert_it_is_refused():
    with pytest.raises(ValueError, match="top_p=0.5 would change nothing with top_k=1"):
        LoRASwitchConfig(top_k=1, top_p=0.5)
    assert LoRASwitchConfig(top_k=1).top_p == 1.0


@kinds
def test_saved_and_loaded(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    assert f"whose probabilities sum to {KINDS[kind]['top_p']} (top-p)" in (tmp_path / "README.md").read_text()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)
    again.load_adapter(tmp_path, "default")  # into the one that is there
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)


def test_vllm_reads_it(tmp_path):
    model_of("top-2").save_pretrained(tmp_path)
    settings = read_settings(str(tmp_path))
    assert read_adapter(str(tmp_path), settings).options.top_p == 0.6
    for wrong in (0, 1.5, "half", True):
        with pytest.raises(ValueError, match="top_p=.* must be a number above 0 and at most 1"):
            read_adapter(str(tmp_path), {**settings, "top_p": wrong})


# ------------------------------------------------------------------------------------------------------------ the model


def varies(model: nn.Module, **batch: torch.Tensor) -> bool:
    """Whether some tokens take fewer experts than others."""
    with torch.no_grad(), record_routing(model) as recorded:
        model(**batch)
    mean = recorded.summary("default")["mean_experts"]
    return 1 < mean + (model.peft_config["default"].base_expert) and mean < model.peft_config["default"].top_k


@kinds
def test_model_and_gradients_equal_the_oracle(kind):
    model = without_losses(model_of(kind)).train()
    assert varies(model, **BATCH)
    exact = oracle.Oracle(model)
    ours, theirs = model(**BATCH), exact(**BATCH)
    torch.testing.assert_close(ours.logits.double(), theirs.logits, rtol=1e-4, atol=1e-4)
    for each in (ours, theirs):
        each.loss.backward()
    expected = exact.gradients()
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(
            gradient.double(), expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["top-2", "top-3, raw gates", "shared"])
@pytest.mark.parametrize("backbone", [tiny_llama, tiny_gpt2])
def test_padded_batches_equal_the_oracle(kind, backbone):
    model = without_losses(model_of(kind, backbone()))
    batch = {k: v for k, v in padded([7, 4], side="left").items() if k != "labels"}
    assert_layers_equal_oracle(model, lambda: model(**batch))
    check_model_gradients(model)


@pytest.mark.parametrize("fused", [False, True])
def test_experts_that_are_left_out_reach_nothing(fused):
    """One linear, one token: NaN in all experts but the one that it takes (unfused, where B is one product, in A alone)."""
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], top_k=3, top_p=1e-6)
    layer = router_layer(model)
    x = torch.randn(1, 6)
    with torch.no_grad():
        expected = model(x)
        first = int(layer.loraswitch_router["default"](x).argmax())
        for experts in (layer.loraswitch_A, layer.loraswitch_B)[: 1 + fused]:
            for e in range(4):
                if e != first:
                    experts["default"].weight[e] = NAN
        if fused:
            model.fuse_for_inference("fused")
        torch.testing.assert_close(model(x), expected)


@kinds
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 7), (4, 30)], ids=str)
def test_fused(kind, shape):
    check_fused(model_of(kind), tokens(*shape))


@pytest.mark.parametrize("kind", ["top-2", "base", "shared"])
@pytest.mark.parametrize("in_place", [False, True])
def test_merged(kind, in_place):
    check_merged(model_of(kind), tokens(1, 12), in_place)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@kinds
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 7), (4, 30), (8, 200)], ids=str)
def test_fused_on_a_gpu(kind, shape):
    model = model_of(kind, tiny_llama(hidden_size=128, intermediate_size=256), r=8).to("cuda", torch.bfloat16)
    check_fused_in_16_bit(model, tokens(*shape).cuda())


@kinds
def test_decoding_with_a_cache_is_the_whole_sequence(kind):
    model, ids = model_of(kind), tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        cached = model(input_ids=ids[:, :5], use_cache=True)
        rows = [cached.logits]
        for t in range(5, 9):
            cached = model(input_ids=ids[:, t : t + 1], past_key_values=cached.past_key_values, use_cache=True)
            rows.append(cached.logits)
    torch.testing.assert_close(torch.cat(rows, 1), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- statistics and training


@kinds
def test_statistics_are_the_oracles(kind):
    model = model_of(kind)
    config = model.peft_config["default"]
    exact = oracle.Oracle(model)
    with torch.no_grad(), record_routing(model) as recorded:
        model(input_ids=BATCH["input_ids"])
        exact(input_ids=BATCH["input_ids"])
    found = recorded.summary("default")
    picks = [e for token in exact.decision for e, _ in token]
    real = [e for e in picks if e < config.num_experts]
    assert found["mean_experts"] == pytest.approx(len(real) / len(exact.decision))
    assert found["load"] == pytest.approx([picks.count(e) / len(picks) for e in range(config.num_experts)])
    if config.base_expert:
        assert found["base_share"] == pytest.approx(picks.count(config.num_experts) / len(picks))


def test_the_balance_loss_counts_what_was_taken():
    model = model_of("top-3, raw gates", router_z_loss_coef=0.0, router_aux_loss_coef=0.5).train()
    exact = oracle.Oracle(model)
    loss, without = model(**BATCH).loss, without_losses(copy.deepcopy(model))(**BATCH).loss
    with torch.no_grad():
        exact(**BATCH)
    picks = [e for token in exact.decision for e, _ in token]
    seen: list[torch.Tensor] = []
    handle = router_layer(model).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**BATCH)
    handle.remove()
    logits = seen[0].double() @ exact.router.T
    mean = logits.softmax(-1).flatten(0, -2).mean(0).detach()
    balance = sum(4 * picks.count(e) / len(exact.decision) * float(mean[e]) for e in range(4))
    assert float(loss - without) == pytest.approx(0.5 * balance, rel=1e-4)
    assert router_stats(model, "default")["balance_loss"] == pytest.approx(balance, rel=1e-4)


@pytest.mark.parametrize("kind", ["top-2", "base", "context"])
def test_the_report_shows_what_was_taken(kind):
    model, text = model_of(kind), sentence(seed=1, length=40)
    ids = TOKENIZER(text)["input_ids"]
    report = routing_report(model, text, TOKENIZER)
    exact = oracle.Oracle(model)
    with torch.no_grad():
        exact(input_ids=torch.tensor([ids]))
    for token, expected in zip(report.texts[0].tokens, exact.decision, strict=True):
        assert list(token.experts) == [e for e, _ in expected]
        assert token.gates == pytest.approx([float(g) for _, g in expected], abs=1e-5)
    config = model.peft_config["default"]
    number = sum(e < config.num_experts for token in exact.decision for e, _ in token)
    assert report.totals.mean_experts == pytest.approx(number / len(ids))
    assert f"{number / len(ids):.2f} experts a token" in str(report) and "experts a token" in report.html()


def test_it_trains_and_logs_the_mean(tmp_path):
    model = model_of("top-3, raw gates").train()
    trainer = OrderedTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=samples(),
        data_collator=collate,
        callbacks=[RouterStatsCallback()],
    )
    before = router_layer(model).loraswitch_router["default"].weight.detach().clone()
    trainer.train()
    assert not torch.equal(router_layer(model).loraswitch_router["default"].weight, before)
    logged = [entry["router/mean_experts"] for entry in trainer.state.log_history if "router/mean_experts" in entry]
    assert logged and all(1 <= mean < 3 for mean in logged)


@pytest.mark.slow
@pytest.mark.parametrize("kind, training", [("top-2", False), ("shared", True)])
def test_compiled(kind, training):
    torch._dynamo.reset()
    model = model_of(kind, tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"]).train(training)
    eager = copy.deepcopy(model)
    expected = eager(**BATCH)
    found = torch.compile(model, backend="aot_eager")(**BATCH)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    if training:
        for each in (expected, found):
            each.loss.backward()
        wanted, got = adapter_gradients(eager), adapter_gradients(model)
        assert wanted.keys() == got.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["top-2", "shared, deep"])
def test_checkpointing(kind, reentrant):
    model = model_of(kind, tiny_llama(num_hidden_layers=3))
    expected, found = gradients_with_and_without_checkpointing(model, reentrant)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_mixed_batch():
    model = model_of("top-2")
    model.add_adapter("plain", switch_config())
    model.add_adapter("more", switch_config(top_k=3, top_p=0.8, base_expert=True))
    for seed, name in enumerate(("plain", "more"), start=3):
        randomize_adapter(model, name, seed=seed)
    model.eval()
    ids, names = tokens(4), ["default", "__base__", "plain", "more"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for sample, name in enumerate(names):
            alone = ids[sample : sample + 1]
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(input_ids=alone).logits
            else:
                model.set_adapter(name)
                expected = model(input_ids=alone).logits
            torch.testing.assert_close(mixed[sample : sample + 1], expected, rtol=1e-4, atol=1e-5)


def test_experts_that_are_given_are_used_whatever_top_p_says():
    model = model_of("top-3, raw gates")
    with torch.no_grad(), use_experts(model, [1, 3]), record_routing(model) as recorded:
        given = model(input_ids=BATCH["input_ids"]).logits
    assert recorded.summary("default")["load"] == [0, 0.5, 0, 0.5]
    assert recorded.summary("default")["mean_experts"] == 1
    with torch.no_grad():
        assert not torch.equal(given, model(input_ids=BATCH["input_ids"]).logits)
