"""The merge launch alone: all linears of a few decoder layers, against copying the same bytes; and the drift in place.

    python -m recipes.benchmarks.merge [--shape llama-2-7b] [--layers 8] [--ranks 8 16 64] [--json FILE] [--no-drift]

A merge from pristine weights reads and writes what `torch.add(source, 1, out=target)` does, a merge in place what
`weights.add_(1)` does, plus the chosen experts: those two are its floors. Eight layers are 3.2 GB: fifty times an L2 cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from peft_loraswitch import kernels
from recipes.benchmarks import linears

DRIFT_STEPS = (1, 10, 100, 1000, 10000)


def measure(shape: str, layers: int, ranks: list[int]) -> dict[str, Any]:
    """Milliseconds of a merge of all linears, one row a rank and mode, and their ratio to the floor of that mode."""
    model = linears.Layers(shape, layers)
    weights = [w for group in model.weights for w in group]
    target = torch.empty_like(model.buffer)
    gigabytes = 2 * model.buffer.numel() * 2 / 1e9
    floors = {
        "pristine": linears.graph_ms(lambda: torch.add(model.buffer, 1.0, out=target)),
        "in place": linears.graph_ms(lambda: target.add_(1.0)),
    }
    for mode, ms in floors.items():
        print(f"floor, {mode}: {ms:.4f} ms, {gigabytes / ms:.3f} TB/s read and written", flush=True)
    at, merged = 0, []
    for weight in weights:
        merged.append(target[at : at + weight.numel()].view_as(weight))
        at += weight.numel()
    chosen, taken_out = torch.tensor([1, 5], device="cuda"), torch.tensor([6, 2], device="cuda")
    gates, old_gates = torch.tensor([0.6, 0.4], device="cuda"), torch.tensor([0.7, 0.3], device="cuda")
    rows = []
    for rank in ranks:
        experts = model.experts(rank)
        lora_a, lora_b = [a for pair in experts for a in pair[0]], [b for pair in experts for b in pair[1]]
        for mode, floor in floors.items():
            sources, old = (weights, ()) if mode == "pristine" else (merged, (taken_out, old_gates))
            target.copy_(model.buffer)
            table = kernels.MergeTable(merged, sources, lora_a, lora_b, [1.0] * len(weights), [False] * len(weights))
            ms = linears.graph_ms(lambda: table(chosen, gates, *old))  # noqa: B023
            row = {"rank": rank, "mode": mode, "ms": round(ms, 4), "over_floor": round(ms / floor, 4)}
            row["tb_per_s"] = round(gigabytes / ms, 3)
            rows.append(row)
            print(f"  {row}", flush=True)
    floor_ms = {mode: round(ms, 4) for mode, ms in floors.items()}
    return {"shape": shape, "layers": layers, "gb": round(gigabytes, 3), "floor_ms": floor_ms, "rows": rows}


def drift(rank: int = 8, top_k: int = 2) -> list[dict[str, float]]:
    """Relative error of a weight after steps of random experts in place, next to the size of what is merged."""
    num_experts = linears.NUM_EXPERTS
    source = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    a = torch.empty(num_experts, rank, 4096, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    b = torch.empty(num_experts, 4096, rank, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    pristine = source.clone()
    table = kernels.MergeTable([source], [source], [a], [b], [16.0], [False])
    old, old_gates = torch.full((top_k,), -1, device="cuda"), torch.zeros(top_k, device="cuda")
    rows = []
    for step in range(1, DRIFT_STEPS[-1] + 1):
        new, new_gates = torch.randperm(num_experts, device="cuda")[:top_k], torch.rand(top_k, device="cuda")
        table(new, new_gates, old, old_gates)
        old, old_gates = new, new_gates
        if step in DRIFT_STEPS:
            update = torch.zeros_like(pristine, dtype=torch.float64)
            for e, gate in zip(new.tolist(), new_gates.tolist(), strict=True):
                update += 16.0 * gate * (b[e].double() @ a[e].double())
            exact = pristine.double() + update
            error = float((source.double() - exact).norm() / exact.norm())
            rows.append({"step": step, "relative_error": error, "update": float(update.norm() / exact.norm())})
            print(f"in place, step {step}: relative error {error:.2e}; the update itself is {rows[-1]['update']:.2e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=linears.SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--no-drift", action="store_true", help="times only")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not kernels.available():
        parser.error(f"needs a CUDA GPU and the kernels: {kernels.why_not()}")
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": kernels.build_info(),
    }
    result |= measure(args.shape, args.layers, args.ranks)
    if not args.no_drift:
        result["drift"] = drift()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
