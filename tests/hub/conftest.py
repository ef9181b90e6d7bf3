"""A good adapter on disk, and a copy of it to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loaders import save_adapter


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "base", a backbone, and "adapter", whose configuration names it. Not to be changed."""
    return save_adapter(tmp_path_factory.mktemp("saved")).parent


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, for one test."""
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))
