"""The linear layers of a decoder alone, in one CUDA graph: what csrc/README.md's table comes from.

    python csrc/bench.py [--layers 8] [--tokens 1 8 32] [--ranks 8] [--sweep]

Compares pure reading of the same bytes, cuBLAS without an adapter, and the kernels with and without one. --sweep tries
every kernel shape that csrc/linear.cu knows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peft_loraswitch import kernels

SHAPES = {  # hidden, intermediate, key and value width
    "llama-2-7b": (4096, 11008, 4096),
    "llama-3.1-8b": (4096, 14336, 1024),
    "mistral-7b": (4096, 14336, 1024),
    "qwen3-0.6b": (1024, 3072, 1024),
}


def graph_ms(run, repeats: int = 7, inner: int = 20) -> float:
    """Median milliseconds of one replay of a CUDA graph of `run()`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            keep = run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    del keep
    return statistics.median(times)


def pure_read_ms(buffer: torch.Tensor) -> float:
    """The best of a few plain streaming kernels over `buffer`, in milliseconds."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(pointer, out, n, BLOCK: tl.constexpr, LOOP: tl.constexpr):
        base = tl.program_id(0).to(tl.int64) * BLOCK * LOOP
        acc = tl.zeros([BLOCK], tl.int32)
        for i in range(LOOP):
            offset = base + i * BLOCK + tl.arange(0, BLOCK)
            acc ^= tl.load(pointer + offset, mask=offset < n, other=0)
        total = tl.xor_sum(acc, 0)
        if total == 123456789:  # keeps the loads alive
            tl.store(out, total)

    words = buffer.view(torch.int32)
    out = torch.zeros(1, dtype=torch.int32, device=buffer.device)
    best = float("inf")
    for block, loop, warps in ((4096, 4, 8), (2048, 4, 8), (4096, 8, 8), (8192, 2, 16), (4096, 1, 8)):
        grid = (-(-words.numel() // (block * loop)),)
        best = min(best, graph_ms(lambda: read[grid](words, out, words.numel(), block, loop, num_warps=warps)))  # noqa: B023
    return best


class Layers:
    """Weights of `layers` decoder layers in one buffer, experts of rank r, and the groups of linears."""

    def __init__(self, shape: str, layers: int, num_experts: int, dtype=torch.bfloat16) -> None:
        h, m, kv = SHAPES[shape]
        self.groups_of = [[(h, h), (kv, h), (kv, h)], [(h, h)], [(m, h), (m, h)], [(h, m)]]
        sizes = [out * inp for g in self.groups_of for out, inp in g]
        self.buffer = torch.empty(sum(sizes) * layers, dtype=dtype, device="cuda").normal_(std=0.02)
        self.num_experts, self.dtype = num_experts, dtype
        self.weights, at = [], 0
        for _ in range(layers):
            for group in self.groups_of:
                tensors = []
                for out, inp in group:
                    tensors.append(self.buffer[at : at + out * inp].view(out, inp))
                    at += out * inp
                self.weights.append(tensors)

    def experts(self, rank: int):
        def make(*s):
            return torch.empty(*s, dtype=self.dtype, device="cuda").normal_(std=0.02)

        return [
            ([make(self.num_experts, rank, w.shape[1]) for w in g], [make(self.num_experts, w.shape[0], rank) for w in g])
            for g in self.weights
        ]

    def inputs(self, tokens: int):
        widths = {w.shape[1] for g in self.weights for w in g}
        return {n: torch.randn(tokens, n, dtype=self.dtype, device="cuda") for n in widths}


def packed_groups(model: Layers, experts, tuning=0):
    groups = []
    for weights, (a, b) in zip(model.weights, experts, strict=True):
        groups.append(kernels.PackedGroup(weights, [None] * len(weights), a, b, [1.0] * len(weights), tuning=tuning))
    return groups


def runner(model, groups, xs, ids, gates, filler=None):
    def run():
        outs = []
        for weights, group in zip(model.weights, groups, strict=True):
            if filler is not None:
                for _ in range(3):
                    filler.add_(1.0)  # stands for the norms and attention between the linears
            outs.append(group(xs[weights[0].shape[1]], ids, gates))
        return outs

    return run


def cublas_runner(model, xs, filler=None):
    def run():
        outs = []
        for weights in model.weights:
            if filler is not None:
                for _ in range(3):
                    filler.add_(1.0)
            outs.append([F.linear(xs[w.shape[1]], w) for w in weights])
        return outs

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    num_experts, top_k = 8, 2
    model = Layers(args.shape, args.layers, num_experts)
    gigabytes = model.buffer.numel() * 2 / 1e9
    read = pure_read_ms(model.buffer)
    rate = gigabytes / read
    print(f"{args.shape} x {args.layers} layers, {gigabytes:.2f} GB; pure read {read:.4f} ms = {rate:.3f} TB/s", flush=True)
    filler = torch.zeros(4096, device="cuda")
    for tokens in args.tokens:
        if args.sweep:  # what one launch of each group costs beyond its bytes
            x1, none = model.inputs(tokens), torch.zeros(tokens, 0, dtype=torch.int64, device="cuda")
            for kind, name in enumerate(("q,k,v", "o", "gate,up", "down")):
                chosen = model.weights[kind::4]
                size = sum(w.numel() for w in chosen[0]) * 2
                line = f"  tokens {tokens} {name}: {size / rate / 1e6:.2f} us to read"
                line += f"; cuBLAS {graph_ms(lambda: [[F.linear(x1[w.shape[1]], w) for w in g] for g in chosen]) * 1e3 / len(chosen):.2f}"  # noqa: E501, B023
                for tuning in (1, 2):
                    blank = [(w, [w_.new_empty(8, 0, w_.shape[1]) for w_ in w], [w_.new_empty(8, w_.shape[0], 0) for w_ in w]) for w in chosen]  # noqa: E501
                    groups = [kernels.PackedGroup(w, [None] * len(w), a, b, [1.0] * len(w), tuning=tuning) for w, a, b in blank]
                    ids, gates = torch.zeros(tokens, 1, dtype=torch.int64, device="cuda"), torch.ones(tokens, 1, device="cuda")
                    ms = graph_ms(lambda: [g(x1[w[0].shape[1]], ids, gates) for g, w in zip(groups, chosen)])  # noqa: B023, B905
                    line += f"; kernel {tuning} {ms * 1e3 / len(chosen):.2f}"
                print(line, flush=True)
        xs = model.inputs(tokens)
        ids = torch.rand(tokens, num_experts, device="cuda").topk(top_k).indices
        gates = torch.rand(tokens, top_k, device="cuda")
        cublas = graph_ms(cublas_runner(model, xs))
        cublas_gaps = graph_ms(cublas_runner(model, xs, filler))
        print(f"tokens {tokens}: cuBLAS {cublas:.4f} ({cublas / read:.3f} x read); with gaps {cublas_gaps:.4f}", flush=True)
        none = [([a[:, :0] for a in aa], [b[:, :, :0] for b in bb]) for aa, bb in model.experts(8)]
        for rank in [0, *args.ranks]:
            experts = model.experts(rank) if rank else none
            floor = read * (1 + rank * top_k * sum(t.numel() for a in model.experts(1) for p in a for t in p)
                            / num_experts / model.buffer.numel())  # fmt: skip
            for tuning in (kernels.TUNING_STREAM, kernels.TUNING_REGISTERS) if args.sweep else [0]:
                groups = packed_groups(model, experts, tuning)
                plain = graph_ms(runner(model, groups, xs, ids, gates))
                gaps = graph_ms(runner(model, groups, xs, ids, gates, filler))
                print(
                    f"  rank {rank:3d} kernel {tuning}: {plain:.4f} ms, {plain / floor:.3f} x read, "
                    f"{plain / cublas:.3f} x cuBLAS; with gaps {gaps:.4f}, {gaps / cublas_gaps:.3f} x cuBLAS",
                    flush=True,
                )


if __name__ == "__main__":
    main()
