"""The colours of experts: seven that colour-blind people tell apart (Okabe and Ito, 2008, without black). More experts than
that have the same colours again, with another line below the text."""

from __future__ import annotations

# red, green, blue; the nearest colour of a terminal with 256; whether text on it must be white
PALETTE = (
    ((230, 159, 0), 214, False),
    ((86, 180, 233), 117, False),
    ((0, 158, 115), 36, False),
    ((204, 121, 167), 175, False),
    ((240, 228, 66), 227, False),
    ((0, 114, 178), 25, True),
    ((213, 94, 0), 166, False),
)
LINES = ("solid", "dashed", "dotted", "double")  # of a web page; those of a terminal: none, underlined, italic, both


def place(index: int) -> tuple[int, int]:
    """Which colour and which line the choice with this index has."""
    return index % len(PALETTE), index // len(PALETTE) % len(LINES)
