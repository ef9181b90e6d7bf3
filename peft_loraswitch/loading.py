"""Loading an adapter: what the weights file must hold, and that a load that fails changes nothing.

Adapters are loaded by `PeftModel.from_pretrained`, `PeftModel.load_adapter` and Transformers' `model.load_adapter` (also
behind `AutoModelForCausalLM.from_pretrained(adapter)`). Each changes the model before it reads the weights, puts up with
missing and unknown tensors, and leaves no hook. `watch_loads` therefore wraps the three; loads of other PEFT methods
pass through. Within a load of ours

- the weights file is found (folder or Hub) and its header compared with the configuration and the model, while the
  adapter is being injected (`check_file_being_loaded`);
- missing and unknown tensors are errors;
- after any error the model is put back as it was (`rollback.py`).
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .patterns import TimeLimit, rank_for
from .rollback import Snapshot, all_or_nothing

if TYPE_CHECKING:
    from .config import LoRASwitchConfig

LIST_AT_MOST = 3
PREFIX = "base_model.model."  # what PEFT puts before the names of the backbone's modules
OUR_KEY = re.compile(r"(?P<module>.+)\.loraswitch_(?P<part>A|B|router)\.weight")
Header = dict[str, tuple[int, ...]]  # of a safetensors file: shape by key


# ------------------------------------------------------------------------------------------------------ watching loads


class _Load:
    """A load in progress: where the weights come from, and what to put back if it fails."""

    def __init__(self, source: Any, hub: dict[str, Any]) -> None:
        self.source = source
        self.hub = hub
        self.snapshots: list[Snapshot] = []

    def weights_file(self) -> str | None:
        return None if self.source is None else find_weights_file(self.source, **self.hub)


_current: ContextVar[_Load | None] = ContextVar("loraswitch_load", default=None)


def watch_loads() -> None:
    """Wrap the three functions that load adapters. Idempotent, also across re-imports of this package."""
    for owner, name in (
        (PeftModel, "load_adapter"),
        (PeftModel, "from_pretrained"),
        (PeftAdapterMixin, "load_adapter"),
    ):
        original = vars(owner)[name]
        function = original.__func__ if isinstance(original, classmethod) else original
        if getattr(function, "watched_by_loraswitch", False):
            continue
        watched = _watched(function)
        setattr(owner, name, classmethod(watched) if isinstance(original, classmethod) else watched)


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        from peft_loraswitch.loading import run_load  # looked up at each call: after a re-import, the new one

        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:  # a wrong call: the original says what is wrong with it
            return original(*args, **kwargs)
        return run_load(functools.partial(original, *args, **kwargs), arguments)

    load.watched_by_loraswitch = True  # type: ignore[attr-defined]
    return load


def run_load(load: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    """Run one of the three functions, called with `arguments` (by parameter name), all or nothing."""
    model: Any = arguments.get("self")
    adapter = arguments.get("adapter_name") or "default"
    progress = _Load(arguments.get("model_id", arguments.get("peft_model_id")), _hub_arguments(arguments))
    if arguments.get("adapter_state_dict") is not None:
        progress.source = None  # the tensors are given: nothing is read
    outermost = _current.get() is None
    token = _current.set(progress)
    try:
        if outermost and (config := _our_config(model, adapter)):  # an adapter that exists gets new weights
            progress.snapshots.append(Snapshot(model, values_of=adapter))
            check_file_being_loaded(model, config, adapter)
        result = load()
        if config := _our_config(model, adapter):
            _check_result(result, config, adapter, progress.source)
        return result
    except BaseException as error:
        for snapshot in reversed(progress.snapshots):
            snapshot.restore()
        if isinstance(error, KeyError) and progress.snapshots and error.args and "." in str(error.args[0]):
            # PEFT looks up the tensors of modules_to_save without a word about what it is doing
            raise ValueError(
                f"{progress.source}: the weights lack '{error.args[0]}', which modules_to_save names."
            ) from error
        raise
    finally:
        _current.reset(token)


def _our_config(model: Any, adapter: str) -> Any:
    from .config import LoRASwitchConfig

    configs = getattr(model, "peft_config", None) if isinstance(model, nn.Module) else None
    config = configs.get(adapter) if isinstance(configs, dict) else None
    return config if isinstance(config, LoRASwitchConfig) else None


def _hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Where and how on the Hub, from the arguments of any of the three functions."""
    given: dict[str, Any] = dict(getattr(arguments.get("load_config"), "download_kwargs", None) or {})
    for source in (arguments.get("adapter_kwargs"), arguments.get("kwargs"), arguments):
        given.update(source or {})
    wanted = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
    return {name: given[name] for name in wanted if given.get(name) is not None}


@contextmanager
def injecting(tuner: nn.Module, config: LoRASwitchConfig) -> Iterator[None]:
    """Around the injection of an adapter: all or nothing, and undone as well if the load fails that it is part of."""
    from .card import keep_card_on_push

    keep_card_on_push()
    model: Any = tuner.model
    try:
        with all_or_nothing(tuner, config) as snapshot:
            yield
    except BaseException:
        # Transformers' add_adapter says so before it is true, and trips over it the next time
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = False
        raise
    progress = _current.get()
    if progress is not None:
        progress.snapshots.append(snapshot)


# ------------------------------------------------------------------------------------------------------------- checks


def check_file_being_loaded(model: nn.Module, config: LoRASwitchConfig, adapter_name: str) -> None:
    """If a load is in progress: check the header of its weights file against the configuration and the model's tensors.

    Raises:
        ValueError: see `check_weights_file`; or a tensor does not fit the backbone. Names file, tensor and shapes.
    """
    progress = _current.get()
    path = progress.weights_file() if progress is not None else None
    if path is None:
        return
    header = check_weights_file(path, config)
    own = {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, shape in header.items():
        match = OUR_KEY.fullmatch(key)
        name = key.removeprefix(PREFIX).removesuffix(".weight") + f".{adapter_name}.weight"
        if match and name in own and own[name] != shape:
            raise ValueError(
                f"{path}: wrong shape: '{key}' is {list(shape)}, this model needs {list(own[name])}. The adapter was made "
                f"for another backbone ({config.base_model_name_or_path or 'its name was not saved'})."
            )


def find_weights_file(source: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> str | None:
    """The safetensors file of an adapter in a folder or on the Hub; None if there is none, which the loader reports.

    Raises:
        ValueError: there is a pickle instead. It can run code when it is loaded, so it is not.
    """
    folder = os.path.join(source, subfolder or "")
    if os.path.isdir(folder):
        path, pickle = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), os.path.join(folder, WEIGHTS_NAME)
        if not os.path.isfile(path) and os.path.isfile(pickle):
            raise ValueError(_pickle_message(pickle))
        return path if os.path.isfile(path) else None
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            path = hf_hub_download(str(source), name, subfolder=subfolder, **hub)
        except EntryNotFoundError:
            continue
        except Exception:  # no such repository, no network, ...: the loader's own words are the best ones
            return None
        if name == WEIGHTS_NAME:
            raise ValueError(_pickle_message(path))
        return path
    return None


def _pickle_message(path: str) -> str:
    return (
        f"{path} is a pickle, which can run code when it is loaded; LoRA-Switch adapters are safetensors only. If you trust "
        "it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
        f"'{os.path.join(os.path.dirname(path), SAFETENSORS_WEIGHTS_NAME)}')"
    )


def check_weights_file(path: str, config: LoRASwitchConfig) -> Header:
    """Check a weights file against the configuration, reading its header only; return the header.

    Raises:
        ValueError: the file is truncated; a tensor is not of a float dtype, or has another number of dimensions, experts or
            ranks than the configuration says. Names the file and the tensor. (What is missing or unknown, the load tells.)
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            header = {key: tuple(part.get_shape()) for key, part in slices.items()}
            integers = [
                key for key, part in slices.items() if part.get_dtype()[0] not in "FB" and ".loraswitch_" in key
            ]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}): copy or download it again."
        ) from error
    if integers:
        raise ValueError(f"{path}: '{integers[0]}' does not hold floating-point numbers.")
    limit = TimeLimit()
    for key, shape in header.items():
        if match := OUR_KEY.fullmatch(key):
            rank = rank_for(config, match["module"].removeprefix(PREFIX), limit)
            _check_shape(path, key, rank, match["part"], shape, config)
    return header


def _check_shape(path: str, key: str, rank: int, part: str, shape: tuple[int, ...], config: LoRASwitchConfig) -> None:
    layout = {
        "A": "[num_experts, r, in_features]",
        "B": "[num_experts, out_features, r]",
        "router": "[num_experts, in_features]",
    }[part]
    if len(shape) != layout.count(",") + 1:
        raise ValueError(f"{path}: wrong shape: '{key}' is {list(shape)}, not {layout}.")
    shared = 0 if part == "router" else config.num_shared_experts
    sizes = {config.num_experts + shared}
    if shared and config.router_module:
        sizes.add(shared)  # a linear before the router
    if shape[0] not in sizes:
        raise ValueError(
            f"{path} holds {shape[0]} experts ('{key}' is {list(shape)}), but the configuration (adapter_config.json) says "
            f"num_experts={config.num_experts}{f', num_shared_experts={shared}' if shared else ''}: the two do not belong "
            "together."
        )
    found = {"A": shape[1], "B": shape[-1], "router": rank}[part]
    if found != rank:
        raise ValueError(
            f"{path} holds experts of rank {found} ('{key}' is {list(shape)}), but the configuration (adapter_config.json) "
            f"says {'rank_pattern' if config.rank_pattern else 'r'}={rank}: the two do not belong together."
        )


def _check_result(result: Any, config: LoRASwitchConfig, adapter_name: str, source: Any) -> None:
    """What PEFT (a named tuple) or Transformers (a dataclass) report of a load that they take for a success."""
    missing = [key for key in getattr(result, "missing_keys", ()) if _belongs_to(adapter_name, key)]
    _refuse(source, sorted(missing), sorted(getattr(result, "unexpected_keys", ())))


def check_adapter_state_dict(
    model: nn.Module, config: LoRASwitchConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Check tensors, with the model's own keys, before they are loaded.

    Raises:
        ValueError: tensors are missing, unknown or of another shape. Names them.
    """
    own = model.state_dict()
    inserted = "" if any(key.startswith(PREFIX) for key in own) else PREFIX
    given = {key.removeprefix(inserted) if inserted else key: tensor for key, tensor in state_dict.items()}
    wanted = {key for key in own if ".loraswitch_" in key and _belongs_to(adapter_name, key)}
    for key in sorted(wanted & set(given)):
        if given[key].shape != own[key].shape:
            raise ValueError(
                f"Adapter '{adapter_name}': wrong shape: '{key}' is {list(given[key].shape)}, this model needs "
                f"{list(own[key].shape)} (num_experts={config.num_experts}, r={config.r}; was it made for this backbone?)."
            )
    progress = _current.get()
    where = f"adapter '{adapter_name}'" if progress is None or progress.source is None else progress.source
    _refuse(where, sorted(wanted - set(given)), sorted(set(given) - set(own)))


def _belongs_to(adapter_name: str, key: str) -> bool:
    """Whether a key of the model names a tensor of this adapter (the name may also be a component of other keys)."""
    return any(
        key.rpartition(mark)[2].split(".")[1:2] == [adapter_name]
        for mark in (".loraswitch_", ".modules_to_")
        if mark in key
    )


def _refuse(where: Any, missing: Iterable[str], unknown: Iterable[str]) -> None:
    problems = [
        f"{what}: {_some(list(keys))}" for what, keys in (("missing", missing), ("not in the model", unknown)) if keys
    ]
    if problems:
        raise ValueError(
            f"The weights of {where} do not match the LoRA-Switch adapter. Tensors {'; tensors '.join(problems)}. Nothing has "
            "been changed."
        )


def _some(items: list[str]) -> str:
    more = len(items) - LIST_AT_MOST
    return ", ".join(items[:LIST_AT_MOST]) + (f" and {more} more" if more > 0 else "")
