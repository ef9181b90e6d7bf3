"""Training with base layers of bitsandbytes in 4 bits on a GPU: the library's results, in no more memory, without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fast_linear_checks import NO_LOSSES
from four_bit_linear import linear_4bit
from four_bit_training import (
    KINDS,
    LINEARS,
    MODES,
    SOFT,
    agree,
    given,
    model_of,
    no_further,
    noted_specs,
    packed,
    plain_twin,
)
from helpers import adapter_gradients, padded
from peft_loraswitch.training import fast_linears, four_bit_kernels, four_bit_weights

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


def step(model: Any, lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**{key: value.to(DEVICE) for key, value in padded(lengths, seed=seed).items()}).loss.backward()
    return {name: g.clone() for name, g in adapter_gradients(model).items()}


# For few tokens the library has kernels that make no weight; of few, rounding is by chance, so there are three batches.
@pytest.mark.parametrize(("lengths", "batches"), [([16, 12], 3), ([900, 800], 1)], ids=["few", "many"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_librarys_products(kind, dtype, mode, lengths, batches, monkeypatch):
    """In 16 bits, where both ways round, by how far each is from float32 with the same weights."""
    specs = noted_specs(monkeypatch)
    model = model_of(dtype, mode, kind, DEVICE, {"max_position_embeddings": 1024}, **SOFT)
    step(model, lengths)
    ours = []
    for seed in range(batches):
        specs.clear()
        ours.append(step(model, lengths, seed))
        assert packed(specs) == LINEARS * (1 if mode == MODES[0] else 2)
    with given():
        theirs = [step(model, lengths, seed) for seed in range(batches)]
    if dtype == torch.float32:
        for actual, expected in zip(ours, theirs, strict=True):
            agree(actual, expected, 1e-3)
        return
    twin = plain_twin(model, dtype).float()
    with fast_linears.plain():
        no_further(ours, theirs, [step(twin, lengths, seed) for seed in range(batches)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_librarys_kernels_are_called_and_give_its_bits(kind, dtype, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit

    monkeypatch.setattr(four_bit_kernels, "_alike", {})
    base = linear_4bit(torch.nn.Linear(4096, 1024, device=DEVICE), **kind)
    state = base.weight.quant_state
    state.dtype = dtype
    for _ in range(2):
        (weight,) = four_bit_weights.four_bit_weights([base.weight], False)
        assert torch.equal(weight.to(dtype), dequantize_4bit(base.weight.detach(), state))
    assert list(four_bit_kernels._alike.values()) == [True], "only the public function, which takes longer"


@pytest.mark.parametrize("mode", MODES)
def test_no_more_memory_than_in_the_given_way(mode):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "max_position_embeddings": 2048}
    model = model_of(torch.bfloat16, mode, {}, DEVICE, shape, **NO_LOSSES)

    def peak() -> int:
        for _ in range(2):
            step(model, [1500, 1500])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, [1500, 1500])
        return torch.cuda.max_memory_allocated() - before

    ours = peak()
    with given():
        assert ours <= 1.01 * peak()


def test_no_wait_for_the_device(monkeypatch):
    make, run = four_bit_weights.FourBitWeight.to, fast_linears.run
    model = model_of(torch.bfloat16, "non-reentrant", {"double": True}, DEVICE, None, **NO_LOSSES)
    for _ in range(2):
        step(model, [7, 4])
    made = []

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            made.append(function)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    monkeypatch.setattr(four_bit_weights.FourBitWeight, "to", watched(make))
    monkeypatch.setattr(fast_linears, "run", watched(run))
    step(model, [7, 4])
    assert make in made and run in made
