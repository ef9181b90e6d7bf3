"""Shared experts on a fused model: every strategy, compiled, in CUDA graphs, and what the ops cannot take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo

from fusing import devices
from helpers import (
    adapted,
    padded,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tokens,
)
from peft_loraswitch import ops
from peft_loraswitch.inference.fuse import adapted_layers
from peft_loraswitch.routing.decision import shared_routing
from shared_experts import CONFIGS, DEEP, by_name, close, each_config, llama, logits


@devices
@pytest.mark.parametrize("strategy", ["fused", "merge"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
@each_config
def test_fused(config, make, strategy, device):
    router = {tiny_gpt2: "h.1.attn.c_attn", tiny_opt: "layers.1.self_attn.q_proj"}.get(make)
    if "router_module" in config and router:
        config = {**config, "router_module": router}
    model = adapted(make(), **config).requires_grad_(False).to(device)
    batches = [tokens(b, n).to(device) for b, n in ((1, 1), (1, 3), (3, 7), (5, 8))]
    wanted = [logits(model, ids) for ids in batches]
    with model.fuse_for_inference(strategy):
        for _ in range(2):
            assert all(close(logits(model, ids), each) for ids, each in zip(batches, wanted, strict=True))
    assert all(torch.equal(logits(model, ids), each) for ids, each in zip(batches, wanted, strict=True))


EIGHT = {"num_shared_experts": 5, "top_k": 3, "num_experts": 6, "router_module": DEEP}  # as many as the kernels take


@devices
@pytest.mark.parametrize("config", [CONFIGS["beside"], CONFIGS["before"], EIGHT], ids=["beside", "before", "eight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_16_bit_error_is_no_larger_than_the_unfused_models(dtype, config, device):
    """With ranks of 8, for which the fast kernel is made. Over several prompts: a token whose experts nearly tie may follow
    others than it should, fused or not, and such a one outweighs all others of a short prompt."""
    model = adapted(tiny_llama(), r=8, **config).requires_grad_(False).to(dtype)
    reference = copy.deepcopy(model).float()
    model.to(device)
    for batch, length in ((1, 1), (1, 9), (3, 8), (4, 16)):
        prompts = [tokens(batch, length, seed=seed) for seed in range(6)]
        exact = torch.stack([logits(reference, ids) for ids in prompts])
        unfused = torch.stack([logits(model, ids.to(device)).float().cpu() for ids in prompts])
        with model.fuse_for_inference("fused"):
            fused = torch.stack([logits(model, ids.to(device)).float().cpu() for ids in prompts])
        assert (fused - exact).norm() <= 1.15 * (unfused - exact).norm() + 1e-3 * exact.norm()


@devices
@pytest.mark.parametrize("strategy", ["fused", "merge"])
def test_fused_generate_gives_the_same_tokens(strategy, device):
    model = llama(r=8, **EIGHT).requires_grad_(False).to(device)
    batch = {name: value.to(device) for name, value in padded([5, 3], side="left").items() if name != "labels"}
    for settings in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        defaults: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = model.generate(**batch, **defaults, **settings)
        with model.fuse_for_inference(strategy):
            assert torch.equal(model.generate(**batch, **defaults, **settings), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("strategy", ["fused", "merge"])
def test_fused_in_cuda_graphs(strategy):
    """`ones` and `arange` of the shared experts are inside the graph, or constants of it; never stale."""
    torch._dynamo.reset()
    model = llama(r=8, **CONFIGS["before"]).requires_grad_(False).to("cuda")
    batches = [tokens(1, 1, seed=seed).to("cuda") for seed in range(6)]
    wanted = [logits(model, ids, use_cache=False) for ids in batches]
    with model.fuse_for_inference(strategy):
        step = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for ids, expected in zip(batches, wanted, strict=True):
            assert close(logits(step, ids, use_cache=False).clone(), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_merging_leaves_linears_before_the_router_alone(in_place):
    model = llama(**CONFIGS["before"]).requires_grad_(False)
    ids = tokens(2, 6)
    steps = [logits(model, ids[:1, i : i + 1]) for i in range(6)]
    mixed = logits(model, ids, adapter_names=["default", "__base__"])
    weights = {name: layer.base_layer.weight.clone() for name, layer in by_name(model).items()}
    with model.fuse_for_inference("merge", in_place=in_place):
        for i in range(6):
            assert close(logits(model, ids[:1, i : i + 1]), steps[i], 1e-5)
        for name, layer in by_name(model).items():
            merged = in_place and layer.routing_options["default"].is_routed
            assert torch.equal(layer.base_layer.weight, weights[name]) != merged
        # what does not run merged must not see what is merged in place
        assert close(logits(model, ids, adapter_names=["default", "__base__"]), mixed, 1e-5)
        logits(model, ids[:1, :1])
        with model.disable_adapter():
            assert close(logits(model, ids), logits(tiny_llama(), ids), 1e-5)
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in by_name(model).items())


@devices
@pytest.mark.parametrize("config", [{"num_shared_experts": 7}, {"top_k": 9, "num_experts": 9}, {"r": 300}], ids=str)
def test_beyond_what_the_fused_ops_take(config, device, caplog):
    model = llama(**config).requires_grad_(False).to(device)
    batches = [tokens(1, 1).to(device), tokens(2, 3).to(device)]
    wanted = [logits(model, ids) for ids in batches]
    with pytest.raises(ValueError, match=r"strategy='merge' takes at most 8 experts per token .*use 'fused'"):
        model.fuse_for_inference("merge")
    caplog.clear()
    with model.fuse_for_inference("fused"):
        assert all(close(logits(model, ids), each) for ids, each in zip(batches, wanted, strict=True))
    said = [record for record in caplog.records if "is served by PyTorch operations" in record.message]
    assert len(said) <= 1  # once in a process: not at every layer or token


@devices
def test_beyond_the_limits_on_some_linears_only(device):
    """7 experts a token before the router, 9 from there on."""
    model = llama(num_shared_experts=7, top_k=2, router_module=DEEP).requires_grad_(False).to(device)
    ids = tokens(1, 2).to(device)
    wanted = logits(model, ids)
    with model.fuse_for_inference("fused"):
        assert close(logits(model, ids), wanted)


def test_linears_that_share_a_tensor_with_one_before_the_router_keep_their_launch(monkeypatch):
    """k routes, so q has the shared experts alone: its own launch, and one for k and v."""
    model = llama(**CONFIGS["before"]).requires_grad_(False)
    launches = []
    original = ops.linear

    def linear(x, experts, gates, weights, *args):
        launches.append((experts.shape[-1], len(weights)))
        return original(x, experts, gates, weights, *args)

    monkeypatch.setattr(ops, "linear", linear)
    ids = tokens(1, 1)
    wanted = logits(model, ids)
    with model.fuse_for_inference("fused"):
        launches.clear()
        assert close(logits(model, ids), wanted)
    assert launches == [(2, 3), (2, 1), (2, 2), (2, 1), (2, 1), (4, 2), (4, 1), (4, 2), (4, 1)]  # (experts, linears)


def test_shared_decisions_are_made_once_per_forward(monkeypatch):
    made = []

    def counted(*args):
        made.append(args)
        return shared_routing(*args)

    model = llama(**CONFIGS["before"]).requires_grad_(False)
    monkeypatch.setattr("peft_loraswitch.layer.shared_routing", counted)
    logits(model, tokens())
    assert len(made) == 1  # for eight linears
    with model.fuse_for_inference("fused"):
        logits(model, tokens(1, 1))
        logits(model, tokens(1, 1))
    assert len(made) == 3  # finding the groups decides nothing


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_fused_and_compiled():
    """One graph, one output, and the shared experts' constants in it once."""
    torch._dynamo.reset()
    model = llama(**CONFIGS["before"]).requires_grad_(False)
    ids = tokens(1, 1)
    wanted = logits(model, ids, use_cache=False)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    with model.fuse_for_inference("fused"):
        step = torch.compile(model, fullgraph=True, backend=backend)
        for seed in range(3):
            logits(step, tokens(1, 1, seed=seed), use_cache=False)
        assert close(logits(step, ids, use_cache=False), wanted)
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    # before the router, and in the decision
    assert sum("arange" in str(node.target) and node.args == (2,) for node in nodes) == 2
    assert sum(str(node.target) == "loraswitch.linear.default" for node in nodes) == 9
    assert len(next(node for node in graph.graph.nodes if node.op == "output").args[0]) == 1
    assert len(adapted_layers(model)) == 14
