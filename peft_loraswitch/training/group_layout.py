"""What a call of the fused training path is (`Spec`), and how the weights that it has cast lie in memory (`Casts`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cast_kernels
from .gate_hidden import Columns, runs

# What a checkpointed block's first run keeps for its second, at most, of one group of linears. Its cast weights: in an 8B model
# the largest group is gate_proj and up_proj, 4.5 MiB at E * r = 64. All groups together: 2 bytes for each number in A and B,
# 320 MiB there. Its hidden, as a part of the group's input: with E * r = 64, q_proj, k_proj and v_proj have 192 columns of 4,096,
# and all groups together 0.11 of what checkpointing itself keeps of a block.
# The gated hidden spares one launch, which counts where launches take longer than what they do: 192 columns of 4,096 tokens are
# 1.5 MiB.
KEPT_BYTES = 16 * 2**20
KEPT_HIDDEN = 1 / 16
KEPT_GATED_BYTES = 2 * 2**20


class PackedWeight:
    """Stands where the weight of a base layer does, in a form that no product reads. Like a weight of another dtype than that of
    the products it is cast to theirs (`to`) for each product, and what that makes is kept by none."""

    __slots__ = ()
    dtype: torch.dtype | None = None  # none of any product

    def to(self, dtype: torch.dtype) -> Tensor:
        """[out, in], made anew in each call."""
        raise NotImplementedError


Weight = Tensor | PackedWeight


class Part(NamedTuple):
    """Linears of a group that one launch takes, where products go by pairs.

    Attributes:
        key: what they have in common.
        one: of them.
        columns: theirs in the hidden; None: all, they are the whole group.
    """

    key: Any
    one: Columns
    linears: slice
    columns: slice | None


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
        packed: the base layers' weights are `PackedWeight`s, and their outputs have the dtype of the input.
    """

    dtype: torch.dtype
    columns: tuple[Columns, ...]
    given: bool
    transposed: bool = False
    in_place: tuple[bool, ...] = ()
    checkpointed: bool = False
    last: bool = False
    slots: int = 0
    packed: bool = False

    @functools.cached_property
    def size(self) -> int:
        return len(self.columns)

    @functools.cached_property
    def widths(self) -> list[int]:
        """E * r of each linear."""
        return [each.stop - each.start for each in self.columns]

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        """One, once a call has shown the shapes of the weights."""
        return []

    @functools.cached_property
    def parts(self) -> dict[tuple[Any, ...], list[Part]]:
        """By the keys of the linears, as calls have shown them."""
        return {}

    @functools.cached_property
    def width(self) -> int:
        return self.columns[-1].stop

    @functools.cached_property
    def hidden_widths(self) -> list[int]:
        """Columns of each linear in the hidden, whose rows are tokens, or pairs."""
        return [each.rank for each in self.columns] if self.slots else self.widths


class Layout:
    """Where in `Casts` something begins.

    Attributes:
        joins_a: A of all linears is one matrix there. On a CPU not if its dtype is that of the products: copying costs more than
            the products that it joins.
        holds_a: A is there: if it is joined, and in a checkpointed block, so that it is kept with B. Elsewhere it is read where
            it lies.
        end: the size of all; `bytes`: in bytes.
        launches: of the kernel that casts, if A is there and it takes them; none: PyTorch copies.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor], spec: Spec) -> None:
        self.width, self.features = spec.width, a[0].shape[-1]
        self.joins_a = len(a) > 1 and a[0].is_cuda or any(each.dtype != spec.dtype for each in a)
        self.holds_a = self.joins_a or spec.checkpointed
        end = _aligned(spec.width * self.features if self.holds_a else 0)
        self.places_a, self.places_b, self.wide_a, self.wide_b = [], [], [], []  # size, strides, start
        self.pair_a: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        self.pair_b: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        self.pair_d_b: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.hidden_width = sum(spec.hidden_widths)
        for columns, width, up in zip(spec.columns, spec.widths, b, strict=True):
            experts, out, rank = up.shape
            size, strides = (experts, rank, self.features), (rank * self.features, self.features, 1)
            if self.holds_a:
                self.places_a.append((size, strides, columns.start * self.features))
                self.wide_a.append(((width, self.features), (self.features, 1), columns.start * self.features))
            self.places_b.append(((experts, out, rank), (rank, width, 1), end))
            self.wide_b.append(((out, width), (width, 1), end))
            self.pair_b.append(((1, experts, rank, out), (out * width, rank, 1, width), end))
            self.pair_d_b.append(((1, experts, rank, out), (out * width, out * rank, 1, rank)))
            end += _aligned(out * width)
        if self.joins_a:
            self.wide_a = [((self.width, self.features), (self.features, 1), 0)]
        self.end, self.bytes = end, end * spec.dtype.itemsize
        self.launches: list[cast_kernels.Part] = []
        if self.holds_a and cast_kernels.takes([*a, *b]):
            outs, starts = [up.shape[1] for up in b], [start for _, _, start in self.places_b]
            self.launches = cast_kernels.parts(spec.columns, self.features, outs, starts)
        for first, count in runs(spec.columns):
            alike = (count, first.experts, first.rank, self.features)
            steps = (first.experts * first.rank * self.features, first.rank * self.features, self.features, 1)
            self.pair_a.append((alike, steps, first.start * self.features))


def _aligned(size: int) -> int:
    """Up to the next 128 bytes of 16-bit numbers, as products like their matrices to begin."""
    return -(-size // 64) * 64


class Casts:
    """The weights of a call in the dtype of the products, in one piece of memory, so that it is allocated as one: A of
    all linears [N, in]; each linear's B [out, E * r]. Views are made when asked for, and once.

    Args:
        kept: what `to_keep()` of the same call has given; None: a new piece, with the weights as they are now.
    """

    def __init__(
        self, a: Sequence[Tensor], b: Sequence[Tensor], spec: Spec, kept: Sequence[Tensor] | None = None
    ) -> None:
        if not spec.layouts:
            spec.layouts.append(Layout(a, b, spec))
        layout = self.layout = spec.layouts[0]
        self.memory: Tensor | None = None
        self._wide_a: Sequence[Tensor] | None = None
        self._wide_b: Sequence[Tensor] | None = None
        self._pair_a: list[Tensor] | None = None
        self._pair_b: list[Tensor] | None = None
        if kept is None:
            memory = self.memory = torch.empty(layout.end, dtype=spec.dtype, device=a[0].device)
            if not layout.launches or not cast_kernels.cast(memory, a, b, layout.launches):
                places = [memory.as_strided(*place) for place in layout.places_a + layout.places_b]
                torch._foreach_copy_(places, [*a, *b] if layout.holds_a else list(b))
        elif spec.slots:
            (self.memory,) = kept
        else:
            self._wide_b = kept[: spec.size]
            if layout.holds_a:
                self._wide_a = kept[spec.size :]

    def to_keep(self, a: Sequence[Tensor], spec: Spec) -> tuple[Tensor, ...]:
        """What backward takes: by pairs the memory, otherwise the views, which a product reads either way round."""
        if spec.slots:
            assert self.memory is not None
            return (self.memory,)
        return (*self.wide_b(), *(self.wide_a(a) if self.layout.holds_a else ()))

    def _views(self, places: Sequence[tuple[tuple[int, ...], tuple[int, ...], int]]) -> list[Tensor]:
        assert self.memory is not None
        return [self.memory.as_strided(*place) for place in places]

    def wide_a(self, a: Sequence[Tensor]) -> Sequence[Tensor]:
        """One matrix [N, in], or one [E * r, in] for each linear."""
        if not self.layout.holds_a:  # not kept: whoever owns A may have put it elsewhere since
            return [each.detach().reshape(-1, self.layout.features) for each in a]
        if self._wide_a is None:
            self._wide_a = self._views(self.layout.wide_a)
        return self._wide_a

    def wide_b(self) -> Sequence[Tensor]:
        """[out, E * r] each"""
        if self._wide_b is None:
            self._wide_b = self._views(self.layout.wide_b)
        return self._wide_b

    def pair_a(self, a: Sequence[Tensor]) -> list[Tensor]:
        """[linears, E, r, in] each, in the order of the linears; those alike in one, if they lie side by side."""
        if not self.layout.holds_a:
            return [each.detach().unsqueeze(0) for each in a]
        if self._pair_a is None:
            self._pair_a = self._views(self.layout.pair_a)
        return self._pair_a

    def pair_b(self) -> list[Tensor]:
        """[1, E, r, out] each"""
        if self._pair_b is None:
            self._pair_b = self._views(self.layout.pair_b)
        return self._pair_b


class KeptByBlock:
    """What a checkpointed block's runs have made for its groups of linears, for as long as the block may run again: the weights
    as they were cast, and the hidden, so that the second run takes what the first has, and backward what the second has.

    Nothing looks whether the experts have been written to in between: FSDP frees them after the forward and fills them again with
    the same numbers, and a write through `.data` cannot be seen. So the second run and backward take A and B together from one
    moment, and backward differentiates what the second run computes. Where a group's casts are kept, that is by the weights of
    the first run. Where they are too large, it is by those of the second, as in any checkpointed block, and what the first run
    has made of the inputs of this and later groups in the block is not kept: they may be others by then. All other weights that a
    block's inputs follow from (the backbone's, the router's, norms that train) have to stay as they are until backward.

    The block alone holds on to this object, and the autograd function refers to it weakly: memory goes as backward goes on from
    block to block.

    Attributes:
        hidden: by `place()`. Backward takes it away, so it is made anew if there is a second backward.
        gated: the same, which the second run takes away.
        packed: the weights that the second run has made of their 4 bits, with what that has left for backward.
    """

    def __init__(self) -> None:
        self.hidden: dict[Any, Tensor] = {}
        self.gated: dict[Any, Tensor] = {}
        self.packed: dict[Any, Sequence[Weight]] = {}
        self._casts: dict[Any, Casts] = {}
        self._second_run = False
        self._all_kept = True  # the casts of all groups that the first run has come to
        self._calls: dict[Any, int] = {}

    def begin_second_run(self) -> None:
        self._second_run = True
        self._calls.clear()

    def casts(self, key: Any, a: Sequence[Tensor], b: Sequence[Tensor], spec: Spec) -> Casts:
        """Those of the group that `key` stands for, made now if need be."""
        found = self._casts.get(key)
        if found is None:
            found = Casts(a, b, spec)
            if self._second_run or found.layout.bytes <= KEPT_BYTES:
                self._casts[key] = found
            else:
                self._all_kept = False
        return found

    def place(self, key: Any) -> tuple[Any, int]:
        """Of the hidden that the group `key` has now: a run may call a group several times, in both runs in the same order."""
        call = self._calls.get(key, 0)
        self._calls[key] = call + 1
        return key, call

    def keep_hidden(self, place: tuple[Any, int], hidden: Tensor, rows: Tensor) -> None:
        """Unless it is too large for its input `rows`, or this need not be the same in the second run. That of the second run is
        kept in any case, as backward comes next."""
        if self._second_run or self._all_kept and hidden.numel() <= KEPT_HIDDEN * rows.numel():
            self.hidden[place] = hidden

    def keep_gated(self, place: tuple[Any, int], gated: Tensor) -> None:
        """Of a first run, if it is small and the hidden is kept."""
        if not self._second_run and place in self.hidden and gated.nbytes <= KEPT_GATED_BYTES:
            self.gated[place] = gated

    def keep_packed(self, place: tuple[Any, int], weights: Sequence[Weight]) -> None:
        """Of a second run."""
        if self._second_run:
            self.packed[place] = weights
