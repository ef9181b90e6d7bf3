"""A safetensors file told from its outside, and a JSON file that is to be an object: found sane, then read. Needs no PEFT.

Files come from anywhere, so nothing of them is believed before it was compared.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

# Far beyond what an adapter needs (some 200 bytes a tensor in the header), and still read in a second.
MAX_HEADER_BYTES = MAX_CONFIG_BYTES = 16 * 2**20
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # what training gives, and so what a save of ours writes


class TensorInfo(NamedTuple):
    """A tensor, as a header describes it. `key` is the name in the file; `dtype` is what safetensors files call it, for
    instance "BF16"."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, key: str, tensor: torch.Tensor) -> TensorInfo:
        return cls(key, DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


Header = dict[str, TensorInfo]  # by key of the file, or by the name that it stands for


def check_regular_file(path: str, at_most: int | None = None) -> None:
    """Raise a ValueError unless `path` is a regular file (or a link to one) of `at_most` bytes. Opens nothing: reading a
    FIFO would wait for good, and a device never ends."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a device, a FIFO or a socket"
        raise ValueError(f"{path} is {kind}, not a regular file: copy or download the adapter again.")
    if at_most is not None and info.st_size > at_most:
        raise ValueError(f"{path} has {info.st_size:,} bytes; no adapter needs more than {at_most:,} there.")


def read_json_object(path: str) -> dict[str, Any]:
    """The fields of an adapter_config.json, as they are.

    Raises:
        ValueError: it is not a regular file of a sane size that holds a JSON object. Names the file.
    """
    check_regular_file(path, MAX_CONFIG_BYTES)
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{path}: {error.msg}", error.doc, error.pos) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}, not an object with the fields of an adapter.")
    return fields


def read_header(path: str) -> Header:
    """What a weights file holds; reads its header only.

    Raises:
        ValueError: it is not a regular file, truncated, no safetensors file, or has a header of an absurd size.
    """
    check_regular_file(path)
    try:
        with open(path, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if MAX_HEADER_BYTES < size <= os.path.getsize(path):
            raise ValueError(f"{path} has a header of {size:,} bytes; no adapter needs more than {MAX_HEADER_BYTES:,}.")
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {k: TensorInfo(k, str(part.get_dtype()), tuple(part.get_shape())) for k, part in slices.items()}
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:  # too large to be mapped is not an OSError
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}): copy or download it again."
        ) from error


def check_finite(where: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that tensors are free of NaN and Inf.

    Raises:
        ValueError: names the file and the tensor.
    """
    for key, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: '{key}' holds NaN or Inf: its training went wrong, or the file is damaged.")


def read_tensors(path: str, keys: Iterable[str]) -> Iterator[torch.Tensor]:
    """Some of the file's tensors, one after the other, on the CPU."""
    with safe_open(path, framework="pt") as file:
        for key in keys:
            yield file.get_tensor(key)
