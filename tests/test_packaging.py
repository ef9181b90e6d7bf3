"""The wheels: with kernels where there is an nvcc, pure Python that says so where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check_wheel(*options: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "check_wheel.py"), *options], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_machine_without_nvcc_gets_a_pure_python_wheel_that_says_so(tmp_path):
    out = check_wheel("--no-nvcc", "--output", str(tmp_path))
    assert "py3-none-any.whl" in out and "installs into an empty environment" in out


@pytest.mark.slow
def test_the_wheel_with_kernels(tmp_path):
    sys.path.insert(0, str(ROOT))
    try:
        import setup
    finally:
        sys.path.pop(0)
    if setup.find_nvcc() is None:
        pytest.skip("no nvcc on this machine: nothing to compile the kernels with")
    out = check_wheel("--output", str(tmp_path))
    assert "py3-none-manylinux_2_" in out and "its library loads there" in out


def test_setup_neither_imports_torch_nor_downloads():
    source = (ROOT / "setup.py").read_text()
    assert not [word for word in ("import torch", "urllib", "requests", '"pip"') if word in source.split('"""', 2)[2]]
