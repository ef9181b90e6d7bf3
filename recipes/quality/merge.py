"""Several files of results, one for each family or machine, as one.

They go together only if they answer the same question: the same sizes and steps, the same text, the same base. Which seeds and
learning rates were tried may differ; the tables then say what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.quality import methods, results
from recipes.quality.results import COLUMNS

MAY_DIFFER = ("seeds", "learning_rates", "rows_at_once")  # worker.py's fingerprint of a run leaves out the same
VERSIONS = ("date", "gpu", "gpus", "python", "torch", "transformers", "peft", "commit")


class Incompatible(ValueError):
    """Two files cannot be one table; the message names both, what differs, and what to do."""


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """{"header", "runs", "rows"} of all files; methods in the order of the table.

    Raises:
        Incompatible: settings, text or base differ, or two files disagree on a run.
        ValueError: a file holds no results.
    """
    found = [(path, results.read(path)) for path in dict.fromkeys(paths)]
    if not found:
        raise ValueError("no file of results is given.")
    first_path, first = found[0]
    for path, other in found[1:]:
        _same_question(first_path, first["header"], path, other["header"])
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    origin: dict[tuple[str, int], Path] = {}
    for path, each in found:
        of_run: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in each["rows"]:
            of_run.setdefault((row["method"], row["seed"]), []).append({name: row[name] for name in COLUMNS})
        for run in each["runs"]:
            key = (run["method"], run["seed"])
            mine = _finite(of_run.pop(key, []))
            if key in runs and mine != rows[key]:
                raise Incompatible(
                    f"{origin[key]} and {path} both hold {key[0]} with seed {key[1]}, and their figures differ: give the "
                    "file that is to count, without the other."
                )
            runs[key], rows[key], origin[key] = run, mine, path
    known = list(methods.BY_NAME)
    order = sorted(runs, key=lambda key: (known.index(key[0]) if key[0] in known else len(known), *key))
    return {
        "header": _header([each for _, each in found]),
        "runs": _finite([runs[key] for key in order]),
        "rows": [row for key in order for row in rows[key]],
    }


def with_earlier(
    path: Path, head: dict[str, Any], rows: list[dict[str, Any]], runs: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(header, rows, runs) with those that `path` holds of runs that have not been made again; as they are if there is no file.

    Raises:
        Incompatible: the file answers another question; nothing is written.
    """
    if not path.exists():
        return head, rows, runs
    earlier = results.read(path)
    _same_question(path, earlier["header"], Path("the new results"), head)
    new = {(run["method"], run["seed"]) for run in runs}
    kept = [run for run in earlier["runs"] if (run["method"], run["seed"]) not in new]
    if not kept:
        return head, rows, runs
    rows = [row for row in earlier["rows"] if (row["method"], row["seed"]) not in new] + rows
    order = list(methods.EVERY)
    runs = sorted([*kept, *runs], key=lambda run: (order.index(run["method"]), run["seed"]))
    rows = sorted(rows, key=lambda row: (order.index(row["method"]), row["seed"]))
    mine = {"header": head, "runs": runs}
    return _header([{"header": earlier["header"], "runs": kept}, mine]), rows, runs


def _same_question(one: Path, a: dict[str, Any], other: Path, b: dict[str, Any]) -> None:
    for name in sorted({*a["settings"], *b["settings"]}):
        first, second = a["settings"].get(name), b["settings"].get(name)
        if first != second and name not in MAY_DIFFER:
            raise Incompatible(
                f"{one} and {other} were made with different settings ({name}: {first} and {second}): their figures cannot "
                "stand in one table. Run the families again with the same settings."
            )
    if a["sources"] != b["sources"] or a.get("data") != b.get("data"):
        raise Incompatible(
            f"{one} and {other} were made from different texts or tasks: carry one prepared folder (prepare.py) to every "
            "machine, and run the families again."
        )
    if a["base"]["sha256"] != b["base"]["sha256"]:
        raise Incompatible(
            f"{one} and {other} start from different bases ({a['base']['sha256'][:8]} and {b['base']['sha256'][:8]}): "
            "pretrain once, carry the folder 'base' of the output folder to every machine, and run the families again."
        )


def _header(all_files: list[dict[str, Any]]) -> dict[str, Any]:
    heads = [each["header"] for each in all_files]
    parts: list[dict[str, Any]] = []
    for each in all_files:
        own = {name: each["header"].get(name) for name in VERSIONS}
        own["methods"] = list(dict.fromkeys(run["method"] for run in each["runs"]))
        parts += [part for part in each["header"].get("parts", [own]) if part not in parts]
    joined = {name: _joined(part[name] for part in parts) for name in VERSIONS}
    settings = dict(heads[0]["settings"])
    for name in ("seeds", "learning_rates"):
        settings[name] = sorted({value for head in heads for value in head["settings"][name]})
    fixed = {name: heads[0].get(name) for name in ("base", "sources", "data")}
    return {**joined, "settings": settings, **fixed, "parts": parts}


def _joined(values: Iterable[Any]) -> Any:
    """The value if there is only one, else all of them as text."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else ", ".join(map(str, different))


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON has not, as null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
