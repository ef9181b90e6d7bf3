"""Fused models without a GPU: a library in place of the kernels' one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from peft_loraswitch.inference import group_outputs
from recipes.benchmarks import stub_library
from stand_in_library import StandIn


@pytest.fixture
def library() -> Iterator[StandIn]:
    with stub_library.in_place_of_the_library(stand_in := StandIn()):
        yield stand_in


@pytest.fixture
def op_alone(library: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Eager code calls the op, as compiled code does."""
    monkeypatch.setattr(group_outputs, "launchable", lambda x: False)
    return library
