"""The linear layers of a decoder alone, in one CUDA graph: what docs/kernel_log.md comes from.

    python -m recipes.benchmarks.linears [--shape llama-2-7b] [--layers 8] [--tokens 1 8 32] [--ranks 0 8] [--kernels 0 1 2]
    python -m recipes.benchmarks.linears --by-group --tokens 64 --ranks 0 8    # microseconds of q, k, v; o; gate, up; down
    python -m recipes.benchmarks.linears --by-group --joined --tokens 64 128 256 --ranks 8    # and of weights in one matrix

Compares pure reading of the same bytes, cuBLAS without an adapter, and the kernels with and without one (rank 0). Eight
layers are 3.2 GB: fifty times an L2 cache.
"""

from __future__ import annotations

import argparse
import statistics

from recipes.benchmarks.decode.plan import NUM_EXPERTS, TOP_K, Adapter

SHAPES = {  # hidden, intermediate, key and value width
    "llama-2-7b": (4096, 11008, 4096),
    "llama-3.1-8b": (4096, 14336, 1024),
    "mistral-7b": (4096, 14336, 1024),
    "qwen3-0.6b": (1024, 3072, 1024),
}


def graph_ms(run, repeats: int = 7, inner: int = 20) -> float:
    """Median milliseconds of one replay of a CUDA graph of `run()`."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the operands may not be there yet
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            keep = run()
    torch.cuda.current_stream().wait_stream(stream)
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


def pure_read_ms(buffer) -> float:
    """The best of a few plain streaming kernels over `buffer`, in milliseconds."""
    import torch
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
    """Weights of `layers` decoder layers in one buffer, and the groups of linears that share an input."""

    def __init__(self, shape: str, layers: int) -> None:
        import torch

        h, m, kv = SHAPES[shape]
        groups = [[(h, h), (kv, h), (kv, h)], [(h, h)], [(m, h), (m, h)], [(h, m)]]
        sizes = [out * inp for group in groups for out, inp in group]
        self.buffer = torch.empty(sum(sizes) * layers, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        self.weights, at = [], 0
        for _ in range(layers):
            for group in groups:
                tensors = []
                for out, inp in group:
                    tensors.append(self.buffer[at : at + out * inp].view(out, inp))
                    at += out * inp
                self.weights.append(tensors)

    def experts(self, rank: int, number: int):
        import torch

        def make(*shape):
            return torch.empty(*shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)

        return [
            ([make(number, rank, w.shape[1]) for w in g], [make(number, w.shape[0], rank) for w in g])
            for g in self.weights
        ]


def measure(
    shape: str, layers: int, token_counts: list[int], ranks: list[int], torch, tunings=(0,), adapter: Adapter | None = None
) -> dict:  # fmt: skip
    """Milliseconds of all linears, and ratios to pure reading of the same bytes and to cuBLAS without an adapter."""
    import torch.nn.functional as F

    from peft_loraswitch import kernels

    adapter = adapter or Adapter()
    torch.manual_seed(0)
    kernels.give_workspace(torch.cuda.current_device())
    model = Layers(shape, layers)
    gigabytes = model.buffer.numel() * 2 / 1e9
    read = pure_read_ms(model.buffer)
    print(
        f"{shape} x {layers} layers: {gigabytes:.2f} GB, pure read {read:.4f} ms, {gigabytes / read:.3f} TB/s",
        flush=True,
    )
    rows = []
    filler = torch.zeros(
        4096, device="cuda"
    )  # three small launches stand for the norms and attention between the linears
    for tokens in token_counts:
        xs = {
            w.shape[1]: torch.randn(tokens, w.shape[1], dtype=torch.bfloat16, device="cuda")
            for g in model.weights
            for w in g
        }
        ids = torch.rand(tokens, adapter.experts, device="cuda").topk(adapter.top_k).indices
        gates = torch.rand(tokens, adapter.top_k, device="cuda")

        def all_linears(call, gaps):
            outs = []
            for i, weights in enumerate(model.weights):
                for _ in range(3 * gaps):
                    filler.add_(1.0)
                outs.append(call(i, xs[weights[0].shape[1]]))  # noqa: B023
            return outs

        def cublas(i, x):
            return [F.linear(x, w) for w in model.weights[i]]

        base, base_gaps = (graph_ms(lambda: all_linears(cublas, gaps)) for gaps in (0, 1))  # noqa: B023
        print(f"tokens {tokens}: cuBLAS {base:.4f} ms, {base / read:.3f} x read; with gaps {base_gaps:.4f}", flush=True)
        for rank in ranks:
            experts = model.experts(rank, adapter.experts)
            chosen = adapter.distinct(tokens) / adapter.experts
            extra = sum(t.numel() for a, b in experts for t in (*a, *b)) * chosen
            floor = read * (1 + extra / model.buffer.numel())
            for tuning in tunings:
                groups = [
                    kernels.PackedGroup(w, [None] * len(w), a, b, [1.0] * len(w), tuning=tuning)
                    for w, (a, b) in zip(model.weights, experts, strict=True)
                ]

                def fused(i, x):
                    return groups[i](x, ids, gates)  # noqa: B023

                ms, ms_gaps = (graph_ms(lambda: all_linears(fused, gaps)) for gaps in (0, 1))  # noqa: B023
                row = {
                    "tokens": tokens,
                    "rank": rank,
                    "kernel": tuning,
                    "experts": adapter.experts,
                    "top_k": adapter.top_k,
                    "ms": round(ms, 4),
                    "over_read": round(ms / floor, 4),
                }
                row |= {"over_cublas": round(ms / base, 4), "over_cublas_with_gaps": round(ms_gaps / base_gaps, 4)}
                rows.append(row)
                print(f"  {row}", flush=True)
            del experts
    return {"shape": shape, "layers": layers, "gb": round(gigabytes, 3), "read_ms": round(read, 4), "rows": rows}


def by_group(
    shape: str, layers: int, token_counts: list[int], ranks: list[int], torch, tunings, adapter: Adapter, joined: bool = False
) -> None:  # fmt: skip
    """Prints microseconds of each group of linears: by cuBLAS without an adapter, and by the kernels. Before each stands a small
    launch of somebody else's, as in a model; its time is in all of them.

    Args:
        joined: also by cuBLAS with the weights of a group in one matrix.
    """
    import torch.nn.functional as F

    from peft_loraswitch import kernels

    torch.manual_seed(0)
    kernels.give_workspace(torch.cuda.current_device())
    model, filler = Layers(shape, layers), torch.zeros(4096, device="cuda")
    groups = len(model.weights) // layers

    def micros(call, first: int) -> float:
        """Of the `first`-th group, in all layers in turn: no layer finds the one before it in the cache."""

        def run():
            results = []
            for i in range(first, len(model.weights), groups):
                filler.add_(1.0)
                results.append(call(i))
            return results

        return graph_ms(run) / layers * 1e3

    def pack(i: int, pair, tuning: int):
        weights = model.weights[i]
        return kernels.PackedGroup(weights, [None] * len(weights), *pair, [1.0] * len(weights), tuning=tuning)

    for rank in ranks:
        experts = model.experts(rank, adapter.experts)
        for tokens in token_counts:
            ids = torch.rand(tokens, adapter.experts, device="cuda").topk(adapter.top_k).indices
            gates = torch.rand(tokens, adapter.top_k, device="cuda")
            sums: dict[str, float] = {}
            for first in range(groups):
                width = model.weights[first][0].shape[1]
                x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
                of_group = range(first, len(model.weights), groups)
                calls = {"cuBLAS": lambda i: [F.linear(x, w) for w in model.weights[i]]}  # noqa: B023
                for tuning in tunings:
                    packed = {i: pack(i, experts[i], tuning) for i in of_group}
                    calls[f"kernel {tuning}"] = lambda i, packed=packed: packed[i](x, ids, gates)  # noqa: B023
                if joined:
                    calls |= joined_calls(model, of_group, experts if rank else None, x, ids, gates)
                times = {name: micros(call, first) for name, call in calls.items()}
                del calls
                shapes = " ".join(f"{w.shape[0]} x {w.shape[1]}" for w in model.weights[first])
                print(f"tokens {tokens}  rank {rank}  {shapes}: {_line(times)} us", flush=True)
                sums = {name: sums.get(name, 0.0) + time for name, time in times.items()}
            print(f"tokens {tokens}  rank {rank}  a layer: {_line(sums)} us", flush=True)


def _line(times: dict[str, float]) -> str:
    return "  ".join(f"{name} {time:.2f}" for name, time in times.items())


def joined_calls(model, of_group: range, experts, x, ids, gates) -> dict:
    """A group's products by cuBLAS with its weights in one matrix, as with `join_weights=True`, by the number of the group: the
    weights alone; with `experts` (lora_a, lora_b of each group; None: none) also those with lora_a below, the same and `expand`,
    and `expand` beside a product for each linear."""
    import torch
    import torch.nn.functional as F

    from peft_loraswitch import ops

    outs = [w.shape[0] for w in model.weights[of_group[0]]]
    wide = {i: torch.cat(list(model.weights[i])) for i in of_group}
    if experts is None:
        return {"joined": lambda i: F.linear(x, wide[i])}
    matrices = {i: torch.cat([wide[i], *(a.flatten(0, 1) for a in experts[i][0])]) for i in of_group}
    wide = {i: matrix[: sum(outs)] for i, matrix in matrices.items()}

    def expanded(i: int, bases, hidden):
        return ops.expand(hidden, ids, gates, bases, [None] * len(outs), experts[i][1], [1.0] * len(outs))

    def whole(i: int):
        *bases, hidden = F.linear(x, matrices[i]).split([*outs, len(matrices[i]) - sum(outs)], dim=1)
        return expanded(i, bases, hidden)

    return {
        "joined": lambda i: F.linear(x, wide[i]),
        "with lora_a": lambda i: F.linear(x, matrices[i]),
        "with expand": whole,
        "apart with expand": lambda i: expanded(
            i, [F.linear(x, w) for w in model.weights[i]], ops.all_hidden(x, experts[i][0])
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 8, 64])
    parser.add_argument("--experts", type=int, default=NUM_EXPERTS)
    parser.add_argument("--top-k", type=int, default=TOP_K)
    parser.add_argument(
        "--kernels", type=int, nargs="+", default=[0], help="LS_TUNING_* of csrc/loraswitch.h; 0: choose"
    )
    parser.add_argument("--by-group", action="store_true", help="each group of linears by itself")
    parser.add_argument("--joined", action="store_true", help="with --by-group: also weights in one matrix")
    args = parser.parse_args()
    if args.joined and not args.by_group:
        parser.error("--joined belongs to --by-group")
    import torch

    from peft_loraswitch import kernels

    if not torch.cuda.is_available() or not kernels.available():
        parser.error(f"needs a CUDA GPU and the kernels: {kernels.why_not()}")
    adapter = Adapter(args.experts, args.top_k)
    arguments = (args.shape, args.layers, args.tokens, args.ranks, torch, args.kernels, adapter)
    if args.by_group:
        by_group(*arguments, args.joined)
    else:
        measure(*arguments)


if __name__ == "__main__":
    main()
