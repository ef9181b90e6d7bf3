"""What an attention mask says of tokens."""

from __future__ import annotations

import torch


def attended_keys(mask: torch.Tensor) -> torch.Tensor:
    """From an attention's own mask [batch, (heads,) queries, keys], bool, 0 and 1, or additive: bool [batch, keys], which keys
    any query may attend to. Keys that are padding are attended to by none, nor are a static cache's places without a token."""
    allowed = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    return (allowed if mask.dim() == 3 else allowed[:, 0]).any(-2)
