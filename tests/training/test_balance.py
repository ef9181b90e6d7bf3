"""Load-balance loss and z-loss: against Transformers' own functions, over real tokens only, wherever they join."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func as switch_loss,
)
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from helpers import (
    HIDDEN,
    adapted,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    tokens,
    without_losses,
)
from peft_loraswitch import record_routing, router_stats

AUX, Z = 0.25, 0.125  # large on purpose, and powers of two: added without rounding


def trained(model=None, **config):
    settings = {"router_aux_loss_coef": AUX, "router_z_loss_coef": Z, **config}
    return adapted(tiny_llama() if model is None else model, **settings).train()


def run(model, **batch):
    """(output, logits float32 [..., E] of the router, recomputed from what its linear received)"""
    layer, seen = router_layer(model), []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    output = model(**batch)
    handle.remove()
    return output, seen[0].float() @ layer.loraswitch_router["default"].weight.float().T


def expected_loss(logits, top_k: int, mask=None):
    """AUX * Mixtral's loss + Z * Switch's z-loss, with a graph to `logits`."""
    flat = logits.reshape(-1, logits.shape[-1])
    balance = mixtral_loss((flat,), logits.shape[-1], top_k, mask)
    real = flat if mask is None else flat[mask.reshape(-1).bool()]
    return AUX * balance + Z * router_z_loss_func(real[None])


# -------------------------------------------------------------------------------------------- the same as others' losses


@pytest.mark.compat
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    "experts, top_k, normalize", [(4, 2, None), (4, 1, None), (5, 5, False), (1, 1, None), (16, 3, True)]
)
def test_value_and_gradient_equal_mixtrals_and_z_loss(experts, top_k, normalize, side):
    model = trained(num_experts=experts, top_k=top_k, normalize_gates=normalize)
    batch = padded([7, 3, 1], side) if side else {"input_ids": tokens(), "labels": tokens()}
    twin = without_losses(model)
    output, logits = run(model, **batch)
    expected = expected_loss(logits, top_k, batch.get("attention_mask"))
    plain = twin(**batch)
    assert (output.loss - plain.loss).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(output.logits, plain.logits)
    weight, other = (router_layer(m).loraswitch_router["default"].weight for m in (model, twin))
    (exact,) = torch.autograd.grad(expected, weight, retain_graph=True)
    output.loss.backward()
    plain.loss.backward()
    assert torch.allclose(weight.grad - other.grad, exact, rtol=1e-4, atol=1e-6)
    if experts > 1:
        assert exact.norm() > 0.01
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if a.grad is not None and "router" not in name:
            assert torch.equal(a.grad, b.grad), name  # the losses train the router and nothing else


@pytest.mark.parametrize("experts", [2, 8])
def test_top1_equals_switch_transformers(experts):
    model = trained(num_experts=experts, top_k=1, router_z_loss_coef=0.0)
    ids = tokens(1, 12)
    output, logits = run(model, input_ids=ids, labels=ids)
    probabilities = logits.softmax(-1)
    expected = switch_loss(probabilities, probabilities.argmax(-1))
    assert (output.loss - without_losses(model)(input_ids=ids, labels=ids).loss).item() == pytest.approx(
        AUX * expected.item(), rel=1e-5
    )
    assert model.router_stats()["balance_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_perfect_balance_is_top_k_and_collapse_is_more():
    """What the help text of router_aux_loss_coef promises."""
    for weight, low, high in [(torch.zeros(4, HIDDEN), 2.0, 2.0), (None, 2.0, 8.0)]:
        model = trained(num_experts=4, top_k=2)
        router = router_layer(model).loraswitch_router["default"].weight.data
        if weight is not None:
            router.copy_(weight)
        else:
            router.mul_(10)
        model(input_ids=tokens(4, 9))
        balance = model.router_stats()["balance_loss"]
        assert low - 1e-6 <= balance <= high and (weight is not None or balance > 2.01)


# ------------------------------------------------------------------------------------------------ which tokens are real


def forward_alone(model, batch):
    """Statistics of the samples of a padded batch, each run alone and unpadded."""
    with record_routing(model) as recorded, torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            model(input_ids=ids[mask][None])
    return recorded.summary()


def assert_same(actual, expected):
    assert actual["tokens"] == expected["tokens"]
    assert actual["dropped_experts"] == expected["dropped_experts"]
    assert actual["load"] == pytest.approx(expected["load"], abs=1e-6)
    for name in ("entropy", "balance_loss", "z_loss"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-4), name


BUILDERS = {
    "llama": (tiny_llama, {}),
    "gpt2": (tiny_gpt2, {}),
    "opt": (tiny_opt, {}),
    "bert": (tiny_bert, {"task_type": "SEQ_CLS"}),
    # adapted inside one block only: modules down to the block see other forms of the mask, or none
    "one-block": (tiny_llama, {"target_modules": r".*layers\.0\.(self_attn|mlp)\..*_proj"}),
    "one-attention": (tiny_llama, {"target_modules": r".*layers\.0\.self_attn\..*_proj"}),
    "one-mlp": (tiny_llama, {"target_modules": r".*layers\.0\.mlp\..*_proj"}),
}


@pytest.mark.compat
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BUILDERS)
def test_padding_does_not_count(name, side):
    if name == "bert" and side == "left":
        side = "right"  # its positions are absolute and not shifted for padding: padded left is another input
    builder, config = BUILDERS[name]
    model = trained(builder(), **config)
    batch = padded([9, 4, 1], side)
    if name == "gpt2":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with record_routing(model) as recorded:
        model(**{k: v for k, v in batch.items() if k != "labels"})
    expected = forward_alone(model, batch)
    assert recorded.summary()["tokens"] == 14
    assert_same(recorded.summary(), expected)
    assert_same(model.router_stats(), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padding_free_batches_equal_the_padded_one(attention):
    model = trained()
    model.get_base_model().set_attn_implementation(attention)
    batch = padded([5, 3, 4])
    real = batch["attention_mask"].bool()
    flat = batch["input_ids"][real][None]
    lengths = batch["attention_mask"].sum(-1).tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = flat.clone()
    labels[positions == 0] = -100  # no sample predicts the next one's first token
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    blocks = (segment[:, None] == segment[None]) & torch.ones(12, 12).tril().bool()  # packed by hand: a 4-D mask
    twin = without_losses(model)
    expected = model(**batch).loss - twin(**batch).loss
    stats = model.router_stats(reset=True)
    for packed in (
        {"input_ids": flat, "position_ids": positions, "labels": labels},
        {"input_ids": flat, "position_ids": positions, "labels": labels, "attention_mask": torch.ones_like(flat)},
        {"input_ids": flat, "position_ids": positions, "labels": labels, "attention_mask": blocks[None, None]},
    ):
        if attention == "eager" and packed.get("attention_mask", flat).dim() == 4:
            allowed = packed["attention_mask"]
            packed["attention_mask"] = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        extra = model(**packed).loss - twin(**packed).loss
        assert extra.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same(model.router_stats(reset=True), stats)


@pytest.mark.parametrize("form", ["bool", "additive", "keys only"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_4d_mask_does_not_count(side, form):
    model = trained()
    batch = padded([6, 2], side)
    expected = forward_alone(model, batch)
    real = batch["attention_mask"].bool()
    allowed = real[:, None, None, :]
    if form != "keys only":
        allowed = allowed & torch.ones(6, 6).tril().bool()
    mask = allowed
    if form == "additive":
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions)
    assert model.router_stats()["tokens"] == 8
    assert_same(model.router_stats(), expected)


def test_a_decoder_counts_its_own_padding_not_the_encoders():
    model = trained(tiny_t5(), target_modules=r"decoder\..*(SelfAttention\.[qkvo]|wi|wo)", task_type="SEQ_2_SEQ_LM")
    long, short = padded([9, 2]), padded([3, 5], seed=1)
    for decoder_mask, count in [(short["attention_mask"], 8), (None, 10)]:
        model(
            input_ids=long["input_ids"],
            attention_mask=long["attention_mask"],
            decoder_input_ids=short["input_ids"],
            decoder_attention_mask=decoder_mask,
        )
        assert model.router_stats(reset=True)["tokens"] == count


def test_an_encoder_counts_its_own_padding():
    model = trained(tiny_t5(), target_modules=r"encoder\..*(SelfAttention\.[qkvo]|wi|wo)", task_type="SEQ_2_SEQ_LM")
    batch = padded([9, 2])
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=tokens(2, 9))
    assert model.router_stats()["tokens"] == 11


def test_all_padding_is_no_token_and_no_nan():
    model = trained()
    ids = tokens()
    output = model(input_ids=ids, attention_mask=torch.zeros_like(ids))
    output.logits.sum().backward()
    assert model.router_stats()["tokens"] == 0 and model.router_stats()["balance_loss"] == 0
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "loraswitch_" in n)


def test_cached_decoding_counts_new_tokens_only():
    model = adapted(tiny_llama())
    batch = padded([6, 3], side="left")
    with record_routing(model) as recorded:
        model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, min_new_tokens=4
        )
    # 9 real prompt tokens, then three steps of two tokens: the last one generated is never fed back
    assert recorded.summary()["tokens"] == 9 + 3 * 2


# ------------------------------------------------------------------------------------------------------- when, and where


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "frozen", "disabled", "zero"])
def test_absent_when_nothing_trains(mode):
    model = trained(**({"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0} if mode == "zero" else {}))
    if mode == "frozen":
        model.requires_grad_(False)
    batch = padded([7, 4])
    expected = without_losses(model).train(mode != "eval")(**batch).loss
    grad = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with grad():
        if mode == "disabled":
            with model.disable_adapter():
                loss, base = model(**batch).loss, tiny_llama()(**batch).loss
            assert torch.equal(loss, base)
        else:
            loss = model.train(mode != "eval")(**batch).loss
            assert torch.equal(loss, expected)
    counted = mode in ("frozen", "zero")  # a training forward as far as anybody can tell: its statistics are wanted
    assert model.router_stats()["tokens"] == (11 if counted else 0)


def test_without_labels_logits_bring_the_losses():
    """DPO, GRPO: the trainer makes its own loss of the logits. Its value, whatever it is scaled with, stays; the gradient of
    the router's losses comes with weight 1. (All outputs and combinations: `test_joining.py`.)"""
    model, batch = trained(), padded([7, 4])
    del batch["labels"]
    twin = without_losses(model)
    output, logits = run(model, **batch)
    plain = twin(**batch)
    assert torch.equal(output.logits, plain.logits)
    weight, other = (router_layer(m).loraswitch_router["default"].weight for m in (model, twin))
    (exact,) = torch.autograd.grad(expected_loss(logits, 2, batch["attention_mask"]), weight)
    for each in (output, plain):
        (each.logits.square().mean() / 8).backward()
    assert torch.allclose(weight.grad - other.grad, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dict with aux_loss"])
def test_outputs_of_every_kind(kind):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(HIDDEN, 5)

        def forward(self, x):
            y = self.linear(x)
            if kind == "tensor":
                return y
            if kind == "tuple":
                return None, torch.zeros(2), y, y.detach()
            if kind == "dict":
                return {"ids": torch.zeros(2), "y": y}
            return {"aux_loss": y.sum() * 0, "y": y}

    model = trained(Custom(), target_modules=["linear"])
    output = model(torch.randn(3, HIDDEN))
    y = output if kind == "tensor" else output[2] if kind == "tuple" else output["y"]
    (y.sum() * 0).backward()  # no gradient but that of the losses
    assert router_layer(model).loraswitch_router["default"].weight.grad.norm() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_get_the_losses_in_float32(dtype):
    model = trained().to(dtype)
    batch = padded([7, 4])
    output, logits = run(model, **batch)
    expected = expected_loss(logits, 2, batch["attention_mask"])
    assert logits.dtype == torch.float32
    stats = model.router_stats()
    assert AUX * stats["balance_loss"] + Z * stats["z_loss"] == pytest.approx(expected.item(), rel=1e-5)
    extra = output.loss - without_losses(model)(**batch).loss
    assert extra.item() == pytest.approx(expected.item(), rel=4 * torch.finfo(dtype).eps * 5)
    output.loss.backward()
    assert router_layer(model).loraswitch_router["default"].weight.grad.isfinite().all()


def test_jitter_is_in_the_losses_too():
    """Losses and load describe one and the same decision: the one taken from the jittered input."""
    model = trained(router_jitter=0.9, num_experts=8, top_k=1)
    ids = tokens(4, 16)
    picked, probabilities = [], []
    layer = router_layer(model)
    router = layer.loraswitch_router["default"]
    handle = router.register_forward_hook(lambda _, args, logits: probabilities.append(logits.detach().softmax(-1)))
    layer.register_forward_hook(
        lambda module, *_: picked.append(module.routing_state.frame.routings["default"].experts)
    )
    model(input_ids=ids)
    handle.remove()
    deciding = probabilities[0].reshape(-1, 8)
    assert torch.equal(deciding.argmax(-1), picked[0].flatten())
    share = torch.bincount(picked[0].flatten(), minlength=8) / 64
    stats = model.router_stats(reset=True)
    assert stats["balance_loss"] == pytest.approx((8 * share * deciding.mean(0)).sum().item(), rel=1e-5)
    model.peft_config["default"].router_jitter = 0.0
    layer.routing_options["default"] = replace(layer.routing_options["default"], jitter=0.0)
    model(input_ids=ids)
    assert model.router_stats()["entropy"] != pytest.approx(stats["entropy"], rel=1e-4)  # the jitter did something


def test_two_adapters_have_their_own_losses_and_statistics():
    model = trained(num_experts=4)
    model.add_adapter("other", switch_config(num_experts=7, top_k=3, router_aux_loss_coef=AUX, router_z_loss_coef=0.0))
    randomize_adapter(model, "other", seed=4)
    batch = padded([7, 4])
    model(**batch)
    assert len(model.router_stats()["load"]) == 4  # the only one that has counted anything
    first = model.router_stats("default")
    model.set_adapter("other")
    loss = model(**batch).loss
    assert model.router_stats("default") == first
    stats = model.router_stats("other")
    assert stats["tokens"] == 11 and len(stats["load"]) == 7
    extra = loss - without_losses(model)(**batch).loss
    assert extra.item() == pytest.approx(AUX * stats["balance_loss"], rel=1e-5)
    loss.backward()
    assert router_layer(model).loraswitch_router["default"].weight.grad is None
    with pytest.raises(ValueError, match="must be one of default, other"):
        model.router_stats()
    with pytest.raises(ValueError, match="'nobody' is unknown: choose from default, other"):
        model.router_stats("nobody")
    with pytest.raises(ValueError, match="carries no LoRA-Switch adapter"):
        router_stats(tiny_llama())


def test_both_adapters_at_once_add_both_losses():
    model = trained(num_experts=4)
    model.add_adapter("other", switch_config(num_experts=7, top_k=3, router_aux_loss_coef=AUX, router_z_loss_coef=0.0))
    randomize_adapter(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    batch = padded([7, 4])
    loss = model(**batch).loss
    stats = [model.router_stats(name) for name in ("default", "other")]
    extra = loss - without_losses(model)(**batch).loss
    expected = AUX * stats[0]["balance_loss"] + Z * stats[0]["z_loss"] + AUX * stats[1]["balance_loss"]
    assert extra.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for name in ("default", "other"):
        assert router_layer(model, name).loraswitch_router[name].weight.grad.any()
