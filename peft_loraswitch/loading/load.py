"""Loading an adapter: only its own tensors are written, all or nothing.

Adapters are loaded by `PeftModel.from_pretrained`, `PeftModel.load_adapter` and Transformers' `model.load_adapter` (also
behind `AutoModelForCausalLM.from_pretrained(adapter)`). Each changes the model before it reads the weights, writes every
tensor whose name the model knows, tolerates missing and unknown ones, and has no hook to change that. So `watched_load` wraps
the three, and whatever reads an adapter_config.json; loads of other PEFT methods pass through. Within a load of ours

- the header of the weights file (`tensor_file.py`) is compared with the configuration before experts are made, and with
  the tensors that an adapter of this model may have (`layout.py`) before one is written;
- what the loader knows no place for, although the file may hold it, is written afterwards;
- after any error the model is put back as it was (`rollback.py`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..config import LoRASwitchConfig
from ..patterns import TimeLimit
from ..peft_names import PREFIX
from ..targets.trained_in_full import TOKENS, trained_shapes
from .layout import (
    Layout,
    Slot,
    backbone_of,
    check_experts,
    check_shape,
    check_vocabulary,
    embedding_names,
    expert_shapes,
    plain_name,
    refuse,
    some,
)
from .rollback import Snapshot, all_or_nothing
from .tensor_file import Header, TensorInfo, check_finite, read_header, read_tensors
from .weights_file import HUB_ARGUMENTS, find_file, find_weights_file, make_config, read_config_file

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------ watching loads


class _Load:
    """A load in progress: where the weights come from, what they become, and what to put back if it fails."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.model: Any = arguments.get("self", arguments.get("model"))
        self.adapter: str = arguments.get("adapter_name") or "default"
        self.source: Any = arguments.get("model_id", arguments.get("peft_model_id"))
        self.given: dict[str, torch.Tensor] | None = arguments.get("adapter_state_dict")  # then nothing is read
        self.hub = _hub_arguments(arguments)
        self.snapshots: list[Snapshot] = []
        self.slots: dict[str, Slot] = {}  # of each tensor in the file, once it has been checked
        self._header: Header = {}

    @functools.cached_property
    def path(self) -> str:
        """The weights file."""
        pickle_first = _transformers_argument(self.arguments, "use_safetensors") is False
        path = find_weights_file(self.source, pickle_first=pickle_first, **self.hub)
        if path is None:
            raise ValueError(f"{self.source} holds no weights: there is no {SAFETENSORS_WEIGHTS_NAME}.")
        return path

    @property
    def where(self) -> str:
        """The origin of the tensors, for messages."""
        return self.path if self.given is None else "adapter_state_dict"

    def header(self, model: nn.Module) -> Header:
        """What the weights file holds, by the names that the loader will look for in `model`."""
        if self._header:
            return self._header
        given = self.given or {}
        held = {k: TensorInfo.of(k, t) for k, t in given.items()} if self.given is not None else read_header(self.path)
        rename, self._header = renaming(self.arguments, model), {}
        for key, info in held.items():
            name = PREFIX + rename(key).removeprefix(PREFIX)
            if name in self._header:
                raise ValueError(f"{self.where}: '{key}' and '{self._header[name].key}' are the same tensor.")
            self._header[name] = info
        return self._header

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of the file by these names, one after the other."""
        keys = {name: self._header[name].key for name in names}
        given = self.given
        found = read_tensors(self.path, keys.values()) if given is None else (given[key] for key in keys.values())
        return zip(keys, found, strict=True)

    def config(self) -> Any:
        """The configuration beside the weights; None if there is none."""
        path = find_file(self.source, CONFIG_NAME, **self.hub)
        return None if path is None else make_config(read_config_file(path))


_current: ContextVar[_Load | None] = ContextVar("loraswitch_load", default=None)


def watched_load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of each of the three functions that load an adapter."""
    try:
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
    except TypeError:  # a wrong call: the original says what is wrong with it
        return original(*args, **kwargs)
    return run_load(functools.partial(original, *args, **kwargs), arguments)


def config_read_after_a_check(original: Callable[..., Any], cls: type, path_json_file: str, **kwargs: Any) -> Any:
    """In place of PEFT's reader of adapter_config.json."""
    read_config_file(path_json_file)
    return original(cls, path_json_file, **kwargs)


def config_found_after_a_check(original: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """In place of Transformers' search for adapter_config.json, which comes before its own reading of it."""
    path = original(*args, **kwargs)
    if path is not None:
        read_config_file(path)
    return path


def run_load(load: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    """Run one of the three functions, called with `arguments` (by parameter name), all or nothing."""
    progress = _current.get()
    if progress is not None:  # PeftModel.from_pretrained calls load_adapter: one load
        result = load()
        _finish(progress, result)
        return result
    progress = _Load(arguments)
    token = _current.set(progress)
    try:
        config = _our_config(progress.model, progress.adapter)
        if config is not None and "self" in arguments and "model_id" in arguments:  # PeftModel.load_adapter
            _prepare_loading_again(progress, config)
        result = load()
        _finish(progress, result)
        _tell_of_the_backbone(progress)
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
    configs = getattr(model, "peft_config", None) if isinstance(model, nn.Module) else None
    config = configs.get(adapter) if isinstance(configs, dict) else None
    return config if isinstance(config, LoRASwitchConfig) else None


def _transformers_argument(arguments: dict[str, Any], name: str) -> Any:
    """One that Transformers takes as a keyword or in `load_config`."""
    given = arguments.get("kwargs") or {}
    return given[name] if name in given else getattr(arguments.get("load_config"), name, None)


def _hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Where and how on the Hub, from the arguments of any of the three functions."""
    given: dict[str, Any] = dict(_transformers_argument(arguments, "download_kwargs") or {})
    for source in (arguments.get("adapter_kwargs"), arguments.get("kwargs"), arguments):
        given.update(source or {})
    return {name: given[name] for name in HUB_ARGUMENTS if given.get(name) is not None}


def renaming(arguments: dict[str, Any], model: Any) -> Callable[[str], str]:
    """How the loader renames the keys of the file: PEFT by `key_mapping`, Transformers by what it knows of the model."""
    if "peft_model_id" in arguments:
        mapping = _transformers_argument(arguments, "weight_mapping") or get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        return lambda key: rename_source_key(key.removeprefix(PREFIX), renamings, [])[0]
    patterns = arguments.get("key_mapping")
    if patterns is None and "model" in arguments:  # PeftModel.from_pretrained
        patterns = getattr(arguments["model"], "_checkpoint_conversion_mapping", None)

    def rename(key: str) -> str:
        key = key.removeprefix(PREFIX)
        for pattern, replacement in (patterns or {}).items():
            renamed, changes = re.subn(pattern, replacement, key)
            if changes:
                return renamed
        return key

    return rename


@contextmanager
def injecting(tuner: nn.Module, config: LoRASwitchConfig) -> Iterator[None]:
    """Around the injection of an adapter: all or nothing, and undone as well if the load fails that it is part of."""
    model: Any = tuner.model
    progress = _current.get()
    loaded_into = [] if progress is None else [progress.model]  # a PeftModel is around the tuner
    try:
        with all_or_nothing(tuner, config, *loaded_into) as snapshot:
            yield
    except BaseException:
        # Transformers' add_adapter sets this before the adapter is there; if it then fails, the next call would fail, too
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = False
        raise
    if progress is not None:
        progress.snapshots.append(snapshot)


# ------------------------------------------------------------------------------------------------------------- checks


def check_experts_being_loaded(
    model: nn.Module, config: LoRASwitchConfig, adapted: list[str], router: str, before: Collection[str]
) -> None:
    """If a load is in progress: compare the experts in its file, and the modules that it trains in full, with those that are
    about to be made, so that nothing is allocated that the file does not hold.

    Args:
        adapted, router, before: see `InjectionPlan`.

    Raises:
        ValueError: the file is no safetensors file, or holds other experts or modules. Names file, tensor and shapes.
    """
    progress = _current.get()
    if progress is None:
        return
    header = progress.header(model)
    check_experts(progress.where, header, config)
    wanted = expert_shapes(model, config, adapted, router, before)
    refuse(progress.where, [key for key in wanted if key not in header], [])
    for key, shape in wanted.items():
        check_shape(progress.where, key, header[key].shape, shape, config)
    _check_trained(progress, header, model, config)


def _check_trained(progress: _Load, header: Header, model: nn.Module, config: LoRASwitchConfig) -> None:
    wanted = trained_shapes(model, config)
    if not wanted:
        return
    held = {plain_name(key): info for key, info in header.items()}
    tokens = "." + plain_name(TOKENS)
    fields = {key: "trainable_token_indices" if key.endswith(tokens) else "modules_to_save" for key in wanted}
    refuse(progress.where, [f"{key} (of {fields[key]})" for key in wanted if key not in held], [])
    embeddings = tuple(f"{PREFIX}{plain_name(name)}." for name in embedding_names(backbone_of(model)))
    for key, shape in wanted.items():
        if key.startswith(embeddings) and not key.endswith(tokens):
            check_vocabulary(progress.where, held[key], shape)
        check_shape(progress.where, held[key].key, held[key].shape, shape, config)


def check_file_being_loaded(model: nn.Module, config: LoRASwitchConfig, adapter_name: str) -> None:
    """If a load is in progress: compare its file with the tensors of the adapter, which is in the model by now.

    Raises:
        ValueError: tensors are missing, unknown, of another shape or dtype, or hold NaN or Inf. Names file and tensors.
    """
    progress = _current.get()
    if progress is None:
        return
    layout = Layout(model, config, adapter_name)
    progress.slots = layout.match(progress.where, progress.header(model))
    written = [key for key, slot in progress.slots.items() if slot.is_checked and isinstance(slot.tensor, nn.Parameter)]
    check_finite(progress.where, progress.tensors(written))
    progress.snapshots.append(Snapshot(values=[slot.tensor for slot in progress.slots.values() if slot.of_backbone]))


def _prepare_loading_again(progress: _Load, config: LoRASwitchConfig) -> None:
    """An adapter that exists gets new weights: PEFT reads only these, and the adapter keeps its configuration.

    Raises:
        ValueError: the configuration in the file gives the same weights another meaning; or see `check_file_being_loaded`.
    """
    saved = progress.config()
    check_experts(progress.where, progress.header(progress.model), saved or config)
    if saved is not None:
        _check_same_meaning(progress, config, saved)
    check_file_being_loaded(progress.model, config, progress.adapter)
    progress.snapshots.append(Snapshot(progress.model, values=[slot.tensor for slot in progress.slots.values()]))


def _check_same_meaning(progress: _Load, config: LoRASwitchConfig, saved: LoRASwitchConfig) -> None:
    def compare(field: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            raise ValueError(
                f"{progress.source}: {CONFIG_NAME} says {field}={theirs!r}, but the adapter '{progress.adapter}' that is in the "
                f"model has {ours!r}. An adapter that exists keeps its configuration, so load this one under another "
                f"adapter_name, or call delete_adapter('{progress.adapter}') first."
            )

    for field in (
        "num_experts", "num_shared_experts", "base_expert", "top_k", "top_p", "normalize_gates", "router_decay",
    ):  # fmt: skip
        compare(field, getattr(config, field), getattr(saved, field))
    if config.expert_names is not None and saved.expert_names is not None:
        compare("expert_names", config.expert_names, saved.expert_names)
    compare("trainable_token_indices", _rows(config.trainable_token_indices), _rows(saved.trainable_token_indices))
    limit = TimeLimit()
    for name, module in backbone_of(progress.model).named_modules():
        if progress.adapter in getattr(module, "loraswitch_A", {}):
            scale = saved.scale_of(name, limit)
            compare(
                f"lora_alpha (with r, use_rslora and alpha_pattern: the scale of '{name}')",
                module.scaling[progress.adapter],
                scale,
            )


def _rows(token_indices: Any) -> list[list[int]] | None:
    """Token ids, whether or not their embedding is named."""
    if isinstance(token_indices, dict):
        return [list(token_indices[name]) for name in sorted(token_indices)]
    return None if token_indices is None else [list(token_indices)]


def _finish(progress: _Load, result: Any) -> None:
    """Write what the loader could not place, and check that everything is there.

    Args:
        result: what PEFT (a named tuple) or Transformers (a dataclass) report of a load that they take for a success.
    """
    unplaced = {PREFIX + key.removeprefix(PREFIX) for key in getattr(result, "unexpected_keys", ())}
    left = {name: slot.target for name, slot in progress.slots.items() if name in unplaced and slot.target is not None}
    state = backbone_of(progress.model).state_dict(keep_vars=True) if left else {}
    with torch.no_grad():
        for name, tensor in progress.tensors(left):
            state[left[name]].copy_(tensor)
    _check_result(progress, set(getattr(result, "missing_keys", ())) - set(left.values()))


def _check_result(progress: _Load, missing: set[str]) -> None:
    needed = {slot.target for slot in progress.slots.values() if slot.required}
    refuse(progress.where, [key for key in missing if key.removeprefix(PREFIX) in needed], [])


def _tell_of_the_backbone(progress: _Load) -> None:
    names = sorted(slot.target for slot in progress.slots.values() if slot.of_backbone and slot.target is not None)
    if names:
        logger.warning(
            f"{progress.where} also holds tensors of the backbone, as PEFT saves them with resized embeddings, "
            f"save_embedding_layers=True or bias: {some(names)}. They are loaded, for all adapters on this model."
        )


def select_tensors(
    model: nn.Module, config: LoRASwitchConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those of `state_dict` that belong to the adapter, under the names that they have in `model`.

    Args:
        state_dict: tensors by name in the file or in the model.

    Raises:
        ValueError: tensors are missing, unknown or of another shape or dtype. Names them.
    """
    layout = Layout(model, config, adapter_name)
    slots = {slot.target: slot for slot in layout.slots.values() if slot.target is not None}
    tensors = {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
    header = {name: TensorInfo.of(name, tensor) for name, tensor in tensors.items()}
    progress = _current.get()
    where = f"adapter '{adapter_name}'" if progress is None else progress.where
    matched = layout.match(where, header, lambda name: slots.get(name.removeprefix(PREFIX)) or layout.find(name))
    if progress is None:
        check_finite(where, ((name, tensors[name]) for name, slot in matched.items() if slot.is_checked))
    inserted = PREFIX if backbone_of(model) is not model else ""
    return {inserted + slot.target: tensors[name] for name, slot in matched.items() if slot.target is not None}
