"""Saving over an adapter that is there: a process that dies leaves the old adapter or the new one, or a folder that says that
it is neither.

An adapter is two files. PEFT writes the weights, in place, and then the configuration; Transformers the other way round. In
between lie the weights of one save beside the configuration of another, and nobody can tell. Here both files are written
beside the old ones first. Then, in three renames,

1. the old configuration is marked (`UNFINISHED`), so that it is refused,
2. the weights take their place,
3. and the configuration, whereby the mark is gone.

The old adapter is whole until 1, the new one from 3 on. PEFT and Transformers offer no hook for that: `integrations.py` puts
what is here in place of `save_pretrained` of both, and of the function by which they write the weights.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..peft_names import NAME

UNFINISHED = "unfinished_save"  # the key in adapter_config.json
BROKEN_OFF = (
    f"{CONFIG_NAME} says ('{UNFINISHED}') that a save into its folder was broken off while the files were replaced: "
    f"{SAFETENSORS_WEIGHTS_NAME} may belong to another configuration. Save again, or use another checkpoint."
)
# Of `RoutingOptions`, where the configuration has another name.
_FIELDS = {
    "decay": "router_decay",
    "jitter": "router_jitter",
    "aux_loss_coef": "router_aux_loss_coef",
    "z_loss_coef": "router_z_loss_coef",
}


class Written:
    """A file that is written, beside the place that it is for.

    Args:
        path: its place.
        write: called with the path to write to; the last part is that of `path`.

    Raises:
        OSError: it cannot be written (disk full). Nothing is left of it.
    """

    def __init__(self, path: str, write: Callable[[str], Any]) -> None:
        self.path = path
        parent, name = os.path.dirname(path) or ".", os.path.basename(path)
        _remove_leftovers(parent, f".{name}-")
        self._folder = tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-")
        self._beside = os.path.join(self._folder.name, name)
        try:
            write(self._beside)
            with suppress(FileNotFoundError):
                os.chmod(self._beside, os.stat(path).st_mode & 0o777)
        except BaseException:
            self.discard()
            raise

    def enter(self) -> None:
        """Take the place, in one step. (`discard` is still to be called.)"""
        os.replace(self._beside, self.path)

    def discard(self) -> None:
        self._folder.cleanup()


def _remove_leftovers(parent: str, prefix: str) -> None:
    """Remove what processes that died have left; what is younger than an hour may be of one that lives."""
    for entry in os.scandir(parent):
        if entry.name.startswith(prefix) and entry.is_dir() and time.time() - entry.stat().st_mtime > 3600:
            shutil.rmtree(entry.path, ignore_errors=True)


class _Save:
    """A `save_pretrained` in progress: what is written of each folder and waits for the other file."""

    def __init__(self) -> None:
        self.weights: dict[str, Written] = {}
        self.configs: dict[str, tuple[Written, Callable[[], Any]]] = {}

    def finish(self, folder: str, last: bool = False) -> None:
        """If both files of `folder` are there, or one and it is the `last` chance, let them take their places."""
        if not last and not (folder in self.weights and folder in self.configs):
            return
        weights = self.weights.pop(folder, None)
        config, then = self.configs.pop(folder, (None, None))
        try:
            if weights is not None and config is not None:
                _enter_both(weights, config)
            elif weights is not None or config is not None:
                (weights or config).enter()  # type: ignore[union-attr]
        finally:
            for file in (weights, config):
                if file is not None:
                    file.discard()
        if then is not None:
            then()

    def finish_all(
        self,
    ) -> None:  # large weights come in several files with other names; a configuration may come alone
        for folder in [*self.weights, *self.configs]:
            self.finish(folder, last=True)

    def discard(self) -> None:
        for file in [*self.weights.values(), *(config for config, _ in self.configs.values())]:
            file.discard()


_current: ContextVar[_Save | None] = ContextVar("loraswitch_save", default=None)


def save_config(folder: str, write: Callable[[str], Any], then: Callable[[], Any]) -> None:
    """Write the configuration of an adapter in `folder`, and then call `then`; within a save, when the weights are there too.

    Args:
        write: writes the configuration into the folder that it is called with.
    """
    config = Written(os.path.join(folder, CONFIG_NAME), lambda beside: write(os.path.dirname(beside)))
    save = _current.get() or _Save()
    save.configs[os.path.realpath(folder)] = config, then
    save.finish(os.path.realpath(folder), last=save is not _current.get())


def replace_both(folder: str, write_weights: Callable[[str], Any], write_config: Callable[[str], Any]) -> None:
    """Write the two files of an adapter of whatever method into `folder`, which is made if it is not there.

    Args:
        write_weights, write_config: called with the path to write to; the last part is that of the file.

    Raises:
        OSError: one cannot be written; the adapter of before is then still there.
    """
    os.makedirs(folder, exist_ok=True)
    with ExitStack() as later:
        files = []
        for name, write in ((SAFETENSORS_WEIGHTS_NAME, write_weights), (CONFIG_NAME, write_config)):
            files.append(Written(os.path.join(folder, name), write))
            later.callback(files[-1].discard)
        _enter_both(*files)


def _enter_both(weights: Written, config: Written) -> None:
    """In between, which is as short as can be, the configuration that is there is marked (if it is one that loads)."""
    old = content = b""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        old = Path(config.path).read_bytes()
        content = json.dumps({**json.loads(old), UNFINISHED: True}, indent=2, sort_keys=True).encode()
    with ExitStack() as later:
        if content:
            marked, unmarked = _beside(config.path, content, later), _beside(config.path, old, later)
            marked.enter()
        try:
            weights.enter()
        except OSError:  # the old weights are still there
            if content:
                unmarked.enter()
            raise
        config.enter()


def _beside(path: str, content: bytes, later: ExitStack) -> Written:
    file = Written(path, lambda beside: Path(beside).write_bytes(content))
    later.callback(file.discard)
    return file


# ------------------------------------------------------------------------------------------------------ watching saves


def watched_save_file(
    original: Callable[..., Any], tensors: dict[str, Any], filename: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """In place of the function by which PEFT and Transformers write weights: those of an adapter of ours wait beside the old
    ones. Other files are written as before."""
    save, path = _current.get(), os.fspath(filename)
    ours = os.path.basename(path) == SAFETENSORS_WEIGHTS_NAME and any(".loraswitch_" in key for key in tensors)
    if save is None or not ours:
        return original(tensors, filename, *args, **kwargs)
    folder = os.path.realpath(os.path.dirname(path))
    save.weights[folder] = Written(path, lambda beside: original(tensors, beside, *args, **kwargs))
    save.finish(folder)
    return None


def watched_save_pretrained(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `save_pretrained` of PEFT's and of Transformers' models."""
    with suppress(TypeError):  # a wrong call: the original says what is wrong with it
        if not inspect.signature(original).bind(model, *args, **kwargs).arguments.get("safe_serialization", True):
            _refuse_pickle(model)
    _warn_of_edits(model)
    with _save_in_progress():
        return original(model, *args, **kwargs)


def _refuse_pickle(model: Any) -> None:
    """It would lie beside the old weights, which would be loaded with the new configuration."""
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(config.peft_type == NAME for config in configs.values()):
        raise ValueError(
            "safe_serialization=False writes a pickle, which LoRA-Switch does not load: leave it out; adapters are safetensors."
        )


def _warn_of_edits(model: Any) -> None:
    """Layers keep the settings that they were made with, and the file gets those of the configuration as it is."""
    configs = getattr(model, "peft_config", None)
    for adapter, config in configs.items() if isinstance(configs, dict) else ():
        if config.peft_type != NAME:
            continue
        options = (getattr(module, "routing_options", {}).get(adapter) for module in model.modules())
        made_with = next((each for each in options if each is not None and each.is_routed), None)
        if made_with is None:
            continue
        now = replace(config.routing_options(), edition=made_with.edition)
        edited = [
            f"{_FIELDS.get(field.name, field.name)} from {getattr(made_with, field.name)} to {getattr(now, field.name)}"
            for field in fields(now)
            if getattr(made_with, field.name) != getattr(now, field.name)
        ]
        if edited:
            warnings.warn(
                f"The configuration of adapter '{adapter}' was edited after the adapter was made: {', '.join(edited)}. This "
                "model runs as it was made; what is saved now will run as edited."
            )


@contextmanager
def _save_in_progress() -> Iterator[None]:
    save = _Save()
    token = _current.set(save)
    try:
        yield
        save.finish_all()
    finally:
        save.discard()
        _current.reset(token)
