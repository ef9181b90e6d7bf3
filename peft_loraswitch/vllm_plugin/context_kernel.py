"""`kept_sums.mean_logits` and the decision that follows, as one Triton kernel: a program a token.

`route_kernel.py` runs before it in the same stream, and leaves each token's own logits. A program adds up those of its request's
tokens in this batch, as far back as their weight counts, and the sums that the token before them has in the KV cache. If that
token is computed in this batch, too, by a request that shares its block, it goes on with that one's logits instead. So it reads
no row that another program of the launch writes, and programs need not wait for each other: a long prompt takes them all.

It reads the buffers in which vLLM tells attention where tokens lie. Their addresses stay, so it is captured in CUDA graphs with
the rest of the model; an op at which vLLM splits the model would cut its graphs in two at each linear that routes. The launch is
the same whatever the batch: tokens of padding have no slot in the KV cache, and their programs end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kept_sums import KeptSums, Places
from .route_kernel import mask_width, write_decision

TILE = 64  # tokens that a program adds up at a time
SEARCHED = 1024  # tokens of the batch that it compares at a time


@triton.jit  # type: ignore[untyped-decorator]
def _context_kernel(  # type: ignore[no-untyped-def]
    own, here, settings, token_slots, mask, starts, positions, cache_slots, blocks, address,
    slots, requests, block_size, own_row, setting_row, mask_row, block_row, columns, sums_row,
    CHOICES: tl.constexpr, REQUESTS: tl.constexpr, TILE: tl.constexpr, SEARCHED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slots + token).to(tl.int64)
    adapted = (slot >= 0) & (slot < slots)
    slot = tl.where(adapted, slot, 0)
    settings += slot * setting_row
    decay = tl.load(settings + 7).to(tl.float32, bitcast=True)
    place = tl.load(cache_slots + token)
    begin_of_sums = tl.load(address)
    if adapted & (tl.load(here + slot) != 0) & (decay > 0.0) & (place >= 0) & (begin_of_sums != 0):
        sums = begin_of_sums.to(tl.pointer_type(tl.float32))
        rate = tl.load(settings + 8).to(tl.float32, bitcast=True)  # log2(decay), 0 or less
        index = tl.arange(0, CHOICES)
        is_choice = index < tl.load(settings)

        behind = tl.arange(0, REQUESTS)
        ends = tl.load(starts + 1 + behind, mask=behind < requests, other=2147483647)
        # Weights below 2^-64 are nothing beside the token's own, 1.
        reach = tl.minimum(tl.where(rate < 0.0, 64.0 / tl.where(rate < 0.0, -rate, 1.0), 1e9), 1e9).to(tl.int64)

        total = tl.zeros([CHOICES], dtype=tl.float32)
        weights = 0.0
        last = token  # of a run of tokens in this batch that are still to add up; -1: none
        distance = token * 0  # from `last` to `token` in their text
        while last >= 0:
            request = tl.sum((ends <= last).to(tl.int64), axis=0)
            begin = tl.load(starts + request).to(tl.int64)
            for start in range(tl.maximum(begin, last - reach), last + 1, TILE):
                row = start + tl.arange(0, TILE)
                inside = row <= last
                weight = tl.where(inside, tl.exp2((distance + last - row).to(tl.float32) * rate), 0.0)
                value = tl.load(
                    own + row[:, None] * own_row + index[None, :], mask=inside[:, None] & is_choice[None, :], other=0.0
                )
                total += tl.sum(weight[:, None] * value, axis=0)
                weights += tl.sum(weight, axis=0)

            distance += last - begin + 1
            last = token * 0 - 1
            position = tl.load(positions + begin)
            if (position > 0) & (distance <= reach):
                before = position - 1
                block = tl.load(blocks + request * block_row + before // block_size).to(tl.int64)
                previous = block * block_size + before % block_size
                found = tl.zeros([SEARCHED], dtype=tl.int64)
                for first in range(0, tl.num_programs(0), SEARCHED):  # a name of its own: `start` is of another type
                    other = first + tl.arange(0, SEARCHED)
                    there = tl.load(cache_slots + other, mask=other < tl.num_programs(0), other=-1)
                    found = tl.where(there == previous, other + 1, found)
                last = tl.max(found, axis=0) - 1
                if last < 0:
                    weight = tl.exp2(distance.to(tl.float32) * rate)
                    total += weight * tl.load(sums + previous * sums_row + index, mask=is_choice, other=0.0)
                    weights += weight * tl.load(sums + previous * sums_row + sums_row - 1)

        tl.store(sums + place * sums_row + index, total, mask=is_choice)
        tl.store(sums + place * sums_row + sums_row - 1, weights)
        write_decision(total / weights, settings, mask + token * mask_row, columns, CHOICES, WIDTH)


def is_needed(kept: KeptSums) -> bool:
    """Whether to launch the kernel: for adapters that are there, for those that may come while a captured graph lives, and
    once, so that it is compiled before anything is captured."""
    return kept.sums is not None or not kept.launched or torch.cuda.is_current_stream_capturing()


def route(
    tokens: int, here: Tensor, settings: Tensor, token_slots: Tensor, mask: Tensor, kept: KeptSums, places: Places
) -> None:
    """Write the mask rows of the tokens with a decay, and their sums; `kept.own` has their logits."""
    choices = triton.next_power_of_2(kept.max_choices)
    requests = places.starts.shape[0] - 1
    _context_kernel[(tokens,)](
        kept.own, here.view(torch.uint8), settings, token_slots, mask,
        places.starts, places.positions, places.slots, places.blocks, kept.address,
        here.shape[0], requests, places.block_size, kept.own.stride(0), settings.stride(0), mask.stride(0),
        places.blocks.stride(0), mask.shape[1], kept.max_choices + 1,
        CHOICES=choices, REQUESTS=triton.next_power_of_2(requests), TILE=TILE, SEARCHED=SEARCHED,
        WIDTH=mask_width(mask, choices), num_warps=4,
    )  # fmt: skip
    kept.launched = True
