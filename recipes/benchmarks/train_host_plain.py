"""The host's share of training without gradient checkpointing, forward and backward apart, on a CPU.

    python -m recipes.benchmarks.train_host_plain                          # some seconds; printed

Like `train_host`, whose model this has, with the stand-ins of `train_host_pairs` for kernels, so that this is the way that a GPU
goes. For a call of a group of linears, over the step with nothing adapted:

- `functions`: all functions called, Python's and C's, as cProfile counts them: a number that other work does not change;
- `ops`: dispatched;
- `launches` of Triton kernels;
- `us`: microseconds, the fastest of all rounds, in one thread.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from recipes.benchmarks.train_host import METHODS, functions_of, header, model_of, parser_of, trained_of
from recipes.benchmarks.train_host_pairs import launches_of, without_a_gpu

PHASES = ("forward", "backward")
GROUPS = 4  # of linears, a layer
Row = dict[str, float]


class AllOps(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is dispatched within it."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def phases_of(model: Any) -> Callable[[Callable[[Callable[[], Any]], Any]], list[Any]]:
    """A step: calls what it is given with forward and with backward, and returns what these calls did."""
    ids = torch.randint(0, 64, (1, 4), generator=torch.Generator().manual_seed(0))
    trained = trained_of(model)

    def step(call: Callable[[Callable[[], Any]], Any]) -> list[Any]:
        found: list[Any] = []

        def forward() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                found.append(model(input_ids=ids, labels=ids, use_cache=False).loss)

        results = [call(forward), call(lambda: found[0].backward())]
        for parameter in trained:
            parameter.grad = None
        return results

    return step


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ops(call: Callable[[], Any]) -> int:
    counts: Counter[str] = Counter()
    with AllOps(counts):
        call()
    return sum(counts.values())


def measure(layers: int, rounds: int) -> dict[str, dict[str, Row]]:
    """From two depths, as `train_host.measure`."""
    depths = (layers, max(layers // 4, 1))
    found: dict[str, dict[Any, list[Any]]] = {}
    with without_a_gpu() as kernels, torch.autograd.set_multithreading_enabled(False):
        steps = {
            (method, depth): phases_of(model_of(method, depth, checkpointing=False))
            for depth in depths
            for method in METHODS
        }
        for step in steps.values():
            for _ in range(4):  # groups are known after the first step, launches after the third
                step(lambda call: call())
        counters: dict[str, Any] = {"functions": functions_of, "ops": ops, "launches": partial(launches_of, kernels)}
        for name, counter in counters.items():
            found[name] = {key: step(counter) for key, step in steps.items()}
        times = {key: [step(seconds)] for key, step in steps.items()}
        for number in range(rounds):
            for key, step in list(steps.items())[:: 1 if number % 2 else -1]:
                times[key].append(step(seconds))
        found["us"] = {key: [min(each) * 1e6 for each in zip(*some, strict=True)] for key, some in times.items()}

    def per_call(values: dict[Any, list[Any]], method: str, phase: int) -> float:
        deep, flat = (values[method, depth][phase] - values["floor", depth][phase] for depth in depths)
        return round(float(deep - flat) / (GROUPS * (depths[0] - depths[1])), 2)

    return {
        method: {
            phase: {name: per_call(values, method, number) for name, values in found.items()}
            for number, phase in enumerate(PHASES)
        }
        for method in METHODS[1:]
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parser_of(__doc__, layers=8, rounds=40).parse_args(argv)
    torch.set_num_threads(1)
    rows = measure(args.layers, args.rounds)
    print(json.dumps(header()))
    print("for each call of a group, over the floor:")
    for method, phases in rows.items():
        for phase, row in phases.items():
            print(
                f"  {method:6s} {phase:9s} {row['functions']:6.1f} functions  {row['ops']:6.1f} ops  "
                f"{row['launches']:5.2f} launches  {row['us']:7.1f} us"
            )
    return rows


if __name__ == "__main__":
    main()
