"""What every part of the measurement works with: the base, the domains' items, the LoRAs on disk, and where rows go."""

from __future__ import annotations

import copy
import csv
import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from recipes.compose import domains
from recipes.compose.base_model import check_tokenizer
from recipes.compose.scoring import Scores, Sets, losses, mean, score
from recipes.compose.settings import Settings
from recipes.compose.stacked_lora import StackedLora
from recipes.compose.text_batches import Example, examples

COLUMNS = ("method", "kind", "seed", "domain", "metric", "value", "trainable_params")
Splits = dict[str, Sets]  # domain -> split -> items


@dataclass
class Lab:
    """One process's means. `plain` is never changed: whoever adapts a model takes a copy."""

    settings: Settings
    base: str
    out: Path
    data: Splits
    tokenizer: Any
    plain: Any
    worker: str
    task: str = "none"  # that is being run: its rows have a file of their own

    @property
    def device(self) -> torch.device:
        found: torch.device = self.plain.get_output_embeddings().weight.device
        return found

    def model(self) -> Any:
        return copy.deepcopy(self.plain)

    def stack(self, rank: int | None = None) -> StackedLora:
        """A fresh copy of the base for a stack of LoRAs of this rank (None: that of the experts), scaled alike."""
        settings = self.settings
        rank = rank or settings.rank
        return StackedLora(self.model(), rank, settings.alpha * rank / settings.rank)

    def sets(self, split: str, count: int, names: Sequence[str] = domains.EIGHT) -> Sets:
        return {name: self.data[name][split][:count] for name in names}

    def test(self, names: Sequence[str] = domains.EIGHT) -> Sets:
        return self.sets("test", self.settings.test_items, names)

    def mixed_batches(self, seed: int, names: Sequence[str] = domains.EIGHT) -> list[list[Example]]:
        """What routers, coefficients and new LoRAs are trained on."""
        settings = self.settings
        return balanced_batches(self.sets("mixed", 10**9, names), settings.mixed_rows, settings.mixed_steps, seed)

    # ------------------------------------------------------------------------------------------------- LoRAs on disk

    def lora(self, domain: str, seed: int) -> Path:
        return self.out / "loras" / f"seed{seed}" / domain

    def loras(self, seed: int, names: Sequence[str] = domains.EIGHT) -> list[str]:
        return [str(self.lora(name, seed)) for name in names]

    def flat(self, stack: StackedLora, seed: int, names: Sequence[str] = domains.EIGHT) -> torch.Tensor:
        return stack.load([self.lora(name, seed) for name in names])

    # ---------------------------------------------------------------------------------------------------- measuring

    def tuned(self, candidates: Sequence[Any], use: Callable[[Any], tuple[Any, Any]], name: str, seed: int) -> Any:
        """The candidate with the lowest mean loss over the domains' validation splits.

        Args:
            use: takes a candidate up, and returns the model to measure, and its given routes or None.
            name: under which the header has what was found.
        """
        found = []
        for candidate in candidates:
            model, routes = use(candidate)
            sets = self.sets("validation", self.settings.tuning_items)
            found.append(sum(losses(model, self.tokenizer, sets, routes).values()) / len(sets))
        best = min(range(len(found)), key=found.__getitem__)
        self.note("tuned", {name: {"seed": seed, "losses": [round(v, 5) for v in found], "best": best}})
        return candidates[best]

    def chosen(self, name: str) -> int | None:
        """The index that `tuned` found on the first seed, or None if it has not yet."""
        for note in notes(self.out):
            found = note.get("tuned", {}).get(name)
            if found is not None:
                return int(found["best"])
        return None

    def label_rate(self) -> float:
        """For training on labels where it is not tuned by itself: what the router of `router_decay=0.98` has, or the middle."""
        best = self.chosen("labels_decay_0.98")
        rates = self.settings.label_rates
        return rates[len(rates) // 2 if best is None else best]

    def measure(
        self, method: str, kind: str, seed: int, model: Any, parameters: int = 0, routes: Any = None,
        sets: Sets | None = None,
    ) -> Scores:  # fmt: skip
        scores = score(model, self.tokenizer, sets or self.test(), self.settings, routes)
        self.rows(method, kind, seed, scores, parameters)
        found = f"exact match {mean(scores, 'exact_match'):.3f}, loss {mean(scores, 'loss'):.3f}"
        say(f"{self.worker}: {method}, seed {seed}: {found}")
        return scores

    # ------------------------------------------------------------------------------------------------------- writing

    def rows(self, method: str, kind: str, seed: int, scores: Scores, parameters: int = 0) -> None:
        """Append rows to the task's file, at once."""
        path = rows_of(self.out, self.task)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            for domain, metrics in scores.items():
                for metric, value in metrics.items():
                    writer.writerow((method, kind, seed, domain, metric, f"{value:.5g}", parameters))

    def note(self, key: str, value: Any) -> None:
        """Something for the header of the results."""
        path = self.out / "notes" / f"{self.worker}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({key: value}) + "\n")


def rows_of(out: Path, task: str) -> Path:
    return out / "rows" / f"{task}.csv"


def resume(out: Path) -> None:
    """What has been done stays done. What was being done when the run ended, or has failed, is to be done again."""
    done = {path.name for path in out.glob("done/*")}
    for folder in ("claims", "failed", "rows"):
        for path in out.glob(f"{folder}/*"):
            if path.name.removesuffix(".csv") not in done:
                path.unlink()


def notes(out: Path) -> Iterator[dict[str, Any]]:
    """What all processes have noted so far. A line that is being written is left out."""
    for path in sorted(out.glob("notes/*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def balanced_batches(sets: Sets, rows: int, steps: int, seed: int) -> list[list[Example]]:
    """Training batches with equally many items of each domain (as nearly as `rows` allows), shortest first, so that they can be
    cut into pieces of similar length. Whoever asks with the same arguments gets the same."""
    generator = torch.Generator().manual_seed(seed)
    streams = [_endless(items, generator) for items in sets.values()]
    turn = itertools.cycle(streams)
    return [sorted((next(next(turn)) for _ in range(rows)), key=len) for _ in range(steps)]


def _endless(items: list[Example], generator: torch.Generator) -> Iterator[Example]:
    """Epoch after epoch, each in an order of its own."""
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index]


def say(text: str) -> None:
    print(f"[{time.time() - BEGUN:5.0f} s] {text}", flush=True)


# Of the whole run: processes that it starts inherit it.
BEGUN = float(os.environ.setdefault("COMPOSE_BEGUN", repr(time.time())))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_items(base: str, data: Path, settings: Settings) -> Splits:
    """Token ids of the items of all nine domains; those that are too long are left out of every split."""
    tokenizer = open_tokenizer(base)
    found = domains.load(data)
    missing = [name for name in (*domains.EIGHT, domains.NINTH) if name not in found]
    if missing:
        raise ValueError(f"{data} has no {', '.join(missing)}: make it anew with python -m recipes.compose.domains.")

    def fitting(items: list[dict[str, str]]) -> list[Example]:
        made = examples(tokenizer, items)
        return [e for e in made if len(e) <= settings.longest and len(e.answer) <= settings.longest_answer]

    return {
        name: {split: fitting(items) for split, items in found[name].items()}
        for name in (*domains.EIGHT, domains.NINTH)
    }


def open_tokenizer(base: str) -> Any:
    # By its own file, whatever class Transformers would choose for the model: versions differ in what they make of the class.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    check_tokenizer(tokenizer)
    return tokenizer


def open_model(base: str) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).to(device).eval()
