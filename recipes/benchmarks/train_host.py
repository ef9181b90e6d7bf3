r"""The host's share of the fused training path: microseconds of Python a group call, on a CPU with tiny tensors.

    python -m recipes.benchmarks.train_host                                # some seconds; printed
    python -m recipes.benchmarks.train_host --output recipes/results/train_host_cpu.json

A training step (bf16 autocast, float32 adapter on a bf16 backbone, gradient checkpointing) of a Llama whose linears have next to
no work; E * r is the part of their features that 8 x 8 is of Llama-3.1-8B's. A decoder layer has four groups of linears (q k v,
o, gate up, down), each called three times a step: forward, its second run, backward. All rows are differences from the same step
with nothing adapted ("floor"), for one such call:

- `lora`: PEFT's LoRA on the same linears;
- `fused`: LoRA-Switch, with `calls` torch functions called from Python and `ops` dispatched (those of its autograd function;
  `gate_ops` of them in place of what is one launch on a GPU with Triton);
- `torch`: what these torch functions take when they are called again by themselves, less those of the floor's linears;
- `functions`: all functions called, Python's and C's, as cProfile counts them, in `fused` and `lora`: a number that other work on
  the machine does not change;
- `beyond`: the rest, fused less torch: looking up, autograd, checkpointing's hooks.

The contestants take turns, and of each the fastest round counts: other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import LlamaConfig, LlamaForCausalLM

from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.training import fast_linears, group_function
from recipes.benchmarks.train import take_turns
from recipes.checkout import processor, versions

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUP = tuple(f"peft_loraswitch.training.{name}" for name in ("group_function", "group_layout", "gate_hidden"))
METHODS = ("floor", "lora", "fused")
CALLS = 3 * 4  # of groups, a layer and step


def model_of(method: str, layers: int, checkpointing: bool = True) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    elif method == "fused":
        adapter = LoRASwitchConfig(r=1, num_experts=2, top_k=1, target_modules=TARGETS, init_weights=False)
        model = get_peft_model(model, adapter)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def trained_of(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step_of(model: Any) -> Callable[[], Any]:
    ids = torch.randint(0, 64, (1, 4), generator=torch.Generator().manual_seed(0))
    trained = trained_of(model)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for parameter in trained:
            parameter.grad = None

    return step


def _alone(value: Any) -> Any:
    """Tensors without their graph."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _caller() -> str:
    """The module of `GROUP` that has called the function that a mode sees, or ""."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals["__name__"].startswith("torch."):
        frame = frame.f_back
    name = "" if frame is None else frame.f_globals["__name__"]
    return name if name in GROUP else ""


class Functions(TorchFunctionMode):
    """Notes the torch functions that the groups' code calls within it, with their arguments."""

    def __init__(self, calls: list[tuple[Any, Any, Any]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = len(self.calls)
        result = func(*args, **kwargs)
        # x.shape and the like do not count, and a mode within this one may have noted it
        if len(self.calls) == before and _caller() and getattr(func, "__name__", "") != "__get__":
            self.calls.append((func, *tree_map(_alone, (args, kwargs))))
        return result

    def of_step(self, step: Callable[[], Any]) -> None:
        """Run a step; also noted is what the autograd engine calls, which leaves such modes behind."""
        run, backward = fast_linears.run, group_function._Group.backward

        def within(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                with Functions(self.calls):
                    return function(*args)

            return call

        fast_linears.run = within(run)
        group_function._Group.backward = staticmethod(within(backward))  # type: ignore[method-assign]
        try:
            step()
        finally:
            fast_linears.run = run
            group_function._Group.backward = staticmethod(backward)  # type: ignore[method-assign]


class Ops(TorchDispatchMode):
    """Counts what the groups' code has dispatched within it; `of_gates`: of these, what stands for one launch on a GPU."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts, self.of_gates = counts, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = _caller()
        if caller:
            self.counts[str(func)] += 1
            self.of_gates += caller.endswith(".gate_hidden")
        return func(*args, **(kwargs or {}))


def functions_of(step: Callable[[], Any]) -> int:
    profile = cProfile.Profile()
    profile.runcall(step)
    profile.create_stats()
    return sum(entry[1] for entry in profile.stats.values())  # type: ignore[attr-defined]


def replay(calls: list[tuple[Any, Any, Any]]) -> Callable[[], None]:
    def again() -> None:
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    return again


def linears_of_floor(model: Any) -> list[tuple[Any, Any, Any]]:
    """What the floor's linears call: each forward, its second run but for the last of a block, and the gradient of the input."""
    calls: list[tuple[Any, Any, Any]] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            x, d = torch.randn(1, 4, module.in_features), torch.randn(4, module.out_features)
            forward = (F.linear, (x.bfloat16(), module.weight), {})
            calls += [forward] * (1 if name.endswith("down_proj") else 2)
            calls.append((torch.mm, (d.bfloat16(), module.weight), {}))
    return calls


def measure(layers: int, rounds: int) -> dict[str, Any]:
    """From two depths, `layers` and a quarter of it, so that what a step does once (routing, the router's losses) is left out."""
    few = max(layers // 4, 1)
    contestants: dict[str, Callable[[], Any]] = {}
    calls: list[tuple[Any, Any, Any]] = []
    counts: Counter[str] = Counter()
    for depth in (layers, few):
        models = {method: model_of(method, depth) for method in METHODS}
        contestants |= {f"{method} {depth}": step_of(model) for method, model in models.items()}
        step = contestants[f"fused {depth}"]
        for _ in range(3):  # groups are known after the first
            step()
        calls.clear()
        Functions(calls).of_step(step)
        contestants[f"torch {depth}"] = replay(list(calls))
        contestants[f"linears {depth}"] = replay(linears_of_floor(models["floor"]))
    with Ops(counts) as ops:
        step()
    functions = {name: functions_of(each) for name, each in contestants.items() if name.split()[0] in METHODS}
    times = take_turns(contestants, rounds)
    best = {name: min(seconds for seconds, _ in values) for name, values in times.items()}

    def per_call(values: Mapping[str, float], method: str, less: str) -> float:
        deep, flat = (values[f"{method} {depth}"] - values[f"{less} {depth}"] for depth in (layers, few))
        return (deep - flat) / (CALLS * (layers - few))

    result = {
        "lora_us": per_call(best, "lora", "floor") * 1e6,
        "fused_us": per_call(best, "fused", "floor") * 1e6,
        "torch_us": per_call(best, "torch", "linears") * 1e6,
        "lora_functions": per_call(functions, "lora", "floor"),
        "fused_functions": per_call(functions, "fused", "floor"),
        "floor_ms": best[f"floor {layers}"] * 1e3,
        "calls": len(calls) / (CALLS * few),
        "ops": sum(counts.values()) / (CALLS * few),
        "gate_ops": ops.of_gates / (CALLS * few),
    }
    result["beyond_us"] = result["fused_us"] - result["torch_us"]
    return {**{key: round(value, 2) for key, value in result.items()}, "dispatched": dict(counts.most_common())}


def parser_of(description: str | None, layers: int, rounds: int) -> argparse.ArgumentParser:
    """The options of this command and of those like it, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=layers, help="of the deeper of two models")
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def header() -> dict[str, Any]:
    made = versions("torch", "transformers", "peft", "peft_loraswitch")
    return {"cpu": processor(), "date": time.strftime("%Y-%m-%d"), **made}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, layers=16, rounds=40)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = {"header": header(), **measure(args.layers, args.rounds)}
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"for each call of a group, over the floor (a step of {report['floor_ms']:.1f} ms):")
    print(f"  lora   {report['lora_us']:7.1f} us   {report['lora_functions']:.0f} functions")
    print(f"  fused  {report['fused_us']:7.1f} us   {report['fused_functions']:.0f} functions", end="; ")
    print(
        f"{report['calls']:.1f} of torch called from Python, {report['ops']:.1f} ops, {report['gate_ops']:.1f} of them the gates'"
    )
    print(f"  torch  {report['torch_us']:7.1f} us")
    print(f"  beyond {report['beyond_us']:7.1f} us")
    return report


if __name__ == "__main__":
    main()
