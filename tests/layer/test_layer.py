"""The maths of the adapted linear: against the float64 oracle, against PEFT's LoRA, and how it gets there."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import oracle
from helpers import (
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_llama,
    tokens,
)
from layer_checks import EPS, MODELS, NO_LOSSES, assert_layers_equal_oracle, check_model_gradients


class Stack(nn.Module):
    """Two linears of odd sizes, so that no dimension equals another by chance."""

    def __init__(self, sizes: tuple[int, ...] = (5, 11, 7)) -> None:
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1])
        self.second = nn.Linear(sizes[1], sizes[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.gelu(self.first(x)))


class Single(nn.Module):
    """One linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def single(dtype: torch.dtype = torch.float32, **config):
    """(model, its one adapted linear)"""
    model = adapted(Single(), target_modules=["first"], **{**NO_LOSSES, **config}).to(dtype)
    return model, model.get_base_model().first


def stack(dtype: torch.dtype = torch.float32, **config):
    return adapted(Stack(), target_modules=["first", "second"], **{**NO_LOSSES, **config}).to(dtype)


CONFIGS = {
    "default": {},
    "one-expert": {"num_experts": 1, "top_k": 1},
    "all-experts": {"num_experts": 5, "top_k": 5},
    "all-experts-raw-gates": {"num_experts": 5, "top_k": 5, "normalize_gates": False},
    "top1": {"top_k": 1},
    "top1-hard-gate": {"top_k": 1, "normalize_gates": True},
    "top3-raw-gates": {"num_experts": 7, "top_k": 3, "normalize_gates": False, "r": 1},
    "top-p": {"top_k": 3, "top_p": 0.95},
    "top-p-raw-gates": {"num_experts": 7, "top_k": 5, "normalize_gates": False, "top_p": 0.9},
    "rslora": {"use_rslora": True, "r": 5},
    "patterns": {"rank_pattern": {"down_proj": 5, "1.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 1.5}},
    "deeper-router": {"router_module": "layers.1.self_attn.q_proj"},
    "deeper-router-mlp": {"router_module": "layers.0.mlp.gate_proj", "top_k": 1},
    "shared": {"num_shared_experts": 1},
    "shared-before-router": {"num_shared_experts": 2, "router_module": "layers.1.self_attn.k_proj"},
}


# ------------------------------------------------------------------------------------------------ against the oracle


@pytest.mark.compat
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_layer_equals_the_oracle(config, dtype):
    model = adapted(tiny_llama(), **config).to(dtype)
    batch = {k: v for k, v in padded([7, 4], side="left").items() if k != "labels"}
    assert_layers_equal_oracle(model, lambda: model(**batch))


@pytest.mark.compat
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_equals_the_oracle(name, dtype):
    task = "SEQ_CLS" if name in ("bert", "llama-classifier") else None
    model = adapted(MODELS[name](), task_type=task).to(dtype)
    assert_layers_equal_oracle(model, lambda: model(input_ids=tokens(3, 5)))


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2-conv1d"])
def test_float32_experts_on_a_16_bit_backbone_equal_the_oracle(name, dtype):
    """What PEFT makes by default: `autocast_adapter_dtype=True`."""
    model = adapted(MODELS[name]().to(dtype))
    assert {p.dtype for n, p in model.named_parameters() if "loraswitch_" in n} == {torch.float32}
    assert_layers_equal_oracle(model, lambda: model(input_ids=tokens(3, 5)))
    model.train()(**padded([7, 4])).loss.backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in adapter_gradients(model).values())


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("experts, top_k", [(1, 1), (4, 2), (3, 3), (17, 1)])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (2, 3), (0,), (2, 0), (0, 3), (2, 1, 3)], ids=str)
def test_odd_shapes_equal_the_oracle(shape, experts, top_k, dtype):
    model = stack(dtype, num_experts=experts, top_k=top_k)
    x = torch.randn(*shape, 5).to(dtype)
    assert_layers_equal_oracle(model, lambda: model(x))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_one_vector_without_any_batch_dimension(train):
    """`nn.Linear` takes it, so the adapted linear does."""
    model = stack(router_aux_loss_coef=0.01).train(train)
    x = torch.randn(5)
    y = model(x)
    assert y.shape == (7,)
    assert torch.allclose(y, model(x[None])[0], atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)], ids=str)
def test_an_empty_batch_trains_and_evaluates(shape):
    """(Attention layers of Transformers refuse batches of size 0 themselves; other backbones take them.)"""
    model = stack(router_aux_loss_coef=0.01, router_z_loss_coef=0.01)
    assert model(torch.zeros(*shape, 5)).shape == (*shape, 7)
    model.train()
    model(torch.zeros(*shape, 5)).sum().backward()
    gradients = adapter_gradients(model)
    assert len(gradients) == 5 and not any(g.any() or g.isnan().any() for g in gradients.values())
    assert model.router_stats()["tokens"] == 0


@pytest.mark.compat
@pytest.mark.parametrize("name", ["llama", "gpt2-conv1d", "opt"])
def test_gradients_of_a_model_equal_the_oracles(name):
    check_model_gradients(adapted(MODELS[name](), **NO_LOSSES))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_every_configuration_equal_the_oracles(config):
    check_model_gradients(adapted(tiny_llama(), **config, **NO_LOSSES))


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("experts, top_k", [(1, 1), (4, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("shape", [(1,), (9,), (2, 3)], ids=str)
def test_gradients_of_one_layer_equal_the_oracles(shape, experts, top_k, dtype):
    """In every dtype, with respect to the layer's input too."""
    model, layer = single(dtype, num_experts=experts, top_k=top_k)
    model.train()
    x = torch.randn(*shape, 5).to(dtype).requires_grad_()
    outside = torch.randn(*shape, 11).to(dtype)  # the gradient that arrives from above
    model(x).backward(outside)

    router, a, b = (
        getattr(layer, word)["default"].weight for word in ("loraswitch_router", "loraswitch_A", "loraswitch_B")
    )
    exact = [p.detach().double().requires_grad_() for p in (x, router, a, b)]
    config = model.peft_config["default"]
    decision = oracle.decide(exact[0], exact[1], config.top_k, config.normalize_gates)
    y = oracle.base_output(layer.get_base_layer(), exact[0]) + oracle.delta(exact[0], *exact[2:], decision, 2.0)
    y.backward(outside.double())
    for actual, expected in zip((x, router, a, b), exact, strict=True):
        if expected is exact[1] and experts == 1:
            assert not actual.grad.any()
            continue
        error = (actual.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error <= (20 if dtype == torch.float32 else 3) * EPS[dtype]


def test_the_oracle_itself_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(3)
    x, router, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in [(3, 5), (4, 5), (4, 2, 5), (4, 7, 2)]
    )
    for top_k, normalize in [(1, False), (2, True), (2, False), (4, True)]:

        def run(x, router, a, b, top_k=top_k, normalize=normalize):
            return oracle.delta(x, a, b, oracle.decide(x, router, top_k, normalize), 1.7)

        assert torch.autograd.gradcheck(run, (x, router, a, b))


def test_routers_gradient_agrees_with_finite_differences():
    """Not through the oracle: the model's own loss, moved a little along its own router gradient."""
    model = adapted(tiny_llama(), **NO_LOSSES).train()
    batch = padded([7, 4])
    loss = model(**batch).loss
    loss.backward()
    router = next(p for n, p in model.named_parameters() if "router" in n)
    direction = router.grad / router.grad.norm()
    step = 1e-2
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            router += sign * step * direction
            values.append(model(**batch).loss.item())
            router -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(router.grad.norm().item(), rel=1e-2)


def test_frozen_backbone_gets_no_gradient_and_every_adapter_weight_does():
    model = get_peft_model(tiny_llama(), switch_config()).train()
    model(**padded([7, 4])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("loraswitch_" in name), name
        assert parameter.requires_grad == ("loraswitch_" in name), name


# ---------------------------------------------------------------------------------------------------- fresh adapters


@pytest.mark.compat
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2-conv1d", "opt"])
def test_a_fresh_adapter_changes_no_bit(name, dtype, train):
    model = MODELS[name]().to(dtype).train(train)
    batch = padded([7, 4])
    before = model(**batch)
    model = get_peft_model(model, switch_config(init_weights="gaussian" if train else True, **NO_LOSSES)).train(train)
    after = model(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


@pytest.mark.parametrize("init_weights", [True, False, "gaussian"])
def test_initial_weights(init_weights):
    model = get_peft_model(tiny_llama(hidden_size=64), switch_config(r=8, num_experts=16, init_weights=init_weights))
    for layer in switch_layers(model).values():
        a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
        assert a.shape == (16, 8, layer.in_features) and b.shape == (16, layer.out_features, 8)
        assert b.any() == (init_weights is False)
        std = 1 / 8 if init_weights == "gaussian" else (3 * layer.in_features) ** -0.5
        assert a.std().item() == pytest.approx(std, rel=0.1)
        assert len({row.sum().item() for row in a}) == 16  # no two experts alike
    routers = [
        layer.loraswitch_router["default"].weight for layer in switch_layers(model).values() if layer.loraswitch_router
    ]
    assert len(routers) == 1 and routers[0].shape == (16, 64) and routers[0].any()


# --------------------------------------------------------------------------------------------------- plain LoRA twin


@pytest.mark.compat
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=["plain", "rslora", "dropout"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2-conv1d"])
def test_one_expert_is_pefts_lora(name, settings, autocast):
    """Same weights, forward and gradients. With dropout: the same mask, since the router draws no random number."""
    ours = adapted(MODELS[name](), num_experts=1, top_k=1, **settings).train()
    config = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "fan_in_fan_out": name != "llama"}
    theirs = get_peft_model(MODELS[name](), LoraConfig(**config, **settings)).train()
    twins = {}
    for path, layer in switch_layers(ours).items():
        twin = theirs.get_submodule(path)
        twin.lora_A["default"].weight.data.copy_(layer.loraswitch_A["default"].weight[0])
        twin.lora_B["default"].weight.data.copy_(layer.loraswitch_B["default"].weight[0])
        twins[path] = (layer, twin)
    assert len(twins) == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())

    batch = padded([7, 4])
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(model(**batch))
        outputs[-1].loss.backward()
    real = batch["attention_mask"].bool()
    logits, reference = (output.logits[real].float() for output in outputs)
    assert logits.dtype == reference.dtype
    # PEFT multiplies with the scale after B, this package before it: under bf16 autocast those round differently
    tolerance = 3e-2 if autocast else 2e-6
    assert (logits - reference).norm() <= tolerance * reference.norm()
    # (the loss itself also holds the router's losses: with one expert they are the constant 0.01 and some z-loss)
    for path, (layer, twin) in twins.items():
        for ours_grad, theirs_grad in (
            (layer.loraswitch_A["default"].weight.grad[0], twin.lora_A["default"].weight.grad),
            (layer.loraswitch_B["default"].weight.grad[0], twin.lora_B["default"].weight.grad),
        ):
            assert (ours_grad - theirs_grad).norm() <= 3 * tolerance * theirs_grad.norm(), path


# -------------------------------------------------------------------------------------------------- dropout, scaling


def test_dropout_acts_on_the_experts_input_only():
    model, layer = single(lora_dropout=0.5, num_experts=3)
    model.train()
    x = torch.randn(40, 5)
    torch.manual_seed(11)
    y = model(x)
    torch.manual_seed(11)
    dropped = torch.nn.functional.dropout(x, 0.5)
    decision = oracle.decide(x, layer.loraswitch_router["default"].weight, 2, True)  # of x, not of what is left of it
    a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
    expected = oracle.base_output(layer.get_base_layer(), x) + oracle.delta(dropped, a, b, decision, 2.0)
    assert torch.allclose(y.double(), expected, atol=1e-5)
    assert_layers_equal_oracle(model.eval(), lambda: model(x))  # none in eval


def test_fixed_and_patterned_scaling():
    config = switch_config(r=4, lora_alpha=6, rank_pattern={"v_proj": 9}, alpha_pattern={"v_proj": 3}, use_rslora=False)
    layers = switch_layers(get_peft_model(tiny_llama(), copy.deepcopy(config)))
    scalings = {name.rpartition(".")[2]: layer.scaling["default"] for name, layer in layers.items()}
    assert scalings["q_proj"] == 1.5 and scalings["v_proj"] == pytest.approx(1 / 3)
    config.use_rslora = True
    layers = switch_layers(get_peft_model(tiny_llama(), config))
    scalings = {name.rpartition(".")[2]: layer.scaling["default"] for name, layer in layers.items()}
    assert scalings["q_proj"] == 3.0 and scalings["v_proj"] == 1.0


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_layer_reached_without_a_forward_of_the_model():
    model = stack()
    with pytest.raises(RuntimeError, match="'first' was reached before any routing"):
        model.get_base_model().first(torch.randn(2, 5))


def test_a_layer_that_sees_other_tokens():
    class Pooled(Stack):
        def forward(self, x):
            return self.second(self.first(x).mean(dim=1))

    model = adapted(Pooled(), target_modules=["first", "second"])
    with pytest.raises(RuntimeError, match=r"tokens of shape \(2, 3\), but the adapted layer 'second' sees \(2,\)"):
        model(torch.randn(2, 3, 5))
    assert model.get_base_model().first.routing_state.frame is None  # the next forward starts anew


def test_randomize_adapter_touches_what_it_says():
    """A helper many tests lean on: after it no B is zero, and A is as it was."""
    model = get_peft_model(tiny_llama(), switch_config())
    before = {n: p.clone() for n, p in model.named_parameters()}
    randomize_adapter(model)
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("loraswitch_B" in name or "loraswitch_router" in name), name
