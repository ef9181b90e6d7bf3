"""All jobs of one device, from the plan to the rows: which processes start, when there is memory, who is measured with whom.

Compiling takes the time, so as many processes as there are processors compile at once; the backbone's weights are in the
GPU's memory once, in a process that shares them. One measurement runs at a time, while all other processes stand still.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from recipes.benchmarks.decode import report, worker
from recipes.benchmarks.decode.device_lock import DeviceLock
from recipes.benchmarks.decode.plan import CONTEXT_GIB, Job, kind_of
from recipes.benchmarks.decode.process import Process, WorkerFailed, process_context

# Samples; 7 of everything else. Eager ones scatter by a third, and that of "fused" has a bar to meet.
ROUNDS = {("fused", "static"): 9, ("fused", "eager"): 21}
PROFILED, PROFILED_JOBS = ("compiled", "static", "eager"), (("fused", 8), ("backbone", 0))
LAST_WORDS = 10.0  # seconds before the limit in which nothing new is prepared, only measured
Key = tuple[str, str]  # the job's name, mode


def is_reference(reference: Job, job: Job) -> bool:
    """Whether `reference` is the backbone that `job` is compared with."""
    return (reference.method, reference.model, reference.backbone) == ("backbone", job.model, job.backbone)


def reference_name(job: Job) -> str:
    return f"{job.model} {job.backbone}"


class Scheduler:
    """All jobs of one device, from the plan to the rows."""

    def __init__(self, jobs: list[Job], args: argparse.Namespace, result: dict[str, Any], folder: Path) -> None:
        self.queue, self.args, self.result, self.folder = list(jobs), args, result, folder
        self.device: str = args.device
        self.context = process_context(self.device)
        self.lock = DeviceLock(folder, self.device)
        self.start = time.monotonic()
        self.deadline = self.start + args.limit - LAST_WORDS
        self.live: list[Process] = []
        self.holders: dict[str, Process] = {}
        self.memory: float | None = args.memory
        self.share = not args.no_sharing
        self.slowness = [1.3]  # measured over estimated time until ready
        self.samples: dict[Key, list[float]] = {}  # of the backbone
        self.planned: list[Key] = [(j.name, mode) for j in jobs for mode in j.modes]
        self.measured: set[Key] = set()
        self.reasons: dict[Key, str] = {}
        self.rows: dict[Key, dict[str, Any]] = {}
        self.ending: list[Process] = []  # killed; taking a CUDA context down is work for the GPU
        self.blocked: Process | None = None  # the first that waits for memory
        self.logs = 0

    # -- the loop

    def run(self) -> None:
        try:
            while (self.queue or self.live) and time.monotonic() < self.deadline:
                self.start_processes()
                self.hand_out_weights()
                self.listen()
                self.measure_what_is_ready()
                self.retire()
            self.deadline += LAST_WORDS - 2
            self.measure_what_is_ready(everything=True)
        finally:
            for process in (*self.live, *self.holders.values()):
                process.process.kill()
            for process in self.live:
                self.say_why(process.job, f"{process.state} when the time was up")
            for job in self.queue:
                self.say_why(job, "not begun")
            self.write()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.start:6.1f} s  {text}", flush=True)

    def say_why(self, job: Job, why: str) -> None:
        for mode in job.modes:
            self.reasons.setdefault((job.name, mode), why)

    def drop(self, process: Process, why: str) -> None:
        """Give a job up."""
        self.say(f"FAILED {process.job}: {why}; the end of {process.log}:")
        if process.log.exists():
            print("    " + process.log.read_text()[-1500:].replace("\n", "\n    "), flush=True)
        self.say_why(process.job, why)
        self.end(process)

    def end(self, process: Process) -> None:
        process.state = "done"
        process.process.kill()
        process.connection.close()
        self.live.remove(process)
        self.ending.append(process)

    # -- starting

    def spawn(self, target: Any, job: Job) -> Process:
        here, there = self.context.Pipe()
        self.logs += 1
        log = self.folder / f"{self.logs:02d}_{job.model}_{job.method}_{job.rank}.log"
        arguments = (job, self.device, there, self.folder, str(log))
        process = self.context.Process(target=target, args=arguments, daemon=True)
        process.start()
        there.close()
        return Process(job, process, here, log, time.monotonic())

    def start_processes(self) -> None:
        busy = sum(process.state in ("starting", "waiting", "preparing") for process in self.live)
        while self.queue and busy < self.args.slots:  # in the order of the plan
            job = self.queue.pop(0)
            left = self.deadline - time.monotonic()
            expected = job.seconds() * statistics.median(self.slowness) if self.device == "cuda" else 0.0
            if expected + 5 > left:
                self.say_why(job, f"not begun: {expected:.0f} s expected, {left:.0f} s left")
                continue
            self.hold(job)
            self.live.append(self.spawn(worker.serve, job))
            busy += 1

    def hold(self, job: Job) -> None:
        """Start the process that keeps the weights of the job's model, if there is none."""
        if self.share and job.method != "ceilings" and job.model not in self.holders:
            self.holders[job.model] = self.spawn(worker.hold_weights, job)

    def used(self) -> float:
        """GiB of device memory that is spoken for."""
        return sum(process.gib for process in (*self.live, *self.holders.values()))

    def hand_out_weights(self) -> None:
        """Let waiting processes build their models, in order, as far as memory goes."""
        self.blocked = None
        for process in [p for p in self.live if p.state == "waiting"]:
            job = process.job
            self.hold(job)
            holder = self.holders.get(job.model) if self.share and job.method != "ceilings" else None
            need = job.gib(shared_weights=holder is not None or job.method == "ceilings")
            weights = job.weights_gib() + CONTEXT_GIB if holder and not holder.gib else 0.0
            alone = need + (holder.gib or weights if holder else 0.0)
            if self.memory is not None and alone > self.memory:
                self.drop(process, f"needs {alone:.1f} GiB of device memory, {self.memory:.1f} can be used")
                continue
            if self.memory is not None and self.used() + need + weights > self.memory:
                self.blocked = process
                return  # who comes first is served first
            if holder is None:
                self.hand_out(process, None, need)
            elif holder.state == "waiting":
                holder.connection.send("load")
                holder.state, holder.gib = "preparing", weights
            elif holder.state == "ready":
                self.hand_out(process, holder, need)

    def hand_out(self, process: Process, holder: Process | None, need: float) -> None:
        """Tell a waiting process to build its model, from the holder's weights or with its own."""
        try:
            process.connection.send(("shared" if holder else "own", None))
            process.gib, process.state = need, "preparing"
            if holder is None:
                return
            try:
                holder.connection.send("send")
                if not holder.connection.poll(60):
                    raise EOFError("no answer")
                process.connection.send_bytes(holder.connection.recv_bytes())
            except EOFError as error:
                self.stop_sharing(f"the process that holds the weights ended: {error}")
                process.connection.send(None)  # its answer will be "unshared"
        except OSError as error:
            self.drop(process, f"its process ended: {error}")

    # -- listening

    def listen(self) -> None:
        sources = {p.connection: p for p in (*self.live, *self.holders.values()) if p.state != "done"}
        for connection in wait(list(sources), timeout=0.1):
            process = sources[connection]  # type: ignore[index]
            if process.state == "done":
                continue
            try:
                message, content = process.connection.recv()
            except (EOFError, OSError):
                message, content = "failed", f"its process ended ({process.process.exitcode})"
            self.heard(process, message, content)

    def heard(self, process: Process, message: str, content: Any) -> None:
        job = process.job
        if process is self.holders.get(job.model):
            if message in ("hello", "loaded"):
                process.state = "waiting" if message == "hello" else "ready"
            else:
                self.stop_sharing(f"the weights of {job.model} could not be held: {content}")
        elif message == "hello":
            if not self.result["header"].get("gpu"):
                self.result["header"].update(content)
                self.say(f"{content}")
            if self.memory is None:
                self.memory = content["memory_gib"] - self.args.reserve
            process.state = "waiting"
        elif message == "unshared":
            process.state, process.gib = "waiting", 0.0  # now for memory for weights of its own
            self.stop_sharing(content)
        elif message == "skipped":
            mode, why = content
            self.say(f"SKIPPED {job.name} {mode}: {why}; see {process.log}")
            self.reasons[(job.name, mode)] = why
        elif message == "ready":
            process.state, process.modes, process.todo = "ready", list(content), list(content)
            took = time.monotonic() - process.started
            self.slowness = [*self.slowness[-5:], min(4.0, max(0.5, took / job.seconds()))]
            self.say(f"ready after {took:.0f} s: {job}")
        else:
            self.drop(process, str(content))

    def stop_sharing(self, why: str) -> None:
        """Every process builds its own weights from now on."""
        if self.share:
            self.say(f"weights are not shared: {why}")
        self.share = False
        users = {p.job.model for p in self.live if p.state in ("preparing", "ready")}
        for model in [model for model in self.holders if model not in users]:
            self.holders.pop(model).process.kill()

    # -- measuring

    def reference(self, job: Job, mode: str) -> Process | None:
        """The live process of the unadapted backbone in this mode."""
        for process in self.live:
            if is_reference(process.job, job) and mode in process.job.modes:
                return process
        return None

    def awaited(self, job: Job, mode: str) -> bool:
        """Whether a reference for this mode is still to come."""
        process = self.reference(job, mode)
        queued = any(is_reference(j, job) and mode in j.modes for j in self.queue)
        return queued or (process is not None and process.state != "ready")

    def measure_what_is_ready(self, everything: bool = False) -> None:
        """`everything`: also what something might still be compared with, or wait for."""
        tasks = [(p, mode) for p in self.live if p.state == "ready" for mode in p.todo]
        if not everything:
            methods = [(p, mode) for p, mode in tasks if p.job.method not in ("backbone", "ceilings")]
            methods = [(p, mode) for p, mode in methods if not self.awaited(p.job, mode)]
            # What keeps the GPU for long comes when nobody waits for the GPU.
            quiet = not any(p.state in ("starting", "waiting") for p in self.live)
            others = [(p, mode) for p, mode in tasks if p.job.method == "ceilings" and quiet]
            others += [(p, mode) for p, mode in tasks if p.job.method == "backbone" and not self.wanted(p, mode)]
            tasks = methods or others
        if tasks:
            self.measure_all(tasks)

    def measure_all(self, tasks: list[tuple[Process, str]]) -> None:
        try:
            if self.lock.exclusive(self.deadline):
                while self.ending:
                    self.ending.pop().process.join(5)
                for process, mode in tasks:
                    if time.monotonic() < self.deadline and process.state == "ready" and mode in process.todo:
                        self.measure(process, mode)
        finally:
            self.lock.release()
        self.write()

    def wanted(self, process: Process, mode: str) -> bool:
        """Whether a job that will be compared with this reference is still to come."""
        jobs = [*self.queue, *(p.job for p in self.live if p.state != "ready" or mode in p.todo)]
        return any(j.method != "backbone" and is_reference(process.job, j) and mode in j.modes for j in jobs)

    def measure(self, process: Process, mode: str) -> None:
        """One mode of one job, its reference's samples in between; everybody else stands still."""
        job = process.job
        process.todo.remove(mode)
        reference = None if job.method == "backbone" else self.reference(job, mode)
        if reference is not None and mode not in reference.modes:
            reference = None
        if reference is not None and mode in reference.todo:
            reference.todo.remove(mode)
        measured = [p for p in (reference, process) if p is not None]
        others = [p for p in (*self.live, *self.holders.values()) if p not in measured]
        for other in others:
            self.signal(other, signal.SIGSTOP)
        try:
            if job.method == "ceilings":
                self.keep_ceiling(mode, process.call("measure", mode))
                self.measured.add((job.name, mode))
                return
            for each in measured:
                each.call("begin", mode)
            times: dict[int, list[float]] = {id(each): [] for each in measured}
            for n in range(ROUNDS.get((job.method, kind_of(mode)), 7)):
                for each in measured if n % 2 else measured[::-1]:
                    times[id(each)].append(each.call("sample", mode))
            for each in measured:
                self.keep_row(each, mode, times[id(each)], times[id(reference)] if reference else None)
            if self.args.profile and kind_of(mode) in PROFILED and (job.method, job.rank) in PROFILED_JOBS:
                for each in measured:
                    name = f"{each.job.name} {mode}"
                    self.result.setdefault("profile", {})[name] = each.call("profile", mode)
        except WorkerFailed as error:
            self.drop(error.process, str(error))
            if error.process is reference:  # once more, against what the reference has measured before
                process.todo.append(mode)
        finally:
            for other in others:
                self.signal(other, signal.SIGCONT)

    def signal(self, process: Process, number: int) -> None:
        if process.process.is_alive():
            os.kill(process.process.pid, number)

    def keep_ceiling(self, mode: str, value: Any) -> None:
        if mode == "copy":
            self.result["copy_tb_per_s"] = value
        else:
            self.result["linears"][mode.partition(":")[2]] = value
        self.say(f"ceilings: {mode} " + (f"{value} TB/s" if mode == "copy" else f"{len(value['rows'])} rows"))

    def keep_row(self, process: Process, mode: str, times: list[float], reference: list[float] | None) -> None:
        job, key = process.job, (process.job.name, mode)
        reference_key = (reference_name(job), mode)
        facts = process.call("finish", mode)
        base = None if reference is None else statistics.median(reference)
        if job.method == "backbone":
            times = self.samples.setdefault(reference_key, []) + times
            self.samples[reference_key] = times
            base = statistics.median(times)
        elif base is None and reference_key in self.samples:  # its process had to go: memory
            base = statistics.median(self.samples[reference_key])
        ms = statistics.median(times)
        self.measured.add(key)
        self.rows[key] = {
            "model": job.model, "layers": job.shape.layers, "method": job.method, "mode": kind_of(mode),
            "batch": facts.pop("batch"), "tokens": facts.pop("tokens"), "rank": job.rank, "experts": job.adapter.experts,
            "top_k": job.adapter.top_k, "shared_experts": job.adapter.shared, "deep_router": job.adapter.deep_router,
            "backbone": job.backbone, "ms": round(ms, 4),
            "ratio": round(ms / base, 4) if base else None, "backbone_ms": round(base, 4) if base else None,
            "gb_per_s": round(facts["read_bytes"] / ms / 1e6, 1), "samples": len(times),
            "spread": round((max(times) - min(times)) / ms, 3), **facts,
        }  # fmt: skip
        if job.method == "backbone":  # who was measured before it, because memory let nobody wait, gets a ratio now
            for (_, other_mode), row in self.rows.items():
                same = (row["model"], row["backbone"], other_mode) == (job.model, job.backbone, mode)
                if same and row["ratio"] is None:
                    row["ratio"], row["backbone_ms"] = round(row["ms"] / ms, 4), round(ms, 4)
        if job.method != "backbone" or reference is None:
            row = self.rows[key]
            self.say(report.line(row) + f"  peak {row['peak_gib']:.2f} GiB, fuse {row['fuse_seconds']} s")
            if row["disturbed"]:
                self.say(
                    f"  {row['disturbed']} of {row['samples']} samples were disturbed: the processors are not ours alone"
                )
            if row["compilations"]:
                self.say(f"  compiled {row['compilations']} times while it was measured")

    # -- ending

    def retire(self) -> None:
        """Let go of processes that nobody needs, and, where memory is short, of references that somebody does."""
        before = self.used()
        for process in [p for p in self.live if p.state == "ready" and not p.todo]:
            if process.job.method != "backbone" or not any(self.wanted(process, mode) for mode in process.modes):
                self.end(process)
        needed = {job.model for job in (*self.queue, *(p.job for p in self.live))}
        for model in [model for model in self.holders if model not in needed]:
            self.holders.pop(model).process.kill()
        if any(p.state in ("starting", "preparing") for p in (*self.live, *self.holders.values())):
            return
        if self.used() == before and self.blocked is not None and self.blocked.state == "waiting":
            self.make_room(self.blocked)

    def make_room(self, waiting: Process) -> None:
        """Nothing moves because there is no memory for `waiting`: let go of what it can do without."""
        idle = [p for p in self.live if p.state == "ready"]
        if idle:  # references that others would have been compared with: from now on with their rows
            process = min(idle, key=lambda p: self.reference(waiting.job, p.modes[0]) is p if p.modes else False)
            if process.todo:
                self.measure_all([(process, mode) for mode in process.todo])
            if process in self.live:
                self.end(process)
            return
        unused = [model for model in self.holders if model != waiting.job.model]
        if unused:
            self.holders.pop(unused[0]).process.kill()  # begun again when a job of its model has its turn
        elif self.memory is not None and self.used() > 0:
            self.drop(waiting, f"no room: {self.used():.1f} of {self.memory:.1f} GiB are taken")

    def write(self) -> None:
        """What there is so far, with what is missing; a reader never sees half a file."""
        header = self.result["header"]
        missing = [key for key in self.planned if key not in self.measured]
        header["missing"] = [
            f"{name} {mode}: {self.reasons.get((name, mode), 'not reached yet')}" for name, mode in missing
        ]
        header["seconds"] = round(time.monotonic() - self.start, 1)
        self.result["rows"] = [self.rows[key] for key in self.planned if key in self.rows]
        report.write(self.result, self.args.output)
