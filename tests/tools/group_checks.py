"""What the Triton kernels of a group's casts and gates have to give, in Triton's interpreter, or compiled for a GPU.

TRITON_INTERPRET=1 python tests/tools/group_checks.py            # the kernels' results, where Triton is installed
python tests/tools/group_checks.py --compile 90                  # they compile for that GPU, which need not be there
"""

from __future__ import annotations

import itertools
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from compiled_launches import command, compiling
from peft_loraswitch.training import cast_kernels, gate_hidden, gate_kernels
from peft_loraswitch.training.gate_hidden import Columns, runs
from peft_loraswitch.training.group_layout import Casts, Spec

Group = tuple[int, tuple[int, ...], int, tuple[int, ...]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# experts, ranks of the linears, features, outputs of the linears
GROUPS: list[Group] = [(4, (2,), 40, (70,)), (3, (5, 5, 5), 33, (64, 1, 130)), (2, (1, 3, 3, 3, 3), 9, (7, 2100, 3, 5, 11)),
          (8, (8, 8), 64, (40, 40))]  # fmt: skip


def columns_of(experts: int, ranks: tuple[int, ...]) -> tuple[Columns, ...]:
    found: list[Columns] = []
    for i, rank in enumerate(ranks):
        found.append(Columns(found[-1].stop if found else 0, experts, rank, 0.5 + (i == 2)))
    return tuple(found)


def weights_of(group: Group, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor], tuple[Columns, ...]]:
    experts, ranks, features, outs = group
    torch.manual_seed(features)
    a = [torch.randn(experts, rank, features).to(device, dtype) for rank in ranks]
    b = [torch.randn(experts, out, rank).to(device, dtype) for out, rank in zip(outs, ranks, strict=True)]
    return a, b, columns_of(experts, ranks)


def on_kernels(on: bool) -> Any:
    return mock.patch.object(gate_kernels, "usable", lambda each: on)


def check_casts(group: Group, dtype: torch.dtype, wanted: torch.dtype, device: str) -> None:
    """The bits of PyTorch's copies, and nothing written beside them. (Triton's interpreter cuts bfloat16 off.)"""
    a, b, columns = weights_of(group, dtype, device)
    spec = Spec(wanted, columns, False, checkpointed=True)  # A is always there
    empty = torch.empty
    results = []
    for kernels in (True, False):
        with (
            on_kernels(kernels),
            mock.patch.object(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(7.0)),
            mock.patch.object(cast_kernels, "cast", wraps=cast_kernels.cast) as cast,
        ):
            results.append(Casts(a, b, spec).memory)
            assert cast.call_count == 1
    assert results[0] is not None and results[1] is not None
    loose = 2**-7 if device == "cpu" and wanted == torch.bfloat16 != dtype else 0
    torch.testing.assert_close(results[0], results[1], rtol=loose, atol=0)
    assert not cast_kernels.cast(results[0], [each.transpose(1, 2) for each in a], b, spec.layouts[0].launches)


def check_gates(group: Group, dtype: torch.dtype, masked: bool, device: str) -> None:
    experts, ranks, *_ = group
    columns, tokens = columns_of(experts, ranks), 37
    torch.manual_seed(tokens)
    hidden, d_gated = (torch.randn(tokens, columns[-1].stop).to(device, dtype) for _ in range(2))
    gates, before = (torch.rand(tokens, experts).to(device) for _ in range(2))
    chosen = (torch.rand(tokens, experts) < 0.4).to(device) if masked else None
    results = []
    for each in (dtype, torch.float64):
        with on_kernels(each is dtype):
            h, d, g = hidden.to(each), d_gated.to(each, copy=True), gates if each is dtype else gates.double()
            total = before.to(g.dtype, copy=True)
            d_hidden, d_gates, gated = gate_hidden.gate_backward(d, h, g, chosen, columns, True, True)
            d = d_gated.to(each, copy=True)
            again = gate_hidden.gate_backward(d, h, g, chosen, columns, True, False, total)
            assert again[1] is total and again[2] is None
            results.append([gate_hidden.gate(h, g, chosen, columns), d_hidden, d_gates, gated, again[0], total])
    for actual, exact in zip(*results, strict=True):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < 4 * torch.finfo(dtype).eps, (error, actual.shape)


def compile_all(capability: int) -> int:
    """The number of kernels that compile for a GPU of this capability."""
    with compiling(capability) as compiled, on_kernels(True):
        for group, dtype in itertools.product(GROUPS, FLOATS):
            a, b, columns = weights_of(group, dtype, "cpu")
            for wanted in FLOATS:
                Casts(a, b, Spec(wanted, columns, False, checkpointed=True))
            hidden, gates = torch.zeros(5, columns[-1].stop, dtype=dtype), torch.zeros(5, group[0])
            for chosen, total in itertools.product((None, gates > 0), (None, gates)):
                gate_kernels.gate(hidden, gates, chosen, runs(columns))
                gate_kernels.gate_backward(hidden, hidden, gates, chosen, runs(columns), True, True, total)
    return len(compiled)


def check_all() -> int:
    checks = 0
    for group in GROUPS:
        for dtype, wanted in itertools.product(FLOATS, FLOATS):
            check_casts(group, dtype, wanted, "cpu")
            checks += 1
        for dtype, masked in itertools.product((torch.float32, torch.float16), (True, False)):
            check_gates(group, dtype, masked, "cpu")
            checks += 1
    return checks


if __name__ == "__main__":
    command(__doc__, compile_all, check_all, sys.argv[1:])
