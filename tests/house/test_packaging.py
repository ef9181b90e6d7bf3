"""The wheels: with kernels where there is an nvcc, pure Python that says so where there is none."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from compiler import setup_with_fresh_library
from paths import ROOT


def check_wheel(*options: str) -> str:
    # The environment that it makes has to find the package in the wheel, and no clone on PYTHONPATH.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "check_wheel.py"), *options],
        capture_output=True, text=True, cwd=ROOT, env=variables,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_machine_without_nvcc_gets_a_pure_python_wheel_that_says_so(tmp_path):
    out = check_wheel("--no-nvcc", "--output", str(tmp_path))
    assert "py3-none-any.whl" in out and "installs into an empty environment and imports" in out


@pytest.mark.slow
def test_the_wheel_with_kernels(tmp_path):
    setup_with_fresh_library()
    out = check_wheel("--output", str(tmp_path))
    assert "py3-none-manylinux_2_" in out and "imports, and its library loads" in out
    assert "sm_80+sm_86+sm_89+sm_90a+sm_100+sm_120+compute_90" in out


def test_setup_neither_imports_torch_nor_downloads():
    source = (ROOT / "setup.py").read_text()
    assert not [word for word in ("import torch", "urllib", "requests", '"pip"') if word in source.split('"""', 2)[2]]


def test_the_package_is_written_for_the_python_it_says_it_needs():
    """Python 3.10, the floor of the oldest PyTorch, PEFT and Transformers that are supported."""
    metadata = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in metadata
    assert 'python_version = "3.10"' in metadata, "mypy must look the standard library up as it was in 3.10"
    files = sorted((ROOT / "peft_loraswitch").rglob("*.py"))
    assert len(files) > 40
    for file in files:
        ast.parse(file.read_text(), str(file), feature_version=(3, 10))
        future = re.search(
            r"from typing import .*\b(Self|assert_never|LiteralString|Unpack|override)\b", file.read_text()
        )
        assert future is None, f"{file.name}: {future.group() if future else ''} is not in Python 3.10"


def test_python_3_10_compiles_it(tmp_path):
    python = shutil.which("python3.10")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("no python3.10 on this machine")
    shutil.copytree(
        ROOT / "peft_loraswitch", tmp_path / "package", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    result = subprocess.run(
        [python, "-m", "compileall", "-q", str(tmp_path / "package")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
