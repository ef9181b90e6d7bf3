"""One expert a token with gate exactly 1 (`top_k=1, normalize_gates=True`), and a straight-through gradient to the router."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import kernel_oracle
import oracle
from helpers import (
    adapted,
    adapter_gradients,
    gradients_with_and_without_checkpointing,
    randomize_adapter,
    router_layer,
    switch_config,
    switch_layers,
    tiny_llama,
    tokens,
    without_losses,
)
from peft_loraswitch import LoRASwitchConfig, ops
from peft_loraswitch.routing.decision import decide, route
from peft_loraswitch.routing.options import RoutingOptions

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)
devices = pytest.mark.parametrize("device", ["cpu", GPU])
HARD: dict[str, Any] = {"top_k": 1, "normalize_gates": True}
BATCH = {"input_ids": tokens(), "labels": tokens()}
INF, NAN = float("inf"), float("nan")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def awkward_logits(device: str = "cpu") -> tuple[torch.Tensor, list[int]]:
    """float32 [T, 5] and the experts: ties, far and near logits, and at the end three tokens that cannot be decided."""
    rows = [
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0),
        ([1.0, 2.0, 2.0, -1.0, 2.0], 1),
        ([-0.0, 0.0, -1.0, -0.0, 0.0], 0),
        ([-1000.0, 1000.0, 999.9999, 0.0, 0.0], 1),
        ([3.3, 3.3000002, 3.3, 3.3, 3.3], 1),
        ([-INF, -INF, -3.0, -INF, -3.0], 2),
        ([1e-30, 0.0, -1e-30, 0.0, 0.0], 0),
        ([3.0, NAN, 1.0, 1.0, 1.0], 1),
        ([3.0, 1.0, INF, 1.0, INF], 2),
        ([-INF] * 5, 0),
    ]
    return torch.tensor([row for row, _ in rows], device=device), [expert for _, expert in rows]


def check(experts: torch.Tensor, gates: torch.Tensor, expected: list[int]) -> None:
    assert experts.flatten().tolist() == expected
    assert gates.flatten()[:-3].tolist() == [1.0] * (len(expected) - 3)  # exactly
    assert gates.flatten()[-3:].isnan().all()


# --------------------------------------------------------------------------------------------------------- configuration


def test_the_default_of_one_expert_stays_the_softmax():
    assert LoRASwitchConfig(top_k=1).normalize_gates is False
    assert LoRASwitchConfig(**HARD).normalize_gates is True


def test_saved_and_loaded(tmp_path):
    model = adapted(tiny_llama(), **HARD)
    model.save_pretrained(tmp_path)
    assert "1, with gate 1 |" in (tmp_path / "README.md").read_text()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert again.peft_config["default"].normalize_gates is True
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)


# ----------------------------------------------------------------------------------------------------- the gate, anywhere


@devices
@pytest.mark.parametrize("gradients", [False, True])
def test_the_gate_is_exactly_one(gradients, device):
    logits, expected = awkward_logits(device)
    check(*decide(logits.requires_grad_(gradients), 1, True), expected)
    many = torch.randn(5000, 7, device=device) * 10
    assert (decide(many.requires_grad_(gradients), 1, True)[1] == 1).all()


@devices
@pytest.mark.parametrize("gradients", [False, True])
def test_compiled(gradients, device, fresh_compiler):
    compiled = torch.compile(lambda logits: decide(logits, 1, True), fullgraph=True)
    logits, expected = awkward_logits(device)
    logits.requires_grad_(gradients)
    experts, gates = compiled(logits)
    check(experts, gates, expected)
    if gradients:
        weight = torch.arange(1.0, 11.0, device=device).unsqueeze(-1)
        (found,) = torch.autograd.grad((gates * weight)[:-3].sum(), logits)
        (wanted,) = torch.autograd.grad((decide(logits, 1, True)[1] * weight)[:-3].sum(), logits)
        torch.testing.assert_close(found, wanted, equal_nan=True)


def test_exported():
    class Decide(nn.Module):
        def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return decide(logits, 1, True)

    logits, expected = awkward_logits()
    dim = torch.export.Dim("tokens")
    program = torch.export.export(Decide(), (torch.randn(4, 5),), dynamic_shapes=({0: dim},))
    check(*program.module()(logits), expected)
    core = program.run_decompositions()
    check(*core.module()(logits), expected)
    operators = [node.target for node in core.graph.nodes if node.op == "call_function"]
    assert all(torch.Tag.core in operator.tags for operator in operators), operators


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_op(dtype, device):
    """On a GPU: the kernel, which divides the gate by itself, and PyTorch's operations."""
    for in_features in (1, 4):
        router = torch.zeros(9, in_features, device=device, dtype=dtype)
        router[:, 0] = torch.tensor([0.5, 2.0, 2.0, -3.0, -3.0, 1.0, 2.0, 0.0, -0.0], device=device)
        x = torch.zeros(3, in_features, device=device, dtype=dtype)
        x[:, 0] = torch.tensor([1.0, -1.0, 0.0], device=device)
        for implementation in (ops.route, ops.pytorch.route_pytorch):
            experts, gates = implementation(x, router, 1, True)
            assert experts.tolist() == [[1], [3], [0]] and gates.tolist() == [[1.0]] * 3
        many = torch.randn(2000, in_features, device=device, dtype=dtype)
        assert (ops.route(many, torch.randn(256, in_features, device=device, dtype=dtype), 1, True)[1] == 1).all()
        x[1] = NAN
        gates = ops.route(x, router, 1, True)[1]
        assert gates[[0, 2]].tolist() == [[1.0]] * 2 and gates[1].isnan().all()


def test_the_oracles_agree():
    x, router = torch.randn(20, 6), torch.randn(4, 6)
    experts, gates = kernel_oracle.route(x, router, 1, True)
    assert [[(e, 1.0)] for e in experts.flatten().tolist()] == [
        [(e, float(g.detach())) for e, g in token] for token in oracle.decide(x, router, 1, True)
    ]
    assert (gates == 1).all()


@pytest.mark.parametrize("shared", [0, 2])
def test_routing(shared):
    options = RoutingOptions(num_experts=5, top_k=1, normalize_gates=True, num_shared_experts=shared)
    logits, expected = awkward_logits()
    routing = route(logits[:-3], options)
    dense = torch.zeros(len(expected) - 3, 5 + shared)
    dense[range(len(dense)), expected[:-3]] = 1
    dense[:, 5:] = 1  # 1 / top_k
    assert torch.equal(routing.dense_gates, dense)


# --------------------------------------------------------------------------------------------------------------- gradient


def test_the_gradient_is_that_of_the_softmax():
    logits = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 1, dtype=torch.float64)
    found = [torch.autograd.grad((decide(logits, 1, hard)[1] * weight).sum(), logits)[0] for hard in (True, False)]
    assert torch.equal(*found) and found[0].norm() > 1e-2


def test_finite_differences_of_the_surrogate():
    """In float64: the gate is 1 + p(router) - p(router now), the expert the one that is chosen now. Its derivative by finite
    differences, of a whole adapted linear written out here, is the gradient of router and experts."""
    torch.manual_seed(3)
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], router_aux_loss_coef=0.0,
                    router_z_loss_coef=0.0, **HARD)  # fmt: skip
    layer = router_layer(model)
    x, weight = torch.randn(9, 6), torch.randn(9, 5).double()
    named = {"router": layer.loraswitch_router, "A": layer.loraswitch_A, "B": layer.loraswitch_B}
    values = {name: modules["default"].weight.detach().double() for name, modules in named.items()}
    now = (x.double() @ values["router"].T).softmax(-1)
    chosen = now.argmax(-1)
    assert len(set(chosen.tolist())) > 1

    def surrogate(name: str, value: torch.Tensor) -> torch.Tensor:
        at = {**values, name: value}
        probabilities = (x.double() @ at["router"].T).softmax(-1)
        total = torch.zeros((), dtype=torch.float64)
        for t, e in enumerate(chosen.tolist()):
            gate = 1 + probabilities[t, e] - now[t, e]
            base = layer.base_layer.weight.double() @ x[t].double() + layer.base_layer.bias.double()
            y = base + layer.scaling["default"] * gate * (at["B"][e] @ (at["A"][e] @ x[t].double()))
            total = total + (y.detach() * weight[t]).sum() + (y.detach() ** 2).sum()
        return total

    model.train()
    y = model(x)
    ((y * weight).sum() + (y.double() ** 2).sum()).backward()
    for name, modules in named.items():
        found = modules["default"].weight.grad
        numeric = torch.zeros_like(values[name])
        for index in range(numeric.numel()):
            step = torch.zeros_like(numeric)
            step.view(-1)[index] = 1e-5
            numeric.view(-1)[index] = (
                surrogate(name, values[name] + step) - surrogate(name, values[name] - step)
            ) / 2e-5
        assert numeric.norm() > 1e-2
        torch.testing.assert_close(found.double(), numeric, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "fields",
    [{}, {"trainable": "router"}, {"num_shared_experts": 1, "router_module": "layers.1.mlp.up_proj"}],
    ids=["all", "router", "shared"],
)
def test_a_model_equals_the_oracle(fields):
    model = without_losses(adapted(tiny_llama(), **HARD, **fields)).train()
    exact = oracle.Oracle(model)
    ours, theirs = model(**BATCH), exact(**BATCH)
    torch.testing.assert_close(ours.logits.double(), theirs.logits, rtol=1e-4, atol=1e-4)
    for each in (ours, theirs):
        each.loss.backward()
    expected, found = exact.gradients(), adapter_gradients(model)
    assert any("router" in name and gradient.norm() > 1e-4 for name, gradient in found.items())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-3, atol=1e-5)


def test_an_expert_chosen_by_all_computes_its_lora():
    """In float32 to the bit of the same products with one expert alone: nothing scales it."""
    model = adapted(tiny_llama(), **HARD)
    for layer in switch_layers(model).values():
        for router in layer.loraswitch_router.values():
            router.weight.data.zero_()  # ties: everybody to expert 0
    alone = adapted(tiny_llama(), num_experts=1, top_k=1)
    for ours, theirs in zip(switch_layers(model).values(), switch_layers(alone).values(), strict=True):
        for word in ("loraswitch_A", "loraswitch_B"):
            getattr(theirs, word)["default"].weight.data.copy_(getattr(ours, word)["default"].weight.data[:1])
    torch.testing.assert_close(model(**BATCH).logits, alone(**BATCH).logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ every other path


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(reentrant):
    model = adapted(tiny_llama(num_hidden_layers=3), **HARD)
    expected, found = gradients_with_and_without_checkpointing(model, reentrant)
    assert any("router" in name and gradient.norm() > 1e-4 for name, gradient in expected.items())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_mixed_batch():
    model = adapted(tiny_llama(), **HARD)
    model.add_adapter("soft", switch_config(top_k=1))
    randomize_adapter(model, "soft", seed=5)
    model.eval()
    ids, names = tokens(3), ["default", "__base__", "soft"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for sample, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids[sample : sample + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids[sample : sample + 1]).logits
            torch.testing.assert_close(mixed[sample : sample + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["fused", "merge"])
def test_fused(strategy):
    model = adapted(tiny_llama(), **HARD)
    ids = tokens(1, 5)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.fuse_for_inference(strategy)
        found = model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for length in range(1, 4):
            one = model(input_ids=ids[:, :length]).logits[:, -1]
            torch.testing.assert_close(one, expected[:, length - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_training_step(fresh_compiler):
    model = adapted(tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"], **HARD).train()
    eager = copy.deepcopy(model)
    expected = eager(**BATCH)
    expected.loss.backward()
    found = torch.compile(model, backend="aot_eager")(**BATCH)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    wanted, got = adapter_gradients(eager), adapter_gradients(model)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_router_trains():
    """Two kinds of tokens, two experts that suit one kind each: the hard gate finds out which."""
    model = adapted(nn.Sequential(nn.Linear(4, 4, bias=False)), r=4, num_experts=2, target_modules=["0"],
                    router_aux_loss_coef=0.0, router_z_loss_coef=0.0, trainable="router", **HARD)  # fmt: skip
    layer = router_layer(model)
    layer.loraswitch_B["default"].weight.data.normal_()
    layer.loraswitch_router["default"].weight.data.mul_(0.01)
    x = torch.randn(64, 4)
    kind = (x[:, 0] > 0).long()
    a, b = (layer.loraswitch_A["default"].weight.detach(), layer.loraswitch_B["default"].weight.detach())
    each = torch.einsum("eor,eri,ti->teo", b, a, x) * layer.scaling["default"]
    target = x @ layer.base_layer.weight.detach().T + each[range(64), kind]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    first = float((model(x) - target).square().mean())
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.3 * first
