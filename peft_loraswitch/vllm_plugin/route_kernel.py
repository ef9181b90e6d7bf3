"""The routing decision of `routing_tables.py` as one Triton kernel: a program a token, one launch for each linear that routes.

A program reads its token's input and, of the router, the rows of its own adapter alone. Everything is computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, BLOCK = 8, 1024  # choices and features that a program takes at a time
GATHERED = 4096  # columns x choices, at a time


@triton.jit  # type: ignore[untyped-decorator]
def write_decision(logits, settings, mask, columns, CHOICES: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row `mask` of a token with these logits, [CHOICES], whose adapter has the row `settings`."""
    choices, top_k = tl.load(settings), tl.load(settings + 1)
    normalize, hard = tl.load(settings + 2), tl.load(settings + 3)
    experts, stacked = tl.load(settings + 4), tl.load(settings + 5)
    top_p = tl.load(settings + 6).to(tl.float32, bitcast=True)
    index = tl.arange(0, CHOICES)
    is_choice = index < choices
    column = tl.arange(0, WIDTH)

    # Highest first, of equal ones the lowest index; NaN counts as the highest, infinite ones as the largest number.
    height = tl.where(logits != logits, 3.4028234663852886e38, logits)
    height = tl.minimum(tl.maximum(height, -3.4028234663852886e38), 3.4028234663852886e38)
    peak = tl.max(tl.where(is_choice, logits, float("-inf")), axis=0)
    share = tl.where(is_choice, tl.exp(logits - peak), 0.0)
    share = share / tl.sum(share, axis=0)
    left = is_choice
    chosen = tl.zeros([CHOICES], dtype=tl.float32)
    reached = 0.0
    for place in range(top_k):
        best = tl.max(tl.where(left, height, float("-inf")), axis=0)
        pick = tl.min(tl.where(left & (height == best), index, CHOICES), axis=0)
        enough = (place > 0) & (top_p < 1.0) & (reached >= top_p)  # not so for NaN
        chosen = tl.where((index == pick) & (enough == 0), 1.0, chosen)
        left = left & (index != pick)
        reached += tl.sum(tl.where(index == pick, share, 0.0), axis=0)

    gates = share * chosen  # not where(): NaN stays
    gates = tl.where(normalize != 0, gates / tl.sum(gates, axis=0), gates)
    gates = tl.where(hard != 0, chosen + share * 0.0, gates)
    shared_gate = 1.0 / top_k.to(tl.float32) + tl.sum(gates, axis=0) * 0.0
    for start in range(0, columns, WIDTH):
        expert = (start + column) % stacked
        gate = tl.sum(tl.where(expert[:, None] == index[None, :], gates[None, :], 0.0), axis=1)
        tl.store(mask + start + column, tl.where(expert < experts, gate, shared_gate), mask=start + column < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _route_kernel(  # type: ignore[no-untyped-def]
    x, router, here, settings, token_slots, mask, own,
    slots, features, x_row, choice_rows, setting_row, mask_row, columns, own_row,
    FIRST: tl.constexpr, LOGITS: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slots + token).to(tl.int64)
    adapted = (slot >= 0) & (slot < slots)
    slot = tl.where(adapted, slot, 0)
    routed = adapted & (tl.load(here + slot) != 0)
    mask += token * mask_row
    if routed:
        settings += slot * setting_row
        choices = tl.load(settings)
        index = tl.arange(0, CHOICES)
        is_choice = index < choices
        x += token * x_row
        if LOGITS:
            logits = tl.load(x + index, mask=is_choice, other=0.0).to(tl.float32)
        else:
            logits = tl.zeros([CHOICES], dtype=tl.float32)
            router += slot * choice_rows * features
            for start in range(0, choices, CHUNK):
                row = start + tl.arange(0, CHUNK)
                products = tl.zeros([CHUNK, BLOCK], dtype=tl.float32)
                for begin in range(0, features, BLOCK):
                    feature = begin + tl.arange(0, BLOCK)
                    inside = feature < features
                    value = tl.load(x + feature, mask=inside, other=0.0).to(tl.float32)
                    at = row[:, None] * features + feature[None, :]
                    weight = tl.load(router + at, mask=(row < choices)[:, None] & inside[None, :], other=0.0)
                    products += weight * value[None, :]
                dots = tl.sum(products, axis=1)
                logits += tl.sum(tl.where(index[:, None] == row[None, :], dots[None, :], 0.0), axis=1)

        if tl.load(settings + 7).to(tl.float32, bitcast=True) > 0.0:  # decided by `context_kernel.py`
            tl.store(own + token * own_row + index, logits, mask=is_choice)
        else:
            write_decision(logits, settings, mask, columns, CHOICES, WIDTH)
    elif FIRST:
        column = tl.arange(0, WIDTH)
        for start in range(0, columns, WIDTH):
            value = tl.where(adapted, tl.full([WIDTH], 1.0, tl.float32), 0.0)
            tl.store(mask + start + column, value, mask=start + column < columns)


def mask_width(mask: Tensor, choices: int) -> int:
    """Columns of the mask that a program writes at a time."""
    return int(min(triton.next_power_of_2(mask.shape[1]), max(GATHERED // choices, 1)))


def route(
    x: Tensor, router: Tensor | None, here: Tensor, settings: Tensor, token_slots: Tensor, first: bool, mask: Tensor,
    own: Tensor | None = None,
) -> None:  # fmt: skip
    """As `routing_tables.write_mask`, on a GPU. Of tokens whose adapter has a decay it leaves the logits in `own`, float32 [at
    least tokens, choices], and the decision to `context_kernel.py`; without `own` no adapter may have one."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, features = x.shape
    max_choices = features if router is None else router.shape[1]
    choices = triton.next_power_of_2(max_choices)
    block = min(triton.next_power_of_2(features), BLOCK)
    _route_kernel[(tokens,)](
        x, x if router is None else router, here.view(torch.uint8), settings, token_slots, mask,
        mask if own is None else own, here.shape[0], features, x.stride(0), max_choices, settings.stride(0), mask.stride(0),
        mask.shape[1], 0 if own is None else own.stride(0),
        FIRST=first, LOGITS=router is None, CHOICES=choices, CHUNK=CHUNK, BLOCK=block, WIDTH=mask_width(mask, choices),
        num_warps=8,
    )  # fmt: skip
