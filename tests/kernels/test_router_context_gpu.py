"""The router's kernel with context, on a GPU: the float64 oracle, odd sizes, every dtype, poisoned outputs, graph replay."""

from __future__ import annotations

import pytest
import torch

import kernel_oracle as oracle
from kernel_groups import captured
from kernel_oracle import DTYPES, poison_allocator, randn
from peft_loraswitch import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]


def past(tokens: int, num_experts: int) -> torch.Tensor:
    """Sums as they may be, also of sequences that begin."""
    previous = torch.randn(tokens, num_experts + 1, device="cuda") * 3
    previous[:, -1] = torch.rand(tokens, device="cuda") * 10
    previous[0] = 0
    return previous


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 2), (8, 2), (9, 1), (33, 5), (256, 8)])
@pytest.mark.parametrize("in_features", [7, 64, 4096])
def test_against_the_oracle(x_dtype, router_dtype, num_experts, top_k, in_features):
    x = randn(37, in_features, dtype=x_dtype)
    router = randn(num_experts, in_features, dtype=router_dtype, scale=in_features**-0.5)
    previous, real = past(37, num_experts), torch.rand(37, device="cuda") < 0.6
    real[0] = False
    for normalize, mask, decay in ((False, None, 0.9), (True, real, 0.3), (True, None, 1.0), (False, real, 0.0)):
        before = previous.clone()
        poison_allocator()
        experts, gates, sums = kernels.router_context(x, router, previous, decay, top_k, normalize, mask)
        expected_experts, expected_gates, expected_sums = oracle.route_context(
            x, router, previous, decay, top_k, normalize, mask
        )
        assert torch.equal(previous, before)
        assert mask is None or torch.equal(sums[~mask], before[~mask])  # padding leaves them as they are
        assert torch.allclose(sums.double(), expected_sums, rtol=1e-4, atol=1e-4)
        # ids may differ only where two probabilities are equal to float32 rounding
        same = (experts == expected_experts).all(-1)
        assert same.float().mean() > 0.9
        assert torch.allclose(gates[same].double(), expected_gates[same], rtol=2e-3, atol=1e-5)
        assert all(len(set(row)) == top_k for row in experts.tolist())


def test_a_step_at_a_time_is_the_decayed_mean_of_all_tokens():
    x, router = randn(50, 3, 64, dtype=torch.float32), randn(8, 64, dtype=torch.float32)
    sums = torch.zeros(3, 9, device="cuda")
    for t in range(50):
        experts, gates, sums = kernels.router_context(x[t], router, sums, 0.9, 2, True, None)
    weights = 0.9 ** torch.arange(49, -1, -1, dtype=torch.float64, device="cuda")
    mean = (weights[:, None, None] * x.double()).sum(0) / weights.sum()
    expected_experts, expected_gates = oracle.route(mean, router, 2, True)
    assert torch.equal(experts, expected_experts)
    assert torch.allclose(gates.double(), expected_gates, rtol=1e-3, atol=1e-4)


def test_broken_rows_give_valid_ids_and_show():
    x, router, previous = torch.randn(4, 64, device="cuda"), torch.randn(10, 64, device="cuda"), past(4, 10)
    previous[1], x[2, 5] = float("nan"), float("inf")
    experts, gates, sums = kernels.router_context(x, router, previous, 0.9, 4, False, None)
    assert ((experts >= 0) & (experts < 10)).all() and all(len(set(row)) == 4 for row in experts.tolist())
    assert gates.isnan().all(-1).tolist() == [False, True, True, False]


def test_graph_replay_goes_on_from_its_own_sums():
    router, x = randn(8, 1024, dtype=torch.bfloat16, scale=1024**-0.5), randn(2, 1024, dtype=torch.bfloat16)
    state = torch.zeros(2, 9, device="cuda")

    def step():
        experts, gates, sums = kernels.router_context(x, router, state, 0.9, 2, True, None)
        state.copy_(sums)
        return experts, gates

    graph, made = captured(step)
    state.zero_()
    expected = torch.zeros(2, 9, device="cuda")
    for _ in oracle.rounds(50):
        x.copy_(torch.randn_like(x))
        made[0].fill_(7)
        made[1].fill_(float("nan"))
        graph.replay()
        experts, gates, expected = kernels.router_context(x, router, expected, 0.9, 2, True, None)
        for got, wanted in zip((*made, state), (experts, gates, expected), strict=True):
            assert torch.equal(got, wanted)
