"""Weights made of bitsandbytes' 4 bits, by that library's own kernels, called as its code for GPUs calls them.

`bitsandbytes.functional.dequantize_4bit` says what a weight is. Its kernels, one or two, take a few microseconds of the host;
what lies around them several times as much (an operator of Python for each, with the switch of a compiler that is not at work),
for 640 weights in a training step of an 8B model. So on a GPU its C functions are called here, with the same arguments, on the
current stream. They are not public. So they are called only if they take the arguments that are known, and if the first weight
of each kind has the bits that the public function gives; where one of these is not so, the public function makes all weights.
"""

from __future__ import annotations

import copy
import functools
import logging
from ctypes import c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
ARGUMENTS = [c_void_p] * 4 + [c_int32, c_int32, c_void_p]  # code, bytes, scales, result; block size, numbers, stream
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Functions = tuple[Any, Any]  # for weights, and for their scales if these are quantised, too
_alike: dict[Any, bool] = {}  # by kind: whether a weight had the bits that the public function gives


def made(packed: Tensor, state: Any, dtype: torch.dtype, kept: list[Tensor] | None = None) -> Tensor:
    """The weight, [out, in].

    Args:
        packed: the bytes, as the layer holds them; state: the `QuantState` that goes with them.
        dtype: to which the numbers are rounded, once, whatever dtype was quantised.
        kept: where quantised scales are put once they are made, and taken from; None: they are made each time.
    """
    stream = _stream(packed)
    functions = None if stream is None else _functions(state.quant_type, dtype)
    if functions is None or not _fits(packed, state):
        return _by_the_library(packed, state, dtype)
    inner = state.state2 if state.nested else None
    kind = (packed.device, dtype, state.quant_type, state.blocksize, None if inner is None else inner.blocksize)
    alike = _alike.get(kind)
    if alike is None:
        if packed.is_cuda and torch.cuda.is_current_stream_capturing():  # to compare waits for the device
            return _by_the_library(packed, state, dtype)
        alike = _alike[kind] = _compare(functions, packed, state, dtype, stream)
    return _launch(functions, packed, state, dtype, stream, kept) if alike else _by_the_library(packed, state, dtype)


def _by_the_library(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if state.dtype != dtype:
        state = copy.copy(state)
        state.dtype = dtype
    weight: Tensor = dequantize_4bit(packed, state)
    return weight


def _launch(
    functions: Functions, packed: Tensor, state: Any, dtype: torch.dtype, stream: int | None, kept: list[Tensor] | None
) -> Tensor:
    of_weights, of_scales = functions
    scales = state.absmax
    if kept:
        scales = kept[0]
    elif state.nested:
        codes, inner = scales, state.state2
        scales = torch.empty_like(codes, dtype=torch.float32)
        of_scales(
            inner.code.data_ptr(), codes.data_ptr(), inner.absmax.data_ptr(), scales.data_ptr(),
            inner.blocksize, codes.numel(), stream,
        )  # fmt: skip
        scales.add_(state.offset)
        if kept is not None:
            kept.append(scales)
    weight = torch.empty(state.shape, dtype=dtype, device=packed.device)
    of_weights(
        None, packed.data_ptr(), scales.data_ptr(), weight.data_ptr(), state.blocksize, weight.numel(), stream
    )  # fmt: skip
    return weight


def _stream(packed: Tensor) -> int | None:
    """On which kernels are launched; None where there are none: on a CPU or a device of another kind, or if another GPU is the
    current one."""
    if not packed.is_cuda:
        return None
    device = packed.get_device()
    return int(torch._C._cuda_getCurrentRawStream(device)) if device == torch.cuda.current_device() else None


@functools.cache
def _functions(quant_type: str, dtype: torch.dtype) -> Functions | None:
    """None: this version of the library does not have them, or they take other arguments."""
    try:
        from bitsandbytes.cextension import lib
    except ImportError:
        return None
    of_weights = getattr(lib, f"cdequantize_blockwise_{NAMES.get(dtype)}_{quant_type}", None)
    of_scales = getattr(lib, "cdequantize_blockwise_fp32", None)
    if all(list(getattr(each, "argtypes", None) or ()) == ARGUMENTS for each in (of_weights, of_scales)):
        return of_weights, of_scales
    return None


def _fits(packed: Tensor, state: Any) -> bool:
    """Whether everything lies as the kernels read it. Else the library may know better."""
    device, scales = packed.get_device(), state.absmax
    if not packed.is_contiguous() or not scales.is_contiguous() or scales.get_device() != device:
        return False
    if not state.nested:
        return bool(scales.dtype is torch.float32)
    inner = state.state2
    return (
        scales.dtype is torch.uint8
        and inner.absmax.is_contiguous()
        and inner.dtype is torch.float32
        and inner.absmax.get_device() == device
        and inner.code.get_device() == device
    )


def _compare(functions: Functions, packed: Tensor, state: Any, dtype: torch.dtype, stream: int | None) -> bool:
    weight = _launch(functions, packed, state, dtype, stream, None)
    expected = _by_the_library(packed, state, dtype)
    alike = torch.equal(weight.view(torch.uint8), expected.view(torch.uint8))
    if not alike:
        logger.warning(
            "LoRA-Switch: bitsandbytes' kernels do not give what its dequantize_4bit gives, so 4-bit weights are made by that, "
            "more slowly."
        )
    return alike
