"""The host's share of training with many experts: by (token, expert) pairs, and with all of them at once, on a CPU.

    python -m recipes.benchmarks.train_host_pairs                          # some seconds; printed

Like `train_host`, whose model this has: E * r is the part of its features that 32 x 16 is of Llama-3.1-8B's, and no cast weights
are kept from a checkpointed block's first run to its second, as there, where they are too large. Kernels are stand-ins that do
nothing, called by `training/triton_launch.py` as compiled ones are (Triton's own part of a launch, and that of the GPU's driver,
is not in here). For a call of a group of linears, over the step with nothing adapted:

- `functions`: all functions called, Python's and C's, as cProfile counts them;
- `launches` of kernels;
- `us`: microseconds; of all experts at once with products on a CPU that a GPU does beside the host, so the rows do not compare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model

from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.training import (
    cast_kernels,
    fast_linears,
    gate_kernels,
    group_layout,
    pair_kernels,
    pair_products,
    triton_launch,
)
from recipes.benchmarks.train import take_turns
from recipes.benchmarks.train_host import CALLS, TARGETS, functions_of, header, model_of, parser_of, step_of

METHODS = ("floor", "contracted", "pairs")


class NoKernel:
    """Compiled by nobody, launched nowhere."""

    pre_run_hooks: tuple[Any, ...] = ()
    function, packed_metadata = 0, ()

    def __init__(self) -> None:
        self.launches = 0
        self._run: Callable[..., None] = self._count

    @property
    def run(self) -> Callable[..., None]:
        return self._run

    def _count(self, *args: Any) -> None:
        self.launches += 1

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> NoKernel:
            self.run(*grid, 0, 0, (), None, None, None, *args, *constants.values())
            return self

        return launch


@contextmanager
def without_a_gpu() -> Iterator[list[NoKernel]]:
    """What would be launched on a GPU is launched with stand-ins, which are yielded."""
    kernels: list[NoKernel] = []
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    stand_ins: list[tuple[Any, dict[str, Any]]] = [
        (triton_launch, {
            "knobs": SimpleNamespace(runtime=runtime), "_device_of": lambda each: 0, "_current_device": lambda: 0,
            "_current_stream": lambda device: 0,
        }),
        (group_layout, {"KEPT_BYTES": 0}),
        (pair_products, {"_by_kernels": lambda each: True}),
        (gate_kernels, {"usable": lambda hidden: hidden.numel() > 0}),
        (fast_linears, {"pays": lambda *_: bool(pair_products._forced)}),
    ]  # fmt: skip
    patches = [mock.patch.multiple(module, **each) for module, each in stand_ins]
    for patch in patches:
        patch.start()
    for module in (pair_kernels, gate_kernels, cast_kernels):
        for name, number in module.TENSORS.items():
            kernels.append(NoKernel())
            launcher = triton_launch.Launcher(kernels[-1], number)
            patches.append(mock.patch.object(module, f"_launch_{name}", launcher, create=True))
            patches[-1].start()
    try:
        yield kernels
    finally:
        for patch in reversed(patches):
            patch.stop()


def launches_of(kernels: list[NoKernel], call: Callable[[], Any]) -> int:
    before = sum(each.launches for each in kernels)
    call()
    return sum(each.launches for each in kernels) - before


def adapted(method: str, layers: int) -> Callable[[], Any]:
    model: Any = model_of("floor", layers)
    if method == "floor":
        return step_of(model)
    config = LoRASwitchConfig(r=4, num_experts=4, top_k=2, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(model, config)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = step_of(model.train())

    def step() -> None:
        with pair_products.forced(method == "pairs"):
            plain()

    return step


def measure(layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """From two depths, as `train_host.measure`."""
    few = max(layers // 4, 1)
    with without_a_gpu() as kernels:
        steps = {(method, depth): adapted(method, depth) for depth in (layers, few) for method in METHODS}
        functions, launches = {}, {}
        for name, step in steps.items():
            for _ in range(4):  # groups are known after the first step, launches after the third
                step()
            launches[name] = launches_of(kernels, step)
            functions[name] = functions_of(step)
        times = take_turns({f"{method} {depth}": step for (method, depth), step in steps.items()}, rounds)
    best = {(method, depth): min(seconds for seconds, _ in times[f"{method} {depth}"]) * 1e6 for method, depth in steps}

    def per_call(values: Any, method: str) -> float:
        deep, flat = (values[method, depth] - values["floor", depth] for depth in (layers, few))
        return round(float(deep - flat) / (CALLS * (layers - few)), 2)

    parts = {"us": best, "functions": functions, "launches": launches}
    return {method: {name: per_call(each, method) for name, each in parts.items()} for method in METHODS[1:]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parser_of(__doc__, layers=8, rounds=25).parse_args(argv)
    torch.set_num_threads(1)
    rows = measure(args.layers, args.rounds)
    print(json.dumps(header()))
    print("for each call of a group, over the floor:")
    for method, row in rows.items():
        print(f"  {method:10s} {row['functions']:6.1f} functions  {row['launches']:5.2f} launches  {row['us']:7.1f} us")
    return rows


if __name__ == "__main__":
    main()
