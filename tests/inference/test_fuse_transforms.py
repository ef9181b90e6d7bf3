"""Transforms of torch.func and forward-mode derivatives through a fused model: those of the unfused one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from fusing import adapted, close, devices, ids
from helpers import tiny_llama
from recipes.benchmarks import stub_library

Run = Callable[[Tensor], Tensor]
STRATEGIES = {"fused": ("fused", False), "merge": ("merge", False), "in place": ("merge", True)}


def direction(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), device=x.device).reshape(x.shape)


def by_jvp(run: Run, x: Tensor) -> Tensor:
    return jvp(run, (x,), (direction(x),))[1]


def by_dual_numbers(run: Run, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(run(forward_ad.make_dual(x, direction(x)))).tangent
        return tangent


@torch.no_grad()
def by_vmap(run: Run, x: Tensor) -> Tensor:
    return vmap(run)(torch.stack([x, 0.5 * x]))


def by_grad(run: Run, x: Tensor) -> Tensor:
    return grad(lambda each: run(each).square().sum())(x)


def by_grad_of_jvp(run: Run, x: Tensor) -> Tensor:
    return grad(lambda each: by_jvp(run, each).square().sum())(x)


WAYS = [by_jvp, by_dual_numbers, by_vmap, by_grad, by_grad_of_jvp]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__[3:])


def runs(device: str, length: int) -> tuple[torch.nn.Module, Run, Tensor]:
    """A model of one block, its logits for embedded tokens, and some of those."""
    model = adapted(tiny_llama(num_hidden_layers=1, attn_implementation="eager"), device)
    x = model.get_input_embeddings()(ids(1, length, device)).detach()

    def run(embedded: Tensor) -> Tensor:
        logits: Tensor = model(inputs_embeds=embedded, use_cache=False).logits
        return logits

    return model, run, x


@ways
@devices
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_as_unfused(strategy, length, device, way):
    model, run, x = runs(device, length)
    expected, value = way(run, x), run(x)
    model.fuse_for_inference(STRATEGIES[strategy][0], in_place=STRATEGIES[strategy][1])
    with torch.no_grad():
        for _ in range(2):  # on a GPU the second finds it packed
            assert close(run(x), value)
    assert close(way(run, x), expected)
    with torch.no_grad():
        assert close(run(x), value)


@ways
def test_what_is_packed_for_the_kernels_is_left_alone(way, library):
    model, run, x = runs("cpu", 2)
    expected, value = way(run, x), run(x)
    model.fuse_for_inference("fused")
    stub_library.use_kernels(model)
    with torch.no_grad():
        for _ in range(2):
            assert close(run(x), value)
        called = len(library.calls)
        assert called
    with torch.no_grad() if way is by_vmap else torch.enable_grad():
        assert close(way(run, x), expected)
    assert len(library.calls) == called


@pytest.mark.slow
@pytest.mark.parametrize("way", [by_jvp, by_vmap], ids=lambda way: way.__name__[3:])
def test_compiled(way):
    """One graph, which knows under what it was traced."""
    model, run, x = runs("cpu", 2)
    expected, value = way(run, x), run(x)
    model.fuse_for_inference("fused")
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert close(compiled(x), value)
        assert close(torch.compile(lambda: way(run, x), fullgraph=True, backend="eager")(), expected)
    assert close(by_dual_numbers(compiled, x), by_dual_numbers(run, x))
    with torch.no_grad():
        assert close(compiled(x), value)
