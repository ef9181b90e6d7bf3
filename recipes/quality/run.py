"""Does one routing decision per token learn as well as one per layer? The measurement, in one command.

    python -m recipes.quality.run                                    # everything, on one GPU after the other family
    python -m recipes.quality.run --family paper                     # one family: under nine minutes on one H200
    python -m recipes.quality.run --family baselines paper routers combined --devices 0 1 2 3
    python -m recipes.quality.run --size smoke --methods lora-r64 moe-lora switch      # a CPU, to see that it runs

It prepares the texts (prepare.py), pretrains the base once and keeps it, and then for each method finds the learning rate,
trains every seed and measures it (worker.py). Finished runs are kept in <out>/runs: the same command again goes on where it
was stopped. At the end <out>/results.csv holds all figures; `report.py` makes tables and pictures of them.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.checkout import module_command, module_environment
from recipes.quality import base, methods, prepare, results
from recipes.quality.merge import with_earlier
from recipes.quality.methods import Method
from recipes.quality.settings import SIZES, Settings
from recipes.quality.worker import Job, OutOfTime, Worker

GIB_PER_WORKER = 18  # of GPU memory, with some to spare
STARTED = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare routed adapters on equal footing: pretrain a base, adapt it with each method, measure.",
    )
    parser.add_argument(
        "--family",
        nargs="+",
        metavar="NAME",
        help=f"families to run: {', '.join((*methods.FAMILIES, *methods.ASIDE_FAMILIES))} "
        "(default: all but the last two)",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="single methods to run (--list names them)")
    parser.add_argument("--list", action="store_true", help="list the methods and stop")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="full: a GPU; smoke: seconds on a CPU")
    parser.add_argument("--out", type=Path, help="folder of base, runs and results (default: outputs/quality/<size>)")
    parser.add_argument("--data", type=Path, help="folder of the prepared texts (default: prepare.py's)")
    parser.add_argument("--devices", nargs="+", type=int, metavar="N", help="GPUs; the methods are spread over them")
    parser.add_argument("--parallel", type=int, metavar="N", help="methods at once on one GPU (default: what fits)")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of each adaptation")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="for every method, instead of the search")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no run that would end after that time")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument(
        "--results", type=Path, help="where the results go besides <out>/results.csv (a .csv file), to those it has"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # used by the command itself
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.seeds is not None and options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.results is not None and options.results.suffix != ".csv":
        parser.error(f"--results {options.results}: must end in .csv (a .json file comes beside it)")
    options.out = options.out or Path("outputs/quality") / options.size
    options.data = options.data or Path("outputs/quality") / (
        "data" if options.size == "full" else f"data-{options.size}"
    )
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    seeds = None if options.seeds is None else tuple(range(options.seeds))
    return SIZES[options.size].with_changes(seeds=seeds, steps=options.steps)


def devices_of(options: argparse.Namespace) -> list[str]:
    """Names of the devices to use.

    Raises:
        ValueError: there is no such GPU, or none at all and the size needs one.
    """
    found = torch.cuda.device_count()
    if not found:
        if options.size == "full":
            raise ValueError(
                "no GPU is visible to torch, and the full size needs one (a CPU would take days). To see that everything "
                "runs: python -m recipes.quality.run --size smoke"
            )
        if options.devices:
            raise ValueError(f"--devices {' '.join(map(str, options.devices))}: no GPU is visible to torch.")
        return ["cpu"]
    wanted = options.devices or [0]
    missing = [index for index in wanted if not 0 <= index < found]
    if missing:
        raise ValueError(f"--devices {missing[0]}: this machine has {found} GPU(s), numbered from 0.")
    return [f"cuda:{index}" for index in wanted]


def in_parallel(options: argparse.Namespace, device: str) -> int:
    """How many methods share a device. 0: this very process does them one by one."""
    if options.parallel is not None:
        return options.parallel
    if device == "cpu":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min((os.cpu_count() or 2) // 2 // len(options.devices or [0]), int(free / 2**30 / GIB_PER_WORKER)))


# --------------------------------------------------------------------------------------------- in this process


def work(method: Method, prepared: Any, options: argparse.Namespace, device: str, wait: bool) -> None:
    """All of one method, here."""
    job = Job(
        settings=settings_of(options),
        out=options.out,
        device=device,
        learning_rate=options.learning_rate,
        deadline=options.deadline,
        compiled=device != "cpu" and not options.no_compile,
    )
    if time.time() > job.deadline:
        return
    try:
        Worker(method, prepared, job, wait).all()
    except OutOfTime as stop:
        say(f"{stop}; what is finished is kept")


def make_base(prepared: Any, options: argparse.Namespace, device: str) -> dict[str, Any]:
    settings, folder = settings_of(options), options.out / "base"
    vocabulary = len(prepared.tokenizer)
    info = base.cached(folder, base.fingerprint(prepared.general, vocabulary, settings))
    if info is not None:
        say(f"base: from {folder} (held-out loss {info['held_out_loss']:.3f})")
        return info
    say(f"base: pretraining on {device}")
    return base.make(folder, prepared.general, prepared.general_held_out, vocabulary, settings, torch.device(device))


# ----------------------------------------------------------------------------------------------- other processes


@dataclass
class Jobs:
    """Processes of this command, at most `slots` of each device at once."""

    options: argparse.Namespace
    failed: list[str] = field(default_factory=list)
    finished: int = 0
    total: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, chosen: Sequence[Method], slots: dict[str, int]) -> None:
        """Run every method, the next one wherever there is room, and return when all are done.

        Args:
            slots: of each device, how many methods it runs at once.
        """
        self.total = len(chosen)
        line: queue.SimpleQueue[Method] = queue.SimpleQueue()
        for method in chosen:
            line.put(method)
        places = [device for turn in range(max(slots.values())) for device in slots if turn < slots[device]]
        threads = [
            threading.Thread(target=self._serve, args=(device, line), daemon=True) for device in places[: len(chosen)]
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(timeout=0.2)
        finally:
            self.stop.set()  # an interrupt, or the base failed: each thread ends its own process
            for thread in threads:
                thread.join(timeout=20)

    def _serve(self, device: str, line: queue.SimpleQueue[Method]) -> None:
        while not self.stop.is_set():
            try:
                method = line.get_nowait()
            except queue.Empty:
                return
            status = self._one(method, device)
            if self.stop.is_set():
                return
            self.finished += 1
            left = self.total - self.finished
            elapsed = time.perf_counter() - STARTED
            if status:
                self.failed.append(method.name)
                say(f"{method.name} FAILED with exit status {status}; the others go on")
            eta = f", about {elapsed / self.finished * left:.0f} s left" if left else ""
            say(f"{self.finished} of {self.total} methods done{eta}")

    def _one(self, method: Method, device: str) -> int:
        environment = module_environment(OMP_NUM_THREADS="2", TOKENIZERS_PARALLELISM="false")
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        command = module_command("recipes.quality.run", *worker_arguments(self.options, method, device))
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None:
            if self.stop.wait(0.2):
                process.terminate()
                process.wait(timeout=20)
        return process.returncode


def worker_arguments(options: argparse.Namespace, method: Method, device: str) -> list[str]:
    words = ["--worker", method.name, "--size", options.size, "--out", str(options.out), "--data", str(options.data)]
    words += ["--deadline", repr(options.deadline)]
    for name in ("seeds", "steps", "learning_rate"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", repr(value)]
    if device.startswith("cuda:"):
        words += ["--devices", device.removeprefix("cuda:")]
    return words + (["--no-compile"] if options.no_compile else [])


# ---------------------------------------------------------------------------------------------------------- main


def main(options: argparse.Namespace) -> int:
    chosen = methods.chosen(options.family, options.methods)
    if options.list:
        for method in methods.EVERY.values():
            print(f"{method.family:<10} {method.name:<16} {method.what}")
        return 0
    devices = devices_of(options)
    if options.worker:
        torch.cuda.set_device(devices[0]) if devices[0] != "cpu" else torch.set_num_threads(1)
        work(methods.chosen(None, [options.worker])[0], prepare.load(options.data), options, devices[0], wait=True)
        return 0
    if options.limit is not None:
        options.deadline = time.time() + options.limit
    say("texts: preparing, or reading what was prepared")
    prepared = prepare.prepare(options.data, options.size)
    slots = {device: in_parallel(options, device) for device in devices}
    say(
        f"{', '.join(m.name for m in chosen)}; at once: {', '.join(f'{n or 1} on {device}' for device, n in slots.items())}"
    )
    failed: list[str] = []
    if all(slots.values()):
        # the methods' processes are built and compiled while the base trains
        jobs = Jobs(options)
        runner = threading.Thread(target=jobs.run, args=(chosen, slots), daemon=True)
        runner.start()
        try:
            info = make_base(prepared, options, devices[0])
            if devices[0] != "cpu":
                torch.cuda.empty_cache()
            while runner.is_alive():
                runner.join(timeout=0.5)
        finally:
            jobs.stop.set()
            runner.join(timeout=60)
        failed = jobs.failed
    else:
        info = make_base(prepared, options, devices[0])
        for method in chosen:
            work(method, prepared, options, devices[0], wait=False)
    rows, runs = results.of_runs(options.out / "runs", info["sha256"])
    head = results.header(settings_of(options), info, getattr(prepared, "sources", None))
    head["data"] = results.data_sizes(prepared, settings_of(options))
    results.write(options.out / "results.csv", head, rows, runs)
    if options.results is not None:
        results.write(options.results, *with_earlier(options.results, head, rows, runs))
    say(f"{len(runs)} runs, {len(rows)} rows: {options.results or options.out / 'results.csv'}")
    if failed:
        print(f"failed: {', '.join(failed)} (their messages are above)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse()))
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("QUALITY_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: finished runs are kept, the same command goes on from there")
