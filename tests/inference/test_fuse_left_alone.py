"""What fused layers leave to the unfused forward, or find again: offloaded experts, float64 routers, groups after a rollback."""

from __future__ import annotations

import accelerate
import pytest
import torch

from fusing import adapted, as_on_a_gpu, close, ids, load_that_fails, logits
from helpers import tiny_llama


@pytest.mark.parametrize("before", [True, False])
def test_a_model_that_is_offloaded_runs_unfused(before):
    """accelerate brings weights to the device where it executes when their modules are called, which fused layers do not."""
    model = adapted(tiny_llama(), "cpu", torch.bfloat16)
    tokens = ids(10, 2, "cpu")
    want = logits(model, tokens)
    if before:
        model.fuse_for_inference("fused")
        logits(model, tokens)
    accelerate.cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    if not before:
        model.fuse_for_inference("fused")
    for _ in range(2):
        assert torch.equal(logits(model, tokens), want)


def test_a_router_in_a_dtype_that_the_ops_do_not_take(monkeypatch):
    model = adapted(tiny_llama(), "cpu", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "loraswitch_router" in name:
            parameter.data = parameter.data.double()
    tokens = ids(40, 1, "cpu")
    want = logits(model, tokens)
    model.fuse_for_inference("fused")
    as_on_a_gpu(model)
    assert close(logits(model, tokens).float(), want.float(), 0.02)


def test_a_load_that_fails_leaves_a_model_that_compiles(tmp_path, monkeypatch):
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"])
    model.fuse_for_inference("fused")
    load_that_fails(model, tmp_path, monkeypatch)
    want = logits(model, ids(2, 5, "cpu"))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(ids(2, 5, "cpu")).logits
    assert close(got, want)
