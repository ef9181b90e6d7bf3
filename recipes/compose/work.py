"""One process of the measurement: it takes up task after task that nobody else has taken up. Processes meet in files alone."""

from __future__ import annotations

import pickle
import time
import traceback
import warnings
from pathlib import Path

import torch

from recipes.compose.lab import BEGUN, Lab, free, open_model, open_tokenizer, rows_of, say
from recipes.compose.settings import SIZES
from recipes.compose.tasks import Task, all_tasks

ITEMS = "items.pickle"


def open_lab(base: str, size: str, out: Path, worker: str) -> Lab:
    """Waits for the items that the parent process writes."""
    # Gradients of a stack lie as its weights do; Arrow and X-LoRA warn of what is meant.
    warnings.filterwarnings("ignore")
    tokenizer, plain = open_tokenizer(base), open_model(base)
    while not (out / ITEMS).exists():
        time.sleep(0.1)
    data = pickle.loads((out / ITEMS).read_bytes())
    return Lab(SIZES[size], base, out, data, tokenizer, plain, worker)


def work(lab: Lab, limit: float, only: list[str] | None = None) -> None:
    """Until nothing is left, or `limit` seconds after the run has begun. only: these tasks and what they need."""
    tasks = all_tasks(lab.settings)
    if only is not None:
        wanted = set(only)
        for task in reversed(tasks):  # what a task needs stands before it
            wanted |= set(task.needs) if task.name in wanted else set()
        tasks = [task for task in tasks if task.name in wanted]
    for folder in ("claims", "done", "failed"):
        (lab.out / folder).mkdir(parents=True, exist_ok=True)
    while time.time() - BEGUN < limit:
        waiting = False
        for task in tasks:
            state = _state(lab.out, task)
            waiting |= state == "waits"
            if state == "ready" and _claim(lab.out, task.name):
                _run(lab, task)
                break
        else:
            if not waiting:
                return
            time.sleep(0.2)


def _state(out: Path, task: Task) -> str:
    if (out / "claims" / task.name).exists():
        return "taken"
    if any((out / "failed" / name).exists() for name in task.needs):
        (out / "failed" / task.name).write_text("what it needs has failed")
        return "taken"
    return "ready" if all((out / "done" / name).exists() for name in task.needs) else "waits"


def _claim(out: Path, name: str) -> bool:
    try:
        (out / "claims" / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _run(lab: Lab, task: Task) -> None:
    begun = time.time()
    lab.task = task.name
    rows_of(lab.out, task.name).unlink(missing_ok=True)  # of a try that ended early
    try:
        task.run(lab)
    except torch.cuda.OutOfMemoryError as error:
        again = lab.out / "claims" / f"{task.name}.again"
        say(f"{lab.worker}: {task.name}: out of memory")
        if again.exists():
            (lab.out / "failed" / task.name).write_text(str(error))
        else:  # others may have ended by then
            again.touch()
            (lab.out / "claims" / task.name).unlink()
    except Exception as error:  # one broken row must not take the others with it
        say(f"{lab.worker}: {task.name} failed: {traceback.format_exc()}")
        (lab.out / "failed" / task.name).write_text(f"{type(error).__name__}: {error}"[:400])
    else:
        (lab.out / "done" / task.name).touch()
    lab.note("seconds", {task.name: [round(begun - BEGUN, 1), round(time.time() - BEGUN, 1)]})
    free()
    say(f"{lab.worker}: {task.name}: {time.time() - begun:.1f} s")
