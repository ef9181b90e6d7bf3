"""Threads that run one model at the same time do not see each other's routing."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from helpers import (
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_llama,
    tokens,
)

ROUNDS = 25


def at_once(*jobs: Callable[[int], Any]) -> list[list[Any]]:
    """Runs each job ROUNDS times in a thread of its own, all starting every round together: results by job."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[int], Any]) -> list[Any]:
        results = []
        for index in range(ROUNDS):
            barrier.wait(timeout=60)
            results.append(job(index))
        return results

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=300) for future in [pool.submit(run, job) for job in jobs]]


def two_adapters() -> nn.Module:
    model = adapted(tiny_llama())
    torch.manual_seed(5)
    model.add_adapter("other", switch_config(num_experts=3, top_k=1, r=5))
    return randomize_adapter(model, "other", seed=7).eval()


def meet(model: nn.Module, threads: int) -> None:
    """Makes every forward wait, in the middle of the model, until another thread's is there too: true overlap."""
    barrier = threading.Barrier(threads)

    def wait(*_: Any) -> None:
        barrier.wait(timeout=60)

    model.base_model.model.model.layers[1].register_forward_pre_hook(wait)


@pytest.mark.compat
def test_forwards_of_different_inputs():
    model = adapted(tiny_llama())
    inputs = [tokens(2, 7, seed=1), tokens(2, 7, seed=2), tokens(3, 5, seed=3)]  # two of one shape, one of another
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]
    meet(model, 3)

    def job(ids: torch.Tensor) -> Callable[[int], torch.Tensor]:
        return lambda index: model(input_ids=ids).logits.detach()

    for results, logits in zip(at_once(*map(job, inputs)), expected, strict=True):
        for result in results:
            torch.testing.assert_close(result, logits, rtol=0, atol=0)


def test_forwards_with_different_adapters():
    model = two_adapters()
    ids = tokens(2, 7)
    names = [["default", "default"], ["other", "other"], ["other", "default"], ["__base__", "other"]]
    with torch.no_grad():
        expected = [model(input_ids=ids, adapter_names=each).logits for each in names]
    meet(model, 4)

    def job(each: list[str]) -> Callable[[int], torch.Tensor]:
        return lambda index: model(input_ids=ids, adapter_names=each).logits.detach()

    for results, logits in zip(at_once(*map(job, names)), expected, strict=True):
        for result in results:
            torch.testing.assert_close(result, logits, rtol=0, atol=0)


def test_generation():
    model = adapted(tiny_llama())
    prompts = [tokens(2, 5, seed=1), tokens(2, 5, seed=2)]

    def generate(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)

    expected = [generate(ids) for ids in prompts]
    jobs = [lambda index, ids=ids: generate(ids) if index % 5 == 0 else None for ids in prompts]
    for results, output in zip(at_once(*jobs), expected, strict=True):
        assert all(torch.equal(result, output) for result in results[::5])


def test_an_error_in_one_thread_does_not_reach_the_other():
    model = adapted(tiny_llama())
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    def failing(index: int) -> None:
        with pytest.raises(ValueError, match="embeds|either"):
            model(input_ids=ids, inputs_embeds=torch.zeros(2, 7, 32))

    _, results = at_once(failing, lambda index: model(input_ids=ids).logits.detach())
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_of_two_copies_and_evaluation_at_once(reentrant):
    """Each thread has a model; a third uses one of them under no_grad while it trains."""
    models = [adapted(tiny_llama()).train() for _ in range(2)]
    expected = []
    for index, model in enumerate(models):
        plain = copy.deepcopy(model)
        plain(**padded([7, 5], seed=index)).loss.backward()
        expected.append(adapter_gradients(plain))
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()

    def train(which: int) -> Callable[[int], Any]:
        def job(index: int) -> dict[str, torch.Tensor]:
            models[which].zero_grad()
            models[which](**padded([7, 5], seed=which)).loss.backward()
            return adapter_gradients(models[which])

        return job

    def look(index: int) -> None:
        with torch.no_grad():
            models[0](input_ids=tokens(3, 4, seed=index))

    *results, _ = at_once(train(0), train(1), look)
    for found, gradients in zip(results, expected, strict=True):
        for each in found:
            for name, gradient in gradients.items():
                torch.testing.assert_close(each[name], gradient, rtol=1e-5, atol=1e-7)


def test_backward_in_another_thread():
    """As on a GPU, where autograd has threads of its own: a checkpointed block finds its decision there too."""
    for reentrant in (False, True):
        plain = adapted(tiny_llama()).train()
        model = copy.deepcopy(plain)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        plain(**padded([7, 5])).loss.backward()
        loss = model(**padded([7, 5])).loss
        with torch.no_grad():
            model(input_ids=tokens(2, 7, seed=3))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join(timeout=60)
        actual = adapter_gradients(model)
        for name, gradient in adapter_gradients(plain).items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


def test_replicas_as_data_parallel_makes_them():
    """nn.DataParallel needs GPUs; its replicas (shallow copies that share hooks and state) can be made here."""
    model = adapted(tiny_llama())

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            replica._parameters[name] = None
            setattr(replica, name, parameter)
        return replica

    inputs = [tokens(2, 7, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]
        replicas = [replicate(model) for _ in inputs]
        results = at_once(
            *[
                lambda index, r=replica, ids=ids: r(input_ids=ids).logits
                for replica, ids in zip(replicas, inputs, strict=True)
            ]
        )
    for found, logits in zip(results, expected, strict=True):
        for result in found:
            torch.testing.assert_close(result, logits, rtol=0, atol=0)


def test_no_thread_leaves_routing_behind():
    model = adapted(tiny_llama())
    state = next(iter(switch_layers(model).values())).routing_state
    frames = at_once(*[lambda index: (model(input_ids=tokens(seed=index)), state.frame)[1]] * 2)
    assert all(frame is None for found in frames for frame in found) and state.frame is None


def test_mixed_batches_with_modules_trained_in_full():
    """A hook on PEFT's wrapper hands it its names. Threads that switch at every instruction, as far as Python can."""
    model = adapted(tiny_llama(), modules_to_save=["lm_head", "embed_tokens"])
    model.add_adapter("other", switch_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "modules_to_save" in name:
            parameter.data += 0.01 * (1 + index)
    randomize_adapter(model, "other")
    model.eval()
    ids = tokens(3, 5)
    names = [
        ["default", "other", "__base__"],
        ["other", "__base__", "default"],
        ["__base__", "default", "default"],
        None,
    ]
    with torch.no_grad():
        alone = {n: model(ids, adapter_names=[n] * 3).logits for n in ("default", "other", "__base__")}
        expected = [
            model(ids).logits if each is None else torch.stack([alone[n][row] for row, n in enumerate(each)])
            for each in names
        ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def job(given: dict[str, Any]) -> Callable[[int], Any]:
            def forward(index: int) -> torch.Tensor:
                with torch.no_grad():
                    return model(ids, **given).logits

            return forward

        results = at_once(*(job({} if each is None else {"adapter_names": each}) for each in names))
    finally:
        sys.setswitchinterval(interval)
    for index, each in enumerate(results):
        assert len(each) == ROUNDS
        for logits in each:
            torch.testing.assert_close(logits, expected[index])
    hooks = [len(m._forward_hooks) for m in model.modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    assert hooks == [1, 1], "one each, not one for each call"


def test_a_copy_of_a_model_that_has_run_mixed_batches_is_its_own():
    model = adapted(tiny_llama(), modules_to_save=["lm_head"])
    ids = tokens(2, 5)
    with torch.no_grad():
        model(ids, adapter_names=["default", "__base__"])
        twin = copy.deepcopy(model)
        randomize_adapter(twin, seed=9)
        for name, parameter in twin.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1
        mixed = twin(ids, adapter_names=["default", "__base__"]).logits
        torch.testing.assert_close(mixed[0], twin(ids).logits[0])
        with twin.disable_adapter():
            torch.testing.assert_close(mixed[1], twin(ids).logits[1])


def test_one_of_two_threads_that_fuse_a_model_does():
    model = adapted(tiny_llama())
    ids = tokens(1, 1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    already = "This model is fused already: call unfuse() first."

    def fuse(index: int) -> str:
        try:
            model.fuse_for_inference("fused")
        except RuntimeError as error:
            return str(error)
        return "fused"

    for first, second in zip(*at_once(*[lambda index: (fuse(index), model.unfuse())[0]] * 2), strict=True):
        assert "fused" in (first, second) and {first, second} <= {"fused", already}
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("double", [False, True], ids=["", "casts"])
def test_forwards_while_another_thread_fuses_and_unfuses(double):
    model = adapted(tiny_llama())
    if double:
        for layer in switch_layers(model).values():
            layer.loraswitch_A.double(), layer.loraswitch_B.double()
    inputs = [tokens(1, 1, seed=1), tokens(2, 3, seed=2)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]
    done = threading.Event()

    def decode(which: int) -> int:
        count = 0
        while not done.is_set():
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=inputs[which]).logits, expected[which], rtol=1e-4, atol=1e-4)
            count += 1
        return count

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns at every few lines
    try:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(decode, which) for which in range(2)]
            try:
                for _ in range(ROUNDS):
                    model.fuse_for_inference("fused")
                    model.unfuse()
            finally:
                done.set()
            assert all(future.result(timeout=60) > 0 for future in futures)
    finally:
        sys.setswitchinterval(interval)
    before = {name: set(vars(module)) for name, module in adapted(tiny_llama()).named_modules()}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
