"""Compiled decoding of batches beyond the tokens that the fused op takes by itself: by that op where a GPU has a kernel for them,
else B, gates and bias by `expand`, in one launch for a group."""

from __future__ import annotations

import pytest
import torch

from fusing import MAKERS, adapted, as_on_a_gpu, devices, ids, logits
from helpers import tiny_llama
from peft_loraswitch import kernels, ops
from peft_loraswitch.inference import group_outputs
from peft_loraswitch.inference.fused_layer import FusedLinear


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of `expand` that is traced."""
    calls: list[int] = []
    real = ops.expand

    def spy(hidden, *arguments):
        calls.append(hidden.shape[0])
        return real(hidden, *arguments)

    monkeypatch.setattr(group_outputs.ops, "expand", spy)
    return calls


@devices
@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize(
    ("batch", "most", "by_expand"),
    [(40, 32, True), (256, 32, True), (257, 32, False), (40, 128, False), (128, 128, False), (129, 128, True)],
)
def test_compiled_batches(name: str, batch: int, most: int, by_expand: bool, device: str, expanded: list[int]):
    model = adapted(MAKERS[name](), device, torch.bfloat16)
    tokens = ids(batch, 1, device)
    want = logits(model, tokens).double()
    model.fuse_for_inference()
    as_on_a_gpu(model, most)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits.double()
    assert bool(expanded) == by_expand and all(tokens == batch for tokens in expanded)
    assert (got - want).norm() < 0.03 * want.norm()


def check_without_expand(model: torch.nn.Module, batch: int, device: str, expanded: list[int]) -> None:
    tokens = ids(batch, 1, device)
    want = logits(model, tokens).double()
    model.fuse_for_inference()
    as_on_a_gpu(model, 32)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits.double()
    assert not expanded
    assert (got - want).norm() < 0.03 * want.norm()


def test_ranks_that_expand_does_not_take(expanded: list[int]):
    check_without_expand(adapted(tiny_llama(), "cpu", torch.bfloat16, r=16, num_experts=16), 40, "cpu", expanded)


@devices
@pytest.mark.parametrize("batch", [1, 40, 200])
def test_more_experts_for_a_token_than_the_ops_take(batch: int, device: str, expanded: list[int]):
    check_without_expand(
        adapted(tiny_llama(), device, torch.bfloat16, num_experts=12, top_k=9), batch, device, expanded
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_hopper_gives_so_many_tokens_of_compiled_code_to_the_fused_op():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("linear_split_k_sm90.cu is for compute capability 9.0")
    model = adapted(tiny_llama(), "cuda", torch.bfloat16)
    model.fuse_for_inference()
    logits(model, ids(2, 1, "cuda"))
    groups = [g for m in model.modules() if isinstance(m, FusedLinear) for g in m.fused_groups.values()]
    assert groups and all(group.compiled_tokens == kernels.SPLIT_K_TOKENS for group in groups)
