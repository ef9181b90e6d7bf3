"""Stands in for recipes/benchmarks/decode/worker.py: the same messages, no model. What a process does is in its job's rank."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# ranks that misbehave
FAILS, DIES_WHILE_MEASURED, SKIPS, NEVER_READY, CANNOT_SHARE, TICKS, HEARS_TICKS, DIES_LATER = range(91, 99)
HELLO = {"gpu": "fake", "memory_gib": 100.0, "torch": "2", "transformers": "5", "peft": "0", "kernels": "no"}
MS = {"backbone": 2.0, "fused": 3.0, "merge": 8.0, "lora": 4.0}


def hold_weights(job: Any, device: str, connection: Connection, locks: Path, log: str) -> None:
    connection.send(("hello", None))
    connection.recv()
    connection.send(("loaded", None))
    while True:
        connection.recv()
        connection.send({"weight": job.model})


def tick(path: Path, until: Path) -> None:
    """Shows that this process runs: a file that grows, until there is another file."""
    with open(path, "a") as file:
        while not until.exists():
            file.write(".")
            file.flush()
            time.sleep(0.005)


def serve(job: Any, device: str, connection: Connection, locks: Path, log: str) -> None:
    Path(log).write_text(f"the log of {job}\n")
    connection.send(("hello", HELLO))
    command = connection.recv()[0]
    if command == "shared":
        assert connection.recv() == {"weight": job.model}
        if job.rank == CANNOT_SHARE:
            connection.send(("unshared", "RuntimeError: invalid device ordinal"))
            assert connection.recv() == ("own", None)
    with open(locks / "built", "a") as file:
        file.write(f"{job.method} {job.rank} {command}\n")
    if job.rank == FAILS:
        connection.send(("failed", "OutOfMemoryError: too much"))
        return
    if job.rank in (NEVER_READY, TICKS):
        tick(locks / "ticks", until=locks / ("ticked" if job.rank == TICKS else "never"))
    while job.rank == HEARS_TICKS and not (locks / "ticks").exists():
        time.sleep(0.01)
    modes = list(job.modes)
    if job.rank == SKIPS:
        connection.send(("skipped", (modes.pop(0), "Unsupported: a graph break")))
    connection.send(("ready", modes))
    while True:
        name, mode = connection.recv()
        connection.send(answer(job, name, mode, locks))


def answer(job: Any, name: str, mode: str, locks: Path) -> Any:
    if name == "measure":
        return 4.0 if mode == "copy" else {"rows": []}
    if name == "finish":
        (locks / "ticked").touch()
        return {
            "batch": int(mode.partition(":")[2] or 1), "tokens": 1, "read_bytes": 10**9, "adapted_bytes": 10**9,
            "adapter_gib": 1.0, "peak_gib": 10.0, "fuse_seconds": 0.5, "compilations": 0, "disturbed": 0,
        }  # fmt: skip
    if name == "sample":
        if job.rank == DIES_WHILE_MEASURED:
            os._exit(3)
        if (
            job.rank == DIES_LATER
            and (locks / "samples").exists()
            and len((locks / "samples").read_text().split()) >= 20
        ):
            os._exit(3)
        with open(locks / "samples", "a") as file:
            file.write(f"{job.method}\n")
        if job.rank == HEARS_TICKS:  # another process runs all the time, but not now
            before = (locks / "ticks").stat().st_size
            time.sleep(0.1)
            with open(locks / "heard", "a") as file:
                file.write(f"{(locks / 'ticks').stat().st_size - before}\n")
        return MS[job.method]
    assert name == "begin" and threading.active_count() == 1
    return None
