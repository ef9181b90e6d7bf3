"""`y += (mask * hidden) B^T` of the tokens of a batch, each with its own LoRA, as one Triton kernel: vLLM's expand, which it
takes the place of, and the mask in the same launch.

A program takes some tokens of one LoRA and some outputs of one part of a packed linear. It reads all columns of B there, also
those of experts that were not chosen: at the usual ranks they are a hundredth of what a step reads, and tokens share them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 4  # of a packed linear, in one launch


@triton.jit  # type: ignore[untyped-decorator]
def _expand_kernel(  # type: ignore[no-untyped-def]
    hidden, mask, b_0, b_1, b_2, b_3, out, order, counts, starts, ids,
    tokens, width_0, width_1, width_2, width_3, offset, hidden_part, hidden_row, mask_row, out_row,
    RANK: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    token_tiles = tl.cdiv(tokens, TOKENS)
    first_place = tl.program_id(0) % token_tiles * TOKENS
    first_output = tl.program_id(0) // token_tiles * OUTPUTS
    part, group = tl.program_id(1), tl.program_id(2)
    lora = tl.load(ids + group).to(tl.int64)
    if lora < 0:
        return
    count = tl.load(counts + group)
    if first_place >= count:
        return
    width = tl.where(part == 0, width_0, tl.where(part == 1, width_1, tl.where(part == 2, width_2, width_3)))
    if first_output >= width:
        return
    b = b_0
    if part == 1:
        b = b_1
    if part == 2:
        b = b_2
    if part == 3:
        b = b_3
    before = tl.where(part > 0, width_0, 0) + tl.where(part > 1, width_1, 0) + tl.where(part > 2, width_2, 0)

    place = first_place + tl.arange(0, TOKENS)
    is_token = place < count
    token = tl.load(order + tl.load(starts + group) + place, mask=is_token, other=0).to(tl.int64)
    output = first_output + tl.arange(0, OUTPUTS)
    is_output = output < width
    b += lora * width * RANK
    hidden += part.to(tl.int64) * hidden_part
    total = tl.zeros([TOKENS, OUTPUTS], dtype=tl.float32)
    for start in range(0, RANK, RANKS):
        column = start + tl.arange(0, RANKS)
        is_column = column < RANK
        weight = tl.load(
            b + output[None, :] * RANK + column[:, None], mask=is_output[None, :] & is_column[:, None], other=0.0
        )
        inside = is_token[:, None] & is_column[None, :]
        value = tl.load(hidden + token[:, None] * hidden_row + column[None, :], mask=inside, other=0.0)
        gate = tl.load(mask + token[:, None] * mask_row + column[None, :], mask=inside, other=0.0)
        value = (value.to(tl.float32) * gate).to(weight.dtype)
        total = tl.dot(value, weight, total, input_precision="ieee")
    at = out + token[:, None] * out_row + (offset + before + output)[None, :]
    inside = is_token[:, None] & is_output[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@functools.cache
def _is_hopper(device: int) -> bool:
    """Whether a GPU (-1: a CPU) has wgmma. The left factor is computed here, so it is in registers, and ptxas before 13.3 may
    have these written to while products of the steps before still read them (triton-lang/triton#9433). Triton does not say
    which ptxas it has. So only one of several steps is on its way at a time, as in vLLM's own kernel from 0.33 on."""
    return device >= 0 and torch.cuda.get_device_capability(device)[0] == 9


def expand(
    hidden: Tensor, lora_b: Sequence[Tensor], mask: Tensor, out: Tensor,
    order: Tensor, counts: Tensor, starts: Tensor, ids: Tensor, groups: int, offset: int, add_inputs: bool,
) -> None:  # fmt: skip
    """Add (or write, without `add_inputs`) what the tokens' LoRAs give, to `out` [tokens, outputs] from output `offset` on.

    Args:
        hidden: [parts, tokens, rank].
        lora_b: for each part, [slots, 1, outputs of the part, rank], contiguous.
        mask: float32 [at least tokens, at least rank].
        order: the tokens, those of one LoRA side by side; ids, counts, starts: the slot of each such group (-1: no LoRA), its
            tokens, and where they begin in `order`.
        groups: how many groups to look at.
    """
    tokens, rank = hidden.shape[1:]
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if out.stride(-1) != 1 or not all(b.is_contiguous() for b in lora_b):
        raise RuntimeError("LoRA-Switch: vLLM gave a LoRA's tensors in a layout that the expand kernel does not take.")
    rows, outputs = (16, 64) if tokens <= 16 else (32, 64) if tokens <= 64 else (64, 128)
    ranks = max(16, min(64, triton.next_power_of_2(rank)))
    stages = 1 if rank > ranks and _is_hopper(hidden.get_device()) else 2
    for first in range(0, len(lora_b), PARTS):
        parts = list(lora_b[first : first + PARTS])
        widths = [b.shape[-2] for b in parts]
        grid = (triton.cdiv(tokens, rows) * triton.cdiv(max(widths), outputs), len(parts), groups)
        missing = PARTS - len(parts)
        _expand_kernel[grid](
            hidden[first], mask, *parts, *[parts[0]] * missing, out, order, counts, starts, ids,
            tokens, *widths, *[0] * missing, offset, hidden.stride(0), hidden.stride(1), mask.stride(0), out.stride(0),
            RANK=rank, TOKENS=rows, OUTPUTS=outputs, RANKS=ranks, ADD=add_inputs, num_warps=4, num_stages=stages,
        )  # fmt: skip
        offset += sum(widths)
