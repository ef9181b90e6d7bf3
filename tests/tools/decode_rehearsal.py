"""The command of the decode benchmark, run in the test's process: its workers are forks of one that has imported everything."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks.decode import __main__ as command
from two_processes import start_fork_server


def rehearse(output: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[dict[str, Any], str]:
    """(what the command writes into `output`, what it prints), run with tiny models on the CPU."""
    start_fork_server()
    monkeypatch.setattr(os, "environ", os.environ.copy())  # it sets variables for what it starts
    said, before = io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(said):
            command.main(["--device", "cpu", "--slots", "2", *options, "--output", str(output)])
    finally:
        signal.signal(signal.SIGTERM, before)
    return json.loads(output.read_text()), said.getvalue()
