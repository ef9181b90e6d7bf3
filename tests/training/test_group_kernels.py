"""The Triton kernels of a group's casts and gates (`cast_kernels.py`, `gate_kernels.py`); where they do not run, PyTorch does."""

from __future__ import annotations

import pytest
import torch

import vllm_server
from group_checks import FLOATS, GROUPS, check_casts, check_gates, weights_of
from peft_loraswitch.training import cast_kernels
from peft_loraswitch.training.group_layout import Casts, Spec

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_casts_lie_where_they_are_looked_for(group, checkpointed):
    a, b, columns = weights_of(group, torch.float32, "cpu")
    spec = Spec(torch.bfloat16, columns, False, checkpointed=checkpointed)
    made = Casts(a, b, spec)
    for casts in (made, Casts(a, b, spec, made.to_keep(a, spec))):
        joined = torch.cat([each.flatten(0, 1) for each in a]).bfloat16()
        assert torch.equal(torch.cat([*casts.wide_a(a)]), joined)
        for each, wide in zip(b, casts.wide_b(), strict=True):
            assert torch.equal(wide, each.transpose(0, 1).flatten(1).bfloat16())


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_launches_hold_every_linear_once(group):
    a, b, columns = weights_of(group, torch.float32, "cpu")
    spec = Spec(torch.bfloat16, columns, False)
    layout = Casts(a, b, spec).layout
    assert [i for part in layout.launches for i in range(part.first, part.end)] == [*range(len(a))]
    for part in layout.launches:
        some = range(part.first, part.end)
        assert 0 < len(some) <= cast_kernels.LINEARS
        assert {(each.experts, each.rank) for each in columns[part.first : part.end]} == {
            (part.width // part.rank, part.rank)
        }
        sizes = [max(a[i].numel(), b[i].numel()) for i in some]
        assert part.tiles == -(-max(sizes) // cast_kernels.TILE)
        outs = [(b[i].shape[1], layout.places_b[i][2]) for i in some]
        assert part.numbers == (a[some[0]].numel(), layout.places_a[some[0]][2], *sum(outs, ()))


def test_a_cpu_has_no_kernel():
    a, b, columns = weights_of(GROUPS[0], torch.float32, "cpu")
    memory = torch.full((10_000,), 7.0)
    launches = Casts(a, b, Spec(torch.bfloat16, columns, False)).layout.launches
    assert launches and not cast_kernels.cast(memory, a, b, launches) and (memory == 7).all()


def test_other_dtypes_have_no_launch():
    a, b, columns = weights_of(GROUPS[1], torch.float64, "cpu")
    assert not Casts(a, b, Spec(torch.float32, columns, False)).layout.launches


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("group", [*GROUPS, (8, (8, 8, 8), 4096, (4096, 1024, 1024))], ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_on_a_gpu(dtype, wanted, group):
    for _ in range(3):  # the third launch is a direct one
        check_casts(group, dtype, wanted, "cuda")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gates_on_a_gpu(dtype, masked, group):
    for _ in range(3):
        check_gates(group, dtype, masked, "cuda")


@pytest.mark.vllm
def test_kernels_in_the_interpreter():
    """In vllm's environment, which has Triton."""
    assert vllm_server.printed_by("group_checks.py", TRITON_INTERPRET="1")[-2:] == ["checks", "passed"]


@pytest.mark.vllm
def test_kernels_compile_for_a_gpu_that_is_not_there():
    assert vllm_server.printed_by("group_checks.py", "--compile", "90")[-2:] == ["kernels", "compiled"]
