"""For the tests on a GPU: the library is there, and no launch leaves anything behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_loraswitch import kernels


@pytest.fixture
def kernels_must_be_there() -> Iterator[None]:
    assert kernels.available(), kernels.why_not()
    kernels.give_workspace(torch.cuda.current_device())
    yield
    torch.cuda.synchronize()
    counters = kernels.loader._workspaces[torch.cuda.current_device()]
    assert not counters.any(), "a launch left counters behind: the next one of its stream would go wrong"
