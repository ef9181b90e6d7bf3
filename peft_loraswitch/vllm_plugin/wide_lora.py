"""A routed adapter as vLLM can hold it: one wide LoRA per linear, all experts side by side.

For E' experts of rank r, the wide LoRA has rank E' r: A `[E' r, in]` and B `[out, E' r]` with the scale in B. What routing does
is then a mask on the hidden vector A x: the gate of an expert on each of its columns, 0 on those of experts that were not
chosen.

Columns are rank-major: column c belongs to expert c mod E', whatever r is. So one mask serves all linears, also where
`rank_pattern` gives them different ranks.
"""

from __future__ import annotations

import torch


def wide_a(a: torch.Tensor) -> torch.Tensor:
    """[experts, r, in] -> [r * experts, in], rank-major."""
    return a.transpose(0, 1).flatten(0, 1)


def wide_b(b: torch.Tensor, scale: float) -> torch.Tensor:
    """[experts, out, r] -> float32 [out, r * experts], rank-major, times `scale`."""
    return (b.float() * scale).permute(1, 2, 0).flatten(1)


def with_unrouted(stack: torch.Tensor, routed: int) -> torch.Tensor:
    """A stack of shared experts alone, [shared, ...], as the full one, [routed + shared, ...], in which the routed are zero."""
    return torch.cat([stack.new_zeros(routed, *stack.shape[1:]), stack])
