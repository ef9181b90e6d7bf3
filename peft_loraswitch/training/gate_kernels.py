"""`gate_hidden.py` as Triton kernels: one launch forward, one backward.

A program takes a tile of tokens and one expert, in all linears of the group, so that the gradient of a gate is summed by one
program: no atomics, the same bits in every run. Everything is computed in float32. The tensors are small ([tokens, E * r]): what
counts is the number of launches.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .triton_launch import Launcher, Rest

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of PyTorch
    triton = None

logger = logging.getLogger(__name__)
Run = tuple[Any, int]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 32  # of one program
TENSORS = {"gate": 4, "gate_backward": 7}  # of each kernel's arguments
_compiles: dict[torch.device, bool] = {}


def usable(hidden: Tensor) -> bool:
    """Whether the kernels take this hidden."""
    if triton is None or not hidden.is_cuda or hidden.dtype not in FLOATS or hidden.numel() == 0:
        return False
    if hidden.device not in _compiles:
        _compiles[hidden.device] = _compile(hidden.device)
    return _compiles[hidden.device]


def _compile(device: torch.device) -> bool:
    """Whether Triton can compile for this device: it wants a C compiler on the machine."""
    probe = torch.ones(1, 1, device=device)
    try:
        with torch.cuda.device(device):
            _gate_kernel[(1, 1)](
                probe, probe, probe, probe, 1, 1, 1, 1, 1.0, LINEARS=1, RANK=1, WIDTH=1, TILE=TOKENS, MASKED=False
            )
        return True
    except torch.OutOfMemoryError:  # says nothing of Triton: the next call looks again
        raise
    except Exception as error:
        logger.warning(f"LoRA-Switch: gates are applied by PyTorch operations, because Triton fails: {error}")
        return False


if triton is not None:

    @triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
    def _gate_kernel(  # type: ignore[no-untyped-def]
        hidden, gates, chosen, gated, tokens, row, experts, gate_row, scaling,
        LINEARS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        expert = tl.program_id(1)
        token = tl.program_id(0) * TILE + tl.arange(0, TILE)
        there = token < tokens
        factor = tl.load(gates + token * gate_row + expert, mask=there, other=0.0).to(tl.float32) * scaling
        counts = there
        if MASKED:
            counts = tl.load(chosen + token * experts + expert, mask=there, other=0)
        inner = tl.arange(0, WIDTH)
        inside = there[:, None] & (inner < RANK)[None, :]
        for linear in range(LINEARS):
            at = token.to(tl.int64)[:, None] * row + (linear * experts + expert) * RANK + inner[None, :]
            value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(counts[:, None], value * factor[:, None], 0.0)
            tl.store(gated + at, value.to(gated.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
    def _gate_backward_kernel(  # type: ignore[no-untyped-def]
        d_gated, hidden, gates, chosen, d_hidden, d_gates, gated, tokens, row, experts, gate_row, scaling,
        LINEARS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
        WANT_GATES: tl.constexpr, ADD: tl.constexpr, WANT_GATED: tl.constexpr,
    ):  # fmt: skip
        expert = tl.program_id(1)
        token = tl.program_id(0) * TILE + tl.arange(0, TILE)
        there = token < tokens
        factor = tl.load(gates + token * gate_row + expert, mask=there, other=0.0).to(tl.float32) * scaling
        counts = there
        if MASKED:
            counts = tl.load(chosen + token * experts + expert, mask=there, other=0)
        inner = tl.arange(0, WIDTH)
        inside = there[:, None] & (inner < RANK)[None, :]
        total = tl.zeros([TILE], dtype=tl.float32)
        for linear in range(LINEARS):
            at = token.to(tl.int64)[:, None] * row + (linear * experts + expert) * RANK + inner[None, :]
            gradient = tl.load(d_gated + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(counts[:, None], gradient * factor[:, None], 0.0)
            tl.store(d_hidden + at, value.to(d_hidden.dtype.element_ty), mask=inside)
            if WANT_GATES or WANT_GATED:
                h = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
                if WANT_GATES:
                    total += tl.sum(tl.where(counts[:, None], gradient * h, 0.0), axis=1)
                if WANT_GATED:
                    value = tl.where(counts[:, None], h * factor[:, None], 0.0)
                    tl.store(gated + at, value.to(gated.dtype.element_ty), mask=inside)
        if WANT_GATES:
            at_gate = token * experts + expert
            total = total * scaling
            if ADD:
                total += tl.load(d_gates + at_gate, mask=there, other=0.0)
            tl.store(d_gates + at_gate, total, mask=there)

    _launch_gate = Launcher(_gate_kernel, TENSORS["gate"])
    _launch_gate_backward = Launcher(_gate_backward_kernel, TENSORS["gate_backward"])


def gate(hidden: Tensor, gates: Tensor, chosen: Tensor | None, runs: list[Run]) -> Tensor:
    """As `gate_hidden.gate`; `runs` as `gate_hidden.runs` gives them."""
    hidden, gates, masked = _whole(hidden), _rows(gates), chosen is not None
    mask = gates if chosen is None else _whole(chosen)
    gated = torch.empty_like(hidden)
    (tokens, row), gate_row = hidden.shape, gates.stride(0)
    for run in runs:
        first = run[0]
        _launch_gate(
            (-(-tokens // TOKENS), first.experts, 1),
            (_from(hidden, first), gates, mask, _from(gated, first)),
            (((tokens,), (row, gate_row, run, masked), partial(_rest, row, gate_row, run, masked)),),
        )
    return gated


def gate_backward(
    d_gated: Tensor, hidden: Tensor, gates: Tensor, chosen: Tensor | None, runs: list[Run], want_gates: bool, want_gated: bool,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As `gate_hidden.gate_backward`. d_hidden is written over d_gated, each number where it was read."""
    d_gated, hidden, gates, masked = _whole(d_gated), _whole(hidden), _rows(gates), chosen is not None
    mask = gates if chosen is None else _whole(chosen)
    d_gates = total
    if want_gates and total is None:
        d_gates = torch.empty(gates.shape, dtype=torch.float32, device=gates.device)
    gated = torch.empty_like(hidden) if want_gated else None
    (tokens, row), gate_row = hidden.shape, gates.stride(0)
    for number, run in enumerate(runs):
        first, flags = run[0], (masked, want_gates, number > 0 or total is not None, want_gated)
        d_run = _from(d_gated, first)
        _launch_gate_backward(
            (-(-tokens // TOKENS), first.experts, 1),
            (
                d_run, _from(hidden, first), gates, mask, d_run, gates if d_gates is None else d_gates,
                hidden if gated is None else _from(gated, first),
            ),
            (((tokens,), (row, gate_row, run, *flags), partial(_rest, row, gate_row, run, *flags)),),
        )  # fmt: skip
    return d_gated, d_gates, gated


def _rest(row: int, gate_row: int, run: Run, masked: bool, *of_backward: bool) -> Rest:
    first, count = run
    flags = dict(zip(("WANT_GATES", "ADD", "WANT_GATED"), of_backward, strict=False))
    width = 1 << max(first.rank - 1, 0).bit_length()
    sizes = {"LINEARS": count, "RANK": first.rank, "WIDTH": width, "TILE": TOKENS, "MASKED": masked}
    return Rest([row, first.experts, gate_row, float(first.scaling)], {**sizes, **flags}, {})


def _from(each: Tensor, first: Any) -> Tensor:
    return each[:, first.start :] if first.start else each


def _rows(gates: Tensor) -> Tensor:
    """float32, with its columns side by side."""
    if gates.dtype != torch.float32:
        gates = gates.to(torch.float32)
    return gates if gates.stride(-1) == 1 else gates.contiguous()


def _whole(each: Tensor) -> Tensor:
    return each if each.is_contiguous() else each.contiguous()
