"""Which base layers are linears in 4 bits whose weight lies as bitsandbytes (NF4, FP4) or torchao (int4, in tiles) makes it."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def four_bit_state(base: nn.Module) -> Any | None:
    """What goes with the bytes of its weight (`QuantState`: scales, block size, code, shape); None of all other layers."""
    library: Any = sys.modules.get("bitsandbytes.nn")  # as long as nobody imports it nothing is of its classes
    if library is None or type(base) not in (library.Linear4bit, library.LinearNF4, library.LinearFP4):
        return None
    layer: Any = base
    weight = layer._parameters.get("weight")  # the attribute takes a microsecond
    state = getattr(weight, "quant_state", None)
    if type(weight) is not library.Params4bit or state is None:  # a weight that is not quantised yet
        return None
    # Packed otherwise, for some CPUs. (For an attribute that is not there, the library looks up a table of its own.)
    if state.__dict__.get("packing_format_for_cpu", False):
        return None
    fits = state.quant_type in ("nf4", "fp4") and tuple(state.shape or ()) == (layer.out_features, layer.in_features)
    return state if fits else None


def int4_tiles(base: nn.Module) -> Any | None:
    """The weight of an nn.Linear that torchao has packed for tensor cores (`Int4WeightOnlyConfig`, "tile_packed_to_4d"): `qdata`,
    `scale_and_zero`, `block_size`; None of all other layers."""
    library: Any = sys.modules.get("torchao.quantization")
    if library is None or type(base) is not nn.Linear:
        return None
    weight = base._parameters.get("weight")
    kind = getattr(library, "Int4TilePackedTo4dTensor", None)  # older versions have none
    return weight if kind is not None and type(weight) is kind else None
