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
from collections.abc import Callable, Iterable
from typing import Any

import regex

MAX_PATTERN = 100_000  # characters of one pattern: it takes half a second to compile
SECONDS = 5.0  # of processor time, for all patterns of a configuration
SECONDS_PER_MATCH = 1e-4  # more for every match that is tried; an ordinary one takes 3e-6

# What PEFT puts around a pattern, by the field that holds it.
ENDING = r"(.*\.)?({})$"  # rank_pattern, alpha_pattern
BLOCK = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # layers_pattern


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


def match_target(original: Callable[[str, str], Any], pattern: str, key: str) -> Any:
    """What PEFT's `match_target_against_key` is replaced by: it looks by itself whether embeddings are among the targets, when it
    injects and when it saves. Patterns of other methods go to the `original`."""
    if pattern in _target_patterns:
        return TimeLimit().match("target_modules", pattern, key)
    return original(pattern, key)


def first_match(field: str, keys: Iterable[str], name: str, limit: TimeLimit) -> str | None:
    """The first of the patterns `keys` (of `rank_pattern` or `alpha_pattern`: `field`) that matches the module `name`, as PEFT
    matches them; None if none does.

    Raises:
        ValueError: a pattern takes too long. Names the field.
    """
    return next((key for key in keys if limit.match(f"{field}[{shown(key)}]", key, name, ENDING)), None)


def shown(value: Any) -> str:
    """`repr(value)` for a message: shortened in the middle, and for values whose repr fails, their type."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an int of thousands of digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-100:]}"
