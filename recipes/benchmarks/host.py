"""How much of a decode step is the host's: Python, guards, launches. On a GPU and, without the device's share, on a CPU.

    python -m recipes.benchmarks.host                                   # tiny layers: what is measured is the host
    python -m recipes.benchmarks.host --shape llama-2-7b --modes static # a real model's step beside it
    python -m recipes.benchmarks.host --methods fused --modes static --profile

Modes: `eager` (`generate` as it is), `static` (`generate(cache_implementation="static")`, whose step transformers compiles),
`step` (that compiled step called alone; on a CPU also without guards), `layers` (the linears of one decoder layer, called one
after the other), `prefill` (one forward of --prompt tokens, not compiled; microseconds of the whole), `unlaunched` (CPU only: a
token's forward, not compiled, with kernels that do nothing, so that fused layers go the way that they go on a GPU).
On a CPU the compiled graph is replaced by its results, so that guards and arguments are all that is left of a step.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import os
import pstats
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from recipes.benchmarks.decode.plan import TARGETS
from recipes.benchmarks.stub_library import NoKernels, in_place_of_the_library, use_kernels
from recipes.benchmarks.token_times import token_times

SHAPES = {"tiny": (64, 64, 96, 4), "llama-2-7b": (32000, 4096, 11008, 32)}  # vocabulary, hidden, intermediate, heads
METHODS = ("backbone", "lora", "torch", "fused")
MODES = ("eager", "static", "step", "layers", "prefill", "unlaunched")
PROMPT = 16


def build(method: str, shape: str, layers: int, rank: int, device: str) -> Any:
    """A Llama with random weights, bare or adapted by `method` ("torch": LoRA-Switch as it trains, not fused)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_loraswitch import LoRASwitchConfig

    vocabulary, hidden, intermediate, heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
        if method == "lora":
            adapter: Any = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
            model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
        elif method != "backbone":
            adapter = LoRASwitchConfig(r=rank, num_experts=8, top_k=2, target_modules=TARGETS, init_weights=False)
            model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    model = model.to(dtype).eval().requires_grad_(False)
    if method == "fused":
        model.fuse_for_inference("fused")
    return model


class Backend:
    """Notes (inputs, outputs) of every graph. On a CPU it hands back the graph's results unread instead of running it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.graphs: list[tuple[int, int]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        import torch

        outputs = graph.graph.find_nodes(op="output")[0].args[0]
        self.graphs.append((len(inputs), len(outputs)))
        if self.device == "cuda":
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": True})
        values = [node.meta["example_value"] for node in outputs]
        results = tuple(torch.zeros(tuple(map(int, value.shape)), dtype=value.dtype) for value in values)
        return lambda *_: results


class Timed:
    """A function, and the seconds that each call of it took to return (a GPU may still be at work then)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        return result


class Bench:
    """One model; `generate` with a compiled step that is counted and timed."""

    def __init__(self, model: Any, device: str) -> None:
        import torch
        from transformers import CompileConfig

        self.model, self.device = model, device
        self.backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.ids = torch.randint(5, 60, (1, PROMPT), device=device)
        backend = self.backend = Backend(device)
        # a function, because generate() copies the config
        config: Any = CompileConfig
        self.config = config(mode=None, backend=lambda *args: backend(*args))
        self.config._compile_all_devices = True
        self.caught: dict[str, Any] = {}

    def synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def generate(self, static: bool, tokens: int) -> list[float]:
        """Seconds of each decode step of one `generate` of so many tokens."""
        options: dict[str, Any] = {}
        if static:
            options = {"cache_implementation": "static", "compile_config": self.config, "max_cache_len": 256}
        times = token_times(self.model, self.ids, tokens, **options)
        self.synchronize()
        return times

    def prefill(self, tokens: int) -> Callable[[], float]:
        """Seconds of a forward of so many tokens, of which the last one's logits are wanted."""
        import torch

        ids = torch.randint(5, 60, (1, tokens), device=self.device)

        @torch.no_grad()
        def run() -> float:
            self.synchronize()
            start = time.perf_counter()
            self.model(input_ids=ids, logits_to_keep=1, use_cache=False)
            self.synchronize()
            return time.perf_counter() - start

        run()
        return run

    def per_token(self, static: bool, repeats: int = 9) -> float:
        """Microseconds of a token: the median of all of several calls of `generate`."""
        self.generate(static, 8)
        self.generate(static, 16)
        return statistics.median(seconds for _ in range(repeats) for seconds in self.generate(static, 42)) * 1e6

    def forwards(self, repeats: int = 300) -> list[float]:
        """Seconds of each of so many forwards of one token, not compiled."""
        import torch

        forward = Timed(self.backbone)
        with torch.no_grad():
            cache = self.backbone(input_ids=self.ids, use_cache=True).past_key_values
            for _ in range(repeats):
                forward(input_ids=self.ids[:, :1], past_key_values=cache, use_cache=True)
                cache.crop(-1)
        return forward.seconds

    def steps(self, step: Callable[..., Any], repeats: int = 400) -> list[float]:
        """Seconds of each of so many calls of the compiled step, with the arguments that `generate` gave it last."""
        import torch

        timed = Timed(step)
        with torch.no_grad():
            for _ in range(repeats):
                timed(**self.caught, return_dict=True)
        return timed.seconds

    def time_step(self) -> Timed:
        """From now on the compiled step of `generate` is timed, and its arguments are kept in `caught`."""
        prepare = self.backbone.prepare_inputs_for_generation

        @functools.wraps(prepare)
        def catching(*args: Any, **kwargs: Any) -> Any:
            self.caught = prepare(*args, **kwargs)
            return self.caught

        self.backbone.prepare_inputs_for_generation = catching
        timed = Timed(self.backbone.get_compiled_call(self.config))
        self.backbone.get_compiled_call = lambda config: timed
        return timed


def guards_of(backbone: Any) -> int:
    """Number of guards of the compiled step of `backbone`; with BENCH_GUARDS=folder they are written there."""
    import torch
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    functions = [type(backbone).forward, torch.nn.Module._call_impl, torch.nn.Module._wrapped_call_impl]
    if "forward" in backbone.__dict__:
        functions.insert(0, backbone.forward.__func__)
    largest = 0
    for function in functions:
        while function is not None:
            for entry in _debug_get_cache_entry_list(function.__code__):
                tree = str(entry.guard_manager)
                counted = len(re.findall(r"\+- [A-Z_]+:", tree))
                if directory := os.environ.get("BENCH_GUARDS"):
                    Path(directory, f"guards_{function.__qualname__}_{counted}.txt").write_text(tree)
                largest = max(largest, counted)
            function = getattr(function, "__wrapped__", None)
    return largest


def device_us(run: Callable[[], object], tokens: int) -> float:
    """Microseconds a token for which the GPU is busy, from the profiler's kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
    return sum(event.self_device_time_total for event in found.key_averages()) / tokens


def graph_launch_us(run: Callable[[], object]) -> float | None:
    """Microseconds that a launch of a CUDA graph keeps the host, from the profiler; None without one."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
    launches = [event for event in found.key_averages() if event.key == "cudaGraphLaunch"]
    return round(launches[0].cpu_time_total / launches[0].count, 1) if launches else None


def layers_us(bench: Bench, repeats: int = 30) -> float:
    """Microseconds of host time for one linear of a decoder layer, called as a decode step calls it, with its group."""
    import torch

    from peft_loraswitch.model import routing_state

    layer = bench.backbone.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    weight = bench.backbone.model.embed_tokens.weight
    hidden = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    state = routing_state(bench.backbone)
    wide = torch.zeros(1, 1, bench.backbone.config.intermediate_size, dtype=weight.dtype, device=weight.device)

    def once() -> None:
        attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
        attention.o_proj(hidden.view(1, 1, -1))
        other = hidden.view(1, 1, -1)
        mlp.gate_proj(other), mlp.up_proj(other)
        mlp.down_proj(wide)

    def run() -> float:
        # as the model's hooks do; the first linear of the model has the router
        frame = None if state is None else state.hooks.open_frame(0, False, None)
        try:
            bench.backbone.model.layers[0].self_attn.q_proj(hidden)
            start = time.perf_counter()
            for _ in range(20):
                once()
            seconds = time.perf_counter() - start
        finally:
            if state is not None and frame is not None:
                state.close_frame(frame, True)
        bench.synchronize()
        return seconds / 20 / 7 * 1e6

    with torch.no_grad():
        run()
        return min(run() for _ in range(repeats))


def measure(method: str, modes: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    bench = Bench(build(method, args.shape, args.layers, args.rank, args.device), args.device)
    rows: list[dict[str, Any]] = []

    def add(mode: str, us: float, **more: Any) -> None:
        row = {"method": method, "mode": mode, "us": round(us, 1), **more}
        rows.append(row)
        print(json.dumps(row), flush=True)

    if "layers" in modes:
        add("layers", layers_us(bench))
    if "prefill" in modes:
        run = bench.prefill(args.prompt)
        times = sorted(run() for _ in range(9))
        more = {"device_us": round(device_us(run, 1), 1)} if args.device == "cuda" else {}
        add("prefill", times[len(times) // 2] * 1e6, **more)
        profiled(args, f"{method} prefill", run)
    if "eager" in modes:
        us = bench.per_token(static=False)
        busy: dict[str, Any] = {}
        if args.device == "cuda":
            busy["device_us"] = round(device_us(lambda: bench.generate(False, 17), 16), 1)
        add("eager", us, **busy)
        profiled(args, f"{method} eager", lambda: bench.generate(False, 64))
    if "unlaunched" in modes:
        use_kernels(bench.model)
        with in_place_of_the_library(NoKernels()):
            times = sorted(bench.forwards())
            add("unlaunched", times[len(times) // 10] * 1e6, median=round(statistics.median(times) * 1e6, 1))
            profiled(args, f"{method} unlaunched", lambda: bench.generate(False, 64))
    if "static" in modes or "step" in modes:
        timed = bench.time_step()
        us = bench.per_token(static=True)
        counters = torch._dynamo.utils.counters
        leaves = guards_of(bench.backbone)
        extra: dict[str, Any] = {
            "step_host_us": round(statistics.median(timed.seconds[len(timed.seconds) // 2 :]) * 1e6, 1),
            "guards": leaves, "graphs_in_out": bench.backend.graphs,
            "graph_breaks": sum(counters["graph_break"].values()),
        }  # fmt: skip
        if args.device == "cuda":
            extra["device_us"] = round(device_us(lambda: bench.generate(True, 17), 16), 1)
            extra["graph_launch_us"] = graph_launch_us(lambda: bench.generate(True, 17))
            extra |= {key: value for key, value in counters["inductor"].items() if "cudagraph" in key}
        add("static", us, **extra)
        if "step" in modes:
            if args.device == "cpu":
                times = bench.steps(timed.function)
                with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                    unguarded = round(min(bench.steps(timed.function)) * 1e6, 1)
                add("step", min(times) * 1e6, median=round(statistics.median(times) * 1e6, 1), unguarded_us=unguarded)
            else:
                add("step", min(timed.seconds) * 1e6, median=extra["step_host_us"])
        profiled(args, f"{method} static", lambda: bench.generate(True, 64))
    return rows


def profiled(args: argparse.Namespace, title: str, run: Callable[[], object]) -> None:
    """With --profile: the functions that took most of the host's time, 64 tokens."""
    if not args.profile:
        return
    profiler = cProfile.Profile()
    profiler.enable()
    run()
    profiler.disable()
    print(f"--- {title}, 64 tokens")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    if args.device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
        print(found.key_averages().table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["backbone", "lora", "fused"], choices=METHODS)
    parser.add_argument("--modes", nargs="+", default=["layers", "eager", "static", "step"], choices=MODES)
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of `prefill`")
    parser.add_argument("--device", default=None, choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true", help="print which functions take the host's time")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    import torch
    import transformers

    from recipes.checkout import processor, versions

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cpu":
        torch.set_num_threads(1)
    elif "unlaunched" in args.modes:
        parser.error("--modes unlaunched is for --device cpu: on a GPU kernels are launched")
    transformers.logging.set_verbosity_error()
    header = {**versions("torch", "transformers", "peft"), "cpu": processor()}
    header |= {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    header |= {"shape": args.shape, "layers": str(args.layers), "rank": str(args.rank)}
    print(json.dumps(header), flush=True)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        rows += measure(method, args.modes, args)
    base = {row["mode"]: row["us"] for row in rows if row["method"] == "backbone"}
    print(f"{'method':9s} {'mode':7s} {'us':>9s}  over the backbone")
    for row in rows:
        reference = base.get(row["mode"])
        over = f"{row['us'] - reference:+9.1f} us  {row['us'] / reference:.3f}" if reference else ""
        print(f"{row['method']:9s} {row['mode']:7s} {row['us']:9.1f}  {over}")
    if args.output:
        args.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
