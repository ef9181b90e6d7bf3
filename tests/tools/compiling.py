"""torch.compile with a backend that notes its graphs, and what is run with it: the same of stock LoRA and of LoRA-Switch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers import adapted, adapter_gradients, padded, switch_config, tiny_llama, tokens

TARGETS = ["q_proj", "down_proj", "c_attn"]  # few, because tracing takes long; c_attn is GPT-2's


class Graphs:
    """A backend that runs graphs as they are and notes the number of outputs of each."""

    def __init__(self) -> None:
        self.outputs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable:
        self.outputs.append(len(graph.graph.find_nodes(op="output")[0].args[0]))
        return graph.forward


def one_layer(**overrides: Any) -> nn.Module:
    return tiny_llama(**{"num_hidden_layers": 1, **overrides})


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=TARGETS))


def switch(model: nn.Module, **config: Any) -> nn.Module:
    return adapted(model, **{"target_modules": TARGETS, **config})


def graphs_of(run: Callable[[nn.Module, Graphs], Any], make: Callable[[], nn.Module] = one_layer) -> tuple[list, list]:
    """(outputs of each graph with stock LoRA, the same with LoRA-Switch)"""
    found = []
    for adapt in (lora, switch):
        torch._dynamo.reset()
        graphs = Graphs()
        run(adapt(make()), graphs)
        found.append(graphs.outputs)
    assert found[0], "nothing was compiled"
    return found[0], found[1]


def compiled(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def compiled_whole(model: nn.Module) -> tuple[Any, list[torch.fx.GraphModule]]:
    """`model` compiled, and the list that gets its graphs."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    return compiled(model, backend), graphs


def run_eval(model: nn.Module, graphs: Graphs) -> None:
    step = compiled(model.eval(), graphs)
    with torch.no_grad():
        for seed in range(3):
            step(input_ids=tokens(seed=seed))


def run_training(model: nn.Module, graphs: Graphs) -> None:
    model.base_model.model.loss_type = (
        "ForCausalLM"  # GPT-2 has none, and warns: that breaks the graph of stock LoRA too
    )
    step = compiled(model.train(), graphs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(4):
        output = step(**padded([7, 5], seed=seed))
        objective = output.loss
        if seed % 2:  # all that is differentiable
            objective = objective + output.logits.mean() + output.past_key_values.layers[0].keys.mean()
        objective.backward()
        optimizer.step()
        optimizer.zero_grad()


def run_training_without_labels(model: nn.Module, graphs: Graphs) -> None:
    step = compiled(model.train(), graphs)
    for seed in range(3):
        step(input_ids=tokens(seed=seed)).logits.square().mean().backward()


def checkpointing(model: nn.Module) -> nn.Module:
    backbone = model.base_model.model  # transformers 5.23 says "activation" where older versions say "gradient"
    name = "activation" if hasattr(backbone, "activation_checkpointing_enable") else "gradient"
    getattr(backbone, f"{name}_checkpointing_enable")({"use_reentrant": False})
    model.base_model.model.disable_input_require_grads()  # a hook that stock LoRA cannot be compiled with either
    return model.train()


def two_layers() -> nn.Module:
    return tiny_llama(num_hidden_layers=2)


def run_checkpointed(model: nn.Module, graphs: Graphs) -> None:
    step = compiled(checkpointing(model), graphs)
    for seed in range(3):
        step(**padded([7, 5], seed=seed), use_cache=False).loss.backward()


def run_lengths(model: nn.Module, graphs: Graphs) -> None:
    step = compiled(model.eval(), graphs)
    with torch.no_grad():
        for length in range(5, 14):
            step(input_ids=tokens(2, length), use_cache=False)


def run_cached_decoding(model: nn.Module, graphs: Graphs) -> None:
    """The cache grows by one with each token: no graph for each."""
    step = compiled(model.eval(), graphs)
    past, ids = None, tokens(2, 5)
    with torch.no_grad():
        for seed in range(9):
            past = (step if seed else model)(input_ids=ids, past_key_values=past, use_cache=True).past_key_values
            ids = tokens(2, 1, seed=seed)


def run_switching(model: nn.Module, graphs: Graphs) -> None:
    config = model.peft_config["default"]
    model.add_adapter(
        "other",
        LoraConfig(target_modules=TARGETS) if config.peft_type == "LORA" else switch_config(target_modules=TARGETS),
    )
    step = compiled(model.eval(), graphs)
    with torch.no_grad():
        for index in range(6):
            model.set_adapter(("default", "other")[index % 2])
            step(input_ids=tokens())
        with model.disable_adapter():
            step(input_ids=tokens())


def same_training(plain: nn.Module, step: Any, model: nn.Module, batches: list[dict], **kwargs: Any) -> None:
    """Gradients and statistics of `step` (a compiled `model`) are those of `plain`."""
    for batch in batches:
        expected, actual = plain(**batch, **kwargs), step(**batch, **kwargs)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-6)
        expected.loss.backward()
        actual.loss.backward()
    expected_gradients, actual_gradients = adapter_gradients(plain), adapter_gradients(model)
    assert expected_gradients.keys() == actual_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    expected_stats, actual_stats = plain.router_stats(), model.router_stats()
    assert actual_stats["tokens"] == expected_stats["tokens"] > 0
    assert actual_stats["load"] == pytest.approx(expected_stats["load"])
    assert actual_stats["z_loss"] == pytest.approx(expected_stats["z_loss"], rel=1e-5)
