"""Routed texts in a terminal: tokens on the colour of their expert, or without colours the expert's name before each run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .colours import PALETTE, place
from .routes import RoutedText, RoutedToken, Totals, summary_line

RESET = "\x1b[0m"
LINE_CODES = ("", ";4", ";3", ";3;4")
SPLIT = "\N{MIDDLE DOT}"  # in the place of a token that is a part of a character


def wants_colours() -> bool:
    """Whether the standard output is a terminal that shows colours, and nobody asked for none (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def rendered(names: Sequence[str], has_base: bool, texts: Sequence[RoutedText], total: Totals, colours: bool) -> str:
    """All texts, each with its summary, then that of all of them.

    Args:
        names: of the experts; with `has_base` the last is the base expert, which has no colour.
    """
    codes = [_code(index) for index in range(len(names))]
    if has_base:
        codes[-1] = "2"  # dim
    shown_names = [_printable(name) for name in names]
    lines = []
    if colours:
        lines += [" ".join(f"\x1b[{code}m {name} {RESET}" for code, name in zip(codes, shown_names, strict=True)), ""]
    for text in texts:
        body = _coloured(text.tokens, codes) if colours else _plain(text.tokens, shown_names)
        lines += [body, f"  ({summary_line(shown_names, text.totals)})", ""]
    if len(texts) > 1:
        lines.append(f"All {len(texts)} texts: {summary_line(shown_names, total)}")
    return "\n".join(lines).rstrip("\n")


def _code(index: int) -> str:
    colour, line = place(index)
    _, number, white = PALETTE[colour]
    return f"{'97' if white else '30'};48;5;{number}{LINE_CODES[line]}"


def _coloured(tokens: Sequence[RoutedToken], codes: Sequence[str]) -> str:
    parts = []
    for token in tokens:
        # not over the end of a line, which many terminals would colour to the margin
        for piece in _pieces(token):
            parts.append("\n" if piece == "\n" else f"\x1b[{codes[token.experts[0]]}m{piece}{RESET}")
    return "".join(parts)


def _plain(tokens: Sequence[RoutedToken], names: Sequence[str]) -> str:
    parts, last = [], None
    for token in tokens:
        if token.experts[0] != last:
            last = token.experts[0]
            parts.append(f"[{names[last]}]")
        parts += _pieces(token)
    return "".join(parts)


def _pieces(token: RoutedToken) -> list[str]:
    """Its text, ends of lines by themselves, with a sign before each."""
    pieces: list[str] = []
    for index, line in enumerate(token.text.split("\n")):
        pieces += ["\N{RETURN SYMBOL}", "\n"] if index else []
        pieces += [_printable(line)] if line else []
    return pieces or [SPLIT]


def _printable(text: str) -> str:
    """Without anything that a terminal takes for a command."""
    text = text.replace("\t", "\N{RIGHTWARDS ARROW TO BAR}   ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
