"""Decayed running sums over the tokens of sequences: what a router that sees context is made of.

    s_t = sum over i <= t of decay^(t - i) * v_i          within one sequence

By doubling: after the pass for a distance d, s_t covers 2 d tokens. log2(T) passes of plain tensor operations, which every
device and compiler knows, without overflow (no power of 1 / decay), and differentiable as they are.
"""

from __future__ import annotations

import torch

# Weights below it are nothing in float32: a decay of 0.9 reaches 829 tokens back, and needs no pass beyond.
_NOTHING = 2.0**-126
# A denominator below it has no real token near enough to count; real tokens have at least their own weight, 1.
_NO_REAL_TOKEN = 1e-30


def decayed_sums(
    values: torch.Tensor, decay: float, numbers: torch.Tensor | None = None, previous: torch.Tensor | None = None
) -> torch.Tensor:
    """s, as above, of every token.

    Args:
        values: float [batch, tokens, n].
        decay: in (0, 1].
        numbers: [batch, tokens], which sequence of its row a token is of (packing); None: each row is one.
        previous: [batch, n], s of the token before the first one; not together with `numbers`.
    """
    tokens, distance = values.shape[1], 1
    sums = values
    while distance < tokens and decay**distance > _NOTHING:
        earlier = decay**distance * sums[:, :-distance]
        if numbers is not None:
            same = numbers[:, distance:] == numbers[:, :-distance]
            earlier = earlier.where(same.unsqueeze(-1), 0.0)
        sums = torch.cat([sums[:, :distance], sums[:, distance:] + earlier], dim=1)
        distance *= 2
    if previous is None:
        return sums
    if tokens == 1:
        return sums + decay * previous.unsqueeze(1)
    distances = torch.arange(1, tokens + 1, dtype=sums.dtype, device=sums.device)
    return sums + torch.pow(decay, distances).unsqueeze(-1) * previous.unsqueeze(1)


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
    some = denominator > _NO_REAL_TOKEN
    mean = numerator / denominator.where(some, 1.0)
    return mean.where(some | denominator.isnan(), values.float())


def sequence_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """position_ids [batch, tokens] of packed sequences -> int64 [batch, tokens], 0 for the first sequence of a row, 1 for the
    next one, ...: one begins wherever positions do not go on."""
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return starts.cumsum(-1)
