"""The measurement: what routing over LoRAs that come separately is worth, beside everything that could take its place.

    python -m recipes.compose --base /tmp/compose-base --gpus 2 --limit 540
    python -m recipes.compose --base /tmp/compose-base --gpus 2 --limit 540 --resume    # what the limit has left out
    python -m recipes.compose --smoke          # CPU, about a minute: every part, with a tiny random model

Rows go to <results>/compose.csv (`method, kind, seed, domain, metric, value, trainable_params`), all else to compose.json,
what the limit leaves out included.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.checkout import ROOT, module_command, module_environment, versions
from recipes.compose import domains
from recipes.compose.lab import BEGUN, COLUMNS, notes, read_items, resume, say
from recipes.compose.settings import SIZES

COST = "cost"  # what --only calls the times
COST_SECONDS = 75.0  # left at the end for the times, which are taken alone
SECONDS = "seconds"  # file in the work folder: how long the run took, with those that it went on with
KEEP_SECONDS = 30.0  # between two writings of the results so far


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    out: Path = args.out or ROOT / "outputs" / "compose" / ("smoke" if args.smoke else "run")
    if args.worker:
        _worker(args, out)
        return
    size = "smoke" if args.smoke else "full"
    _check_tasks(args.only or [], size)
    if args.add is not None:  # before anything is deleted or measured
        earlier_of(args.add, header(out, args, size))
    if args.resume:
        resume(out)
    else:
        for folder in ("claims", "done", "failed", "rows", "notes", "loras", "one_lora", "routers", "random", "xlora"):
            shutil.rmtree(out / folder, ignore_errors=True)
        for name in ("items.pickle", SECONDS):
            (out / name).unlink(missing_ok=True)
    (out / "alone").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        from recipes.compose.smoke import make

        args.base, args.data = make(out)
    results = args.results or (out if args.smoke else ROOT / "recipes" / "results")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        if args.processes:
            processes = [_start(args, out, size, number) for number in range(args.gpus * args.processes)]
            if _takes_times(args):
                processes.append(_start(args, out, size, None))
        _write_items(args, out, size)
        if processes:
            workers = processes[: args.gpus * args.processes]
            _wait(workers, _tasks_limit(args), lambda: collect(out, results, args, size))
            (out / "alone").touch()
            _wait(processes, args.limit, lambda: None)
        else:
            _work_here(args, out, size)
    finally:
        _stop(processes)
        collect(out, results, args, size)
        (out / SECONDS).write_text(f"{_seconds(out):.1f}")


def _takes_times(args: argparse.Namespace) -> bool:
    return args.only is None or COST in args.only


def _tasks_limit(args: argparse.Namespace) -> float:
    """Seconds after which no task begins any more."""
    return float(args.limit - (COST_SECONDS if _takes_times(args) else 0.0))


def _seconds(out: Path) -> float:
    """Of this run and of those that it goes on with."""
    earlier = out / SECONDS
    return time.time() - BEGUN + (float(earlier.read_text()) if earlier.exists() else 0.0)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure routing over LoRAs that come separately.")
    parser.add_argument("--base", help="folder of the base model (recipes.compose.base_model) or Hub name")
    parser.add_argument("--data", type=Path, default=domains.DEFAULT, help="what recipes.compose.domains wrote")
    parser.add_argument(
        "--out", type=Path, help="work folder, begun anew but for --resume (default: outputs/compose/run)"
    )
    parser.add_argument(
        "--results", type=Path, help="folder of compose.csv and compose.json (default: recipes/results)"
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--processes", type=int, help="on each GPU (default: 6; 0: this one alone, as with --smoke)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the work folder, after its limit or with other tasks",
    )
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing begins any more")
    parser.add_argument("--commit", help="of the clone, where git is not at hand")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and made-up items, on a CPU")
    parser.add_argument(
        "--only", nargs="+", metavar="TASK", help=f"only these tasks (recipes.compose.tasks); {COST}: the times"
    )
    parser.add_argument(
        "--add",
        type=Path,
        metavar="FOLDER",
        help="keep rows of the compose.csv there that this run does not measure again",
    )
    parser.add_argument("--size", choices=list(SIZES), default="full", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.base is None and not args.smoke:
        parser.error("--base is missing (or --smoke)")
    if args.add is not None and not (args.add / "compose.csv").exists():
        parser.error(f"--add {args.add}: there is no compose.csv in it")
    if args.base is not None and not Path(args.base).exists() and args.base.startswith((".", "/")):
        parser.error(f"--base {args.base}: there is no such folder (python -m recipes.compose.base_model makes it)")
    if args.resume and args.smoke:
        parser.error("--smoke makes its model anew: it cannot --resume")
    if args.processes is None:
        args.processes = 0 if args.smoke else 6
    return args


def _check_tasks(only: list[str], size: str) -> None:
    from recipes.compose.tasks import all_tasks

    known = [task.name for task in all_tasks(SIZES[size])]
    unknown = [name for name in only if name not in (*known, COST)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*known, COST], n=5, cutoff=0.4)
        raise SystemExit(f"--only: there is no task {', '.join(unknown)}; similar: {', '.join(near) or 'none'}.")


# ---------------------------------------------------------------------------------------------------------- processes


def _command(args: argparse.Namespace, out: Path, size: str, worker: str, limit: float) -> list[str]:
    only = ["--only", *args.only] if args.only else []
    return module_command(
        "recipes.compose", "--base", str(args.base), "--out", str(out), "--worker", worker, "--size", size,
        "--limit", str(limit), *only,
    )  # fmt: skip


def _environment(gpu: int) -> dict[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    device = visible[gpu] if gpu < len(visible) and visible[gpu] else str(gpu)
    return module_environment(
        CUDA_VISIBLE_DEVICES=device, OMP_NUM_THREADS="2", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    )  # fmt: skip


def _start(args: argparse.Namespace, out: Path, size: str, number: int | None) -> subprocess.Popen[bytes]:
    """number: of a process that takes up tasks; None: the one that takes times when the others have ended."""
    gpu = 0 if number is None else number % args.gpus
    name = "cost" if number is None else f"gpu{gpu}-{number // args.gpus}"
    return subprocess.Popen(
        _command(args, out, size, name, _tasks_limit(args)), env=_environment(gpu), start_new_session=True
    )


def _wait(processes: list[subprocess.Popen[bytes]], limit: float, keep: Callable[[], None]) -> None:
    """Until all have ended, or until `limit` seconds after the run has begun, when they are ended. `keep` runs now and then."""
    kept = time.time()
    while any(process.poll() is None for process in processes):
        if time.time() - kept > KEEP_SECONDS:
            keep()
            kept = time.time()
        if time.time() - BEGUN > limit:
            say("the limit is reached: what still runs is ended")
            _stop(processes)
            return
        time.sleep(0.3)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _worker(args: argparse.Namespace, out: Path) -> None:
    from recipes.compose.cost import cost
    from recipes.compose.work import open_lab, work

    lab = open_lab(args.base, args.size, out, args.worker)
    say(f"{args.worker}: ready")
    if args.worker == "cost":
        while not (out / "alone").exists():  # until all others have ended
            time.sleep(0.1)
        cost(lab, args.limit + COST_SECONDS)
    else:
        work(lab, args.limit, args.only)


def _work_here(args: argparse.Namespace, out: Path, size: str) -> None:
    from recipes.compose.cost import cost
    from recipes.compose.work import open_lab, work

    lab = open_lab(str(args.base), size, out, "here")
    work(lab, args.limit, args.only)
    if _takes_times(args):
        cost(lab, args.limit)


def _write_items(args: argparse.Namespace, out: Path, size: str) -> None:
    path = out / "items.part"
    path.write_bytes(pickle.dumps(read_items(str(args.base), args.data, SIZES[size])))
    path.rename(out / "items.pickle")
    say("items are tokenized")


# ------------------------------------------------------------------------------------------------------------ results


def collect(out: Path, results: Path, args: argparse.Namespace, size: str) -> None:
    """compose.csv and compose.json of what there is by now."""
    rows = []
    for path in sorted(out.glob("rows/*.csv")):
        with path.open(newline="") as file:
            rows += [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
    head = header(out, args, size)
    if args.add is not None:
        rows, head = added(args.add, rows, head)
    if not any(row[1] == "cost" for row in rows):
        head["not_measured"] = [
            *head["not_measured"],
            "Times of a decode step and a prefill: the run's limit came first.",
        ]
    rows.sort(key=lambda row: (row[1], row[0], int(row[2])))
    results.mkdir(parents=True, exist_ok=True)
    with (results / "compose.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    (results / "compose.json").write_text(json.dumps(head, indent=1) + "\n")
    say(f"{len(rows)} rows in {results / 'compose.csv'}")


def earlier_of(folder: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The header in that folder, of a run whose rows may stand beside those of `head`'s."""
    earlier: dict[str, Any] = json.loads((folder / "compose.json").read_text())
    for key in ("settings", "base"):
        if earlier[key] != json.loads(
            json.dumps(head[key])
        ):  # what JSON has no word for, such as tuples, as it reads them
            raise SystemExit(f"--add {folder}: of other {key}; rows of both cannot stand in one table.")
    return earlier


def added(folder: Path, rows: list[list[str]], head: dict[str, Any]) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows and header of this run, with those of an earlier one that this run has not measured again."""
    earlier = earlier_of(folder, head)
    with (folder / "compose.csv").open(newline="") as file:
        earlier_rows = list(csv.reader(file))[1:]
    # One by one: several tasks measure the same method, and not all of them need be in this run.
    measured = {tuple(row[:5]) for row in rows}
    rows = rows + [row for row in earlier_rows if tuple(row[:5]) not in measured]
    this = {key: head[key] for key in ("date", "commit", "hardware", "command", "seconds")}
    return rows, {
        **head,
        **{key: {**earlier.get(key, {}), **head.get(key, {})} for key in ("tuned", "tasks")},
        "left_out": [name for name in head["left_out"] if name in earlier["left_out"]],
        "runs": [*earlier.get("runs", [{key: earlier[key] for key in this}]), this],
    }


def header(out: Path, args: argparse.Namespace, size: str) -> dict[str, Any]:
    from recipes.compose.tasks import all_tasks

    found: dict[str, dict[str, Any]] = {}
    for note in notes(out):
        for key, value in note.items():
            found.setdefault(key, {}).update(value)
    made = versions("torch", "transformers", "peft")
    if args.commit:
        made["commit"] = args.commit
    names = [task.name for task in all_tasks(SIZES[size])]
    return {
        **made,
        "hardware": _hardware(args.gpus),
        "command": " ".join(["python -m recipes.compose", *(sys.argv[1:] if not args.smoke else ["--smoke"])]),
        "seconds": round(_seconds(out), 1),
        "base": "google/gemma-3-270m, dequantized from Q4_K_M" if size == "full" else "a tiny random model",
        "settings": asdict(SIZES[size]),
        "domains": [*domains.EIGHT, domains.NINTH],
        "left_out": [name for name in names if not (out / "done" / name).exists()],
        "failed": {path.name: path.read_text() for path in sorted(out.glob("failed/*"))},
        "not_measured": NOT_MEASURED,
        "tasks": found.pop("seconds", {}),
        **found,
    }


NOT_MEASURED = [
    "A deeper router_module in the adapter itself: from_loras refuses it for LoRAs that adapt the blocks below it. "
    "deep_previous and "
    "deep_per_prompt are computed from the base's hidden states, with given routes.",
]


def _hardware(gpus: int) -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU, {platform.machine()}"
    return f"{gpus} x {torch.cuda.get_device_name(0)}"


if __name__ == "__main__":
    main()
