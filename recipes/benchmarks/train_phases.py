"""Where the host is in a training step: when forward, backward and optimizer have returned, and how long the GPU goes on then.

    python -m recipes.benchmarks.train_phases                       # a GPU: Llama-3.1-8B's shape; under a minute
    python -m recipes.benchmarks.train_phases --rows floor fused-8x8 --functions 30     # what took the host's time, by cProfile

Rows and modes are those of `train_gpu.py`. Milliseconds, medians: a step whose `wait` is next to nothing waits for the host. Each
row but the floor is measured once more with `torch.autograd.set_multithreading_enabled(False)`: backward then runs in the thread
that called it instead of one of autograd's own, which is also where cProfile sees its functions.

On a machine that others use, a step that waits for the host takes anything from its own time to twice as long. With `--quiet` all
threads run on one processor that nobody else slows down, and a step during which somebody did is taken again
(`quiet_processor.py`); `disturbed` says how many were, and `kept` how many of those count because there were too many.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.benchmarks import train_gpu
from recipes.benchmarks.quiet_processor import QuietProcessor
from recipes.benchmarks.train_gpu import Row

PHASES = ("forward", "backward", "optimizer", "wait", "step")
MOST_DISTURBED = 6  # times as many steps as are wanted


def step_of(target: Any, ids: torch.Tensor, device: str) -> Callable[[], list[float]]:
    """A step of training that returns milliseconds of `PHASES`."""
    trained = [p for p in target.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda") if trained else None

    def step() -> list[float]:
        times = [time.perf_counter()]
        with torch.autocast(device, torch.bfloat16):
            loss = target(input_ids=ids, labels=ids, use_cache=False).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter())
        train_gpu.synchronize(device)
        times.append(time.perf_counter())
        each = [(after - before) * 1e3 for before, after in zip(times, times[1:], strict=False)]
        return [*each, (times[-1] - times[0]) * 1e3]

    return step


def measured(
    step: Callable[[], list[float]], warmup: int, steps: int, processor: QuietProcessor | None = None
) -> dict[str, float]:
    for _ in range(warmup):
        step()
    taken, disturbed = [], []
    while len(taken) < steps:
        quiet = processor is None or processor.seek()
        times = step()
        quiet = processor is None or processor.is_quiet() and quiet
        (taken if quiet else disturbed).append(times)
        if len(disturbed) >= MOST_DISTURBED * steps:
            break
    kept = steps - len(taken)
    taken += sorted(disturbed, key=lambda times: times[-1])[:kept]
    medians = [statistics.median(times) for times in zip(*taken, strict=True)]
    row: dict[str, float] = {phase: round(ms, 1) for phase, ms in zip(PHASES, medians, strict=True)}
    return row if processor is None else {**row, "disturbed": len(disturbed), "kept": kept}


def functions_of(step: Callable[[], list[float]], count: int) -> str:
    """The functions in which two steps spend most of the host's time."""
    profile = cProfile.Profile()
    profile.runcall(lambda: (step(), step()))
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(count)
    return text.getvalue()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["floor", "lora-16", "fused-8x8"])
    parser.add_argument("--modes", nargs="+", choices=("plain", "checkpointing"), default=["plain", "checkpointing"])
    parser.add_argument("--functions", type=int, default=0, help="so many functions of each row but the floor")
    parser.add_argument("--quiet", action="store_true", help="steps on a processor that nobody else slows down")
    parser.add_argument("--output", type=Path, help="left out: printed alone")
    options, rest = parser.parse_known_args(argv)
    args = train_gpu.parse(rest)
    report: dict[str, Any] = {"header": train_gpu.header(args), "rows": []}
    processor = QuietProcessor() if options.quiet else None
    report["header"]["quiet"] = options.quiet
    model = train_gpu.backbone(args, False)
    model.get_input_embeddings().register_forward_hook(train_gpu._ask_for_gradient)
    for mode in options.modes:
        if mode == "plain":
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        samples = max(args.batch // 2, 1) if mode == "plain" else args.batch
        ids = torch.randint(0, args.vocab, (samples, args.length), device=args.device)
        for name in options.rows:
            target, take_off = train_gpu.adapted(model, Row.of(name), args)
            target.train()
            step = step_of(target, ids, args.device)
            row: dict[str, Any] = {"mode": mode, "row": name, **measured(step, args.warmup, args.steps, processor)}
            if name != "floor":
                with torch.autograd.set_multithreading_enabled(False):
                    row["one_thread"] = measured(step, 1, 3, processor)
                    if options.functions:
                        print(functions_of(step, options.functions))
            print(row, flush=True)
            report["rows"].append(row)
            take_off()
            del target, step
            train_gpu.let_go(args.device)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
