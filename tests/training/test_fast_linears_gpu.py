"""The fused training path on a GPU: the Triton kernels against the definition, and whole models against a CPU's float32."""

from __future__ import annotations

import pytest
import torch

from fast_linear_checks import CONFIGS, NO_LOSSES, counted_calls, on_both_devices, relative
from peft_loraswitch.training import fast_linears, gate_hidden, gate_kernels
from peft_loraswitch.training.gate_hidden import Columns

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    return counted_calls(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ranks", [(8,), (8, 8, 8), (3, 3, 5), (64, 64), (1, 130)], ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 257])
def test_triton_equals_pytorch(tokens, ranks, masked, dtype, monkeypatch):
    start, found = 0, []
    for i, rank in enumerate(ranks):
        found.append(Columns(start, 5, rank, 0.5 + (i == 2)))
        start = found[-1].stop
    hidden, d_gated = (torch.randn(tokens, start, device="cuda").to(dtype) for _ in range(2))
    gates = torch.rand(tokens, 5, device="cuda")
    chosen = torch.rand(tokens, 5, device="cuda") < 0.4 if masked else None
    assert gate_kernels.usable(hidden)
    call = (tuple(found), True, True)
    actual = [gate_hidden.gate(hidden, gates, chosen, call[0])]
    actual += gate_hidden.gate_backward(d_gated.clone(), hidden, gates, chosen, *call)  # written over
    monkeypatch.setattr(gate_kernels, "usable", lambda hidden: False)
    exact = (hidden.double(), gates.double(), chosen)
    expected = [gate_hidden.gate(*exact, call[0]), *gate_hidden.gate_backward(d_gated.double(), *exact, *call)]
    for y, z in zip(actual, expected, strict=True):
        assert relative(y, z) < 4 * torch.finfo(dtype).eps  # the gates' gradient is a sum over the rank


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_models_on_a_gpu_equal_float32_on_a_cpu(config, kind, checkpointed, counted):
    """To the rounding of the dtype: the fused path strays from the exact gradients no further than the plain form does."""
    exact, gpu_step = on_both_devices(kind, checkpointed, **NO_LOSSES, **config)
    gpu_step()
    fast = gpu_step()
    with fast_linears.plain():
        slow = gpu_step()
    assert max(counted) == 3
    for name, gradient in exact.items():
        allowed = 1e-4 if kind == "float32" else 1.5 * relative(slow[name], gradient) + 0.02
        assert relative(fast[name], gradient) < allowed, name
