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


def setup_with_fresh_library() -> Any:
    """As above; also skipped where the library is missing or older than csrc/: no test starts minutes of compiling."""
    setup = setup_with_nvcc()
    library = setup.ROOT / "peft_loraswitch" / setup.LIBRARY
    if not setup.is_current(library, setup.find_nvcc()[1]):
        pytest.skip(
            f"{library.name} is not built from csrc/ as it is now; `python setup.py build_kernels` makes it, in minutes"
        )
    return setup
