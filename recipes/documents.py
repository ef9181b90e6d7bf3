"""Tables that a command writes into documents, between two markers."""

from __future__ import annotations


def between_markers(document: str, text: str, table: str, markers: tuple[str, str]) -> str:
    """`text`, which is that of `document`, with `table` between its markers.

    Raises:
        SystemExit: the markers are not there once each, in order.
    """
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{document} needs the lines {begin!r} and {end!r}, once each, in this order.")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{table}\n{end}{after}"
