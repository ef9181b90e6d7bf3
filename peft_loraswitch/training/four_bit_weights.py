"""Base layers of bitsandbytes (`Linear4bit`, NF4 and FP4) whose products the fused training path computes itself: their weight is
made of its 4 bits, by the library's own function, each time that a product reads it.

That is what the library does. Its forward makes the weight in the dtype that the layer computes in, and multiplies by it (for up
to some hundred tokens it has kernels that read the bytes); its backward makes it again. Keeping it would take the memory that 4
bits are to spare. The first forward of a layer settles which dtype it computes in; until then it runs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..four_bit_layers import four_bit_state
from . import four_bit_kernels
from .group_layout import PackedWeight


class FourBitWeight(PackedWeight):
    """That of a layer, as its memory is whenever `to` is called. So backward goes by what bytes and scales are by then, and to
    write to them after the forward is no error: as in the library. (In a checkpointed block that is by what the scales are in
    its second run, where these are quantised, too.)

    Attributes:
        packed: the bytes, the layer's own memory; state: `QuantState`.
        scales: those that were quantised, once they are made; None: they are not kept.
    """

    __slots__ = ("packed", "scales", "state")

    def __init__(self, weight: Any, keeps_scales: bool) -> None:
        self.state = weight.quant_state
        self.packed: Tensor = weight.detach()
        self.scales: list[Tensor] | None = [] if keeps_scales else None

    def to(self, dtype: torch.dtype) -> Tensor:
        # In another dtype than what was quantised: the library's forward, too, rounds to what it computes in.
        return four_bit_kernels.made(self.packed, self.state, dtype, self.scales)


def four_bit_weights(weights: Sequence[Any], keep_scales: bool) -> list[FourBitWeight]:
    """Of bitsandbytes' parameters.

    Args:
        keep_scales: in a checkpointed block's second run, whose backward comes next: 4 bytes for each block of a
            weight, until that is over.
    """
    with torch._C.DisableTorchFunctionSubclass():  # theirs is in Python; a plain tensor has none
        return [FourBitWeight(weight, keep_scales) for weight in weights]


class FourBitForm(NamedTuple):
    """What decides whether `FourBitWeight` can stand for the weight of a base layer.

    Attributes:
        device: of the weight.
        compute_dtype: what the layer casts its input to; None: nothing.
    """

    device: torch.device
    compute_dtype: torch.dtype | None


def four_bit_form(base: nn.Module) -> FourBitForm | None:
    """That of a base layer whose weight is frozen and made of 4 bits; None of all other layers."""
    if four_bit_state(base) is None:
        return None
    layer: Any = base
    weight = layer._parameters["weight"]
    with torch._C.DisableTorchFunctionSubclass():
        if not layer.compute_type_is_set or weight.requires_grad or "ds_id" in weight.__dict__:
            return None
        if weight.dim() != 2 or weight.shape[1] != 1 or weight.shape[0] == 1:  # one row: for the library, [in, out]
            return None
        return FourBitForm(weight.device, layer.compute_dtype)
