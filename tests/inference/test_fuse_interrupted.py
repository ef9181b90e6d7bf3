"""A KeyboardInterrupt at any line of fuse_for_inference() or unfuse() leaves the model unfused, as it was before."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from fusing import join_anywhere
from helpers import adapted, tiny_llama, tokens
from peft_loraswitch import inference
from peft_loraswitch.inference.fuse import adapted_layers, is_fused
from peft_loraswitch.inference.fused_layer import FusedLinear, changing

FILES = {str(path) for path in Path(inference.__file__).parent.glob("*.py")}
STRATEGIES = {
    "fused": ("fused", False), "merge": ("merge", False), "in place": ("merge", True), "joined": ("fused", False, True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _join(monkeypatch: pytest.MonkeyPatch) -> None:
    join_anywhere(monkeypatch)


def interrupted_at(line: int, run: Callable[[], Any]) -> int:
    """Runs it, with a KeyboardInterrupt before the `line`-th line of our own; returns how many there were (so far). The lines of
    `with` and `try` are left out: there a tracer interrupts where no signal does, before a lock would be given back."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in FILES:
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and text != "try:" and not text.startswith("with "):
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines


def state_of(model: nn.Module) -> Any:
    """All that fusing touches."""
    modules = {
        name: (
            type(module),
            module.training,
            set(vars(module)),
            [len(v) for k, v in vars(module).items() if "hooks" in k],
        )
        for name, module in model.named_modules()
    }
    return modules, {name: type(parameter) for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model: nn.Module, length: int = 1) -> torch.Tensor:
    return model(input_ids=tokens(1, length)).logits


def check_no_lock_is_held(model: nn.Module) -> None:
    """Another thread would wait for it for ever; this one would not."""
    thread = threading.Thread(target=model.unfuse, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def made() -> nn.Module:
    """float64 experts on float32 weights, so that there are casts; one module in training, so that there are flags to keep."""
    model = adapted(tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "v_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if "loraswitch_A" in name or "loraswitch_B" in name:
            parameter.data = parameter.data.double()
    model.base_model.model.model.norm.train()
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fusing(strategy):
    model = made()
    expected, before = logits(model), state_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # the first time, some things are done once for the process
        total = interrupted_at(-1, lambda: model.fuse_for_inference(*STRATEGIES[strategy]))
        model.unfuse()
    assert total > 100
    for line in sorted({*range(1, 30), *range(30, total, max(1, total // 120)), *range(total - 10, total + 1)}):
        interrupted_at(line, lambda: model.fuse_for_inference(*STRATEGIES[strategy]))
        if line == total:  # everything was done
            model.unfuse()
        assert not is_fused(model) and state_of(model) == before, f"line {line} of {total}"
        assert torch.equal(logits(model), expected) and not changing._is_owned()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with model.fuse_for_inference(*STRATEGIES[strategy]):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unfusing(strategy):
    model = made()
    expected, before = logits(model), state_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def fused() -> None:
        model.fuse_for_inference(*STRATEGIES[strategy])
        logits(model)
        logits(model, 3)

    fused()
    total = interrupted_at(-1, model.unfuse)
    still = 0
    for line in range(1, total + 1):
        fused()
        interrupted_at(line, model.unfuse)
        if is_fused(model):  # before anything was done
            assert all(isinstance(layer, FusedLinear) for layer in adapted_layers(model))
            still += 1
            model.unfuse()
        assert state_of(model) == before, f"line {line} of {total}"
        assert torch.equal(logits(model), expected) and not changing._is_owned()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    check_no_lock_is_held(model)
    assert total > 20 and still <= 4
