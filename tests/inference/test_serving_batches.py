"""Compiled batches beyond the fused tokens: what the experts add is computed apart, in a captured graph beside the products."""

from __future__ import annotations

import pytest
import torch

from fusing import MAKERS, adapted, devices, ids, logits
from helpers import tiny_llama
from peft_loraswitch import ops
from peft_loraswitch.inference import group_outputs
from peft_loraswitch.inference.fused_layer import FusedLinear


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of `change` that is traced."""
    calls: list[int] = []
    real = ops.linear_and_change

    def spy(x, *arguments):
        calls.append(x.shape[:-1].numel())
        return real(x, *arguments)

    monkeypatch.setattr(group_outputs.ops, "linear_and_change", spy)
    return calls


def as_on_a_gpu(model: torch.nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, FusedLinear):
            for group in layer.fused_groups.values():
                group.kernels = True


@devices
@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize(("batch", "apart"), [(40, True), (256, True), (257, False)])
def test_compiled_batches(name: str, batch: int, apart: bool, device: str, changed: list[int]):
    model = adapted(MAKERS[name](), device, torch.bfloat16)
    tokens = ids(batch, 1, device)
    want = logits(model, tokens).double()
    model.fuse_for_inference()
    as_on_a_gpu(model)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits.double()
    assert bool(changed) == apart and all(tokens == batch for tokens in changed)
    assert (got - want).norm() < 0.03 * want.norm()


def test_ranks_that_no_kernel_takes_for_many_tokens(changed: list[int]):
    model = adapted(tiny_llama(), "cpu", torch.bfloat16, r=16, num_experts=16)
    tokens = ids(40, 1, "cpu")
    want = logits(model, tokens).double()
    model.fuse_for_inference()
    as_on_a_gpu(model)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits.double()
    assert not changed
    assert (got - want).norm() < 0.03 * want.norm()
