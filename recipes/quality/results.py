"""Results as files: `results.csv` with one row per figure, and beside it `results.json` with how they came about.

In memory a row also has what is the same for all rows of its run (`RUN_COLUMNS`); on disk that stands once, in the entry of
the run in `results.json`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.checkout import versions
from recipes.quality import files, methods
from recipes.quality.settings import LENGTH, Settings

FIGURE_COLUMNS = ("method", "seed", "domain_or_task", "metric", "value")
RUN_COLUMNS = ("trainable_params", "learning_rate", "steps")
COLUMNS = FIGURE_COLUMNS + RUN_COLUMNS


def header(settings: Settings, base: dict[str, Any], sources: Any) -> dict[str, Any]:
    """Where and from what the rows come."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        **versions("torch", "transformers", "peft"),
        "gpu": torch.cuda.get_device_name() if cuda else "none (CPU)",
        "gpus": torch.cuda.device_count(),
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


def of_runs(folder: Path, base_digest: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, one entry per run) of every finished run in `folder` that started from this base, in the order of the table."""
    rows, runs = [], []
    for method in methods.EVERY.values():
        found = [files.read_json(path) for path in folder.glob(f"{method.name}-[0-9]*.json")]
        fitting = [run for run in found if run and run["base"] == base_digest and run["method"] == method.name]
        tuning = (files.read_json(folder / f"{method.name}-tuning.json") or {}).get("scores", {})
        for run in sorted(fitting, key=lambda run: run["seed"]):
            rows += [{name: {**run, **row}[name] for name in COLUMNS} for row in run["rows"]]
            names = ("method", "seed", *RUN_COLUMNS, "training_loss", "ms_per_step", "seconds")
            runs.append({**{name: run[name] for name in names}, "family": method.family, "tuning": tuning})
    return rows, runs


def write(path: Path, head: dict[str, Any], rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """The figures to `path`, a .csv file; header and runs to the .json file beside it, which names the figures' checksum."""

    def write_figures(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, FIGURE_COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    files.write_atomically(path, write_figures)
    top = json.dumps(head, indent=1).replace("\n", "\n ")
    entries = ",\n".join("  " + json.dumps(run) for run in runs)  # a line each, so that a difference can be read
    text = f'{{\n "header": {top},\n "runs": [\n{entries}\n ],\n "csv_sha256": "{files.digest_of_file(path)}"\n}}\n'
    files.write_atomically(about(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def about(path: Path) -> Path:
    """The file of header and runs that belongs to a file of figures."""
    return path.with_suffix(".json")


def read(path: Path) -> dict[str, Any]:
    """{"header", "runs", "rows"} from a .csv file of figures and the .json file beside it.

    Raises:
        ValueError: there are no such files, or they do not belong together.
    """
    found = files.read_json(about(path)) if path.suffix == ".csv" and path.exists() else None
    if not isinstance(found, dict) or not {"header", "runs", "csv_sha256"} <= set(found):
        raise ValueError(
            f"{path} holds no results (it must be a .csv file with a .json file of the same name beside it, and one is "
            "missing or damaged): python -m recipes.quality.run writes them."
        )
    if files.digest_of_file(path) != found["csv_sha256"]:
        raise ValueError(f"{path} has changed since {about(path)} was written: take both from the same run.")
    runs = {(run["method"], run["seed"]): run for run in found["runs"]}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [_row(line, runs, path) for line in csv.DictReader(file)]
    return {"header": found["header"], "runs": found["runs"], "rows": rows}


def _row(line: Mapping[str, str], runs: Mapping[tuple[str, int], dict[str, Any]], path: Path) -> dict[str, Any]:
    """One line of the file of figures, with what the entry of its run says."""
    key = (line["method"], int(line["seed"]))
    if key not in runs:
        raise ValueError(f"{path} has figures of {key} but {about(path)} no entry for it in 'runs': it is damaged.")
    figure = {**line, "seed": key[1], "value": float(line["value"]) if line["value"] else None}
    return {**figure, **{name: runs[key][name] for name in RUN_COLUMNS}}
