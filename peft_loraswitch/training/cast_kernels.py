"""The weights of a group of linears in the dtype of the products, by a Triton kernel: one launch, where PyTorch has one a tensor.

A keeps its order. B is [E, out, r] and becomes [out, E * r].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from . import gate_kernels
from .gate_hidden import Columns, runs
from .triton_launch import Launcher, Rest

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of PyTorch
    triton = None

LINEARS = 3  # of one launch, at most
TENSORS = {"cast": 1 + 2 * LINEARS}  # of the kernel's arguments
TILE = 2048  # numbers of a program
LARGEST = 2**30  # numbers in the memory: offsets are ints of 32 bits


class Part(NamedTuple):
    """Linears alike that one launch takes.

    Attributes:
        first, end: of the linears.
        tiles: of the largest weight.
        numbers: size of an A, where the first A begins in the memory; of each B: out, and where it begins.
    """

    first: int
    end: int
    rank: int
    width: int
    tiles: int
    numbers: tuple[int, ...]


def takes(weights: Sequence[Tensor]) -> bool:
    """Whether the kernel can read their dtypes."""
    return all(each.dtype in gate_kernels.FLOATS for each in weights)


def parts(columns: tuple[Columns, ...], features: int, outs: Sequence[int], starts_of_b: Sequence[int]) -> list[Part]:
    """The launches of a group whose inputs have `features`, and whose A begin with the memory, side by side."""
    found: list[Part] = []
    first = 0
    for one, count in runs(columns):
        width = one.experts * one.rank
        for start in range(first, first + count, LINEARS):
            end = min(start + LINEARS, first + count)
            of_b = itertools.chain(*zip(outs[start:end], starts_of_b[start:end], strict=True))
            tiles = -(-width * max(features, *outs[start:end]) // TILE)
            numbers = (width * features, columns[start].start * features, *of_b)
            found.append(Part(start, end, one.rank, width, tiles, numbers))
        first += count
    return found


def cast(memory: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], launches: Sequence[Part]) -> bool:
    """Writes A [E, r, in] and B [E, out, r] of all linears to the memory. False where the kernel does not take them: nothing is
    written then."""
    if memory.numel() > LARGEST or not gate_kernels.usable(memory):
        return False
    weights = [*itertools.chain(*zip(a, b, strict=True))]
    if False in map(Tensor.is_contiguous, weights):
        return False
    for part in launches:
        tensors = [memory, *weights[2 * part.first : 2 * part.end]]
        _launch_cast((part.tiles, len(tensors) - 1, 1), tensors, [((), part, partial(_rest, part))])
    return True


def _rest(part: Part) -> Rest:
    absent = [None, None] * (LINEARS - (part.end - part.first))
    return Rest([*part.numbers, *absent], {"RANK": part.rank, "WIDTH": part.width, "SIZE": TILE}, {})


if triton is not None:

    @triton.jit
    def _cast_a(a, place, size, at):  # type: ignore[no-untyped-def]
        value = tl.load(a + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(place + at, value.to(place.dtype.element_ty), mask=at < size)

    @triton.jit  # type: ignore[untyped-decorator]
    def _cast_b(b, place, out, at, RANK: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        row, column = at // WIDTH, at % WIDTH
        inside = row < out
        value = tl.load(b + (column // RANK * out + row) * RANK + column % RANK, mask=inside, other=0.0).to(tl.float32)
        tl.store(place + at, value.to(place.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _cast_kernel(  # type: ignore[no-untyped-def]
        memory, a0, b0, a1, b1, a2, b2, a_size, a_start, out0, start0, out1, start1, out2, start2,
        RANK: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        which = tl.program_id(1)
        at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        if which == 0:
            _cast_a(a0, memory + a_start, a_size, at)
        elif which == 1:
            _cast_b(b0, memory + start0, out0, at, RANK, WIDTH)
        if a1 is not None:
            if which == 2:
                _cast_a(a1, memory + a_start + a_size, a_size, at)
            elif which == 3:
                _cast_b(b1, memory + start1, out1, at, RANK, WIDTH)
        if a2 is not None:
            if which == 4:
                _cast_a(a2, memory + a_start + 2 * a_size, a_size, at)
            elif which == 5:
                _cast_b(b2, memory + start2, out2, at, RANK, WIDTH)

    _launch_cast = Launcher(_cast_kernel, TENSORS["cast"])
