"""First stage: a LoRA for each domain and seed, trained on that domain alone, and what each can do on every domain.

    python -m recipes.compose.experts --base /tmp/compose-base

Learning rates are tuned for each domain (first seed, validation loss of the answers). Everything finished is in --out and is
not done again. At the end <out>/experts.csv has the scores of the base and of each LoRA on its own domain, and
<out>/confusion.csv those of all LoRAs of the first seed on all domains.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.checkout import ROOT
from recipes.compose import domains
from recipes.compose.settings import SIZES, Settings
from recipes.compose.stacked_lora import StackedAdamW, StackedLora
from recipes.compose.text_batches import Example, answer_losses, batch_of, by_length, examples, greedy_answers, right

STARTED = time.perf_counter()
# Gradients lie as the weights do: in one tensor of all weights of a LoRA.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
Splits = dict[str, list[Example]]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


@dataclass
class Bench:
    """The base with its stack of LoRAs, and the domains' items."""

    model: Any
    tokenizer: Any
    stack: StackedLora
    data: dict[str, Splits]
    settings: Settings
    base: str
    out: Path

    @property
    def device(self) -> torch.device:
        return self.stack.device

    def loras(self) -> Path:
        return self.out / "loras"


def open_bench(base: str, data: Path, settings: Settings, out: Path, only: Sequence[str] | None) -> Bench:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    found = domains.load(data)
    splits = {
        name: {split: fitting(examples(tokenizer, items), settings) for split, items in found[name].items()}
        for name in only or found
    }
    bench = Bench(model, tokenizer, StackedLora(model, settings.rank, settings.alpha), splits, settings, base, out)
    for name, each in splits.items():
        lengths = sorted(map(len, each["train"]))
        say(
            f"{name}: train {len(lengths)} of {len(found[name]['train'])}, test {len(each['test'])} of "
            f"{len(found[name]['test'])}; tokens: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        )
    return bench


def fitting(items: list[Example], settings: Settings) -> list[Example]:
    return [item for item in items if len(item) <= settings.longest and len(item.answer) <= settings.longest_answer]


# ----------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Job:
    """One LoRA to train."""

    domain: str
    seed: int
    rate: float


def groups(bench: Bench, jobs: list[Job]) -> list[list[Job]]:
    """Domains of similar lengths together, as many as fit into memory; all jobs of a domain are in one group."""

    def length(domain: str) -> int:
        lengths = sorted(map(len, bench.data[domain]["train"]))
        return lengths[int(0.98 * (len(lengths) - 1))]

    most = bench.settings.tokens_at_once // bench.settings.expert_rows
    found: list[list[Job]] = []
    for name in sorted({job.domain for job in jobs}, key=length):
        mine = [job for job in jobs if job.domain == name]
        if not found or (len(found[-1]) + len(mine)) * length(name) > most:
            found.append([])
        found[-1] += mine
    return found


def train(bench: Bench, jobs: list[Job]) -> torch.Tensor:
    """All these LoRAs at once: [jobs, weights of one]."""
    settings, stack, pad = bench.settings, bench.stack, bench.tokenizer.pad_token_id
    flat = stack.fresh([1000 * job.seed + 7 for job in jobs])
    gradients = stack.use(flat)
    assert gradients is not None
    optimizer = StackedAdamW(flat)
    streams = []
    for job in jobs:
        items = bench.data[job.domain]["train"]
        generator = torch.Generator().manual_seed(job.seed)
        streams.append(by_length(len(items), settings.expert_rows, list(map(len, items)), generator))
    rates = torch.tensor([job.rate for job in jobs], device=bench.device)
    begun, seen = time.perf_counter(), 0
    for step in range(settings.expert_steps):
        chosen = [
            bench.data[job.domain]["train"][index]
            for job, stream in zip(jobs, streams, strict=True)
            for index in next(stream)
        ]
        batch = batch_of(chosen, pad).to(bench.device)
        losses = answer_losses(bench.model, batch)
        owner = batch.rows // settings.expert_rows
        sums = losses.new_zeros(len(jobs)).index_add(0, owner, losses)
        means = sums / torch.bincount(owner, minlength=len(jobs))
        means.sum().backward()
        optimizer.step(gradients, rates * schedule(step, settings.expert_steps))
        stack.refresh(flat, gradients)
        seen += batch.ids.numel()
        if step + 1 in (10, settings.expert_steps // 2, settings.expert_steps):
            mean = means.mean().item()
            seconds = time.perf_counter() - begun
            left = seconds / (step + 1) * (settings.expert_steps - step - 1)
            say(
                f"  {len(jobs)} LoRAs, step {step + 1}: loss {mean:.3f}, {seen / seconds / 1e3:.0f} k tokens a second, "
                f"{left:.0f} s left, {memory()}"
            )
    stack.use(None)
    return flat


def schedule(step: int, steps: int) -> float:
    """Up within the first 5 %, then down to a tenth."""
    return min(1.0, (step + 1) / (0.05 * steps)) * (1 - 0.9 * step / steps)


def memory() -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if torch.cuda.is_available() else "CPU"


# ---------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure(bench: Bench, flat: torch.Tensor | None, sets: list[list[Example]]) -> list[dict[str, float]]:
    """Each LoRA of `flat` on its own set of items (all sets equally long); without LoRAs, the base on each.

    Returns:
        Exact match of greedy answers, and loss of a token of the right answer.
    """
    settings, count = bench.settings, len(sets[0])
    assert all(len(items) == count for items in sets)
    bench.stack.use(flat)
    per_pass = max(1, settings.rows_at_once // len(sets))
    hits, losses, tokens = [[0.0] * len(sets) for _ in range(3)]
    order = [sorted(range(count), key=[len(item) for item in items].__getitem__) for items in sets]
    for begin in range(0, count, per_pass):
        parts = [[items[i] for i in each[begin : begin + per_pass]] for items, each in zip(sets, order, strict=True)]
        rows = [example for part in parts for example in part]
        longest = min(settings.new_tokens, max(len(example.answer) for example in rows))
        made = greedy_answers(bench.model, bench.tokenizer, [example.prompt for example in rows], longest)
        texts = bench.tokenizer.batch_decode(made)
        batch = batch_of(rows, bench.tokenizer.pad_token_id).to(bench.device)
        each_loss = answer_losses(bench.model, batch)
        owner = batch.rows // len(parts[0])
        sums = each_loss.new_zeros(len(sets)).index_add(0, owner, each_loss).tolist()
        counts = torch.bincount(owner, minlength=len(sets)).tolist()
        for index in range(len(sets)):
            losses[index] += sums[index]
            tokens[index] += counts[index]
        for row, (text, example) in enumerate(zip(texts, rows, strict=True)):
            hits[row // len(parts[0])] += right(text, example.text)
    bench.stack.use(None)
    return [{"exact_match": hits[i] / count, "loss": losses[i] / tokens[i]} for i in range(len(sets))]


def held_out(bench: Bench, names: Sequence[str], split: str, count: int) -> list[list[Example]]:
    """The first items of each domain, as many of each as the smallest has."""
    count = min(count, *(len(bench.data[name][split]) for name in names))
    return [bench.data[name][split][:count] for name in names]


# -------------------------------------------------------------------------------------------------------------- steps


def folder_of(bench: Bench, domain: str, seed: int) -> Path:
    return bench.loras() / f"seed{seed}" / domain


def tune(bench: Bench) -> dict[str, float]:
    """The learning rate of each domain. Keeps the first seed's LoRA of that rate."""
    path = bench.out / "rates.json"
    found = read(path)
    settings, seed = bench.settings, bench.settings.seeds[0]
    left = [domain for domain in bench.data if domain not in found]
    jobs = [Job(domain, seed, rate) for domain in left for rate in settings.rates]
    for number, group in enumerate(groups(bench, jobs)):
        say(f"learning rates, group {number + 1}: {', '.join(dict.fromkeys(job.domain for job in group))}")
        flat = train(bench, group)
        scores = measure(
            bench, flat, held_out(bench, [job.domain for job in group], "validation", settings.validation_items)
        )
        for domain in dict.fromkeys(job.domain for job in group):
            mine = [index for index, job in enumerate(group) if job.domain == domain]
            best = min(mine, key=lambda index: scores[index]["loss"])
            found[domain] = {"rate": group[best].rate, "tried": {str(group[i].rate): scores[i] for i in mine}}
            bench.stack.save(flat[best], folder_of(bench, domain, seed), bench.base)
            say(f"  {domain}: {found[domain]}")
        write(path, found)
    return {domain: found[domain]["rate"] for domain in bench.data}


def train_all(bench: Bench, rates: dict[str, float]) -> None:
    jobs = [
        Job(domain, seed, rates[domain])
        for domain in bench.data
        for seed in bench.settings.seeds
        if not (folder_of(bench, domain, seed) / "adapter_model.safetensors").exists()
    ]
    for group in groups(bench, jobs):
        flat = train(bench, group)
        for row, job in zip(flat, group, strict=True):
            bench.stack.save(row, folder_of(bench, job.domain, job.seed), bench.base)


def scores(bench: Bench) -> None:
    """Base and oracle on the test items: experts.csv."""
    names, rows = list(bench.data), []
    sets = held_out(bench, names, "test", bench.settings.test_items)
    for seed in (None, *bench.settings.seeds):
        flat = None if seed is None else bench.stack.load([folder_of(bench, name, seed) for name in names])
        found = measure(bench, flat, sets)
        method = "base" if seed is None else "oracle"
        rows += [
            (method, seed or 0, name, metric, round(value, 5))
            for name, score in zip(names, found, strict=True)
            for metric, value in score.items()
        ]
        mean = sum(score["exact_match"] for score in found) / len(found)
        say(f"{method}, seed {seed}: exact match {mean:.3f}")
        say(
            "  " + ", ".join(f"{n} {s['exact_match']:.3f} ({s['loss']:.3f})" for n, s in zip(names, found, strict=True))
        )
    write_rows(bench.out / "experts.csv", ("method", "seed", "domain", "metric", "value"), rows)


def confusion(bench: Bench) -> None:
    """Every LoRA of the first seed on every domain: confusion.csv."""
    names, rows = list(bench.data), []
    sets = held_out(bench, names, "test", bench.settings.confusion_items)
    flat = bench.stack.load([folder_of(bench, name, bench.settings.seeds[0]) for name in names])
    for name, items in zip(names, sets, strict=True):
        found = measure(bench, flat, [items] * len(names))
        rows += [
            (lora, name, metric, round(v, 5)) for lora, s in zip(names, found, strict=True) for metric, v in s.items()
        ]
        say(f"on {name}: " + ", ".join(f"{lora} {s['exact_match']:.2f}" for lora, s in zip(names, found, strict=True)))
    write_rows(bench.out / "confusion.csv", ("lora", "domain", "metric", "value"), rows)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_rows(path: Path, header: Sequence[str], rows: list[tuple[Any, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the domains' LoRAs, and measure them.")
    parser.add_argument("--base", required=True, help="folder or Hub name of the base model")
    parser.add_argument("--data", type=Path, default=domains.DEFAULT, help="what recipes.compose.domains wrote")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="default: all in --data")
    parser.add_argument("--out", type=Path, help="default: outputs/compose/<size>")
    args = parser.parse_args(argv)
    settings = SIZES[args.size]
    bench = open_bench(
        args.base, args.data, settings, args.out or ROOT / "outputs" / "compose" / args.size, args.domains
    )
    rates = tune(bench)
    train_all(bench, rates)
    scores(bench)
    confusion(bench)
    say("done")


if __name__ == "__main__":
    main()
