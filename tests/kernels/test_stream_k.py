"""How `csrc/stream_k.cuh` deals out the work of a launch, looked at on the host for random groups of linears."""

from __future__ import annotations

import random
import shutil
import subprocess

import pytest

from paths import ROOT

COMPILER = shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_step_once_and_every_partial_sum_is_waited_for_once(tmp_path):
    program, source = tmp_path / "check", ROOT / "tests/kernels/stream_k_check.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-x", "c++", "-I", str(ROOT / "csrc")]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], check=True)
    run = subprocess.run([program, "30000", str(random.randrange(2**31))], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
