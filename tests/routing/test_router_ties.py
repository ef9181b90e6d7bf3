"""Equal logits: the lowest expert index first, and the same everywhere that a decision is taken.

The reference is Python's `sorted` by (logit, index). Logits are exact: one feature of the input, 1 or -1 or 0.5, times one
column of the router, so that no order of summation can tell equal logits apart.
"""

from __future__ import annotations

import math

import pytest
import torch

import kernel_oracle
import oracle
from helpers import adapted, switch_layers, tiny_llama, tokens
from peft_loraswitch import kernels, ops
from peft_loraswitch.routing.decision import route
from peft_loraswitch.routing.options import RoutingOptions

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)
devices = pytest.mark.parametrize("device", ["cpu", GPU])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SIZES = [1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64, 100, 128, 255, 256]
INF, NAN = float("inf"), float("nan")
FEW = [-2.0, -1.0, 0.5, 3.0]
VALUES = {
    "few values": FEW,
    "all equal": [0.25],
    "zeros of both signs": [0.0, -0.0],
    "zeros and ones": [-1.0, -0.0, 0.0, 1.0],
    "equal exponentials": [-1000.0, -990.0, -980.0, 0.0, 1.0],  # exp(-990 - 1) is 0 in float32, and exp(-1001)
    "minus infinity": [*FEW, -INF],
    "infinity": [*FEW, INF, -INF],
    "NaN": [*FEW, INF, -INF, NAN],
}


def expected(logits: torch.Tensor, top_k: int) -> list[list[int]]:
    """By definition, [T, E] -> T lists of k: highest first, NaN as high as Inf, equal ones by index."""
    heights = [[INF if math.isnan(v) else v for v in row] for row in logits.double().tolist()]
    return [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:top_k] for row in heights]


def draw(values: list[float], num_experts: int, count: int = 6, device: str = "cpu") -> torch.Tensor:
    """float32 [count, num_experts], each one of `values`."""
    pool = torch.tensor(values)
    return pool[torch.randint(len(values), (count, num_experts))].to(device)


def options(num_experts: int, top_k: int, normalize: bool = True) -> RoutingOptions:
    return RoutingOptions(num_experts=num_experts, top_k=top_k, normalize_gates=normalize)


def as_product(values: torch.Tensor, dtype: torch.dtype, in_features: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x [3, in_features] and a router [E, in_features] whose logits are exactly `values`, -`values` and `values` / 2."""
    x, router = (torch.zeros(n, in_features, device=values.device) for n in (3, len(values)))
    x[:, 0], router[:, 0] = torch.tensor([1.0, -1.0, 0.5], device=values.device), values
    return x.to(dtype), router


def logits_of(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    return x[:, :1].double() * router[:, 0].double()


# ------------------------------------------------------------------------------------------------------------- PyTorch


@devices
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_route(values, device):
    for num_experts in SIZES:
        for top_k in range(1, min(num_experts, 8) + 1):
            logits = draw(values, num_experts, device=device)
            routing = route(logits, options(num_experts, top_k, normalize=False))
            assert routing.experts.tolist() == expected(logits, top_k), (num_experts, top_k)
            assert routing.experts.is_contiguous() and routing.gates.is_contiguous()
            gates = torch.softmax(logits.double(), -1).gather(-1, routing.experts)
            assert torch.allclose(routing.gates.double(), gates, atol=1e-6, equal_nan=True)


@devices
def test_many_tokens(device):
    """Sorting algorithms differ with the number of rows."""
    for num_experts, top_k in ((8, 2), (8, 8), (64, 8), (256, 8)):
        for values in ("few values", "all equal", "zeros of both signs"):
            logits = draw(VALUES[values], num_experts, 5000, device)
            routing = route(logits, options(num_experts, top_k))
            first = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
            assert torch.equal(routing.experts, first)
            rows = torch.randint(5000, (20,))
            assert routing.experts.cpu()[rows].tolist() == expected(logits.cpu()[rows], top_k)


@devices
@dtypes
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("in_features", [1, 4])
def test_the_op(in_features, values, dtype, device):
    """On a GPU: the kernel, and PyTorch's operations where it is not to be had."""
    implementations = [ops.route] if device == "cpu" else [ops.route, ops.pytorch.route_pytorch]
    for num_experts in SIZES:
        for top_k in range(1, min(num_experts, 8) + 1):
            x, router = as_product(draw(values, num_experts, 1, device)[0], dtype, in_features)
            logits = logits_of(x, router)
            for implementation in implementations:
                experts, gates = implementation(x, router, top_k, False)
                assert experts.tolist() == expected(logits, top_k), (implementation, num_experts, top_k)
                exact = torch.softmax(logits, -1).gather(-1, experts)
                assert torch.allclose(gates.double(), exact, atol=1e-6, equal_nan=True)


@devices
@pytest.mark.parametrize("normalize", [False, True])
def test_any_broken_logit_breaks_all_gates_of_its_token_and_of_no_other(normalize, device):
    for value in (NAN, INF):
        logits = draw(FEW, 8, 3, device)
        logits[1, 5] = value
        routing = route(logits, options(8, 3, normalize))
        assert routing.experts[1, 0] == 5 and routing.gates[1].isnan().all()
        assert routing.gates[[0, 2]].isfinite().all() and routing.dense_gates[[0, 2]].isfinite().all()
    nothing = route(torch.full((2, 8), -INF, device=device), options(8, 3, normalize))
    assert nothing.experts.tolist() == [[0, 1, 2]] * 2 and nothing.gates.isnan().all()


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_oracles(values):
    for num_experts in (1, 5, 9, 33):
        for top_k in {1, min(2, num_experts), min(8, num_experts)}:
            x, router = as_product(draw(values, num_experts, 1)[0], torch.float32)
            order = expected(logits_of(x, router), top_k)
            assert [[e for e, _ in token] for token in oracle.decide(x, router, top_k, True)] == order
            assert kernel_oracle.route(x, router, top_k, True)[0].tolist() == order


def test_gradients_reach_the_logits_through_the_chosen_alone():
    logits = torch.zeros(3, 5, requires_grad=True)
    routing = route(logits, options(5, 2, normalize=False))
    (routing.dense_gates * torch.arange(5.0)).sum().backward()
    # the experts 0 and 1 are chosen, all p are 1/5: this is the gradient of 0 * p_0 + 1 * p_1
    assert torch.allclose(logits.grad, torch.tensor([[-0.04, 0.16, -0.04, -0.04, -0.04]]).expand(3, 5))


# -------------------------------------------------------------------------------------------------- compiled, exported


@devices
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (64, 8)])
def test_compiled(num_experts, top_k, device, fresh_compiler):
    settings = options(num_experts, top_k)
    compiled = torch.compile(lambda logits: route(logits, settings).experts, fullgraph=True)
    for name, values in VALUES.items():
        logits = draw(values, num_experts, 50, device)
        assert compiled(logits).tolist() == expected(logits, top_k), name


def test_exported():
    class Decide(torch.nn.Module):
        def forward(self, logits):
            routing = route(logits, options(9, 3))
            return routing.experts, routing.dense_gates

    tokens_dim = torch.export.Dim("tokens")
    program = torch.export.export(Decide(), (torch.randn(4, 9),), dynamic_shapes=({0: tokens_dim},))
    operators = [node.target for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
    # what an exporter has to know, and none of those that leave the order of equal values open
    assert all(torch.Tag.core in operator.tags for operator in operators), operators
    assert not {"topk", "sort"} & {operator._opname for operator in operators}
    for name, values in VALUES.items():
        logits = draw(values, 9, 50)
        assert program.module()(logits)[0].tolist() == expected(logits, 3), name


# ------------------------------------------------------------------------------------------------------------- a model


@devices
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@dtypes
def test_a_router_that_cannot_decide_takes_the_first_experts(dtype, fused, device):
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("slow, and the decision is float32 whatever the model is")
    model = adapted(tiny_llama(), num_experts=9, top_k=3).to(device, dtype).requires_grad_(False)
    seen = []
    layer = next(iter(switch_layers(model).values()))
    layer.loraswitch_router["default"].weight.zero_()
    if fused:
        model.fuse_for_inference("fused")
    layer.register_forward_hook(lambda module, *_: seen.extend(module.routing_state.frame.routings.values()))
    for length in (1, 7, 40):
        model(input_ids=tokens(2, length).to(device))
    assert [routing.token_shape for routing in seen] == [(2, 1), (2, 7), (2, 40)]
    for routing in seen:
        assert (routing.experts == torch.tensor([0, 1, 2], device=device)).all()
        assert torch.allclose(routing.gates, torch.tensor(1 / 3, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernel_orders_by_logits_whose_exponentials_are_equal():
    assert kernels.available(), kernels.why_not()
    values = torch.tensor([-300.0, -200.0, 5.0, -200.0, -250.0, -1e30, -3e38, -INF], device="cuda")
    x, router = as_product(values, torch.float32)
    experts, gates = kernels.router(x[:1], router, 8, False)
    assert experts.tolist() == [[2, 1, 3, 4, 0, 5, 6, 7]]
    assert gates.tolist() == [[1.0] + [0.0] * 7]
