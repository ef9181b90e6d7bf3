"""Whatever way a forward ends, the next one starts clean; and a forward within a forward leaves the outer one alone."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from helpers import adapted, adapter_gradients, switch_layers, tiny_llama, tokens
from peft_loraswitch.routing.frame import RoutingFrame

pytestmark = pytest.mark.compat
ENDINGS = [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError]


def made(attach: str = "peft") -> nn.Module:
    """A model with an adapter; attach="native": without a PeftModel around it."""
    model = adapted(tiny_llama(num_hidden_layers=3))
    return (model if attach == "peft" else model.get_base_model()).train()


def backbone_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def state_of(model: nn.Module):
    return next(iter(switch_layers(model).values())).routing_state


def interrupt(
    model: nn.Module, error: type[BaseException], where: str, ids: torch.Tensor, call: nn.Module | None = None
) -> None:
    """A forward that is left by `error` in the module whose name ends with `where`."""
    module = next(m for name, m in model.named_modules() if name.endswith(where))

    def raise_it(*_: object) -> None:
        raise error

    handle = module.register_forward_pre_hook(raise_it)
    with pytest.raises(error):
        (call or model)(ids)
    handle.remove()


NEXT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the model": lambda model: model,
    "the backbone": backbone_of,
    "an inner module": lambda model: backbone_of(model).model,
}


@pytest.mark.parametrize("then", NEXT)
@pytest.mark.parametrize("where", ["layers.1.mlp", "layers.0.self_attn.k_proj.base_layer", "lm_head"])
@pytest.mark.parametrize("error", ENDINGS)
@pytest.mark.parametrize("attach", ["peft", "native"])
def test_the_next_forward_starts_clean(attach, error, where, then):
    model, untouched = made(attach), made(attach)
    first, second = tokens(2, 7), tokens(2, 7, seed=5)
    interrupt(model, error, where, first)

    def result(each: nn.Module):
        each.zero_grad()
        output = NEXT[then](each)(second)
        output[0].square().sum().backward()
        return output[0].detach(), adapter_gradients(each)

    (value, gradients), (expected, expected_gradients) = result(model), result(untouched)
    assert torch.equal(value, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)
    assert state_of(model).frame is None


@pytest.mark.parametrize("error", ENDINGS)
def test_a_part_of_the_model_called_next_does_not_find_the_old_decision(error):
    """The tokens have the same shape, so nothing else would show."""
    model = made("native")
    interrupt(model, error, "layers.1.mlp", tokens(2, 7))
    with pytest.raises(RuntimeError, match="outside of one"):
        next(iter(switch_layers(model).values()))(torch.randn(2, 7, 32))


def test_interrupted_in_eval_mode_and_fused():
    model = made("native").eval()
    from peft_loraswitch.inference.fuse import fuse

    with torch.no_grad():
        expected = model(tokens(2, 7, seed=5)).logits
        fuse(model, "fused")
        interrupt(model, KeyboardInterrupt, "layers.1.mlp", tokens(2, 7))
        model.model(tokens(2, 7, seed=5))
        assert torch.allclose(model(tokens(2, 7, seed=5)).logits, expected, atol=1e-5)
    assert state_of(model).frame is None


@pytest.mark.parametrize("attach", ["peft", "native"])
def test_no_frame_is_kept(attach, monkeypatch):
    """500 interrupted forwards, and as many of an inner module in between: one frame at most is in memory."""
    model = made(attach)
    alive: weakref.WeakSet = weakref.WeakSet()
    created = RoutingFrame.__init__

    def init(self, *args, **kwargs) -> None:
        created(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(RoutingFrame, "__init__", init)
    for _ in range(50):
        interrupt(model, KeyboardInterrupt, "layers.2.mlp", tokens(1, 3))
        backbone_of(model).model(tokens(1, 3))
    gc.collect()
    assert len(alive) == 0


def test_a_thread_that_is_told_to_stop():
    """An exception set from outside arrives between two instructions, hooks or not."""
    model = made("native")
    entered, ended = threading.Event(), []

    def slow(*_: object) -> None:
        entered.set()
        for _ in range(500):
            time.sleep(0.01)

    handle = model.model.layers[1].register_forward_pre_hook(slow)

    def run() -> None:
        try:
            model(tokens(2, 7))
        except KeyboardInterrupt:
            handle.remove()
            with torch.no_grad():
                ended.append(model.model(tokens(2, 7, seed=5))[0])

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait(30)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    thread.join(30)
    assert not thread.is_alive()
    with torch.no_grad():
        assert torch.equal(ended[0], made("native").model(tokens(2, 7, seed=5))[0])


def test_a_hook_that_raises_after_the_forward():
    model, ids = made(), tokens(2, 7)

    def fail(*_: object) -> None:
        raise ValueError("a hook of somebody's")

    handle = model.get_base_model().register_forward_hook(fail)
    with pytest.raises(ValueError, match="somebody"):
        model(ids)
    handle.remove()
    assert state_of(model).frame is None
    assert torch.equal(model(ids).logits, made()(ids).logits)


# ------------------------------------------------------------------------------------------------- within each other

INNER = {
    "the model": lambda model, ids: model(ids).logits,
    "an inner module": lambda model, ids: backbone_of(model).model(ids)[0],
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("where", ["layers.1.mlp.gate_proj", "layers.1", "layers.0.self_attn.k_proj", "model.norm"])
def test_a_forward_within_a_forward(where, inner, gradients):
    """A hook runs the model on other tokens (and another number of them) in the middle of its forward."""
    ids, others = tokens(2, 7), tokens(3, 5, seed=3)

    def result(nested: bool):
        model = made()
        module = next(m for name, m in model.named_modules() if name.endswith(where))
        found = []

        def again(*_: object) -> None:
            if not found:
                found.append(None)
                with torch.set_grad_enabled(gradients):
                    found[0] = INNER[inner](model, others)

        handle = module.register_forward_pre_hook(again) if nested else None
        logits = model(ids).logits
        if handle:
            handle.remove()
        other = found[0] if nested else INNER[inner](model, others)
        (logits.square().sum() + (other.square().sum() if gradients else 0)).backward()
        return logits.detach(), other.detach(), adapter_gradients(model)

    nested, apart = result(True), result(False)
    assert torch.equal(nested[0], apart[0]) and torch.equal(nested[1], apart[1])
    for name, gradient in apart[2].items():
        torch.testing.assert_close(nested[2][name], gradient, rtol=1e-4, atol=1e-5)


def test_three_deep_and_an_interrupt_in_the_middle():
    model = made("native")
    ids, depth = tokens(2, 7), []
    expected = made("native")(ids).logits

    def again(*_: object) -> None:
        if len(depth) == 2:
            raise KeyboardInterrupt
        depth.append(None)
        try:
            model(tokens(1, 4))
        except KeyboardInterrupt:
            if len(depth) == 2:
                depth.append(None)
                raise

    handle = model.model.layers[1].register_forward_pre_hook(again)
    logits = model(ids).logits
    handle.remove()
    assert torch.equal(logits, expected) and state_of(model).frame is None
