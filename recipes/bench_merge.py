"""The merge launch alone: all linears of eight Llama-2-7B layers, against copying the same bytes.

python recipes/bench_merge.py
"""

from __future__ import annotations

import torch

import bench_linears
from peft_loraswitch import kernels


def main() -> None:
    torch.manual_seed(0)
    model = bench_linears.Layers("llama-2-7b", 8)
    weights = [w for group in model.weights for w in group]
    target = torch.empty_like(model.buffer)
    copy = bench_linears.graph_ms(lambda: target.copy_(model.buffer))
    gigabytes = 2 * model.buffer.numel() * 2 / 1e9
    print(f"copy: {copy:.4f} ms, {gigabytes / copy:.3f} TB/s read and written", flush=True)
    merged = [torch.empty_like(w) for w in weights]
    ids, gates = torch.tensor([1, 5], device="cuda"), torch.tensor([0.6, 0.4], device="cuda")
    for rank in (8, 16, 64):
        experts = model.experts(rank)
        lora_a, lora_b = [a for pair in experts for a in pair[0]], [b for pair in experts for b in pair[1]]
        scalings, transposed = [1.0] * len(weights), [False] * len(weights)
        table = kernels.MergeTable(merged, weights, lora_a, lora_b, scalings, transposed)
        pristine = bench_linears.graph_ms(lambda: table(ids, gates))  # noqa: B023
        table = kernels.MergeTable(merged, merged, lora_a, lora_b, scalings, transposed)
        in_place = bench_linears.graph_ms(lambda: table(ids, gates, ids, gates))  # noqa: B023
        print(f"rank {rank}: from pristine {pristine:.4f} ms, {pristine / copy:.3f} x copy; in place {in_place:.4f} ms")

    # Drift of the in-place switch, over steps of random experts, against the size of what is merged.
    experts = model.experts(8)
    source, a, b = weights[0].clone(), experts[0][0][0], experts[0][1][0]
    pristine = source.clone()
    table = kernels.MergeTable([source], [source], [a], [b], [16.0], [False])
    old, old_gates = torch.tensor([-1, -1], device="cuda"), torch.zeros(2, device="cuda")
    for step in range(1, 10001):
        new, new_gates = torch.randperm(8, device="cuda")[:2], torch.rand(2, device="cuda")
        table(new, new_gates, old, old_gates)
        old, old_gates = new, new_gates
        if step in (1, 10, 100, 1000, 10000):
            update = (
                sum(g * (b[e].double() @ a[e].double()) for e, g in zip(new, new_gates.double(), strict=True)) * 16.0
            )
            exact = pristine.double() + update
            drift = (source.double() - exact).norm() / exact.norm()
            print(
                f"in place, step {step}: relative error {drift:.2e}; the update itself is {update.norm() / exact.norm():.2e}"
            )


if __name__ == "__main__":
    main()
