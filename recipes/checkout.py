"""The clone that the recipes run from: where it is, which commit it is at, and how one of its modules starts as a process."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(*words: str) -> str:
    """What git prints for the clone, without white space around it; "" if it fails (no git, or no clone)."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Short hash of the clone's commit, with a + if tracked files differ from it; 'unknown' outside of one."""
    found = git("rev-parse", "--short", "HEAD")
    return found + ("+" if git("status", "--porcelain", "-uno") else "") if found else "unknown"


def processor() -> str:
    """The processor's name."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def versions(*packages: str) -> dict[str, str]:
    """What a file of results says of how it was made: date, commit, Python and these packages."""
    made = {"date": datetime.date.today().isoformat(), "commit": commit(), "python": platform.python_version()}
    return made | {package: metadata.version(package) for package in packages}


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m module arguments`, with this Python. Start it with `module_environment()`."""
    return [sys.executable, "-m", module, *arguments]


def module_environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, in which the clone's modules are found from any working directory."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}
