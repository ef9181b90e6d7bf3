"""The gradient of the gates is added up by the groups of linears themselves (`gate_sum.py`): whatever part of a graph a backward
pass asks for, however often, and whatever became of the pass before, it is what autograd would have summed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo import compiled_autograd

from helpers import adapted, adapter_gradients, padded, tiny_llama
from peft_loraswitch.training import fast_linears, gate_sum
from peft_loraswitch.training.gate_sum import GateSum, summed


@pytest.fixture(scope="module")
def model() -> Any:
    made = adapted(tiny_llama(num_hidden_layers=2), target_modules="all-linear", num_experts=4, top_k=2).train()
    made(**padded([7, 4]))  # groups are known after it
    return made


def loss_of(model: Any) -> torch.Tensor:
    model.zero_grad()
    return model(**padded([7, 4])).loss


def router(model: Any) -> torch.nn.Parameter:
    (found,) = (p for name, p in model.named_parameters() if "loraswitch_router" in name and p.requires_grad)
    return found


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in adapter_gradients(model).items()}


def expected(model: Any) -> dict[str, torch.Tensor]:
    with fast_linears.plain():
        loss_of(model).backward()
    return gradients(model)


def close(actual: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((actual - exact).norm() < 1e-5 * exact.norm())


@pytest.fixture
def kept(monkeypatch) -> list[bool]:
    found: list[bool] = []
    keep = GateSum.keep
    monkeypatch.setattr(GateSum, "keep", lambda self, total: (found.append(keep(self, total)), found[-1])[1])
    return found


def test_the_router_gets_the_sum(model, kept):
    exact = expected(model)
    loss_of(model).backward()
    assert kept == [True] * 8  # q k v, o, gate up and down, twice
    for name, actual in gradients(model).items():
        assert close(actual, exact[name]), name


def test_a_second_backward_adds_up_anew(model):
    exact = expected(model)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, actual in gradients(model).items():
        assert close(actual, 2 * exact[name]), name


def test_two_forwards_before_their_backwards(model):
    exact = expected(model)
    losses = [loss_of(model), model(**padded([7, 4])).loss]
    for loss in reversed(losses):
        loss.backward()
    for name, actual in gradients(model).items():
        if "router" not in name:  # whose losses are shared by both
            assert close(actual, 2 * exact[name]), name


def test_a_pass_that_does_not_ask_for_the_router_leaves_nothing_to_the_next(model):
    exact = expected(model)
    loss = loss_of(model)
    experts = next(p for name, p in model.named_parameters() if "loraswitch_A.default" in name)
    torch.autograd.grad(loss, experts, retain_graph=True)
    (actual,) = torch.autograd.grad(loss, router(model), retain_graph=True)
    (name,) = (name for name in exact if "router" in name)
    assert close(actual, exact[name])
    loss.backward()
    for name, actual in gradients(model).items():
        assert close(actual, exact[name]), name


def test_a_pass_that_failed_leaves_nothing_to_the_next(model):
    exact = expected(model)
    hidden: list[torch.Tensor] = []
    handle = model.base_model.model.model.layers[0].register_forward_hook(lambda m, a, out: hidden.append(out))
    loss = loss_of(model)
    handle.remove()

    def fail(grad: torch.Tensor) -> None:
        raise ZeroDivisionError

    failing = hidden[0].register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    failing.remove()
    model.zero_grad()
    loss.backward()
    for name, actual in gradients(model).items():
        assert close(actual, exact[name]), name


def in_a_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("run", [lambda call: call(), in_a_thread], ids=["nested", "another-thread"])
def test_a_pass_in_the_middle_of_another_of_the_same_graph(model, run):
    exact = expected(model)
    hidden: list[torch.Tensor] = []
    handle = model.base_model.model.model.layers[0].register_forward_hook(lambda m, a, out: hidden.append(out))
    loss = loss_of(model)
    handle.remove()
    inner: list[torch.Tensor] = []

    def again(grad: torch.Tensor) -> None:
        hook.remove()
        run(lambda: inner.extend(torch.autograd.grad(loss, router(model), retain_graph=True)))

    hook = hidden[0].register_hook(again)
    loss.backward(retain_graph=True)
    (name,) = (name for name in exact if "router" in name)
    assert close(inner[0], exact[name])
    for name, actual in gradients(model).items():
        assert close(actual, exact[name]), name


def test_compiled_autograd_sums_what_each_group_hands_on(model, kept):
    exact = expected(model)
    loss = loss_of(model)
    with compiled_autograd._enable(lambda graph: graph):
        loss.backward()
    assert kept == [False] * 8
    for name, actual in gradients(model).items():
        assert close(actual, exact[name]), name


def test_a_part_that_another_stream_computes_goes_by_autograd(model, kept, monkeypatch):
    exact = expected(model)
    streams, now, so_far = iter([1, 1, 2, 1, 1, 2, 2, 1]), [1], GateSum.so_far

    def next_group(self: GateSum, device: torch.device) -> torch.Tensor | None:
        now[0] = next(streams)
        return so_far(self, device)

    monkeypatch.setattr(GateSum, "so_far", next_group)
    monkeypatch.setattr(gate_sum, "current_stream", lambda device: now[0])
    loss_of(model).backward()
    assert kept == [True, True, False, True, True, False, False, True]
    for name, actual in gradients(model).items():
        assert close(actual, exact[name]), name


def test_both_ways_in_one_graph():
    """A group that is differentiated twice hands its part on by autograd."""
    gates = torch.rand(3, 4, requires_grad=True)
    each, total = summed(gates)
    assert total is not None

    class Adds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, d: torch.Tensor) -> None:
            before = total.so_far(d.device)
            assert total.keep(torch.full((3, 4), 2.0) if before is None else before.add_(2.0))

    (Adds.apply(each) + Adds.apply(each) + (3 * each).sum()).backward()
    assert torch.equal(gates.grad, torch.full((3, 4), 7.0))
    gates.grad = None
    (Adds.apply(each) + Adds.apply(each)).backward()
    assert torch.equal(gates.grad, torch.full((3, 4), 4.0))


def test_gates_without_a_gradient_have_no_sum():
    assert summed(torch.rand(3, 4))[1] is None
    with torch.no_grad():
        assert summed(torch.rand(3, 4, requires_grad=True))[1] is None
    assert summed(torch.rand(3, 4, requires_grad=True).double())[1] is None
