"""The file of results: a header, and one row per figure."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.quality import files, methods
from recipes.quality.settings import LENGTH, Settings

COLUMNS = (
    "method", "seed", "domain_or_task", "metric", "value", "trainable_params", "learning_rate", "steps"
)  # fmt: skip


def header(settings: Settings, base: dict[str, Any], sources: Any) -> dict[str, Any]:
    """Where and from what the rows come."""
    import peft
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else "none (CPU)",
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit(),
        "settings": settings.fingerprint(),
        "base": base,
        "sources": sources,
    }


def data_sizes(prepared: Any, settings: Settings) -> dict[str, Any]:
    """How much each domain and task is trained on, and how much of validation and test is measured.

    Args:
        prepared: as prepare.py makes it: train, validation and test of each domain, rows of each task.
    """

    def items(split: Any, rows: int | None = None) -> int:
        return sum(len(set(row[row >= 0].tolist())) for row in split.item_ids[:rows])

    def measured(stream: Any, rows: int) -> int:
        return LENGTH * min(rows, len(stream) // LENGTH)

    validation, test = settings.validation_rows, settings.test_rows
    return {
        "domains": {
            name: {
                "train_tokens": len(stream),
                "validation_tokens": measured(prepared.validation[name], validation),
                "test_tokens": measured(prepared.test[name], test),
            }
            for name, stream in prepared.train.items()
        },
        "tasks": {
            name: {
                "train_items": items(task.train),
                "validation_items": items(task.validation, validation),
                "test_items": items(task.test, settings.test_task_rows),
            }
            for name, task in prepared.tasks.items()
        },
    }


def commit() -> str:
    """Short hash of the checkout's commit, with a + if tracked files differ from it; 'unknown' outside of one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def of_runs(folder: Path, base_digest: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, one entry per run) of every finished run in `folder` that started from this base, in the order of the table."""
    rows, runs = [], []
    for method in methods.METHODS:
        found = [files.read_json(path) for path in folder.glob(f"{method.name}-[0-9]*.json")]
        fitting = [run for run in found if run and run["base"] == base_digest and run["method"] == method.name]
        tuning = (files.read_json(folder / f"{method.name}-tuning.json") or {}).get("scores", {})
        for run in sorted(fitting, key=lambda run: run["seed"]):
            shared = {name: run[name] for name in ("method", "seed", "trainable_params", "learning_rate", "steps")}
            rows += [{name: {**shared, **row}[name] for name in COLUMNS} for row in run["rows"]]
            names = ("method", "seed", "learning_rate", "training_loss", "ms_per_step", "seconds")
            runs.append({**{name: run[name] for name in names}, "family": method.family, "tuning": tuning})
    return rows, runs


def write(path: Path, head: dict[str, Any], rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """One row per line, so that a difference between two versions can be read."""
    import json

    def lines(items: Iterable[dict[str, Any]]) -> str:
        return ",\n".join("  " + json.dumps(item) for item in items)

    top = json.dumps(head, indent=1).replace("\n", "\n ")
    text = f'{{\n "header": {top},\n "runs": [\n{lines(runs)}\n ],\n "rows": [\n{lines(rows)}\n ]\n}}\n'
    files.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read(path: Path) -> dict[str, Any]:
    """{"header", "runs", "rows"}

    Raises:
        ValueError: not such a file.
    """
    found = files.read_json(path)
    if not isinstance(found, dict) or not {"header", "runs", "rows"} <= set(found):
        raise ValueError(f"{path} holds no results (missing or damaged): python -m recipes.quality.run writes them.")
    return found
