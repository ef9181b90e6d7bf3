"""Training with base layers of bitsandbytes in 4 bits on a GPU: the library's results, in no more memory, without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fast_linear_checks import NO_LOSSES
from four_bit_training import KINDS, LINEARS, MODES, SOFT, agree, given, model_of, noted_specs, packed
from helpers import adapter_gradients, padded
from peft_loraswitch.training import fast_linears, four_bit_weights

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


def step(model: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**{key: value.to(DEVICE) for key, value in padded(lengths).items()}).loss.backward()
    return {name: g.clone() for name, g in adapter_gradients(model).items()}


# For few tokens the library has kernels that make no weight.
@pytest.mark.parametrize("lengths", [[7, 4], [900, 800]], ids=["few", "many"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_librarys_products(kind, dtype, mode, lengths, monkeypatch):
    specs = noted_specs(monkeypatch)
    model = model_of(dtype, mode, kind, DEVICE, {"max_position_embeddings": 1024}, **SOFT)
    for _ in range(2):
        specs.clear()
        gradients = step(model, lengths)
        assert packed(specs) == LINEARS * (1 if mode == MODES[0] else 2)
    with given():
        agree(gradients, step(model, lengths), 1e-3 if dtype == torch.float32 else 0.15)


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
