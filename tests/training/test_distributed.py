"""Two CPU processes with gloo: DDP's gradients are the average, the losses the mean over processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import adapted, adapter_gradients, tiny_llama, tokens
from two_processes import LOSSES, WORLD, alone, batch_of, on_two

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here"),
    pytest.mark.slow,
]


def ddp_gradients(rank: int, directory: str) -> list[dict[str, torch.Tensor]]:
    """By kind of model: plain, checkpointed, top-1 with every expert of a rank unused at times, with static graph."""
    from torch.nn.parallel import DistributedDataParallel

    warnings.simplefilter("ignore")
    results = []
    for kind in ("plain", "checkpointed", "reentrant", "top_1", "many experts"):
        model = adapted(tiny_llama(), **(CONFIGS[kind])).train()
        if kind in ("checkpointed", "reentrant"):
            model.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
        wrapped = DistributedDataParallel(model, static_graph=kind == "reentrant")
        for _ in range(2):  # an unused parameter is reported in the second step
            model.zero_grad()
            wrapped(**batch_of(rank)).loss.backward()
        results.append(dict(adapter_gradients(model).items()))
    return results


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": LOSSES,
    "checkpointed": LOSSES,
    "reentrant": LOSSES,
    "top_1": {"top_k": 1, **LOSSES},
    "many experts": {"num_experts": 32, "top_k": 1, **LOSSES},  # most are not picked by any token of a process
}


def test_ddp_averages_gradients_and_losses(tmp_path):
    results = on_two(ddp_gradients, tmp_path)
    for index, kind in enumerate(CONFIGS):
        first, second = alone(CONFIGS[kind])
        assert results[0][index].keys() == first.keys()
        for name in first:
            expected = (first[name] + second[name]) / 2
            for rank in range(WORLD):
                torch.testing.assert_close(
                    results[rank][index][name], expected, rtol=1e-4, atol=1e-6, msg=f"{kind} {name}"
                )


def trainer_step(rank: int, directory: str) -> dict[str, Any]:
    """One optimiser step of transformers' Trainer, four samples a process in two micro-batches, losses on and off."""
    from trainer_tools import OrderedTrainer, RouterInputs, arguments, collate, routers, samples

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, config in (("off", {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}), ("on", LOSSES)):
        model = adapted(tiny_llama(), **config)
        inputs, before = RouterInputs(model), routers(model)
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
        OrderedTrainer(
            model=model,
            args=arguments(f"{directory}/{rank}", **settings),
            train_dataset=samples(),
            data_collator=collate,
        ).train()
        (key,) = before
        found[name] = before[key] - routers(model)[key]
    return {**found, "x": inputs.x}


def test_trainer_joins_the_mean_over_processes(tmp_path):
    """`num_items_in_batch` counts the tokens of all processes, and the Trainer multiplies by their number."""
    from trainer_tools import auxiliary_gradient

    results = on_two(trainer_step, tmp_path)
    assert sum(len(result["x"]) for result in results) == 51  # all samples, each in one process
    expected = sum(auxiliary_gradient(adapted(tiny_llama()), result["x"], 0.5, 0.1) for result in results) / WORLD
    for result in results:
        torch.testing.assert_close(result["on"] - result["off"], expected, rtol=1e-3, atol=2e-6)


def fsdp_gradients(rank: int, directory: str) -> Any:
    """FSDP2 (fully_shard) of blocks and root; also with two micro-batches, where the router's losses wait."""
    from accelerate.state import GradientState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    results = []
    for accumulate in (False, True):
        torch.manual_seed(0)
        model = adapted(tiny_llama(), **LOSSES).train()
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if accumulate:
            for index, half in enumerate(halves_of(rank)):
                GradientState()._set_sync_gradients(index == 1)
                (model(**half).loss / 2).backward()
        else:
            model(**batch_of(rank)).loss.backward()
        results.append({n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None})
    return results


def halves_of(rank: int) -> list[dict[str, torch.Tensor]]:
    ids = [tokens(2, 6, seed=10 * rank + half) for half in range(2)]
    return [{"input_ids": each, "labels": each} for each in ids]


def test_fsdp2_averages_gradients_and_losses(tmp_path):
    results = on_two(fsdp_gradients, tmp_path)
    joint = []
    for rank in range(WORLD):
        model = adapted(tiny_llama(), **LOSSES).train()
        model(
            **{key: torch.cat([half[key] for half in halves_of(rank)]) for key in ("input_ids", "labels")}
        ).loss.backward()
        joint.append(adapter_gradients(model))
    for index, (first, second) in enumerate((alone(LOSSES), joint)):
        for name in first:
            expected = (first[name] + second[name]) / 2
            for rank in range(WORLD):
                torch.testing.assert_close(
                    results[rank][index][name], expected, rtol=1e-4, atol=1e-6, msg=f"{index} {name}"
                )


def fsdp_checkpointed(rank: int, directory: str) -> Any:
    """Gradients after two steps of SGD, fused and in the plain form; weights are gathered anew in each backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from peft_loraswitch.training import fast_linears

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = adapted(tiny_llama(), **LOSSES).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, sizes, run = torch.optim.SGD(trained, lr=0.1), [], fast_linears.run
    fast_linears.run = lambda spec, *args: (sizes.append(spec.size), run(spec, *args))[1]

    def gradients() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        model(**batch_of(rank)).loss.backward()
        return {n: p.grad.full_tensor().clone() for n, p in model.named_parameters() if p.grad is not None}

    for _ in range(2):
        gradients()
        optimizer.step()
    fused = gradients()
    with fast_linears.plain():
        return fused, gradients(), max(sizes)


def test_fsdp2_with_checkpointing_equals_the_plain_form(tmp_path):
    for fused, plain, size in on_two(fsdp_checkpointed, tmp_path):
        assert size == 3 and fused.keys() == plain.keys() and fused
        for name, gradient in plain.items():
            torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
