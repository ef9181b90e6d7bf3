"""The decision: which experts, which gates, in which precision, from which input."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import oracle
from helpers import adapted, padded, switch_config, switch_layers, tiny_llama, tiny_opt, tokens
from peft_loraswitch.routing.decision import Routing, route
from peft_loraswitch.routing.options import RoutingOptions
from peft_loraswitch.routing.router import Router, jitter


def options(experts: int = 5, top_k: int = 2, normalize: bool = True) -> RoutingOptions:
    return RoutingOptions(num_experts=experts, top_k=top_k, normalize_gates=normalize)


def decisions(model, **batch) -> list[Routing]:
    """The routing that each adapted linear followed, in the order they ran."""
    found: list[Routing] = []
    handles = [
        layer.register_forward_hook(lambda module, *_: found.extend(module.routing_state.frame.routings.values()))
        for layer in switch_layers(model).values()
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


# ------------------------------------------------------------------------------------------------------------ route()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("experts, top_k", [(1, 1), (5, 1), (5, 2), (5, 5), (64, 8)])
def test_route(experts, top_k, normalize, shape):
    logits = torch.randn(*shape, experts, requires_grad=True)
    routing = route(logits, options(experts, top_k, normalize))
    assert routing.experts.shape == routing.gates.shape == (*shape, top_k)
    assert routing.experts.dtype == torch.int64 and routing.gates.dtype == torch.float32
    assert routing.dense_gates.shape == (*shape, experts) and routing.dense_gates.requires_grad
    assert routing.token_shape == torch.Size(shape)
    assert torch.equal(routing.dense_gates.gather(-1, routing.experts), routing.gates)
    assert ((routing.dense_gates != 0).sum(-1) == top_k).all()  # distinct, and no other expert takes part
    assert (routing.gates.diff(dim=-1) <= 0).all()  # best first
    probabilities = torch.softmax(logits.double(), -1).float()
    expected = probabilities.sort(-1, descending=True).values[..., :top_k]
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(routing.gates, expected, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_of_the_gates_agrees_with_finite_differences(normalize):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route(x, options(normalize=normalize)).dense_gates, (logits,))


def test_extreme_logits_give_finite_gates():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]], requires_grad=True)
    routing = route(logits, options(3, 2))
    assert torch.equal(routing.gates, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    routing.gates.sum().backward()
    assert logits.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logits_are_float32_whatever_comes_in(input_dtype, weight_dtype, autocast):
    router = Router(37, 5)
    router.reset_parameters()
    router.to(weight_dtype)
    x = torch.randn(2, 3, 37).to(input_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = router(x)
    exact = x.double() @ router.weight.double().T
    assert logits.dtype == torch.float32
    assert (logits.double() - exact).abs().max() <= 1e-6  # bf16 would be 4e-3 off


@pytest.mark.compat
@pytest.mark.parametrize("case", ["bf16 model", "fp16 model", "bf16 autocast"])
def test_experts_that_16_bits_cannot_tell_apart(case):
    """Two experts whose logits differ by less than bf16 (and fp16) can show: the better one must win, in every token."""
    model = adapted(tiny_llama(), top_k=1)
    layer = next(iter(switch_layers(model).values()))
    weight = layer.loraswitch_router["default"].weight.data
    weight.zero_()
    weight[:, 0] = 1.0  # all logits about x[0] ...
    weight[3, 1] = 2.0**-13  # ... and expert 3 better or worse by x[1] / 8192
    if case != "bf16 autocast":
        model.to(torch.bfloat16 if case == "bf16 model" else torch.float16)
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "bf16 autocast"):
        routing = decisions(model, input_ids=tokens(4, 9))[0]
    better = seen[0][..., 1] > 0
    assert better.any() and not better.all()
    assert torch.equal(routing.experts[..., 0] == 3, better)
    assert routing.gates.dtype == routing.dense_gates.dtype == torch.float32
    logits = seen[0].double() @ weight.double().T
    rounded = logits.to(torch.float16 if case == "fp16 model" else torch.bfloat16)
    assert not torch.equal(rounded.argmax(-1) == 3, better)  # 16 bits really would get it wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_decision_is_the_oracles(dtype):
    model = adapted(tiny_llama(), num_experts=7, top_k=3).to(dtype)
    layer = next(iter(switch_layers(model).values()))
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    routing = decisions(model, input_ids=tokens(3, 8))[0]
    exact = oracle.decide(seen[0], layer.loraswitch_router["default"].weight, 3, True)
    assert routing.experts.reshape(-1, 3).tolist() == [[e for e, _ in token] for token in exact]
    gates = torch.tensor([[float(g.detach()) for _, g in token] for token in exact])
    assert torch.allclose(routing.gates.reshape(-1, 3), gates, atol=1e-6)


# ----------------------------------------------------------------------------------------- one decision for everything


def test_one_decision_serves_every_layer():
    model = adapted(tiny_llama())
    found = decisions(model, input_ids=tokens())
    assert len(found) == 14 and all(routing is found[0] for routing in found)
    assert found[0].token_shape == (2, 7) and found[0].router_input is None  # nothing kept that eval does not need
    assert switch_layers(model)["base_model.model.model.layers.0.mlp.up_proj"].routing_state.frame is None


@pytest.mark.parametrize("module", ["layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj"])
def test_a_deeper_router_decides_from_its_own_input(module):
    model = adapted(tiny_llama(), router_module=module)
    layers = switch_layers(model.get_base_model())
    assert next(iter(layers)).endswith(module)
    assert all(not layer.loraswitch_router for name, layer in layers.items() if not name.endswith(module))
    first = next(iter(layers.values()))
    seen = []
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    routing = decisions(model, input_ids=tokens())[0]
    expected = route(first.loraswitch_router["default"](seen[0]), options(4))
    assert torch.equal(routing.experts, expected.experts)


def test_a_deeper_router_sees_context_and_the_first_linear_of_a_llama_does_not():
    ids = tokens(1, 6)
    other = torch.cat([ids.flip(1)[:, :-1], ids[:, -1:]], dim=1)  # another past, the same last token
    for module, blind in [(None, True), ("layers.1.self_attn.q_proj", False)]:
        model = adapted(tiny_llama(), router_module=module, num_experts=8)
        gates = [decisions(model, input_ids=x)[0].dense_gates[0, -1] for x in (ids, other)]
        assert torch.allclose(gates[0], gates[1], atol=1e-6) == blind


def test_a_router_that_runs_too_late_is_named():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.runs_last = nn.Linear(5, 3)
            self.runs_first = nn.Linear(4, 5)

        def forward(self, x):
            return self.runs_last(self.runs_first(x))

    for router_module in (None, "runs_last"):
        config = switch_config(target_modules=["runs_first", "runs_last"], router_module=router_module)
        model = get_peft_model(Backwards(), config)
        with pytest.raises(RuntimeError, match="'runs_first' runs before the linear that routes, 'runs_last'"):
            model(torch.randn(2, 4))


def test_listed_first_is_not_run_first():
    """OPT lists k before q and runs q before k: the router, held by k, decides from the first input all the same."""
    model = adapted(tiny_opt())
    layers = switch_layers(model)
    holder = next(name for name, layer in layers.items() if layer.loraswitch_router)
    order = []
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    found = decisions(model, input_ids=tokens())
    assert order[0] != holder and all(routing is found[0] for routing in found)


# ------------------------------------------------------------------------------------------------ shapes of the tokens


def gates_of(*shape: int) -> Routing:
    return route(torch.randn(*shape, 5), options())


@pytest.mark.parametrize(
    "routed, seen", [((2, 3), (6,)), ((6,), (2, 3)), ((2, 3), (1, 2, 3)), ((2, 0), (0,)), ((0,), (0, 3)), ((), (1,))]
)
def test_flattened_tokens_keep_their_gates(routed, seen):
    routing = gates_of(*routed)
    gates = routing.dense_gates_for(torch.zeros(*seen, 9), "name")
    assert gates.shape == (*seen, 5)
    assert torch.equal(gates.flatten(), routing.dense_gates.flatten())


@pytest.mark.parametrize(
    "routed, seen", [((2, 3), (3, 2)), ((2, 3), (2, 4)), ((2, 3), (2,)), ((6,), (5,)), ((0,), (1,))]
)
def test_other_tokens_are_refused(routed, seen):
    with pytest.raises(RuntimeError, match="'the.layer' sees"):
        gates_of(*routed).dense_gates_for(torch.zeros(*seen, 9), "the.layer")


# ------------------------------------------------------------------------------------------------------------- jitter


def test_jitter_stays_in_its_range_and_is_new_for_every_element():
    x = torch.full((200, 50), 2.0)
    noise = jitter(x, 0.1) / x
    assert noise.min() >= 0.9 and noise.max() <= 1.1
    assert noise.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.05)
    assert noise.mean().item() == pytest.approx(1, abs=1e-2)


def test_jitter_moves_the_gates_in_training_only_and_never_what_experts_see():
    plain, noisy = (adapted(tiny_llama(), router_jitter=amount) for amount in (0.0, 0.5))
    batch = {"input_ids": tokens()}
    assert torch.equal(plain(**batch).logits, noisy(**batch).logits)
    layer = next(iter(switch_layers(noisy).values()))
    inputs = []
    layer.loraswitch_A["default"].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    gates = [decisions(model.train(), **batch)[0].gates for model in (plain, noisy, noisy)]
    assert not torch.allclose(gates[0], gates[1]) and not torch.allclose(gates[1], gates[2])
    assert torch.equal(inputs[0], inputs[1])
    assert torch.allclose(gates[1].sum(-1), torch.ones(2, 7))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_hidden_states_are_refused(value):
    model = adapted(tiny_llama())
    model.get_base_model().model.embed_tokens.weight.data[5, 3] = value
    model(input_ids=torch.full((1, 4), 6))
    for train in (False, True):
        with pytest.raises(ValueError, match="NaN or Inf in the input of the router of adapter 'default'.*q_proj"):
            model.train(train)(input_ids=torch.tensor([[6, 5, 6, 7]]))
    assert model.router_stats()["tokens"] == 0
    model(**padded([4, 2]))  # and the model still works: token 5 is not in this batch
