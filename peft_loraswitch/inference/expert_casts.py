"""Experts in the dtype of the base weight, for those whose own is another (PEFT keeps adapters of 16-bit models in float32)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .capabilities import base_of, facts_of
from .counted_writes import count_writes, is_counted, versions_of

if TYPE_CHECKING:
    from ..layer import LoRASwitchLinear
    from .fused_layer import Fusing


@dataclass
class Casts:
    """lora_a and lora_b of one adapter in another dtype, each in a dictionary like a module's `_parameters`."""

    a: dict[str, Any]
    b: dict[str, Any]
    versions: tuple[Any, ...]


def refresh_cast(layer: LoRASwitchLinear, fusing: Fusing, adapter: str, changed: bool = False) -> Casts | None:
    """The experts of `adapter` in the dtype of the base weight, brought up to date in place, where compiled code reads them;
    None if they have that dtype themselves.

    Args:
        changed: cast in any case. Otherwise only if a change has been counted (see `counted_writes.py`).
    """
    experts_a, experts_b = layer.loraswitch_A[adapter], layer.loraswitch_B[adapter]
    a, b = experts_a.weight, experts_b.weight
    dtype = base_of(layer).weight.dtype if facts_of(layer).plain else a.dtype
    if a.dtype == dtype:
        fusing.casts.pop(adapter, None)
        return None
    if not (is_counted(a) and is_counted(b)):
        count_writes(experts_a)
        count_writes(experts_b)
        a, b = experts_a.weight, experts_b.weight
    casts = fusing.casts.get(adapter)
    versions = versions_of(a, b)
    if casts is None:
        casts = fusing.casts[adapter] = Casts({}, {}, ())
    changed = changed or versions != casts.versions
    with torch.inference_mode(False), torch.no_grad():  # casts that forwards of every mode can use and write
        for cast, weight in ((casts.a, a), (casts.b, b)):  # the dictionaries that groups know
            if not _fits(cast.get("weight"), weight, dtype):
                cast["weight"] = weight.detach().to(dtype)
                # CUDA graphs read it in place, like a parameter
                torch._dynamo.mark_static_address(cast["weight"], guard=False)
            elif changed:
                cast["weight"].copy_(weight)
        casts.versions = versions
    return casts


def _fits(old: torch.Tensor | None, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the cast `old` can be written over. That of a copy of the model made within inference mode cannot."""
    if old is None or old.is_inference():
        return False
    return (old.dtype, old.device, old.shape) == (dtype, weight.device, weight.shape)
