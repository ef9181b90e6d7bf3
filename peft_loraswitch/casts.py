"""Experts in the dtype of the base weight, for those whose own is another (PEFT keeps adapters of 16-bit models in float32)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .base_layers import base_of, facts_of
from .counted import count_writes, is_counted, versions_of

if TYPE_CHECKING:
    from .fused import Fusing
    from .layer import LoRASwitchLinear


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
        changed: cast in any case. Otherwise only if a change has been counted (see `counted.py`).
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
    old = None if casts is None else casts.a["weight"]
    with torch.inference_mode(False), torch.no_grad():  # casts that forwards of every mode can use and write
        fits = old is not None and (old.dtype, old.device, old.shape) == (dtype, a.device, a.shape)
        if (
            casts is not None and old is not None and fits and not old.is_inference()
        ):  # as those of a copy made within inference mode are
            if changed or versions != casts.versions:
                casts.a["weight"].copy_(a)
                casts.b["weight"].copy_(b)
                casts.versions = versions
            return casts
        if casts is None:
            casts = fusing.casts[adapter] = Casts({}, {}, versions)
        for cast, weight in ((casts.a, a), (casts.b, b)):  # into the dictionaries that groups know
            cast["weight"] = weight.detach().to(dtype)
            # CUDA graphs read it in place, like a parameter
            torch._dynamo.mark_static_address(cast["weight"], guard=False)
        casts.versions = versions
    return casts
