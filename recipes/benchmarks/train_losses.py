r"""Whether the fused training path takes the course of the plain form: the losses of both, step by step, from one seed.

    python -m recipes.benchmarks.train_losses          # on a GPU: Llama-3.2-1B's shape, 300 steps; some minutes
    python -m recipes.benchmarks.train_losses --hidden 64 --intermediate 128 --head-dim 16 --layers 2 --length 32 --steps 20

Writes `train_losses.csv` (step, fused, plain, float32) and a picture beside it. Random weights, bf16 autocast, a float32 adapter
of 8 experts of rank 8 on all seven linears, gradient checkpointing, AdamW; the text is Python's standard library, byte by byte.
All runs begin with the same weights and see the same batches; on a GPU they go at once, each in a process. `float32` is the plain
form without autocast, on a float32 backbone of the same weights: how far `plain` lies from it is what bf16's rounding does, and
`fused` should lie no further from `plain`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from peft_loraswitch.training import fast_linears
from recipes import corpora
from recipes.benchmarks import train_gpu
from recipes.checkout import ROOT

RUNS = ("fused", "plain", "float32")


def batches(steps: int, samples: int, length: int) -> torch.Tensor:
    """int64 [steps, samples, length]"""
    needed, text = steps * samples * length, b""
    for document in corpora.standard_library():
        text += document.text.encode()
        if len(text) >= needed:
            break
    repeated = text * (needed // len(text) + 1)
    return torch.frombuffer(bytearray(repeated[:needed]), dtype=torch.uint8).long().view(steps, samples, length)


def losses_of(run: str, args: argparse.Namespace) -> list[float]:
    backbone = train_gpu.backbone(args, False)
    if run == "float32":
        backbone.float()
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backbone.enable_input_require_grads()
    model, _ = train_gpu.adapted(backbone, train_gpu.Row.of("fused-8x8"), args)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    losses = []
    with nullcontext() if run == "fused" else fast_linears.plain():
        for step, ids in enumerate(batches(args.steps, args.batch, args.length).to(args.device)):
            with torch.autocast(args.device, torch.bfloat16, enabled=run != "float32"):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step % 50 == 49:
                print(f"{run}: step {step + 1} of {args.steps}, loss {loss.item():.4f}", flush=True)
    return [loss.item() for loss in losses]


def draw(losses: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    for run, style in zip(RUNS, ("-", "--", ":"), strict=True):
        above.plot(losses[run], style, label=run, linewidth=1.3)
    above.set_ylabel("loss (nats a byte)")
    above.legend()
    for run in ("fused", "float32"):
        below.plot(
            [a - b for a, b in zip(losses[run], losses["plain"], strict=True)], label=f"{run} - plain", linewidth=1
        )
    below.set_xlabel("step")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "results" / "train_losses.csv")
    args = parser.parse_args(argv)
    args.vocab = 256
    return args


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    args = parse(argv)
    if args.device == "cuda":
        with ProcessPoolExecutor(len(RUNS), multiprocessing.get_context("spawn")) as pool:
            losses = dict(zip(RUNS, pool.map(losses_of, RUNS, itertools.repeat(args)), strict=True))
    else:
        losses = {run: losses_of(run, args) for run in RUNS}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", *RUNS))
        writer.writerows(
            [step, *(f"{loss:.5f}" for loss in row)] for step, row in enumerate(zip(*losses.values(), strict=True))
        )
    draw(losses, args.output.with_suffix(".png"))
    for run in RUNS:
        apart = [abs(a - b) for a, b in zip(losses[run], losses["plain"], strict=True)]
        mean = sum(apart) / len(apart)
        print(
            f"{run:8} {losses[run][0]:.4f} -> {losses[run][-1]:.4f}   from plain: {mean:.5f} on average, {max(apart):.5f} at most"
        )
    return losses


if __name__ == "__main__":
    main()
