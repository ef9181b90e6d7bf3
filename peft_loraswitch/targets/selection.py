"""Which modules `target_modules` and the fields around it select, by PEFT's rules, within the time limit of `patterns.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import nn

from ..config import LoRASwitchConfig
from ..patterns import BLOCK, TimeLimit

ANY_BLOCK = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def module_names(backbone: nn.Module) -> list[str]:
    """Of all modules of the backbone, without what adapters have added."""
    inside = tuple(name + "." for name, m in backbone.named_modules() if isinstance(m, BaseTunerLayer))
    return [name for name, _ in backbone.named_modules() if name and not name.startswith(inside)]


def selects(config: LoRASwitchConfig, name: str, limit: TimeLimit | None = None) -> bool | _ExcludedModule:
    """Whether `config` adapts the module `name`, by PEFT's rules; PEFT's `_ExcludedModule` (false) if `exclude_modules` or
    `modules_to_save` keep it from that.

    Raises:
        ValueError: a pattern takes too long. Names the field.
    """
    limit = limit or TimeLimit()
    excluded, targets = config.exclude_modules, config.target_modules
    if isinstance(excluded, str) and excluded:
        if limit.match("exclude_modules", excluded, name):
            return _ExcludedModule()
    elif excluded and _ends_with_one_of(name, excluded):
        return _ExcludedModule()
    if config.modules_to_save and trained_in_full(name, config.modules_to_save):
        return _ExcludedModule()
    if isinstance(targets, str):
        return limit.match("target_modules", targets, name) is not None
    if not targets or not _ends_with_one_of(name, targets):
        return False
    return name in targets or _in_wanted_block(config, name, limit)  # a full name is taken whatever its block


def _ends_with_one_of(name: str, endings: Iterable[str]) -> bool:
    """Whether `name`, or what follows one of its dots, is one of `endings` (fast if that is a set, whatever its size)."""
    endings = endings if isinstance(endings, (set, frozenset)) else set(endings)
    while name not in endings:
        _, dot, name = name.partition(".")
        if not dot:
            return False
    return True


def trained_in_full(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether the module `name` is one that `modules_to_save` names, or lies within one: PEFT takes every module whose name
    ends so, also in the middle of a word."""
    endings = tuple(modules_to_save)
    while name:
        if name.endswith(endings):
            return True
        name = name.rpartition(".")[0]
    return False


def _in_wanted_block(config: LoRASwitchConfig, name: str, limit: TimeLimit) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or (not isinstance(wanted, int) and not wanted):
        return True
    patterns = config.layers_pattern or []
    match: Any = None
    if not patterns:
        match = ANY_BLOCK.match(name)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = match or limit.match("layers_pattern", pattern, name, BLOCK)
    if match is None:
        return False
    return int(match["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)
