"""What a call of the fused training path is (`Spec`), and how what it makes and keeps lies in memory (`Packed`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gate_hidden import Columns, runs


@dataclass(frozen=True)
class Spec:
    """What a call is, besides its tensors, whose shapes but for the number of tokens are the same in all calls of one object.

    Attributes:
        dtype: of the products.
        columns: of each linear in the group's hidden.
        given: the base layers have run: their results are among the tensors, not their weights.
        transposed: their weights are [in, out] (Conv1D).
        in_place: with `given`, whether each result may be added to.
        checkpointed: the call is in a checkpointed block.
        last: and nothing that comes after it in the block is known to be needed in backward.
        slots: experts of a token, where products go by (token, expert) pairs (`group_pairs.py`); 0: with all experts at once.
    """

    dtype: torch.dtype
    columns: tuple[Columns, ...]
    given: bool
    transposed: bool = False
    in_place: tuple[bool, ...] = ()
    checkpointed: bool = False
    last: bool = False
    slots: int = 0

    @property
    def size(self) -> int:
        return len(self.columns)

    @functools.cached_property
    def widths(self) -> list[int]:
        """E * r of each linear."""
        return [each.stop - each.start for each in self.columns]

    @functools.cached_property
    def layouts(self) -> dict[int, Layout]:
        """By number of tokens."""
        return {}

    @functools.cached_property
    def width(self) -> int:
        return self.columns[-1].stop

    @functools.cached_property
    def hidden_widths(self) -> list[int]:
        """Columns of each linear in the hidden, whose rows are tokens, or pairs."""
        return [each.rank for each in self.columns] if self.slots else self.widths


class Layout:
    """Where in `Packed` something begins. Made once for a number of tokens.

    Attributes:
        holds_a: on a CPU, A stays where it is if its dtype is that of the products: copying costs more than the products that it
            joins.
        end: the size of all.
    """

    def __init__(self, tokens: int, a: Sequence[Tensor], b: Sequence[Tensor], spec: Spec) -> None:
        self.width, self.features = spec.width, a[0].shape[-1]
        self.hidden = (tokens * max(spec.slots, 1), sum(spec.hidden_widths))
        self.holds_a = len(a) > 1 and a[0].is_cuda or any(each.dtype != spec.dtype for each in a)
        self.start_a = _aligned(self.hidden[0] * self.hidden[1])
        end = self.start_a + _aligned(spec.width * self.features if self.holds_a else 0)
        self.places_a, self.places_b, self.wide_b, self.up = [], [], [], []  # size, strides, start
        self.pair_a: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        self.pair_b: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        for columns, width, up in zip(spec.columns, spec.widths, b, strict=True):
            experts, out, rank = up.shape
            size, strides = (experts, rank, self.features), (rank * self.features, self.features, 1)
            self.places_a.append((size, strides, self.start_a + columns.start * self.features))
            self.places_b.append(((experts, out, rank), (rank, width, 1), end))
            self.wide_b.append(((out, width), (width, 1), end))
            self.up.append(((width, out), (1, width), end))
            self.pair_b.append(((1, experts, rank, out), (out * width, rank, 1, width), end))
            end += _aligned(out * width)
        self.end = end
        for first, count in runs(spec.columns):
            alike = (count, first.experts, first.rank, self.features)
            steps = (first.experts * first.rank * self.features, first.rank * self.features, self.features, 1)
            self.pair_a.append((alike, steps, self.start_a + first.start * self.features))


def _aligned(size: int) -> int:
    """Up to the next 128 bytes of 16-bit numbers, as products like their matrices to begin."""
    return -(-size // 64) * 64


class Packed:
    """What a call makes and keeps, in the dtype of the products and in one piece of memory, so that it is allocated and kept as
    one: the hidden of its tokens [T, N] (of their pairs [P, sum of r]); A of all linears [N, in]; each linear's B [out, E * r].
    Views are made when asked for.

    Args:
        memory: as it was kept; None: a new one.
    """

    def __init__(
        self, tokens: int, a: Sequence[Tensor], b: Sequence[Tensor], spec: Spec, memory: Tensor | None = None
    ) -> None:
        layout = spec.layouts.get(tokens)
        if layout is None:
            if len(spec.layouts) > 100:  # batches of any length
                spec.layouts.clear()
            layout = spec.layouts[tokens] = Layout(tokens, a, b, spec)
        self.layout = layout
        self.memory = torch.empty(layout.end, dtype=spec.dtype, device=a[0].device) if memory is None else memory

    def write(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """The weights into their places."""
        view, layout = self.memory.as_strided, self.layout
        if layout.holds_a:  # by copies of equal strides, which a GPU makes in one launch
            torch._foreach_copy_([view(*place) for place in layout.places_a], list(a))
        torch._foreach_copy_([view(*place) for place in layout.places_b], list(b))

    def hidden(self) -> Tensor:
        layout = self.layout
        return self.memory.as_strided(layout.hidden, (layout.hidden[1], 1), 0)

    def wide_a(self, a: Sequence[Tensor]) -> list[Tensor]:
        """One matrix [N, in], or one [E * r, in] for each linear."""
        layout = self.layout
        if layout.holds_a:
            return [self.memory.as_strided((layout.width, layout.features), (layout.features, 1), layout.start_a)]
        return [each.detach().view(-1, layout.features) for each in a]

    def wide_b(self) -> list[Tensor]:
        """[out, E * r] each"""
        return [self.memory.as_strided(*place) for place in self.layout.wide_b]

    def up(self) -> list[Tensor]:
        """[E * r, out] each: the same, the other way round."""
        return [self.memory.as_strided(*place) for place in self.layout.up]

    def pair_a(self, a: Sequence[Tensor]) -> list[Tensor]:
        """[linears, E, r, in] each, in the order of the linears; those alike in one, if they lie side by side."""
        if not self.layout.holds_a:
            return [each.detach().unsqueeze(0) for each in a]
        return [self.memory.as_strided(*place) for place in self.layout.pair_a]

    def pair_b(self) -> list[Tensor]:
        """[1, E, r, out] each"""
        return [self.memory.as_strided(*place) for place in self.layout.pair_b]
