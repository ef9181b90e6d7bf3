"""Shared experts in training: both kinds of checkpointing, several processes, torch.compile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch._dynamo

import checkpoint_steps
import compiling
import multistream
from helpers import (
    adapted,
    adapter_gradients,
    padded,
    tiny_llama,
)
from shared_experts import (
    CONFIGS,
    llama,
    llava_with_both_streams,
)
from two_processes import LOSSES, WORLD, batch_of, on_two


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("step", [checkpoint_steps.two_in_reverse, checkpoint_steps.reference_between])
@pytest.mark.parametrize("config", ["before", "one-routed-less"])
def test_gradient_checkpointing(config, step, reentrant):
    settings = CONFIGS["before"] if config == "before" else {"num_shared_experts": 1}
    checkpoint_steps.compare(lambda: adapted(tiny_llama(num_hidden_layers=3), **settings), step, reentrant)


def test_gradient_checkpointing_of_another_stream():
    plain = llava_with_both_streams().train()
    recomputing = checkpoint_steps.checkpointed(copy.deepcopy(plain), reentrant=False)
    batch = multistream.llava_inputs()
    for model in (plain, recomputing):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    checkpoint_steps.assert_same_gradients(plain, recomputing)


def test_a_checkpointed_block_of_shared_experts_that_would_learn_nothing():
    """The router's block is not checkpointed and would not notice."""
    model = adapted(tiny_llama(num_hidden_layers=4), **CONFIGS["before"]).train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    model.base_model.model.disable_input_require_grads()
    with pytest.raises(
        RuntimeError, match="experts of LoRA-Switch would silently learn nothing.*enable_input_require_grads"
    ):
        model(**padded([7, 5])).loss.backward()


def test_switching_between_forward_and_backward_is_noticed_before_the_router_too():
    model = adapted(tiny_llama(num_hidden_layers=3), router_module="layers.2.self_attn.q_proj", num_shared_experts=1)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))  # of the same shapes: torch cannot tell
    checkpoint_steps.checkpointed(model.train(), reentrant=False)
    loss = model(**padded([7, 5])).loss
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="runs again, in backward, with"):
        loss.backward()


def process_gradients(rank: int, directory: str) -> list[dict[str, torch.Tensor]]:
    """DistributedDataParallel twice (an unused parameter is reported in the second step), then FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    warnings.simplefilter("ignore")
    model = llama(**CONFIGS["before"], **LOSSES).train()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        wrapped(**batch_of(rank)).loss.backward()
    results = [adapter_gradients(model)]
    model = llama(**CONFIGS["before"], **LOSSES).train()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**batch_of(rank)).loss.backward()
    results.append({n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None})
    return results


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_ddp_and_fsdp2(tmp_path):
    results = on_two(process_gradients, tmp_path)
    alone = []
    for rank in range(WORLD):
        model = llama(**CONFIGS["before"], **LOSSES).train()
        model(**batch_of(rank)).loss.backward()
        alone.append(adapter_gradients(model))
    for kind in range(2):
        for rank in range(WORLD):
            assert results[rank][kind].keys() == alone[0].keys()
            for name in alone[0]:
                expected = (alone[0][name] + alone[1][name]) / 2
                torch.testing.assert_close(results[rank][kind][name], expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ torch.compile


DEEP_TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("run", ["run_eval", "run_training", "run_checkpointed"])
def test_graphs_and_outputs_equal_those_of_lora(run):
    found = []
    for adapt in (
        compiling.lora,
        lambda base: compiling.switch(base, **CONFIGS["before"], target_modules=DEEP_TARGETS),
    ):
        torch._dynamo.reset()
        graphs = compiling.Graphs()
        getattr(compiling, run)(adapt(compiling.two_layers()), graphs)
        found.append(graphs.outputs)
    assert found[0] and found[0] == found[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_equals_eager(checkpointing):
    torch._dynamo.reset()
    plain = adapted(tiny_llama(), **CONFIGS["before"], target_modules=DEEP_TARGETS).train()
    model = copy.deepcopy(plain)
    if checkpointing:
        compiling.checkpointing(model)
    step = compiling.compiled(model, "aot_eager")
    batches = [padded([7, 5], seed=seed) for seed in range(2)]
    compiling.same_training(plain, step, model, batches, use_cache=False)
