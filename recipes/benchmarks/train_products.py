"""The products of the fused training path one by one, each in the forms that it could have: `train_gpu.py --products`.

For every linear of a decoder layer: time of the form that `training/group_function.py` has (marked `*`) and of others that give
the same numbers. `per_step_ms` is the time times how often a step of all layers with gradient checkpointing runs it.

- base: the base layer's product, which adds to what the experts have written (`addmm_`); first, with the experts' product added
  to it; and alone, as the backbone runs it: the difference to `up` and this one is what adding costs;
- d_base: the same for the gradient of the input;
- hidden: A of a group as one product, or one for each linear;
- up: the experts' product by B;
- d_gated, d_a, d_b: in backward, with the factors as they are or the other way round (the result is then transposed);
- cast: the weights of a group, by a kernel each, or A by PyTorch's one kernel for many tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_loraswitch.training.group_function import product

Forms = dict[str, Callable[[], Tensor]]


class Question(NamedTuple):
    """One product in its forms, the present one first, and how often a layer runs it in a step."""

    name: str
    times: int
    forms: Forms


def groups_of(hidden: int, intermediate: int) -> dict[str, tuple[int, list[int]]]:
    """(in, out of each linear) of a layer's groups, with a quarter as many key-value heads as heads."""
    return {
        "qkv": (hidden, [hidden, hidden // 4, hidden // 4]),
        "o": (hidden, [hidden]),
        "gate_up": (hidden, [intermediate, intermediate]),
        "down": (intermediate, [hidden]),
    }


def questions(name: str, features: int, outs: list[int], args: argparse.Namespace, width: int) -> Iterator[Question]:
    """Of one group; `width`: E * r of each linear."""
    device, n, rank = args.device, len(outs), args.rank
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    tokens = args.batch * args.length
    forward = 1 if name == "down" else 2  # the second run ends before it
    x, hidden = torch.randn(tokens, features, **half), torch.randn(tokens, n * width, **half)
    wide_a = torch.randn(n * width, features, **half) * 0.02
    parts = hidden.split([width] * n, 1)
    experts = width // rank
    a32 = [torch.randn(experts, rank, features, device=device) for _ in outs]

    def per_linear() -> Tensor:
        whole = torch.empty_like(hidden)
        for place, each in zip(whole.split([width] * n, 1), wide_a.split([width] * n), strict=True):
            torch.mm(x, each.t(), out=place)
        return whole

    def cast(together: bool) -> Tensor:
        memory = torch.empty(n * width * features, **half)
        places = [part.view(experts, rank, features) for part in memory.chunk(n)]
        if together:
            torch._foreach_copy_(places, a32)
        else:
            for place, each in zip(places, a32, strict=True):
                place.copy_(each)
        return memory

    yield Question(f"{name} hidden", 2, {"group*": lambda: x @ wide_a.t(), "per linear": per_linear})
    yield Question(f"{name} cast A", 1, {"each*": lambda: cast(False), "foreach": lambda: cast(True)})
    yield Question(f"{name} dA", 1, {
        "as is*": lambda: product(hidden.t(), x, torch.float32).float(),
        "transposed": lambda: product(x.t(), hidden, torch.float32).float().t(),
    })  # fmt: skip
    for i, out in enumerate(outs):
        yield from _of_linear(f"{name}[{i}]", forward, x, parts[i], out, half)


def _of_linear(name: str, forward: int, x: Tensor, gated: Tensor, out: int, half: dict[str, Any]) -> Iterator[Question]:
    weight = torch.randn(out, x.shape[1], **half) * 0.02
    wide_b = torch.randn(out, gated.shape[1], **half) * 0.02
    packed_b = wide_b.t().contiguous()  # [E * r, out]
    d = torch.randn(x.shape[0], out, **half)
    y, d_x = torch.empty_like(d), torch.empty_like(x)

    def base(order: str) -> Tensor:
        if order == "only":
            return torch.mm(x, weight.t(), out=y)
        if order == "base first":
            return torch.mm(x, weight.t(), out=y).addmm_(gated, wide_b.t())
        return torch.mm(gated, wide_b.t(), out=y).addmm_(x, weight.t())

    yield Question(f"{name} base + up", forward, {
        "up first*": lambda: base("up first"), "base first": lambda: base("base first"), "without up": lambda: base("only"),
    })  # fmt: skip
    yield Question(f"{name} up", forward, {
        "as is*": lambda: torch.mm(gated, wide_b.t(), out=y), "B as [N, out]": lambda: torch.mm(gated, packed_b, out=y),
    })  # fmt: skip

    def zeroed() -> Tensor:
        d_x.zero_()
        return torch.mm(d, weight, out=d_x)

    yield Question(f"{name} d_base", 1, {"adds*": lambda: d_x.zero_().addmm_(d, weight), "overwrites": zeroed})
    yield Question(f"{name} d_gated", 1, {
        "as is*": lambda: d @ wide_b, "B as [N, out]": lambda: d @ packed_b.t(), "transposed": lambda: (wide_b.t() @ d.t()).t(),
    })  # fmt: skip
    yield Question(f"{name} dB", 1, {
        "as is*": lambda: product(d.t(), gated, torch.float32).float(),
        "transposed": lambda: product(gated.t(), d, torch.float32).float().t(),
    })  # fmt: skip


def microseconds(form: Callable[[], Tensor], device: str, repeats: int) -> float:
    """Median. On a GPU all calls are in the queue before the first is measured, so that the host does not count."""
    for _ in range(3):
        form()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            form()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # some 10 ms
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        form()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in zip(marks, marks[1:], strict=False))


def measure(args: argparse.Namespace, repeats: int = 20) -> list[dict[str, Any]]:
    rows = []
    for width in args.widths:
        for name, (features, outs) in groups_of(args.hidden, args.intermediate).items():
            for question in questions(name, features, outs, args, width):
                took = {form: microseconds(call, args.device, repeats) for form, call in question.forms.items()}
                rows.append({
                    "width": width, "product": question.name,
                    "us": {form: round(us, 1) for form, us in took.items()},
                    "per_step_ms": {form: round(us * question.times * args.layers / 1e3, 2) for form, us in took.items()},
                })  # fmt: skip
    return rows


def main(args: argparse.Namespace, header: dict[str, Any], path: Path) -> dict[str, Any]:
    report = {"header": header, "rows": measure(args)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"]:
        shown = ", ".join(
            f"{form} {us:.1f} us ({row['per_step_ms'][form]:.2f} ms a step)" for form, us in row["us"].items()
        )
        print(f"N={row['width']:<5}{row['product']:22}{shown}")
    return report
