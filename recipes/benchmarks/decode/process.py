"""A process of the decode benchmark, as the one that started it sees it, and how such processes start."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from recipes.benchmarks.decode.plan import Job


class WorkerFailed(Exception):
    """`process` died, hung or reported an error."""

    def __init__(self, process: Process, why: str) -> None:
        super().__init__(why)
        self.process = process


@dataclass
class Process:
    """A job's process as the parent sees it: starting, waiting (for weights), preparing, ready, or done."""

    job: Job
    process: Any
    connection: Connection
    log: Path
    started: float
    state: str = "starting"
    gib: float = 0.0
    todo: list[str] = field(default_factory=list)  # ready and not yet measured
    modes: list[str] = field(default_factory=list)  # ready

    def call(self, name: str, mode: str, timeout: float = 90.0) -> Any:
        """The worker's answer.

        Raises:
            WorkerFailed: it has none.
        """
        try:
            self.connection.send((name, mode))
            if not self.connection.poll(timeout):
                raise WorkerFailed(self, f"no answer to {name} {mode} in {timeout:.0f} s")
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerFailed(self, f"died in {name} {mode}") from error
        if isinstance(answer, tuple) and answer[0] == "failed":
            raise WorkerFailed(self, str(answer[1]))
        return answer


def process_context(device: str) -> Any:
    """How processes start. Forked off one that has imported everything they start sooner, but CUDA does not survive a fork."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "transformers", "torch._inductor.compile_fx"])
    return context
