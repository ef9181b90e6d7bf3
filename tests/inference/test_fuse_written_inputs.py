"""Between the linears of a fused group there is the code of others: it may write to what they share, or end the forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from fusing import adapted, close, groups, ids, layer_of
from helpers import tiny_llama
from peft_loraswitch.routing.frame import current

X = ids(1, 6, "cpu")


def made() -> nn.Module:
    return adapted(tiny_llama(num_hidden_layers=1))


def before(module: nn.Module, args: tuple[Any, ...]) -> None:
    args[0].mul_(1.5)


def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    args[0].mul_(1.5)


def before_any(module: nn.Module, args: tuple[Any, ...]) -> None:
    if getattr(module, "name", "").endswith("k_proj"):
        before(module, args)


WRITERS: dict[str, Callable[[nn.Module], Any]] = {
    "before k": lambda model: layer_of(model, "k_proj").register_forward_pre_hook(before),
    "after q": lambda model: layer_of(model, "q_proj").register_forward_hook(after),
    "before v": lambda model: layer_of(model, "v_proj").register_forward_pre_hook(before),
    "before up": lambda model: layer_of(model, "up_proj").register_forward_pre_hook(before),
    "on all modules": lambda model: nn.modules.module.register_module_forward_pre_hook(before_any),
}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=X, use_cache=False).logits
    return result


@contextmanager
def written(model: nn.Module, writer: str) -> Iterator[None]:
    handle = WRITERS[writer](model)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["fused first", "hooked first"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_to_the_shared_input_is_seen(writer, order, mode):
    model = made()
    with MODES[mode]():
        plain = logits(model)
        with written(model, writer):
            expected = logits(model)
            assert not close(expected, plain, 1e-2)
            if order == "hooked first":
                model.fuse_for_inference("fused")
                assert close(logits(model), expected)
        if order == "fused first":
            model.fuse_for_inference("fused")
            with written(model, writer):
                assert close(logits(model), expected)
        assert close(logits(model), plain)


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["before k", "after q"])
def test_compiled(writer):
    model = made()
    with torch.no_grad(), written(model, writer):
        expected = logits(model)
        model.fuse_for_inference("fused")
        torch._dynamo.reset()
        assert close(logits(torch.compile(model, backend="eager", fullgraph=True)), expected)
        model.unfuse()
    model = made()
    model.fuse_for_inference("fused")
    with torch.no_grad(), written(model, writer):
        torch._dynamo.reset()
        assert close(logits(torch.compile(model, backend="eager", fullgraph=True)), expected)


def test_hooks_that_only_look_leave_groups_together():
    """Where writes are counted."""
    model, found = made(), []
    layer_of(model, "k_proj").register_forward_pre_hook(lambda layer, args: found.append(len(current.results)))
    with torch.no_grad():
        expected = logits(model)
        model.fuse_for_inference("fused")
        assert sorted(group.size for group in groups(model)) == [1, 1, 1, 1, 1, 2, 3]
        found.clear()
        assert close(logits(model), expected)
    assert found == [2]


# ------------------------------------------------------------------------------------------------ a forward that is left


def interrupted(model: nn.Module) -> torch.Tensor:
    """A forward that a KeyboardInterrupt ends before k; returns what k would have got."""
    seen: list[torch.Tensor] = []

    def leave(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise KeyboardInterrupt

    handle = layer_of(model, "k_proj").register_forward_pre_hook(leave)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
@pytest.mark.parametrize("strategy", [None, "fused", "merge"])
def test_a_layer_alone_does_not_follow_a_forward_that_was_interrupted(strategy, name):
    model = made()
    with torch.no_grad():
        expected = logits(model)
        if strategy is not None:
            model.fuse_for_inference(strategy)
        x = interrupted(model)
        with pytest.raises(RuntimeError, match="outside of one"):
            layer_of(model, name)(x)
        assert not current.frames and not current.results
        assert close(logits(model), expected)
    assert not current.frames and not current.results


def test_unfusing_after_an_interrupt_leaves_nothing():
    model = made()
    model.fuse_for_inference("fused")
    interrupted(model)
    model.unfuse()
    assert not current.frames and not current.results
