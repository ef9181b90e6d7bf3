"""The clone that the recipes run from: where it is, which commit it is at, and how one of its modules starts as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(*words: str) -> str:
    """What git prints for the clone, without white space around it; "" if it fails (no git, or no clone)."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m module arguments`, with this Python. Start it with `module_environment()`."""
    return [sys.executable, "-m", module, *arguments]


def module_environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, in which the clone's modules are found from any working directory."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}
