"""What every test runs under: one thread (two xdist workers share two cores), no network, a fixed seed, no left-over state."""

from __future__ import annotations

import faulthandler
import gc
import os
import time
from pathlib import Path
from typing import Any

# Before huggingface_hub is imported; tests/hub/test_hub.py lifts it for its own server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported, and for every process that a test starts: threads that wait for each other burn what two workers have,
# and inductor would start, in each process that uses it, two more that import torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Temporary files in memory, where there is room: some thousand adapters are saved, and a disk takes milliseconds for each change.
if os.access("/dev/shm", os.W_OK):
    _shm = os.statvfs("/dev/shm")
    if _shm.f_bavail * _shm.f_frsize > 2**32 and not _shm.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

HANGS = 600  # seconds
watched_since = -HANGS  # of a monotonic clock

# PyTorch is imported within functions here: the process that hands the tests out to workers, before it starts them, runs none.

# A failed assert in a helper shows its values, as one in a test does.
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "tools").glob("*.py")))


@pytest.fixture(autouse=True)
def fixed_seed():
    """What `torch.manual_seed(0)` does, but for devices that are not there: for each it would keep the seed and a traceback."""
    import torch

    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def fresh_compiler():
    """torch.compile as in a new process, before and after."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_gradient_state():
    """accelerate keeps "are gradients being accumulated" in a process-wide singleton: no test inherits another's."""
    from accelerate.state import GradientState

    yield
    GradientState._reset_state()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="one case of each test function, and none that is slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --fast: the first case of each function. Always: what is slow begins first, so that no worker ends alone with it.
    Without a GPU the first of a function's cases that need one says so for all of them: two thousand say the same."""
    if config.getoption("--fast"):
        chosen: dict[str, pytest.Item] = {}
        for item in items:
            if not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
                chosen.setdefault(item.nodeid.partition("[")[0], item)
        keep_alone(config, items, list(chosen.values()))
    elif not torch_has_a_gpu():
        first: dict[Any, pytest.Item] = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0] if item.get_closest_marker("gpu") else item, item)
        keep_alone(config, items, list(first.values()))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def keep_alone(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def torch_has_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def keep_out_of_garbage_collections() -> None:
    """What is there by now, mostly imported modules, stays until the end: no garbage collection looks through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    import torch

    torch.set_num_threads(1)
    # models are made and thrown away all the time: rarer collections, and of everything only at the end of each file
    gc.set_threshold(50_000, 20, 1000)
    keep_out_of_garbage_collections()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that hangs says where, thread by thread. pytest's `faulthandler_timeout` starts and ends a thread for each test."""
    global watched_since
    if time.monotonic() > watched_since + 60:
        watched_since = time.monotonic()
        faulthandler.dump_traceback_later(HANGS, file=item.config.stash[fault_handler_stderr_fd_key])


def pytest_unconfigure() -> None:
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After each file, when its fixtures are gone: what its tests have imported. Libraries collect garbage by themselves, a
    Trainer twice in each run, which came to half of a test's time."""
    if nextitem is not None and nextitem.path != item.path:
        keep_out_of_garbage_collections()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist worksteal` without having to say so: neighbours, which share fixtures, stay on one worker; one that has nothing
    left to do takes half of what another still has."""
    if config.getoption("dist") == "load":  # what -n alone means
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)
    return None
