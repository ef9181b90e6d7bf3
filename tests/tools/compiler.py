"""setup.py as the tests of building use it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from paths import ROOT


def setup_with_nvcc() -> Any:
    """setup.py as a module; the test is skipped where there is no compiler."""
    sys.path.insert(0, str(ROOT))
    try:
        import setup
    finally:
        sys.path.pop(0)
    try:
        setup.find_nvcc()
    except setup.NoKernels as reason:
        pytest.skip(f"nothing to compile the kernels with: {reason}")
    return setup
