"""The file of the compiled library: whether it is whole, and what it was built from.

The build writes the library elsewhere, puts a seal at its end and moves it into place, so a build that is killed leaves no half
of a library behind. The seal holds a checksum of all that comes before it: what has none, or another one, is truncated, altered
or somebody else's, and loading it could crash the process. setup.py reads this file too: standard library only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MARK = b"\nLORASWITCH SEAL 1\n"
LONGEST = 4096  # bytes of a seal


class BrokenLibrary(Exception):
    """The file is not a library that the build has finished; the message says why."""


def seal(path: Path, facts: dict[str, Any]) -> None:
    """Put the seal at the end of a freshly linked library. `facts`: what it was built from, for `read_seal`."""
    content = path.read_bytes()
    text = json.dumps({**facts, "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True).encode()
    with open(path, "ab") as file:
        file.write(MARK + text)


def read_seal(path: Path) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
        BrokenLibrary: there is no such file, it is no regular file, or it is not whole.
    """
    if not path.is_file():
        raise BrokenLibrary(f"{path} is not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BrokenLibrary(f"{path} cannot be read ({error.strerror})") from error
    at = content.rfind(MARK, max(0, len(content) - LONGEST))
    if content[:4] != b"\x7fELF" or at < 0:
        raise BrokenLibrary(f"{path} is truncated, or not built by this package's setup.py")
    try:
        facts = json.loads(content[at + len(MARK) :])
    except ValueError as error:
        raise BrokenLibrary(f"{path} is truncated") from error
    if not isinstance(facts, dict) or facts.get("sha256") != hashlib.sha256(content[:at]).hexdigest():
        raise BrokenLibrary(f"{path} has been altered since it was built")
    return facts
