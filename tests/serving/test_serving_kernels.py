"""The vLLM plugin's Triton kernels against PyTorch in float64: on a GPU, and in vLLM's environment in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import serving_kernels
import vllm_server
from peft_loraswitch.vllm_plugin import custom_ops
from peft_loraswitch.vllm_plugin.routing_tables import RoutingTables

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.vllm
def test_kernels_in_the_interpreter():
    checks, *rest = vllm_server.printed_by("serving_kernels.py", TRITON_INTERPRET="1")
    assert int(checks) > 90 and rest == ["checks", "passed"]


@pytest.mark.vllm
def test_kernels_compile_for_a_gpu():
    """The interpreter takes what the compiler refuses, such as a name that has one type before a branch and another in it."""
    count, _, *names = vllm_server.printed_by("compiled_launches.py", "90")
    assert int(count) >= 72 and names == ["_context_kernel", "_expand_kernel", "_route_kernel"]


@pytest.mark.vllm
def test_the_wrapper_of_gpus():
    assert vllm_server.printed_by("serving_gpu_wrapper.py", TRITON_INTERPRET="1")[-1] == "passed"


@needs_gpu
@pytest.mark.gpu
def test_kernels_on_a_gpu():
    assert serving_kernels.check_all("cuda", route_seeds=24) > 300


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 128])
def test_ops_in_a_cuda_graph(tokens):
    """Captured once; adapters, tokens and what they choose change afterwards."""
    serving_kernels.check_cuda_graph(tokens)


@needs_gpu
@pytest.mark.gpu
def test_batches_without_loras_launch_nothing():
    none, groups = torch.tensor([True]), torch.tensor([2])
    x, router = torch.randn(4, 64, device="cuda"), torch.randn(1, 4, 64, device="cuda")
    tables = RoutingTables(1, 16, 4, 4, "cuda")
    here = torch.ones(1, dtype=torch.bool, device="cuda")
    slots, mask = torch.zeros(4, dtype=torch.long, device="cuda"), torch.zeros(4, 16, device="cuda")
    index, b = torch.zeros(4, dtype=torch.int32, device="cuda"), torch.randn(1, 1, 64, 16, device="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        custom_ops.route(x, router, here, tables.settings, slots, none, True, mask, tables.kept.number)
        custom_ops.expand(mask[None], [b], mask, x, index, index, index, index, none, groups, 0, True)
        torch.cuda.synchronize()
    assert not [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
