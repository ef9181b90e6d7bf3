"""Experts in the dtype that the ops take them in, for those whose own is another (PEFT keeps adapters of 16-bit models in
float32); and the copies of lora_a that lie beside weights (`joined_weights.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..fingerprint import Fingerprint
from ..layer import LoRASwitchLinear
from ..ops import FLOATS
from .capabilities import base_of, facts_of
from .counted_writes import count_writes, is_counted


@dataclass
class Casts:
    """lora_a and lora_b of one adapter as they are served, each in a dictionary like a module's `_parameters`, and of what they
    were made. `b` is the experts' own if `joined` and lora_b has the dtype that the ops take.

    Attributes:
        joined: lora_a lies in one matrix with the group's weights, and is a copy whatever the dtype.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    fingerprint: Fingerprint
    joined: bool = False


def served_dtype(layer: LoRASwitchLinear, adapter: str, seen: torch.dtype | None) -> torch.dtype:
    """The dtype in which the ops take the experts: of the base weight, or where they do not read that, of its input.

    Args:
        seen: that of an input that the layer has had; None: it is not known, and experts keep their own.
    """
    if facts_of(layer).plain:
        weight: torch.Tensor = base_of(layer).weight
        return weight.dtype
    own: torch.Tensor = layer.loraswitch_A[adapter].weight
    return seen if seen in FLOATS else own.dtype


def current_casts(
    layer: LoRASwitchLinear, casts: dict[str, Casts], adapter: str, seen: torch.dtype | None
) -> Casts | None:
    """The experts of `adapter` in the dtype that the ops take, brought up to date in place, where compiled code reads them;
    None if they have that dtype themselves.

    Args:
        casts: those that the layer has, by adapter; kept up to date, too.
        seen: as in `served_dtype`.
    """
    experts_a, experts_b = layer.loraswitch_A[adapter], layer.loraswitch_B[adapter]
    a, b = experts_a.weight, experts_b.weight
    dtype = served_dtype(layer, adapter, seen)
    found = casts.get(adapter)
    if found is not None and found.joined and not _fits(found.a["weight"], a, dtype):
        found = None  # moved, resized or of another dtype: it leaves the matrix
    if a.dtype == dtype and (found is None or not found.joined):
        casts.pop(adapter, None)
        return None
    if not (is_counted(a) and is_counted(b)):
        count_writes(experts_a)
        count_writes(experts_b)
        a, b = experts_a.weight, experts_b.weight
    fingerprint = Fingerprint(written=[experts_a._parameters, experts_b._parameters])  # before the values are read
    if found is None:
        found = casts[adapter] = Casts({}, {}, fingerprint)
    changed = fingerprint.taken != found.fingerprint.taken
    with torch.inference_mode(False), torch.no_grad():  # casts that forwards of every mode can use and write
        if found.joined and b.dtype == dtype:
            found.b = experts_b._parameters
        elif isinstance(found.b.get("weight"), torch.nn.Parameter):
            found.b = {}
        for cast, weight in ((found.a, a), (found.b, b)):  # the dictionaries that groups know
            if cast is experts_b._parameters:
                continue
            if not _fits(cast.get("weight"), weight, dtype):
                cast["weight"] = weight.detach().to(dtype)
                # CUDA graphs read it in place, like a parameter
                torch._dynamo.mark_static_address(cast["weight"], guard=False)
            elif changed:
                cast["weight"].copy_(weight)
        found.fingerprint.renew(fingerprint)  # last: what is cut short is done again
    return found


def _fits(old: torch.Tensor | None, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the cast `old` can be written over. That of a copy of the model made within inference mode cannot."""
    if old is None or old.is_inference():
        return False
    return (old.dtype, old.device, old.shape) == (dtype, weight.device, weight.shape)
