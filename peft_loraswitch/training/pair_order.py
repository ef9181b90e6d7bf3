"""The (token, expert) pairs of a decision, sorted by expert: the order in which `pair_products.py` computes them.

It is made by operations whose shapes depend on the number of tokens alone, so nothing waits for the device to learn how many
tokens an expert has. Rows are cut into tiles of at most `TILE`, each of one expert. An expert's last tile may be short, so there
are at most pairs / TILE + experts of them: so many are listed, and those behind the last say so.

A token's experts are its slots: the first, the second ... Pairs of one expert are sorted by slot, then by token. Where results of
a token are added up, slot after slot, every tile holds pairs of one slot, so that no two add to the same row at the same time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64  # rows
NO_TILE = -1  # in place of an expert, behind the last tile


@dataclass(frozen=True)
class PairOrder:
    """P = tokens * slots pairs. Those of the null index (`Routing.experts`) come last, and belong to the expert `experts`.

    Attributes:
        tokens: int32 [P], whose pair it is.
        bounds: int32 [experts + 1], where the pairs of each expert begin; those of the last end where the null index begins.
        tiles: int32 [n, 3], expert, first row, row behind the last of the expert; the null index has tiles, too.
        slot_tiles: int32 [slots, m, 3], the same, each of one slot.
    """

    experts: int
    slots: int
    tokens: Tensor
    bounds: Tensor
    tiles: Tensor
    slot_tiles: Tensor

    @functools.cached_property
    def pairs(self) -> int:
        return self.tokens.shape[0]

    @functools.cached_property
    def most_tiles(self) -> int:
        return self.tiles.shape[0]

    @functools.cached_property
    def most_slot_tiles(self) -> int:
        return self.slot_tiles.shape[1]


@torch.no_grad()
def order_of(chosen: Tensor, experts: int) -> PairOrder:
    """The order of a decision.

    Args:
        chosen: int64 [tokens, slots], indices of experts, all different in a row; `experts` where there is none.
    """
    tokens, slots = chosen.shape
    keys = (chosen * slots + torch.arange(slots, device=chosen.device)).flatten()
    keys, places = torch.sort(keys, stable=True)
    groups = torch.arange((experts + 1) * slots + 1, device=chosen.device)
    bounds = torch.searchsorted(keys, groups)  # of each expert and slot
    token = places // slots
    each = bounds[:-1].view(experts + 1, slots), bounds[1:].view(experts + 1, slots)
    by_slot = _tiles(each[0].t(), each[1].t(), tokens // TILE + experts + 1)
    by_expert = _tiles(each[0][:, 0].unsqueeze(0), each[1][:, -1].unsqueeze(0), tokens * slots // TILE + experts + 1)
    return PairOrder(
        experts=experts,
        slots=slots,
        tokens=token.to(torch.int32),
        bounds=bounds[: experts * slots + 1 : slots].to(torch.int32),
        tiles=by_expert[0],
        slot_tiles=by_slot,
    )


def _tiles(first: Tensor, end: Tensor, most: int) -> Tensor:
    """int32 [lists, most, 3], from where the rows of each expert begin and end, [lists, experts + 1] each."""
    first, end = first.contiguous(), end.contiguous()
    number = (end - first + TILE - 1) // TILE
    until = number.cumsum(dim=1)
    place = torch.arange(most, device=first.device).expand(len(first), most).contiguous()
    expert = torch.searchsorted(until, place, right=True)
    known = expert.clamp(max=first.shape[1] - 1)
    row = first.gather(1, known) + (place - (until - number).gather(1, known)) * TILE
    expert = expert.where(expert < first.shape[1], NO_TILE)
    return torch.stack((expert, row, end.gather(1, known)), dim=-1).to(torch.int32)
