"""An adapter's two files, told from their outside: found, of a sane kind and size, and their content as a table.

Files come from anywhere, so nothing of them is believed before it was compared: this module finds and opens them,
`layout.py` says what may be in them for a given model, `loading.py` puts the two together around each load.
"""

from __future__ import annotations

import inspect
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..config import LoRASwitchConfig
from ..patterns import shown
from ..peft_names import NAME

# Far beyond what an adapter needs (some 200 bytes a tensor in the header), and still read in a second.
MAX_HEADER_BYTES = MAX_CONFIG_BYTES = 16 * 2**20
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # what training gives, and so what a save of ours writes
HUB_ARGUMENTS = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "tqdm_class", "dry_run"}


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


# ------------------------------------------------------------------------------------------------------------ finding


def find_weights_file(
    source: str | os.PathLike[str], subfolder: str | None = None, pickle_first: bool = False, **hub: Any
) -> str | None:
    """The safetensors file of an adapter in a folder or on the Hub; None if there is none.

    Args:
        pickle_first: the load prefers a pickle where there are both.
        hub: arguments of `hf_hub_download`.

    Raises:
        ValueError: there is a pickle instead (it can run code when it is loaded, so it is not), or no regular file.
        Exception: of huggingface_hub, where the Hub or the repository cannot be reached.
    """
    for name in (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME) if pickle_first else (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        path = find_file(source, name, subfolder, **hub)
        if path is not None and name == WEIGHTS_NAME:
            raise ValueError(
                f"{path} is a pickle, which can run code when it is loaded; LoRA-Switch adapters are safetensors only. If "
                "you trust it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
                f"'{os.path.join(os.path.dirname(path), SAFETENSORS_WEIGHTS_NAME)}')"
            )
        if path is not None:
            return path
    return None


def find_file(source: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """A file of an adapter in a folder or on the Hub; None if the folder or repository does not have it.

    Raises:
        ValueError: it is not a regular file.
    """
    folder = os.path.join(source, subfolder or "")
    if os.path.isdir(folder):
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            return None
        check_regular_file(path)
        return path
    try:
        return hf_hub_download(str(source), name, subfolder=subfolder, **hub)
    except EntryNotFoundError:
        return None


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


# ------------------------------------------------------------------------------------------------------ configuration


def read_config_file(path: str) -> dict[str, Any]:
    """The fields in an adapter_config.json, of whatever method. If it is ours, they have been checked.

    Raises:
        ValueError: it is not a regular file of a sane size that holds a JSON object, or one of our fields is out of range.
            Names the file or the field.
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
    if not isinstance(fields.get("peft_type"), (str, type(None))):
        raise ValueError(f"{path}: peft_type={shown(fields['peft_type'])} must be a text.")
    if fields.get("peft_type") == NAME:
        _check_common_fields(path, fields)
        make_config(fields)
    return fields


def make_config(fields: Mapping[str, Any]) -> Any:
    """A checked `LoRASwitchConfig` of the fields in a file."""
    return LoRASwitchConfig(**fields)


def _check_common_fields(path: str, fields: Mapping[str, Any]) -> None:
    """The fields that all methods have, and PEFT and Transformers take as they come."""
    for name in ("base_model_name_or_path", "revision", "task_type", "peft_version"):
        value = fields.get(name)
        if not (value is None or isinstance(value, str)) or (value and "\0" in value):
            raise ValueError(f"{path}: {name}={shown(value)} must be a string or null.")
    if fields.get("task_type") not in (None, *TaskType):
        raise ValueError(
            f"{path}: task_type={shown(fields['task_type'])} is not one of {', '.join(TaskType)}, or null."
        )
    if not isinstance(fields.get("inference_mode", False), bool):
        raise ValueError(f"{path}: inference_mode={shown(fields['inference_mode'])} must be true or false.")
    mapping = fields.get("auto_mapping")
    wanted = {"base_model_class", "parent_library"}
    if mapping is not None and not (
        isinstance(mapping, dict) and set(mapping) == wanted and all(isinstance(v, str) for v in mapping.values())
    ):
        raise ValueError(f"{path}: auto_mapping={shown(mapping)} must be null or name {' and '.join(sorted(wanted))}.")


# ------------------------------------------------------------------------------------------------------------ weights


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
