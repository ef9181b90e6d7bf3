"""Chosen experts alone decide: Inf, NaN and overflow in the hidden of an expert that a token did not choose reach neither its
output nor any gradient, on any path.

Two ways to break experts. `poison` adds Inf, -Inf and NaN, an expert each in turn, to what A gives for every expert that a token
did not choose, and lets gradients through as they are. `overflow` gives experts that no token chose weights that are finite, and
so large that their hidden overflows, and the gradient that B sends back to it. Either way everything must come out as if those
experts were whole, to the bit: they take part in the products with exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import kernel_oracle
from helpers import (
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from oracle import Oracle
from peft_loraswitch import LoRASwitchLinear, ops
from peft_loraswitch.routing.decision import route, routing_of
from peft_loraswitch.routing.options import RoutingOptions
from peft_loraswitch.training import fast_linears

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
VALUES = [float("inf"), float("-inf"), float("nan")]
values = pytest.mark.parametrize("value", VALUES, ids=str)


def in_turn(experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[experts]: the three values, again and again. They take the same path, and any of them that gets through is seen."""
    return torch.tensor(VALUES, dtype=dtype).repeat(experts // len(VALUES) + 1)[:experts]


NO_LOSSES = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
HUGE = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4}


def is_chosen(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[..., k] -> bool [..., E]"""
    return (experts.unsqueeze(-1) == torch.arange(num_experts, device=experts.device)).any(-2)


@contextmanager
def poison(model: nn.Module) -> Iterator[None]:
    """Within it, one of VALUES is added to the hidden of every expert that a token did not choose, in every adapted linear."""

    def poisoned(layer: LoRASwitchLinear, adapter: str) -> Callable:
        def add(module: nn.Module, args: Any, hidden: torch.Tensor) -> torch.Tensor:
            routing = layer.routing_state.frame.routings[adapter]
            chosen = is_chosen(routing.experts, hidden.shape[-2]).view(*hidden.shape[:-1], 1)
            return hidden + in_turn(hidden.shape[-2], hidden.dtype).unsqueeze(-1).masked_fill(chosen, 0.0)

        return add

    handles = [
        layer.loraswitch_A[adapter].register_forward_hook(poisoned(layer, adapter))
        for layer in switch_layers(model).values()
        for adapter in layer.loraswitch_A
        if layer.routing_options[adapter].is_routed
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def overflow(model: nn.Module, experts: list[int]) -> None:
    """Finite weights of these experts, in every adapted linear, with which their hidden and its gradient overflow."""
    assert experts, "every expert was chosen: there is none to break"
    for layer in switch_layers(model).values():
        for weights in (layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight):
            signs = torch.randn(weights[experts].shape).sign()
            weights.data[experts] = (signs * HUGE[weights.dtype]).to(weights)
            assert weights.isfinite().all()


def unchosen(model: nn.Module, run: Callable) -> list[int]:
    """The routed experts that no token of `run(model)` chooses."""
    found = set(range(model.peft_config["default"].num_experts))
    state = next(iter(switch_layers(model).values())).routing_state
    handle = (
        model.get_base_model()
        .get_submodule(last_linear(model))
        .register_forward_hook(
            lambda *_: found.difference_update(state.frame.routings["default"].experts.flatten().tolist())
        )
    )
    with torch.no_grad():
        run(model)
    handle.remove()
    return sorted(found)


def last_linear(model: nn.Module) -> str:
    return list(switch_layers(model.get_base_model()))[-1]


def evaluated(model: nn.Module, **batch: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval()(**batch).logits]


def trained(model: nn.Module, forward: Callable | None = None, **batch: Any) -> list[torch.Tensor]:
    """Logits and the gradients of all adapter weights, router included, and of the model's input."""
    model.train().zero_grad()
    embedding = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    output = (model if forward is None else forward)(inputs_embeds=embedding, **batch)
    output.loss.backward()
    gradients = adapter_gradients(model)
    assert any("router" in name for name in gradients)
    return [output.logits.detach(), embedding.grad, *gradients.values()]


def assert_equal(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(results) == len(expected) and all(e.isfinite().all() for e in expected)
    assert sum(bool(e.any()) for e in expected) > len(expected) // 2  # there is something to be broken
    assert all(torch.equal(result, e) for result, e in zip(results, expected, strict=True))


# ------------------------------------------------------------------------------------------------- the unfused forward


@pytest.fixture
def plain_form():
    """The hooks of `poison` have linears train in the layer's own form: what is expected is computed so, too. The fused form is
    poisoned in `training/test_fast_linears.py`."""
    with fast_linears.plain():
        yield


CONFIGS = {
    "default": {},
    "top-1": {"top_k": 1},
    "raw-gates": {"num_experts": 7, "top_k": 3, "normalize_gates": False},
    "shared": {"num_shared_experts": 2},
    "deeper-router": {"num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj"},
    "jitter": {"router_jitter": 0.3},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.compat
@dtypes
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.usefixtures("plain_form")
def test_forward_and_backward(config, dtype):
    model = adapted(tiny_llama(), **config).to(dtype)
    batch = padded([7, 4])
    for run in (evaluated, trained):
        torch.manual_seed(3)  # jitter and dropout
        expected = run(model, **batch)
        torch.manual_seed(3)
        with poison(model):
            assert_equal(run(model, **batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", ["autocast", "float32 experts on a 16-bit backbone"])
@pytest.mark.usefixtures("plain_form")
def test_mixed_precision(mixed, dtype):
    model = adapted(tiny_llama() if mixed == "autocast" else tiny_llama().to(dtype), **NO_LOSSES)
    batch = padded([7, 4])
    for run in (evaluated, trained):
        with torch.autocast("cpu", dtype, enabled=mixed == "autocast"):
            expected = run(model, **batch)
            with poison(model):
                assert_equal(run(model, **batch), expected)


@pytest.mark.compat
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("plain_form")
def test_gradient_checkpointing(reentrant):
    model = adapted(tiny_llama())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    expected = trained(model, **padded([7, 4]))
    with poison(model):
        assert_equal(trained(model, **padded([7, 4])), expected)


@pytest.mark.compat
def test_a_batch_of_several_adapters():
    model = adapted(tiny_gpt2())
    model.add_adapter("other", switch_config(num_experts=5, top_k=1, r=2))
    randomize_adapter(model, "other", seed=3)
    batch = {**padded([7, 4, 5, 7]), "adapter_names": ["other", "default", "__base__", "other"]}

    def run() -> list[torch.Tensor]:  # such batches are refused in train mode
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().mean().backward()
        return [logits.detach(), *adapter_gradients(model).values()]

    model.set_adapter("other")
    parameters = [p for n, p in model.named_parameters() if "loraswitch_" in n]
    for parameter in parameters:
        parameter.requires_grad_()
    expected = run()
    assert len(expected) == 1 + len(parameters)
    with poison(model):
        assert_equal(run(), expected)


@pytest.mark.slow
def test_compiled(fresh_compiler):
    model = adapted(tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"])
    batch = padded([7, 7])
    batch.pop("attention_mask")
    expected = trained(model, **batch), evaluated(model, **batch)
    with poison(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = trained(model, compiled, **batch)
        for result, e in zip(results, expected[0], strict=True):
            assert torch.allclose(result, e, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(compiled.eval()(**batch).logits, expected[1][0], atol=1e-5)


@pytest.mark.compat
@dtypes
@pytest.mark.parametrize("config", [{}, {"num_shared_experts": 1}, {"top_k": 1}], ids=str)
def test_overflow_of_finite_weights(config, dtype):
    """In the forward and, by B, in the backward."""
    model = adapted(tiny_llama(), num_experts=24, **config).to(dtype)
    batch = padded([4, 2])
    trained(model, **batch)  # the first forward learns which linears are trained together
    expected = trained(model, **batch), evaluated(model, **batch)
    overflow(model, unchosen(model, lambda m: m(**batch)))
    assert_equal(trained(model, **batch), expected[0])
    assert_equal(evaluated(model, **batch), expected[1])


def test_a_model_with_overflowing_experts_equals_the_oracle():
    model = adapted(tiny_llama(), num_experts=24, **NO_LOSSES)
    batch = padded([4, 2])
    overflow(model, unchosen(model, lambda m: m(**batch)))
    reference = Oracle(model)
    output, expected = model.train()(**batch), reference(**batch)
    real = batch["attention_mask"].bool()
    assert torch.allclose(output.logits[real].double(), expected.logits[real], rtol=0, atol=5e-5)
    output.loss.backward()
    expected.loss.backward()
    gradients, exact = adapter_gradients(model), reference.gradients()
    for name, gradient in gradients.items():
        assert (gradient.double() - exact[name]).norm() <= 2e-5 * exact[name].norm(), name


# ---------------------------------------------------------------------------------------------- what has to be kept


def single(experts: int = 4, top_k: int = 2, **config: Any) -> tuple[nn.Module, LoRASwitchLinear]:
    """(model, its one adapted linear, 5 features to 11)"""
    model = adapted(
        nn.Sequential(nn.Linear(5, 11)), target_modules=["0"], num_experts=experts, top_k=top_k, **NO_LOSSES, **config
    )
    return model, model.get_base_model()[0]


@dtypes
def test_a_chosen_expert_whose_gate_is_zero_keeps_its_gradient(dtype):
    """An exponential that underflows, or a gate that 16 bits round to zero."""
    model, layer = single()
    model.to(dtype)
    experts = torch.tensor([[0, 2], [3, 1]])
    gates = torch.tensor([[1.0, 0.0], [1.0, 1e-30]])
    routing = routing_of(experts, gates, RoutingOptions(num_experts=4, top_k=2, normalize_gates=True))
    routing.dense_gates.requires_grad_()
    x = torch.randn(2, 5, dtype=dtype)
    outside = torch.randn(2, 4, 3, dtype=dtype)
    layer.gated_hidden("default", x, routing).backward(outside)
    a = layer.loraswitch_A["default"].weight
    hidden = torch.einsum("eri,ti->ter", a.double(), x.double())
    exact = 2.0 * (outside.double() * hidden).sum(-1)  # 2 is the scaling
    chosen = is_chosen(experts, 4)
    error = (routing.dense_gates.grad.double() - exact)[chosen].abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    assert (routing.dense_gates.grad[chosen] != 0).all()


@values
def test_a_chosen_expert_that_is_broken_shows(value):
    model, layer = single()
    x = torch.randn(40, 5)
    experts = route(layer.loraswitch_router["default"](x), layer.routing_options["default"]).experts
    layer.loraswitch_A["default"].weight.data[2] = value
    with torch.no_grad():
        broken = ~model(x).isfinite().all(-1)
    assert torch.equal(broken, (experts == 2).any(-1)) and broken.any() and not broken.all()


def test_where_all_experts_are_chosen_nothing_is_selected():
    model, _ = single(experts=3, top_k=3)
    with torch.profiler.profile() as profile:
        model(torch.randn(4, 5))
    assert not any("where" in event.key for event in profile.key_averages())


# ------------------------------------------------------------------------------------------------------------- the ops


def group(
    dtype: torch.dtype, num_tokens: int, ranks: tuple[int, ...] = (8, 3), experts: int = 6, top_k: int = 2
) -> dict:
    outs = (16, 10)[: len(ranks)]

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    ids, gates = kernel_oracle.random_ids(num_tokens, experts - 1, top_k, "cpu")  # nobody chooses the last one
    return {
        "x": randn(num_tokens, 24),
        "experts": ids,
        "gates": gates,
        "weights": [randn(o, 24, scale=0.2) for o in outs],
        "biases": [randn(o) for o in outs],
        "lora_a": [randn(experts, r, 24, scale=0.2) for r in ranks],
        "lora_b": [randn(experts, o, r, scale=r**-0.5) for o, r in zip(outs, ranks, strict=True)],
        "scalings": [0.5, 2.0][: len(ranks)],
    }


@dtypes
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize("value", [*VALUES, None], ids=str)
def test_linear_and_deltas(value, num_tokens, dtype):
    """`value` in A, or with None a finite one whose product overflows."""
    g = group(dtype, num_tokens)

    def run() -> list[torch.Tensor]:
        bases = [torch.ones(num_tokens, b.shape[1], dtype=dtype) for b in g["lora_b"]]
        chosen = [g[k] for k in ("x", "experts", "gates", "lora_a", "lora_b", "scalings")]
        return [*ops.linear(**g), *ops.deltas(bases, *chosen)]

    expected = run()
    for a in g["lora_a"]:
        a[-1] = HUGE[dtype] * torch.randn(a[-1].shape).sign() if value is None else value
    assert_equal(run(), expected)
    for result, w, bias, a, b, s in zip(
        run(), *(g[k] for k in ("weights", "biases", "lora_a", "lora_b", "scalings")), strict=False
    ):
        exact = kernel_oracle.linear(g["x"], g["experts"], g["gates"], w, bias, a, b, s)
        assert kernel_oracle.relative_error(result, exact) < 1.6 * kernel_oracle.limit(result) + 1e-6


@dtypes
@values
@pytest.mark.parametrize("ranks", [(8, 3), (8, 8), (5,)], ids=str)
def test_expand(ranks, value, dtype):
    g = group(dtype, 40, ranks)
    g["experts"][0] = torch.tensor([3, 3])
    g["experts"][1] = torch.tensor([-1, 6])
    g["gates"] = kernel_oracle.poison_gates(g["experts"], g["gates"], 6)
    hidden = ops.all_hidden(g["x"], g["lora_a"])
    bases = [torch.randn(len(hidden), b.shape[1]).to(dtype) for b in g["lora_b"]]
    arguments = (g["experts"], g["gates"], bases, g["biases"], g["lora_b"], g["scalings"])
    expected = ops.expand(hidden, *arguments)
    chosen = is_chosen(g["experts"], 6)
    mask = torch.cat([chosen.repeat_interleave(rank, dim=1) for rank in ranks], dim=1)
    assert_equal(ops.expand(hidden.masked_fill(~mask, value), *arguments), expected)


@values
def test_ids_outside_the_experts_read_no_expert(value):
    """They add nothing, whatever the expert holds that stands in for them."""
    for num_tokens in (2, 40):
        g = group(torch.float32, num_tokens, (8,))
        g["experts"] = torch.where(g["experts"] == 0, -1, g["experts"])
        g["experts"][0] = torch.tensor([-1, 7])
        g["gates"] = kernel_oracle.poison_gates(g["experts"], g["gates"], 6)
        expected = ops.linear(**g)
        g["lora_a"][0][0] = value
        if num_tokens == 2:  # few tokens read the chosen experts only
            g["lora_b"][0][0] = value
        assert_equal(ops.linear(**g), expected)


@values
def test_merge_reads_the_chosen_experts_only(value):
    g = group(torch.float32, 1, (8,))
    weights, ids, gates = [torch.zeros(16, 24)], torch.tensor([2, -1]), torch.tensor([0.5, float("inf")])
    arguments = (g["weights"], g["lora_a"], g["lora_b"], g["scalings"], [False], ids, gates)
    ops.merge(weights, *arguments)
    expected = weights[0].clone()
    for lists in ("lora_a", "lora_b"):
        g[lists][0][[0, 1, 3, 4, 5]] = value
    ops.merge(weights, *arguments)
    assert_equal(weights, [expected])


# ------------------------------------------------------------------------------------------------------- fused models


@dtypes
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "beside-its-base-layer"])
@pytest.mark.parametrize("shared", [0, 1])
def test_fused_without_kernels(shared, hooked, dtype):
    """Few tokens, and many."""
    model = adapted(tiny_llama(), num_experts=48, num_shared_experts=shared).to(dtype).requires_grad_(False)
    if hooked:
        for layer in switch_layers(model).values():
            layer.get_base_layer().register_forward_hook(lambda module, args, output: output + 1)
    batches = [{"input_ids": tokens(1, 1)}, {"input_ids": tokens(1, 7)}, {"input_ids": tokens(1, 4).repeat(10, 1)}]
    with model.fuse_for_inference("fused"):
        expected = [evaluated(model, **batch) for batch in batches]
        broken = [set(unchosen(model, lambda m, batch=batch: m(**batch))) for batch in batches]
        overflow_a(model, sorted(set.intersection(*broken)))
        for batch, e in zip(batches, expected, strict=True):
            assert_equal(evaluated(model, **batch), e)


@pytest.mark.slow
def test_fused_and_compiled(fresh_compiler):
    model = adapted(tiny_llama(num_hidden_layers=1), num_experts=24, target_modules=["q_proj", "k_proj", "down_proj"])
    model.requires_grad_(False)
    batches = [{"input_ids": tokens(1, 2)}, {"input_ids": tokens(1, 2).repeat(20, 1)}]
    with model.fuse_for_inference("fused"):
        expected = [evaluated(model, **batch) for batch in batches]
        broken = unchosen(model, lambda m: m(**batches[0]))
        for layer in switch_layers(model).values():
            layer.loraswitch_A["default"].weight[broken] = in_turn(len(broken)).view(-1, 1, 1)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for batch, e in zip(batches, expected, strict=True):
            assert torch.allclose(evaluated(compiled, **batch)[0], e[0], atol=1e-5)


def overflow_a(model: nn.Module, experts: list[int]) -> None:
    assert experts
    for layer in switch_layers(model).values():
        a = layer.loraswitch_A["default"].weight
        a[experts] = (torch.randn(a[experts].shape).sign() * HUGE[a.dtype]).to(a)
