"""Where things lie in the repository. Tests name files by these, so that a test can move to another folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tests" / "tools"
