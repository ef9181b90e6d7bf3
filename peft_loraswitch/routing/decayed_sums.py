"""Decayed running sums over the tokens of sequences: what a router that sees context is made of.

    s_t = decay * s_(t-1) + v_t          within one sequence; a token that is padding leaves s as it is

By doubling: after the pass for a distance d, s_t covers 2 d tokens. log2(T) passes of plain tensor operations, which every
device and compiler knows, without overflow (no power of 1 / decay), and differentiable as they are. How much of an earlier sum
is left is decay to the number of real tokens in between, so padding costs powers of [batch, tokens], and nothing per value.
"""

from __future__ import annotations

from typing import Any

import torch

# Weights below it are nothing in float32: a decay of 0.9 reaches 829 tokens back, and needs no pass beyond.
_NOTHING = 2.0**-126


def decayed_sums(
    values: torch.Tensor, decay: float, numbers: torch.Tensor | None = None, previous: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """s, as above, of every token: [batch, tokens, n].

    Args:
        values: float [batch, tokens, n], zero where `real` is False.
        decay: in (0, 1].
        numbers: [batch, tokens], which sequence of its row a token is of (packing); None: each row is one.
        previous: [batch, n], s of the token before the first one; not together with `numbers`.
        real: bool [batch, tokens], False for padding; None: all are real.
    """
    tokens, distance = values.shape[1], 1
    sums = values
    counts = None  # [batch, tokens, 1], of the real tokens up to each one
    if real is not None and tokens > 1:
        counts = real.cumsum(-1).to(values.dtype).unsqueeze(-1)
    # with padding in between, a token that counts may be any distance away
    while distance < tokens and (counts is not None or decay**distance > _NOTHING):
        left: Any = decay**distance
        if counts is not None:
            left = torch.pow(decay, counts[:, distance:] - counts[:, :-distance])
        earlier = left * sums[:, :-distance]
        if numbers is not None:
            same = numbers[:, distance:] == numbers[:, :-distance]
            earlier = earlier.where(same.unsqueeze(-1), 0.0)
        sums = torch.cat([sums[:, :distance], sums[:, distance:] + earlier], dim=1)
        distance *= 2
    if previous is None:
        return sums
    previous = previous.unsqueeze(1)
    if tokens == 1:  # no power: padding leaves the very bits
        decayed = decay * previous
        return sums + (decayed if real is None else decayed.where(real.unsqueeze(-1), previous))
    if counts is None:
        counts = torch.arange(1, tokens + 1, dtype=sums.dtype, device=sums.device).unsqueeze(-1)
    return sums + torch.pow(decay, counts) * previous


def weighted(values: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """What is summed: values [batch, tokens, n] and their weight in one tensor, float32 [batch, tokens, n + 1]; all zero where
    `real` [batch, tokens] is False, whatever the values there are."""
    values = values.float()
    one = torch.ones_like(values[..., :1])
    both = torch.cat([values, one], dim=-1)
    return both if real is None else both.where(real.unsqueeze(-1), 0.0)


def mean_of(sums: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weighted mean that `sums` [..., n + 1] of `weighted()` stand for, [..., n]; of a token that has no real one before or
    at it, its own of `values`."""
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    some = denominator != 0  # the last real token has the weight 1; NaN, a past that is not known, is to show
    return (numerator / denominator.where(some, 1.0)).where(some, values.float())


def sequence_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """position_ids [batch, tokens] of packed sequences -> int64 [batch, tokens], 0 for the first sequence of a row, 1 for the
    next one, ...: one begins wherever positions do not go on by one, as in transformers (`find_packed_sequence_indices`)."""
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts.cumsum(-1)
