"""An adapted linear with one adapter, as it is now: the dictionaries that always hold its present tensors and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..fingerprint import Fingerprint, Parameters
from ..layer import LoRASwitchLinear
from .capabilities import base_of
from .expert_casts import Casts, current_casts
from .four_bit import FourBitWeight


class LiveLinear(NamedTuple):
    """
    Attributes:
        base: its base layer's parameters.
        a, b: lora_a and lora_b as the ops take them: the experts' own parameters, or their casts.
        casts: None if those are their own.
        four_bit: its base layer's weight, if that has 4 bits which the ops can read.
        scaling: by adapter.
        hooks, pre_hooks: its base layer's.
    """

    layer: LoRASwitchLinear
    base: Parameters
    a: Parameters
    b: Parameters
    casts: Casts | None
    four_bit: FourBitWeight | None
    scaling: dict[str, float]
    hooks: dict[int, Any]
    pre_hooks: dict[int, Any]

    @property
    def hooked(self) -> bool:
        return bool(self.hooks or self.pre_hooks)


def live_linear(
    layer: LoRASwitchLinear, adapter: str, casts_of_layer: dict[str, Casts], seen: torch.dtype | None,
    four_bit: FourBitWeight | None,
) -> LiveLinear:  # fmt: skip
    """`seen`: as in `served_dtype`."""
    base, casts = base_of(layer), current_casts(layer, casts_of_layer, adapter, seen)
    a = layer.loraswitch_A[adapter]._parameters if casts is None else casts.a
    b = layer.loraswitch_B[adapter]._parameters if casts is None else casts.b
    hooks = base._forward_hooks, base._forward_pre_hooks
    return LiveLinear(layer, base._parameters, a, b, casts, four_bit, layer.scaling, *hooks)


def fingerprint_of(linears: Sequence[LiveLinear], adapter: str, plain: bool) -> Fingerprint:
    """Of all that the ops are given of a group.

    Args:
        plain: the ops read the weights of the base layers, too.
    """
    bases = [one.base for one in linears] if plain else []
    packed = [one.four_bit.fingerprint for one in linears if one.four_bit is not None]
    return Fingerprint(
        weights=[*bases, *(one.a for one in linears), *(one.b for one in linears)],
        biases=[one.base for one in linears if plain or one.four_bit is not None],
        scalings=[one.scaling for one in linears],
        adapter=adapter,
        hooks=[hooks for one in linears for hooks in (one.hooks, one.pre_hooks)],
        parts=[*(one.casts.fingerprint for one in linears if one.casts is not None), *packed],
    )
