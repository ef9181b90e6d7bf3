"""What an attention mask says of tokens."""

from __future__ import annotations

from typing import Any

import torch

FORBIDS = -5e3  # an additive mask forbids by less than this: -1e4 is in use, -1e9, the least number of a dtype, -inf


def one_of(mask: Any) -> Any:
    """A model with several kinds of attention may have a dict of masks, one for each: that of all tokens, or else any."""
    if not isinstance(mask, dict):
        return mask
    masks = [mask.get("full_attention"), *mask.values()]
    return next((each for each in masks if each is not None), None)


def attended_keys(mask: torch.Tensor) -> torch.Tensor:
    """From an attention's own mask [batch, (heads,) queries, keys], bool, 0 and 1, or additive: bool [batch, keys], which keys
    any query may attend to. Keys that are padding are attended to by none, nor are a static cache's places without a token."""
    return _allowed(mask).any(-2)


def numbers_of_blocks(mask: torch.Tensor) -> torch.Tensor:
    """From an attention's own mask with as many queries as keys: int64 [batch, tokens], 0 for the first sequence of a row, 1 for
    the next one, ...: one begins at a token that attends to itself and to none before it. Padding belongs to any."""
    allowed = _allowed(mask)
    begins = allowed.diagonal(dim1=-2, dim2=-1) & ~allowed.tril(-1).any(-1)
    return begins.cumsum(-1)


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """bool [batch, queries, keys]"""
    allowed = mask > FORBIDS if mask.is_floating_point() else mask != 0
    return allowed if mask.dim() == 3 else allowed[:, 0]
