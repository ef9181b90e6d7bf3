"""Everything that is done with one method: build and compile once, find the learning rate, train and measure each seed.

Each finished run is a file at once, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.quality import base, evaluate, files, methods, routing_statistics
from recipes.quality.methods import Method
from recipes.quality.pool import training_pool
from recipes.quality.settings import Settings
from recipes.quality.train import Trainer, search

VERSION = 1  # raised when a change of the code makes results of before incomparable


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
        out: folder with the sub-folders `base` and `runs`.
        learning_rate: None: search for it.
        deadline: time.time() after which no run is begun.
    """

    settings: Settings
    out: Path
    device: str
    learning_rate: float | None = None
    deadline: float = float("inf")
    compiled: bool = False


class OutOfTime(Exception):
    """The next run would not end before the deadline."""


def data_fingerprint(prepared: Any) -> str:
    """Checksum of everything that the adaptation reads."""
    splits = [prepared.train, prepared.validation, prepared.test]
    arrays = [split[name] for split in splits for name in sorted(split)]
    for name in sorted(prepared.tasks):
        task = prepared.tasks[name]
        arrays += [
            array for rows in (task.train, task.validation, task.test) for array in (rows.tokens, rows.answer_mask, rows.item_ids)
        ]  # fmt: skip
    return files.digest(*arrays)


def wait_for_base(folder: Path, wanted: str) -> dict[str, Any]:
    """Another process makes the base: wait until it is there.

    Raises:
        RuntimeError: the process that started this one has ended.
    """
    parent = os.getppid()
    while True:
        info = files.read_json(folder / "base.json")
        if info is not None and info.get("fingerprint") == wanted:
            if files.digest_of_file(folder / "model.safetensors") == info["sha256"]:
                return info
        if os.getppid() != parent:
            raise RuntimeError("the command that makes the base has ended")
        time.sleep(0.5)


class Worker:
    """One method on one device."""

    def __init__(self, method: Method, prepared: Any, job: Job, wait: bool = False) -> None:
        self.method, self.job, self.settings = method, job, job.settings
        self.runs = job.out / "runs"
        self.parent = os.getppid()
        device = torch.device(job.device)
        vocabulary = len(prepared.tokenizer)
        wanted = base.fingerprint(prepared.general, vocabulary, job.settings)
        folder = job.out / "base"
        info = base.cached(folder, wanted)
        if info is None and not wait:
            raise RuntimeError(f"{folder} holds no base for these texts and settings: run without --worker first.")
        frozen: Any = (
            base.new_model(vocabulary, self.settings)  # its weights come later
            if info is None
            else base.load(folder, vocabulary, self.settings, device)
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        frozen = frozen.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.model = method.build(frozen)
        self.trainable = methods.count(self.model)
        self.pool = training_pool(prepared, device)
        size = (self.settings.validation_rows, self.settings.validation_rows, device)
        self.validation = evaluate.rows_of(
            prepared.validation, {n: t.validation for n, t in prepared.tasks.items()}, *size
        )
        size = (self.settings.test_rows, self.settings.test_task_rows, device)
        tasks = {name: task.test for name, task in prepared.tasks.items()}
        self.test = evaluate.rows_of(prepared.test, tasks, *size)
        size = (self.settings.routing_rows, self.settings.routing_rows, device)
        self.routed = evaluate.rows_of(prepared.test, tasks, *size)
        self.trainer = Trainer(self.model, self.pool, self.settings, device, job.compiled, method.optimizer)
        self.run_seconds = 0.0  # of the longest run so far
        if self.trainable:
            seconds = self.trainer.warm_up()
            self.say(f"{self.trainable:,} trainable parameters, ready after {seconds:.0f} s")
        if info is None:
            info = wait_for_base(folder, wanted)
            fresh = base.load(folder, vocabulary, self.settings, device)
            _copy_base(fresh, frozen)
            del fresh
        self.base_digest = info["sha256"]
        self.vocabulary = vocabulary
        config = getattr(self.model, "peft_config", {}).get("default")
        self.fingerprint = files.digest(
            VERSION,
            self.settings.fingerprint("learning_rates", "seeds", "rows_at_once"),
            data_fingerprint(prepared),
            info["sha256"],
            method.name,
            method.what,
            self.trainable,
            _plain(config.to_dict()) if config is not None else None,
        )
        gc.collect()

    def say(self, text: str) -> None:
        print(f"  {self.method.name}: {text}", flush=True)

    # ---------------------------------------------------------------------------------------------- runs

    def all(self) -> None:
        """Search, then every seed; what has been done already is left alone.

        Raises:
            OutOfTime: the deadline came first; what is finished is saved.
        """
        seeds = self.settings.seeds if self.trainable else self.settings.seeds[:1]
        if all(self.finished(seed) for seed in seeds):
            self.say("finished before")
            return
        rate = self.learning_rate() if self.trainable else 0.0
        for seed in seeds:
            if not self.finished(seed):
                self.one_seed(seed, rate)

    def learning_rate(self) -> float:
        """The given one, or the one with the lowest mean validation loss over domains and tasks, on a seed of its own."""
        if self.job.learning_rate is not None:
            return self.job.learning_rate
        path = self.runs / f"{self.method.name}-tuning.json"
        saved = files.read_json(path) or {}
        known = saved["scores"] if saved.get("fingerprint") == self.fingerprint else {}

        def try_one(rate: float) -> float:
            if repr(rate) not in known:
                self.train(rate, self.settings.tuning_seed)
                loss = evaluate.mean_loss(evaluate.measure(self.model, self.validation, self.settings.rows_at_once))
                known[repr(rate)] = loss
                files.write_json(path, {"fingerprint": self.fingerprint, "scores": known})
                self.say(f"learning rate {rate:g}: validation loss {loss:.4f} ({self.speed()})")
            return known[repr(rate)]

        best, _ = search(self.settings.learning_rates, try_one)
        return best

    def one_seed(self, seed: int, rate: float) -> None:
        """Train, measure on the test split, write the run's file."""
        begun = time.perf_counter()
        training_loss = self.train(rate, seed) if self.trainable else None
        scores = evaluate.measure(self.model, self.test, self.settings.rows_at_once)
        rows = [{"domain_or_task": name, "metric": "loss", "value": score.loss} for name, score in scores.items()]
        rows += [
            {"domain_or_task": name, "metric": "exact_match", "value": score.exact_match}
            for name, score in scores.items()
            if score.exact_match is not None
        ]
        rows.append({"domain_or_task": "all", "metric": "active_rank", "value": methods.active_rank(self.model)})
        rows += routing_statistics.rows(self.model, self.routed, self.settings.rows_at_once, self.vocabulary)
        files.write_json(
            self.run_file(seed),
            {
                "fingerprint": self.fingerprint,
                "base": self.base_digest,
                "method": self.method.name,
                "seed": seed,
                "trainable_params": self.trainable,
                "learning_rate": rate,
                "steps": self.settings.steps if self.trainable else 0,
                "training_loss": training_loss,
                "ms_per_step": round(self.trainer.ms_per_step, 2) if self.trainable else None,
                "seconds": round(time.perf_counter() - begun, 1),
                "rows": rows,
            },
        )
        texts = [score.loss for score in scores.values() if score.exact_match is None]
        matches = [f"{name} {100 * s.exact_match:.0f}" for name, s in scores.items() if s.exact_match is not None]
        speed = f", {self.speed()}" if self.trainable else ""
        self.say(
            f"seed {seed}, learning rate {rate:g}: mean loss of domains {sum(texts) / max(1, len(texts)):.4f}, "
            f"exact match in % {', '.join(matches)}{speed}"
        )

    def train(self, rate: float, seed: int) -> float:
        if os.getppid() != self.parent:
            raise OutOfTime(f"{self.method.name}: the command that started this process has ended")
        now = time.time()
        if now + self.run_seconds > self.job.deadline:
            raise OutOfTime(f"{self.method.name}: no time left for another run of {self.run_seconds:.0f} s")
        loss = self.trainer.run(rate, seed)
        self.run_seconds = max(self.run_seconds, time.time() - now)
        return loss

    def speed(self) -> str:
        return f"{self.trainer.ms_per_step:.1f} ms a step"

    def run_file(self, seed: int) -> Path:
        return self.runs / f"{self.method.name}-{seed}.json"

    def finished(self, seed: int) -> bool:
        run = files.read_json(self.run_file(seed))
        return run is not None and run.get("fingerprint") == self.fingerprint


def _copy_base(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Weights of `source` into `target`, the same backbone with an adapter on it: in place, so that it stays compiled."""
    into = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in target.named_parameters()
        if not parameter.requires_grad
    }
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            into[name].copy_(parameter)


def _plain(value: Any) -> Any:
    """Enums and sets as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple, set)):
        return (
            sorted((_plain(item) for item in value), key=str) if isinstance(value, set) else [_plain(i) for i in value]
        )
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
