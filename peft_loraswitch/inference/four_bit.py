"""Base layers in 4 bits whose weights the ops read as they lie, with no copy of them.

bitsandbytes (`Linear4bit`, NF4 and FP4): a weight is bytes, two features in each, and a scale for each block of features.
With double quantisation the scales are quantised themselves; they are then kept dequantised, 4 bytes for each block, once for
all groups that compute the layer.

torchao (int4, tiles for tensor cores): a weight is words of eight features, and a scale and a zero for each group of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fingerprint import Fingerprint
from ..four_bit_layers import four_bit_state, int4_tiles
from ..ops import FEATURES_OF_A_SCALE, INT4_GROUPS, padded_to_tiles
from ..ordinary import ordinary

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FourBitFormat:
    """How such a weight is kept; linears of one group have the same.

    Attributes:
        quant_type: "nf4", "fp4" or "int4"; block: features that share a scale.
        compute_dtype: what the layer casts its input to; None: nothing.
    """

    quant_type: str
    block: int
    compute_dtype: torch.dtype | None


@dataclass(eq=False)
class FourBitWeight:
    """The weight of one layer as the ops read it.

    Attributes:
        packed, scales, code: as `ops.linear_4bit` takes them (int4: no code), all the layer's own memory, but for scales that
            are `dequantized`: those are a copy.
        fingerprint: of what all this was made of.
    """

    packed: Tensor
    scales: Tensor
    code: Tensor | None
    dequantized: bool
    fingerprint: Fingerprint


class WeightFingerprint(Fingerprint):
    """What goes with the weight of a layer's base layer.

    Args:
        look: at base layer and weight: what of them counts.
    """

    def __init__(self, layer: nn.Module, look: Callable[[Any, Any], list[Any]]) -> None:
        self.layer, self.look = layer, look
        super().__init__()

    def _take(self) -> list[Any]:
        try:
            base: Any = self.layer._modules["base_layer"]
            return [base, *self.look(base, base._parameters["weight"])]
        except (AttributeError, KeyError, RuntimeError):  # another kind of layer or weight
            return [object()]  # not like anything before


def _look_coded(base: Any, weight: Any) -> list[Any]:
    """Where the parts of the weight are, what goes with them, and how often scales that were dequantised were written to."""
    state = weight.quant_state
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' is in Python, and takes longer than all of this
        seen = [base.compute_dtype, weight.data_ptr(), state.absmax.data_ptr(), state.code.data_ptr()]
    if state.nested:
        for part in (state.absmax, state.offset, state.state2.absmax, state.state2.code):
            seen += (part.data_ptr(), None if part.is_inference() else part._version)
    return seen


def _look_tiled(base: Any, weight: Any) -> list[Any]:
    """Where tiles and their scales are, and whether the layer does more than multiply by them."""
    return [weight.qdata.data_ptr(), weight.scale_and_zero.data_ptr(), weight.act_pre_scale is None]


def format_of(base: nn.Module) -> FourBitFormat | None:
    """That of a base layer whose weight the ops can read; None of all others."""
    found = _coded_format(base)
    return _tiled_format(base) if found is None else found


def _tiled_format(base: nn.Module) -> FourBitFormat | None:
    weight = int4_tiles(base)
    if weight is None or weight.act_pre_scale is not None or len(weight.block_size) != 2:
        return None
    layer: Any = base
    bias, out, width, block = layer.bias, layer.out_features, layer.in_features, weight.block_size[1]
    if weight.block_size[0] != 1 or block not in INT4_GROUPS or tuple(weight.shape) != (out, width):
        return None
    if bias is not None and (bias.shape != (out,) or not bias.is_contiguous()):
        return None
    rows, features = padded_to_tiles(out, width)
    tiles, scales = weight.qdata, weight.scale_and_zero
    fits = tiles.dtype == torch.int32 and tiles.shape == (rows // 8, features // 128, 32, 4)
    fits = fits and scales.dtype == torch.bfloat16 and scales.shape == (features // block, rows, 2)
    fits = fits and all(type(t) is Tensor and t.is_contiguous() and t.device == tiles.device for t in (tiles, scales))
    return FourBitFormat("int4", block, torch.bfloat16) if fits else None  # the layer computes in that dtype alone


def _coded_format(base: nn.Module) -> FourBitFormat | None:
    state = four_bit_state(base)
    if state is None:
        return None
    layer: Any = base
    weight, bias, out, width = layer.weight, layer.bias, layer.out_features, layer.in_features
    if state.blocksize % FEATURES_OF_A_SCALE or width % state.blocksize:
        return None
    if layer.compute_dtype not in (None, *HALVES):
        return None
    if bias is not None and (bias.shape != (out,) or not bias.is_contiguous()):
        return None
    absmax, code = state.absmax, state.code
    fits = absmax.numel() * state.blocksize == out * width and (state.nested or absmax.dtype == torch.float32)
    fits = fits and code is not None and code.shape == (16,) and code.dtype == torch.float32
    fits = fits and weight.numel() * weight.element_size() * 2 == out * width
    fits = fits and all(t.is_contiguous() and t.device == weight.device for t in (weight, absmax, code))
    return FourBitFormat(state.quant_type, state.blocksize, layer.compute_dtype) if fits else None


def current_four_bit(
    layer: nn.Module, kept: FourBitFormat | None, before: FourBitWeight | None
) -> FourBitWeight | None:
    """The weight of the adapted linear `layer` as the ops read it; None if they cannot.

    Args:
        kept: its format.
        before: what was made of it before. It is returned if it is still right; scales that are not are written over, where
            compiled code reads them.
    """
    if kept is None:
        return None
    if before is not None and before.fingerprint.is_current():
        return before
    return _tiled(layer) if kept.quant_type == "int4" else _coded(layer, before)


def _tiled(layer: nn.Module) -> FourBitWeight:
    fingerprint = WeightFingerprint(layer, _look_tiled)
    base: Any = layer._modules["base_layer"]
    weight = base._parameters["weight"]
    with torch.inference_mode(False), torch.no_grad():
        tiles, scales = (_static(ordinary(t.detach())) for t in (weight.qdata, weight.scale_and_zero))
    return FourBitWeight(tiles, scales, None, False, fingerprint)


def _coded(layer: nn.Module, before: FourBitWeight | None) -> FourBitWeight:
    fingerprint = WeightFingerprint(layer, _look_coded)  # before the values are read
    base: Any = layer._modules["base_layer"]
    weight, out = base.weight, base.out_features
    state = weight.quant_state
    # tensors that forwards of every mode can use, and plain ones, not of bitsandbytes' class
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        packed = ordinary(weight.detach()).view(torch.uint8).view(out, -1)  # other storages hold the same bytes
        scales = _dequantized(state) if state.nested else ordinary(state.absmax.detach())
        scales = scales.view(out, -1)
        if state.nested and before is not None and before.dequantized and _fits(before.scales, scales):
            scales = before.scales.copy_(scales)
        packed, scales, code = (_static(t) for t in (packed, scales, ordinary(state.code.detach())))
    return FourBitWeight(packed, scales, code, state.nested, fingerprint)


def _static(tensor: Tensor) -> Tensor:
    """CUDA graphs read it in place, like a parameter."""
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


def _dequantized(state: Any) -> Tensor:
    """float32: scales that are quantised themselves."""
    from bitsandbytes.functional import dequantize_blockwise

    scales: Tensor = dequantize_blockwise(ordinary(state.absmax), state.state2) + state.offset
    return scales.float()


def _fits(old: Tensor, new: Tensor) -> bool:
    return not old.is_inference() and old.shape == new.shape and old.device == new.device
