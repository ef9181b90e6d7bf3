"""The base expert: a choice without weights. Who takes it gets nothing added, on every path."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
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
from peft_loraswitch import LoRASwitchConfig, RouterStatsCallback
from peft_loraswitch.routing.decision import route, routing_of
from peft_loraswitch.routing.options import RoutingOptions
from trainer_tools import OrderedTrainer, arguments, collate, samples

BASE: dict[str, Any] = {"base_expert": True}
HARD: dict[str, Any] = {"top_k": 1, "normalize_gates": True, **BASE}
BATCH = {"input_ids": tokens(), "labels": tokens()}
NAN = float("nan")
KINDS: dict[str, dict[str, Any]] = {
    "hard": HARD,
    "soft top-1": {"top_k": 1, **BASE},
    "top-2": BASE,
    "all": {"top_k": 4, **BASE},
    "raw gates": {"top_k": 3, "normalize_gates": False, **BASE},
    "one expert": {"num_experts": 1, **HARD},
    "shared": {"num_shared_experts": 2, **BASE},
    "shared, deep": {"num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj", **BASE},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, backbone: Any = None, **overrides: Any) -> nn.Module:
    return adapted(tiny_llama() if backbone is None else backbone, **KINDS[kind], **overrides)


def everybody_takes(model: nn.Module, choice: int) -> nn.Module:
    """Make `choice` every token's: its logit is 0, all others are -50."""
    router_layer(model).loraswitch_router["default"].register_forward_hook(
        lambda module, args, logits: torch.full_like(logits, -50.0).index_fill(-1, torch.tensor([choice]), 0.0)
    )
    return model


def backbone_logits(model: nn.Module, **batch: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter(), torch.no_grad():
        return model(**batch).logits


# ---------------------------------------------------------------------------------------------- configuration and files


def test_saved_only_where_it_is_used(tmp_path):
    for used in (False, True):
        config = LoRASwitchConfig(base_expert=used)
        config.save_pretrained(tmp_path)
        assert ("base_expert" in json.loads((tmp_path / "adapter_config.json").read_text())) is used
        assert LoRASwitchConfig.from_pretrained(tmp_path).base_expert is used


@kinds
def test_saved_and_loaded(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    assert "| base expert |" in (tmp_path / "README.md").read_text()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)
    again.load_adapter(tmp_path, "default")  # into the one that is there
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("saved", [False, True])
def test_a_file_of_the_other_kind_is_refused(saved, tmp_path):
    adapted(tiny_llama(), base_expert=saved).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_expert": not saved}))
    with pytest.raises(ValueError, match=r"holds [45] experts \('.*loraswitch_router.*the two do not belong"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_expert": saved}))
    model = adapted(tiny_llama(), base_expert=not saved)
    with pytest.raises(ValueError, match="base_expert|holds [45] experts"):
        model.load_adapter(tmp_path, "default")


def test_it_has_no_weights():
    with_it, without = adapted(tiny_llama(), **BASE), adapted(tiny_llama())
    shapes = {n: tuple(p.shape) for n, p in without.named_parameters()}
    for name, parameter in with_it.named_parameters():
        shape = shapes[name]
        if "loraswitch_router" in name:
            shape = (shape[0] + 1, shape[1])
        assert tuple(parameter.shape) == shape


# ---------------------------------------------------------------------------------------------------------- the decision


def test_of_equal_logits_it_is_the_last():
    options = RoutingOptions(num_experts=3, top_k=1, normalize_gates=True, base_expert=True)
    routing = route(torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 1], [-1, -1, 2, 2], [-1, -2, -1, -1]]), options)
    assert routing.experts.tolist() == [[0], [3], [2], [0]]
    assert routing.gates.tolist() == [[1.0]] * 4
    assert routing.dense_gates.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert routing.chosen().tolist() == [[True, False, False], [False] * 3, [False, False, True], [True, False, False]]


def test_behind_the_shared_experts():
    options = RoutingOptions(num_experts=2, top_k=2, normalize_gates=True, num_shared_experts=2, base_expert=True)
    routing = route(torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0]]), options)
    assert routing.experts.tolist() == [[4, 0, 2, 3], [0, 1, 2, 3]]
    assert routing.chosen().tolist() == [[True, False, True, True], [True] * 4]
    p = torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(routing.gates[0], torch.tensor([p[0], p[1], 0.5, 0.5]))
    torch.testing.assert_close(routing.dense_gates[0], torch.tensor([p[1], 0.0, 0.5, 0.5]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_that_cannot_be_decided_shows_it(top_k):
    """Also where its NaN is the base expert's own: a gate that nobody multiplies with would hide it."""
    options = RoutingOptions(num_experts=3, top_k=top_k, normalize_gates=True, base_expert=True)
    logits = torch.tensor([[0.0, 0, 0, NAN], [NAN, 0, 0, 0], [NAN] * 4, [0.0, 0, 0, float("inf")], [0.0, 0, 0, 5.0]])
    routing = route(logits, options)
    assert routing.dense_gates[:4].isnan().any(-1).all() and routing.dense_gates[4].isfinite().all()
    assert routing_of(routing.experts[4:].clamp(max=3), routing.gates[4:], options).experts.max() == 3


# -------------------------------------------------------------------------------------------------------------- outputs


@kinds
def test_a_model_equals_the_oracle(kind):
    model = without_losses(model_of(kind)).train()
    exact = oracle.Oracle(model)
    ours, theirs = model(**BATCH), exact(**BATCH)
    torch.testing.assert_close(ours.logits.double(), theirs.logits, rtol=1e-4, atol=1e-4)
    last = model.peft_config["default"].num_experts
    taken = [any(e == last for e, _ in token) for token in exact.decision]
    assert any(taken), "the base expert is among the choices, or this shows nothing"
    for each in (ours, theirs):
        each.loss.backward()
    expected = exact.gradients()
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(
            gradient.double(), expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backbone", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("kind", ["hard", "soft top-1", "one expert"])
def test_who_takes_it_gets_exactly_the_backbone(kind, backbone):
    model = model_of(kind, backbone())
    expected = backbone_logits(model, **BATCH)
    assert not torch.equal(model(**BATCH).logits, expected)
    everybody_takes(model, model.peft_config["default"].num_experts)
    assert torch.equal(model(**BATCH).logits, expected)


def test_only_some_tokens_take_it():
    """One linear, so that tokens do not see each other: bit for bit the base linear where it is taken."""
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], **HARD)
    x = torch.randn(200, 6)
    layer = router_layer(model)
    taken = (x @ layer.loraswitch_router["default"].weight.T).argmax(-1) == 4
    assert 10 < taken.sum() < 100
    same = (model(x) == layer.base_layer(x)).all(-1)
    assert torch.equal(same, taken)


def test_whatever_the_weights_make_of_a_token_that_took_it():
    """An overflow in experts that were not chosen reaches nothing, forward or backward."""
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], **HARD)
    layer = router_layer(model)
    everybody_takes(model, 4).train()
    x = torch.full((3, 6), 1e30, requires_grad=True)
    layer.loraswitch_A["default"].weight.data.fill_(1e30)
    y = model(x)
    assert torch.equal(y, layer.base_layer(x))
    y.sum().backward()
    assert torch.equal(layer.loraswitch_A["default"].weight.grad, torch.zeros(4, 3, 6))
    torch.testing.assert_close(x.grad, layer.base_layer.weight.sum(0).expand(3, 6))


def test_mixed_batch():
    model = model_of("hard")
    model.add_adapter("plain", switch_config())
    model.add_adapter("soft", switch_config(num_shared_experts=1, **BASE))
    for seed, name in enumerate(("plain", "soft"), start=3):
        randomize_adapter(model, name, seed=seed)
    model.eval()
    ids, names = tokens(4), ["default", "__base__", "plain", "soft"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for sample, name in enumerate(names):
            alone = ids[sample : sample + 1]
            if name == "__base__":
                expected = backbone_logits(model, input_ids=alone)
            else:
                model.set_adapter(name)
                expected = model(input_ids=alone).logits
            torch.testing.assert_close(mixed[sample : sample + 1], expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- fused


@kinds
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 7), (4, 30)], ids=str)
def test_fused(kind, shape):
    check_fused(model_of(kind), tokens(*shape))


@pytest.mark.parametrize("kind", ["hard", "top-2", "shared"])
@pytest.mark.parametrize("in_place", [False, True])
def test_merged(kind, in_place):
    check_merged(model_of(kind), tokens(1, 12), in_place)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@kinds
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 7), (4, 30), (8, 200)], ids=str)
def test_fused_on_a_gpu(kind, shape):
    """The kernels take an index behind the stack for an expert that adds nothing: see csrc/loraswitch.h."""
    model = model_of(kind, tiny_llama(hidden_size=128, intermediate_size=256), r=8).to("cuda", torch.bfloat16)
    check_fused_in_16_bit(model, tokens(*shape).cuda())


@pytest.mark.parametrize("strategy", ["fused", "merge"])
def test_generation(strategy):
    model = model_of("hard")
    ids = tokens(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **options)
    model.fuse_for_inference(strategy)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)


# ------------------------------------------------------------------------------------------------ training, statistics


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["hard", "top-2", "shared, deep"])
def test_checkpointing(kind, reentrant):
    model = model_of(kind, tiny_llama(num_hidden_layers=3))
    expected, found = gradients_with_and_without_checkpointing(model, reentrant)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind, training", [("hard", False), ("shared", True)])
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
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@kinds
def test_statistics_and_losses(kind):
    """Shares and losses from their definitions, in float64, the base expert counted as one more."""
    model = model_of(kind, router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    plain = without_losses(model)
    config, layer = model.peft_config["default"], router_layer(model)
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = padded([7, 5])
    loss = model(**batch).loss
    x = seen[0][batch["attention_mask"].bool()].double()
    logits = x @ layer.loraswitch_router["default"].weight.detach().double().T
    choices = config.num_experts + 1
    picks = logits.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
    counts = torch.bincount(picks.flatten(), minlength=choices).double()
    balance = choices * (counts / len(x) * logits.softmax(-1).mean(0)).sum()
    z = logits.logsumexp(-1).square().mean()
    stats = model.router_stats()
    shares = (counts / counts.sum()).tolist()
    assert stats["load"] == pytest.approx(shares[:-1]) and stats["base_share"] == pytest.approx(shares[-1])
    assert stats["dropped_experts"] == [e for e in range(config.num_experts) if counts[e] == 0]
    assert stats["balance_loss"] == pytest.approx(float(balance), rel=1e-4)
    assert stats["z_loss"] == pytest.approx(float(z), rel=1e-4)
    expected = float(plain(**batch).loss) + 0.5 * float(balance) + 0.1 * float(z)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert layer.loraswitch_router["default"].weight.grad[-1].norm() > 1e-5
    model.eval()
    with model.record_routing() as recorded:
        model(**batch)
    assert recorded.summary()["base_share"] == pytest.approx(shares[-1])


def test_no_share_where_there_is_none():
    model = adapted(tiny_llama()).train()
    model(**BATCH)
    assert "base_share" not in model.router_stats()


def test_accumulated_losses_are_those_of_one_batch(tmp_path):
    """Micro-batches through the Trainer: the router's update is that of all samples at once."""
    updates = []
    for each, steps in ((8, 1), (2, 4)):
        model = model_of("top-2", router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
        weight = router_layer(model).loraswitch_router["default"].weight
        before = weight.detach().clone()
        args = arguments(tmp_path, per_device_train_batch_size=each, gradient_accumulation_steps=steps)
        OrderedTrainer(model=model, args=args, train_dataset=samples(), data_collator=collate).train()
        updates.append(weight.detach() - before)
    assert updates[0][-1].norm() > 1e-4
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-3, atol=1e-5)


def test_the_callback_logs_its_share(tmp_path):
    model = model_of("hard")
    trainer = OrderedTrainer(
        model=model, args=arguments(tmp_path), train_dataset=samples(), data_collator=collate,
        callbacks=[RouterStatsCallback()],
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    loads = [value for name, value in entry.items() if re.fullmatch(r"router/load_\d", name)]
    assert len(loads) == 4 and sum(loads) + entry["router/base_share"] == pytest.approx(1.0)


def test_the_router_learns_to_leave_a_token_alone():
    """Half of the tokens want the expert, half the base linear."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4, bias=False)),
        LoRASwitchConfig(
            r=4,
            num_experts=1,
            target_modules=["0"],
            trainable="router",
            router_aux_loss_coef=0.0,
            router_z_loss_coef=0.0,
            init_weights=False,
            top_k=1,
            base_expert=True,
        ),  # fmt: skip
    )
    randomize_adapter(model, std=1.0)
    layer = router_layer(model)
    x = torch.randn(128, 4)
    wants = x[:, 0] > 0
    a, b = layer.loraswitch_A["default"].weight.detach()[0], layer.loraswitch_B["default"].weight.detach()[0]
    delta = layer.scaling["default"] * (x @ a.T @ b.T)
    target = x @ layer.base_layer.weight.detach().T + torch.where(wants.unsqueeze(-1), delta, 0.0)
    layer.loraswitch_router["default"].weight.data.copy_(torch.tensor([[0.1, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    takes = (x @ layer.loraswitch_router["default"].weight.detach().T).argmax(-1) == 0
    assert (takes == wants).float().mean() > 0.9
