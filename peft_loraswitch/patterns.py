"""Which modules a configuration names: lists of name endings, and regular expressions matched within a time limit.

PEFT matches the patterns of a configuration with Python's `re`, which takes for ever on some short ones, such as
`(a|aa)+$`, and a configuration may come from a stranger's file. So the same rules are applied here in its place, with the
`regex` package. It reads the same syntax, takes no long time on most of these patterns, and stops where it would.

The limit counts processor time of this thread, and grows with the number of names: a thousand times what ordinary patterns
take. A slow or busy machine does not make a difference.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import peft.tuners.tuners_utils
import peft.utils.other
import peft.utils.save_and_load
import regex
from peft.tuners.tuners_utils import _ExcludedModule

if TYPE_CHECKING:
    from .config import LoRASwitchConfig

MAX_PATTERN = 100_000  # characters of one pattern: it takes half a second to compile
SECONDS = 5.0  # of processor time, for all patterns of a configuration
SECONDS_PER_MATCH = 1e-4  # more for every match that is tried; an ordinary one takes 3e-6

# What PEFT puts around a pattern, by the field that holds it.
ENDING = r"(.*\.)?({})$"  # rank_pattern, alpha_pattern
BLOCK = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # layers_pattern
ANY_BLOCK = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


class TimeLimit:
    """The processor time that is left for the patterns of one configuration."""

    def __init__(self) -> None:
        self.left = SECONDS

    def match(self, field: str, pattern: str, name: str, template: str | None = None) -> regex.Match | None:
        """The match of `pattern` with all of `name`, or of `pattern` within `template` from its start; None if there is none.

        Raises:
            ValueError: it takes too long, or is not a valid pattern. Names the field.
        """
        compiled = compile_pattern(field, pattern, template)
        match = compiled.fullmatch if template is None else compiled.match
        self.left += SECONDS_PER_MATCH
        timeout = max(self.left, SECONDS_PER_MATCH)
        while True:
            started = time.thread_time()
            try:
                return match(name, timeout=timeout)
            except TimeoutError as error:
                if time.thread_time() - started >= self.left:
                    raise ValueError(
                        f"{field}={shown(pattern)} is a regular expression that takes too long to match (tried on "
                        f"'{name}'): repetitions within repetitions, or alternatives that overlap, as in '(a|aa)+'. Write it "
                        "without them, or give a list of names."
                    ) from error
                timeout *= 2  # `regex` has counted time that other threads have spent
            finally:
                self.left -= time.thread_time() - started


@functools.lru_cache(maxsize=1024)
def compile_pattern(field: str, pattern: str, template: str | None = None) -> regex.Pattern:
    """The pattern, within `template` if there is one.

    Raises:
        ValueError: it is not a valid pattern for PEFT (Python's `re`), or longer than `MAX_PATTERN`. Names the field.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(
            f"{field} is a regular expression of {len(pattern):,} characters; at most {MAX_PATTERN:,} are accepted. Give a "
            "list of names."
        )
    try:
        re.compile(pattern)  # alone as well: 'a)|(b' is no pattern, but within the template it would be one
        whole = pattern if template is None else template.format(pattern)
        re.compile(whole)
        return regex.compile(whole, regex.VERSION0)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        hint = " Names go into a list." if template is None else ""
        raise ValueError(f"{field}={shown(pattern)} is not a valid regular expression ({error}).{hint}") from error


_target_patterns: set[str] = set()


def check_target_pattern(field: str, pattern: str) -> None:
    """`compile_pattern` for `target_modules` and `exclude_modules`; from now on, PEFT matches this pattern within the limit.

    Raises:
        ValueError: see `compile_pattern`.
    """
    compile_pattern(field, pattern)
    _target_patterns.add(pattern)


def limit_peft() -> None:
    """Make PEFT match `target_modules` of our configurations within the limit where it does so by itself: it looks whether
    embeddings are among the targets when it injects and when it saves. Idempotent."""
    original = peft.utils.other.match_target_against_key
    if getattr(original, "limited_by_loraswitch", False):
        return

    @functools.wraps(original)
    def match(target_pattern: str, key: str) -> Any:
        if target_pattern in _target_patterns:
            return TimeLimit().match("target_modules", target_pattern, key)
        return original(target_pattern, key)

    match.limited_by_loraswitch = True  # type: ignore[attr-defined]
    for module in (peft.utils.other, peft.utils.save_and_load, peft.tuners.tuners_utils):
        setattr(module, original.__name__, match)


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


def value_for(config: LoRASwitchConfig, field: str, name: str, default: Any, limit: TimeLimit | None = None) -> Any:
    """What `rank_pattern` or `alpha_pattern` (`field`) says of the module `name`, or `default`: the first key that matches.

    Raises:
        ValueError: a pattern takes too long. Names the field.
    """
    key = matching_key(config, field, name, limit or TimeLimit())
    return default if key is None else getattr(config, field)[key]


def rank_for(config: LoRASwitchConfig, name: str, limit: TimeLimit | None = None) -> int:
    """The rank of the experts of the module `name`. Raises as `value_for`; give one `limit` for many names."""
    return value_for(config, "rank_pattern", name, config.r, limit)


def matching_key(config: LoRASwitchConfig, field: str, name: str, limit: TimeLimit) -> str | None:
    keys = getattr(config, field)
    return next((key for key in keys if limit.match(f"{field}[{shown(key)}]", key, name, ENDING)), None)


def shown(value: Any) -> str:
    """`repr(value)` for a message: shortened in the middle, and for values whose repr fails, their type."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an int of thousands of digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-100:]}"
