"""Two CPU processes: the router's losses join whatever is differentiated under DDP and FSDP2, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import adapted, adapter_gradients, tiny_llama
from two_processes import LOSSES, WORLD, batch_of, on_two

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here"),
    pytest.mark.slow,
]

OBJECTIVES: dict[str, Callable[[Any], torch.Tensor]] = {
    "logits": lambda output: output.logits.square().mean(),
    "logits, in place": lambda output: output.logits.div_(0.7).square().mean(),
    "hidden states": lambda output: output.hidden_states[-1].square().mean(),
    "loss and logits": lambda output: 0.25 * output.loss + output.logits.square().mean(),
}


def policy(kind: str = "plain") -> Any:
    """ "compiled": few linears, because compiling takes long."""
    targets = {"target_modules": ["q_proj", "down_proj"]} if kind == "compiled" else {}
    return adapted(tiny_llama(), **LOSSES, **targets).train()


def alone(kind: str, name: str) -> list[dict[str, torch.Tensor]]:
    """The gradients of each process's batch in a process of its own."""
    found = []
    for rank in range(WORLD):
        model = policy(kind)
        OBJECTIVES[name](model(**batch_of(rank), output_hidden_states=True)).backward()
        found.append(adapter_gradients(model))
    return found


def assert_averaged(results: list[Any]) -> None:
    """What each process found, by (kind, objective), is the mean of both alone."""
    expected = {key: alone(*key) for key in results[0]}
    for result in results:
        assert result.keys() == expected.keys()
        for (kind, name), actual in result.items():
            first, second = expected[kind, name]
            assert actual.keys() == first.keys()
            for key in first:
                mean = (first[key] + second[key]) / 2
                torch.testing.assert_close(actual[key], mean, rtol=1e-4, atol=1e-6, msg=f"{kind}, {name}: {key}")


def ddp_gradients(rank: int, directory: str) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    warnings.simplefilter("ignore")
    found = {}
    for kind in ("plain", "unused", "reentrant"):
        for name, objective in OBJECTIVES.items():
            model = policy()
            if kind == "reentrant":
                model.activation_checkpointing_enable({"use_reentrant": True})
                model.enable_input_require_grads()
            wrapped = DistributedDataParallel(
                model, find_unused_parameters=kind == "unused", static_graph=kind == "reentrant"
            )
            for _ in range(2):
                model.zero_grad()
                objective(wrapped(**batch_of(rank), output_hidden_states=True)).backward()
            found[kind, name] = adapter_gradients(model)
    return found


def test_ddp(tmp_path):
    assert_averaged(on_two(ddp_gradients, tmp_path))


def fsdp_gradients(rank: int, directory: str) -> Any:
    """ "compiled": the layers, each by itself, so that the losses join at the outputs, when the router is sharded again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    found = {}
    for kind in ("plain", "compiled"):
        for name, objective in OBJECTIVES.items():
            if kind == "compiled" and name != "logits":
                continue
            torch.manual_seed(0)
            model, mesh = policy(kind), init_device_mesh("cpu", (WORLD,))
            for layer in model.base_model.model.model.layers:
                if kind == "compiled":
                    layer.compile(backend="aot_eager")
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            objective(model(**batch_of(rank), output_hidden_states=True)).backward()
            found[kind, name] = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return found


def test_fsdp2(tmp_path):
    assert_averaged(on_two(fsdp_gradients, tmp_path))
