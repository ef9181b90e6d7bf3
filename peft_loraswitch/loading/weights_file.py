"""An adapter's two files, told from their outside: found, of a sane kind and size, and their content as a table.

Files come from anywhere, so nothing of them is believed before it was compared: this module finds them, `tensor_file.py` opens
them, `layout.py` says what may be in them for a given model, `load.py` puts the two together around each load.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..config import LoRASwitchConfig
from ..patterns import shown
from ..peft_names import NAME
from .tensor_file import check_regular_file, read_json_object

HUB_ARGUMENTS = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "tqdm_class", "dry_run"}


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
    unknown = None
    for name in (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME) if pickle_first else (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            path = find_file(source, name, subfolder, **hub)
        except LocalEntryNotFoundError as error:  # the other one may be in the cache
            unknown = unknown or error
            continue
        if path is not None and name == WEIGHTS_NAME:
            raise ValueError(
                f"{path} is a pickle, which can run code when it is loaded; LoRA-Switch adapters are safetensors only. If "
                "you trust it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
                f"'{os.path.join(os.path.dirname(path), SAFETENSORS_WEIGHTS_NAME)}')"
            )
        if path is not None:
            return path
    if unknown is not None:
        raise unknown
    return None


def find_file(source: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """A file of an adapter in a folder or on the Hub; None if the folder or repository does not have it.

    Raises:
        ValueError: it is not a regular file.
        LocalEntryNotFoundError: nobody could look: it is not in the cache, and the Hub cannot be asked.
        Exception: others of huggingface_hub, where the repository cannot be reached.
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
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but it says nothing of what the Hub has
        raise LocalEntryNotFoundError(
            f"{source}: there is no such folder, and nobody can see whether the Hub has {name} in a repository of that "
            "name: it is not in the cache, and the Hub cannot be asked (no network, HF_HUB_OFFLINE or local_files_only). "
            "Check the name, or download the adapter first."
        ) from error
    except (EntryNotFoundError, HFValidationError):  # the latter: a folder's name that no repository can have
        return None


# ------------------------------------------------------------------------------------------------------ configuration


def read_config_file(path: str) -> dict[str, Any]:
    """The fields in an adapter_config.json, of whatever method. If it is ours, they have been checked.

    Raises:
        ValueError: it is not a regular file of a sane size that holds a JSON object, or one of our fields is out of range.
            Names the file or the field.
    """
    fields = read_json_object(path)
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
