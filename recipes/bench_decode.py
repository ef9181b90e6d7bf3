"""What a routed adapter costs at decode time, on this GPU: the table at the top of the README.

    python recipes/bench_decode.py                       # all of it, into recipes/results/decode_<gpu>.json and .png
    python recipes/bench_decode.py --models llama-2-7b --methods backbone fused --modes compiled

Models have random weights, made on the GPU; nothing is downloaded. Each job (a model, a method, a rank) is a process of
its own; as many as fit into the GPU's memory prepare at once (compiling takes the time), then they measure one at a time.
Medians of at least five; every ratio is to the unadapted backbone in the same mode of the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

NUM_EXPERTS, TOP_K = 8, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT, CACHE, PREFILL = 16, 512, 2048
SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, key-value heads
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32),
    "mistral-7b": (32000, 4096, 14336, 32, 32, 8),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
    "qwen3-0.6b": (151936, 1024, 3072, 28, 16, 8),
}


@dataclass
class Job:
    """One process: a model with one method, measured in some modes. At most one of them compiles, which takes the time."""

    model: str
    layers: int
    method: str  # backbone, lora (PEFT), torch (routing in plain PyTorch), kernels (ours without adapter), fused, merge
    rank: int
    modes: list[str]  # compiled:<batch>, static, eager, prefill, graph

    def gib(self) -> float:
        """Device memory it needs, roughly."""
        vocabulary, hidden, intermediate, _, heads, kv = SHAPES[self.model]
        linears = self.layers * (2 * hidden * hidden + 2 * hidden * hidden * kv // heads + 3 * hidden * intermediate)
        size = linears * (2 if self.method == "merge" else 1) + 2 * vocabulary * hidden
        size += self.layers * NUM_EXPERTS * self.rank * (10 * hidden + 3 * intermediate)
        cache = (
            max(int(mode.partition(":")[2] or 1) for mode in self.modes)
            * CACHE
            * self.layers
            * 2
            * hidden
            * kv
            // heads
        )
        return (size + cache) * 2 / 2**30 + 1.5


def jobs(models: list[str], methods: list[str], modes: list[str], layers: int) -> list[Job]:
    wanted: list[tuple[str, str, int, list[str]]] = []
    for name in models:
        if name == "llama-2-7b":
            wanted += [
                (name, "backbone", 0, ["compiled:1", "prefill"]),
                (name, "fused", 8, ["compiled:1", "prefill", "eager"]),
            ]
            wanted += [(name, "fused", 64, ["compiled:1", "prefill"]), (name, "fused", 16, ["compiled:1"])]
            wanted += [(name, "backbone", 0, ["static", "eager"]), (name, "fused", 8, ["static"])]
            wanted += [(name, "backbone", 0, ["compiled:8"]), (name, "fused", 8, ["compiled:8"])]
            wanted += [(name, "backbone", 0, ["compiled:32"]), (name, "fused", 8, ["compiled:32"])]
            wanted += [(name, "kernels", 0, ["compiled:1"]), (name, "lora", 16, ["compiled:1", "eager"])]
            wanted += [(name, "torch", 8, ["eager", "compiled:1"])]
            wanted += [(name, "backbone", 0, ["graph"]), (name, "merge", 8, ["graph"])]
            continue
        for method, rank in (("backbone", 0), ("fused", 8), ("fused", 64))[: 2 if name == "qwen3-0.6b" else 3]:
            wanted += [(name, method, rank, ["compiled:1", "eager", "prefill"])]
    chosen = []
    for name, method, rank, job_modes in wanted:
        depth = SHAPES[name][3] if name == "llama-2-7b" else min(layers, SHAPES[name][3])
        job_modes = [mode for mode in job_modes if mode.split(":")[0] in modes]
        if method in methods and job_modes:
            chosen.append(Job(name, depth, method, rank, job_modes))
    return chosen


# ------------------------------------------------------------------------------------------------------- one process


def build(job: Job):
    """(model, seconds that fuse_for_inference took)"""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

    from peft_loraswitch import LoRASwitchConfig

    vocabulary, hidden, intermediate, _, heads, kv = SHAPES[job.model]
    config_class = {"mistral-7b": MistralConfig, "qwen3-0.6b": Qwen3Config}.get(job.model, LlamaConfig)
    extra = {"sliding_window": None} if job.model == "mistral-7b" else {}
    if job.model == "qwen3-0.6b":
        extra = {"head_dim": 128, "tie_word_embeddings": True}
    config = config_class(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=job.layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=4096, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        if job.method == "lora":
            model = get_peft_model(
                model,
                LoraConfig(r=job.rank, target_modules=TARGETS, init_lora_weights=False),
                autocast_adapter_dtype=False,
            )
        elif job.method != "backbone":
            adapter = LoRASwitchConfig(
                r=max(job.rank, 1), num_experts=NUM_EXPERTS, top_k=TOP_K, target_modules=TARGETS, init_weights=False
            )
            model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    model = model.eval().requires_grad_(False)
    seconds = 0.0
    if job.method in ("kernels", "fused", "merge"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.fuse_for_inference(strategy="merge" if job.method == "merge" else "fused")
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if job.method == "kernels":  # our own kernels, no experts: rank 0 is what a LoRASwitchConfig refuses
        for module in model.modules():
            if hasattr(module, "loraswitch_A"):
                a, b = module.loraswitch_A["default"], module.loraswitch_B["default"]
                a.weight = torch.nn.Parameter(a.weight[:, :0].contiguous(), requires_grad=False)
                b.weight = torch.nn.Parameter(b.weight[:, :, :0].contiguous(), requires_grad=False)
    return model, seconds


def median_ms(run, repeats: int = 7) -> float:
    """Median milliseconds of `run()`, by device events."""
    import torch

    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Decoder:
    """A greedy decode step over a static cache: what a serving loop runs."""

    def __init__(self, model, batch: int) -> None:
        import torch
        from transformers import StaticCache

        self.model, self.batch = model, batch
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self.ids = torch.randint(5, 1000, (batch, PROMPT), device="cuda")
        self.position = torch.full((batch, 1), PROMPT, dtype=torch.long, device="cuda")
        with torch.no_grad():
            out = model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits.argmax(-1)

    def step(self, token, position):
        out = self.model(input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)


def prepare_compiled(model, batch: int):
    """tokens -> None: runs that many steps of a loop compiled with reduce-overhead."""
    import torch

    decoder = Decoder(model, batch)
    # different tokens, so that different experts are chosen all over the batch
    compiled = torch.compile(decoder.step, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def run(tokens: int = 16) -> None:
        token = decoder.token
        for _ in range(tokens):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(token, decoder.position).clone()

    run(6)
    return run


def prepare_graph(model):
    """One decode step captured as it is, without a compiler."""
    import torch

    decoder = Decoder(model, 1)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            decoder.step(decoder.token, decoder.position)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            decoder.kept = decoder.step(decoder.token, decoder.position)

    def run(tokens: int = 8) -> None:
        for _ in range(tokens):
            graph.replay()

    run.keep = decoder  # type: ignore[attr-defined]
    return run


def generate(model, static: bool, tokens: int = 48) -> float:
    """Milliseconds of a token of `generate`, prefill taken out as the difference of two lengths."""
    import torch

    ids = torch.randint(5, 1000, (1, PROMPT), device="cuda")
    options = {"cache_implementation": "static"} if static else {}
    seconds = []
    for length in (tokens, 2 * tokens):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length,
            do_sample=False, pad_token_id=0, max_length=None, **options,
        )  # fmt: skip
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / tokens * 1e3


def worker(job: Job) -> None:
    """Prepare, say so, wait for the word, measure, print rows."""
    import torch

    torch._inductor.config.triton.cudagraph_trees = True
    model, fuse_seconds = build(job)
    weights_gib = torch.cuda.memory_allocated() / 2**30
    runs = {}
    for mode in list(job.modes):
        kind, _, batch = mode.partition(":")
        try:
            if kind == "compiled":
                runs[mode] = prepare_compiled(model, int(batch))
            elif kind == "graph":
                runs[mode] = prepare_graph(model)
            elif kind in ("static", "eager"):
                generate(model, kind == "static", 8)
        except Exception:
            traceback.print_exc()
            print(f"SKIPPED {mode}", flush=True)
            job.modes.remove(mode)
    prompt = torch.randint(5, 1000, (1, PREFILL), device="cuda")

    @torch.no_grad()
    def prefill() -> None:
        model(input_ids=prompt, logits_to_keep=1, use_cache=False)

    if "prefill" in job.modes:
        prefill()
    torch.cuda.synchronize()
    print("READY", flush=True)
    sys.stdin.readline()
    rows = []
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    read_bytes = sum(size for name, size in sizes.items() if "loraswitch" not in name and "embed" not in name)
    experts = sum(size for name, size in sizes.items() if "loraswitch_A" in name or "loraswitch_B" in name)
    for mode in job.modes:
        kind, _, batch = mode.partition(":")
        torch.cuda.reset_peak_memory_stats()
        tokens = batch_size = int(batch or 1)
        if kind in ("compiled", "graph"):
            each = 16 if kind == "compiled" else 8
            ms = median_ms(runs[mode]) / each
        elif kind == "prefill":
            ms, tokens = median_ms(prefill), PREFILL
        else:
            ms = statistics.median(generate(model, kind == "static", 32 if kind == "static" else 16) for _ in range(5))
        size = read_bytes + (
            experts * min(1.0, TOP_K * tokens / NUM_EXPERTS) if job.method not in ("backbone", "lora") else 0
        )
        rows.append(
            {
                "model": job.model, "layers": job.layers, "method": job.method, "mode": kind,
                "batch": batch_size, "tokens": tokens, "rank": job.rank,
                "ms": round(ms, 4), "ratio": None, "gb_per_s": round(size / ms / 1e6, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3), "weights_gib": round(weights_gib, 3),
                "fuse_seconds": round(fuse_seconds, 3),
            }
        )  # fmt: skip
    print("ROWS " + json.dumps(rows), flush=True)


# -------------------------------------------------------------------------------------------------------- the parent


def run_wave(wave: list[Job], log: Path) -> list[dict]:
    processes = []
    for i, job in enumerate(wave):
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(job))]
        stderr = open(log.with_suffix(f".{os.getpid()}.{i}.log"), "w")
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the jobs are the parallelism
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
        processes.append((job, process, stderr))
    rows = []
    ready = []
    for job, process, stderr in processes:
        line = ""
        while line.strip() != "READY" and (line := process.stdout.readline()):
            if line.startswith("SKIPPED"):
                print(f"  {job.model} {job.method} r={job.rank}: {line.strip()}, see {stderr.name}", flush=True)
        if line.strip() == "READY":
            ready.append((job, process))
        else:
            print(f"  FAILED to prepare {job}: {Path(stderr.name).read_text()[-1500:]}", flush=True)
    for job, process in ready:  # one at a time: nothing else runs on the GPU now
        process.stdin.write("GO\n")
        process.stdin.flush()
        found = [line for line in process.stdout if line.startswith("ROWS ")]
        process.wait()
        if not found:
            print(f"  FAILED to measure {job}", flush=True)
            continue
        rows += json.loads(found[0][5:])
        for row in json.loads(found[0][5:]):
            print(
                f"  {row['model']:13s} {row['method']:9s} r={row['rank']:<3d} {row['mode']:9s} batch {row['batch']:<3d} "
                f"{row['ms']:9.3f} ms {row['gb_per_s']:8.0f} GB/s  peak {row['peak_gib']:.2f} GiB  fuse {row['fuse_seconds']} s",
                flush=True,
            )
    return rows


def waves(todo: list[Job], gib: float, most: int) -> list[list[Job]]:
    """Jobs that prepare together: as many as memory and processors allow, a model's backbone with its methods."""
    result: list[list[Job]] = []
    left = 0.0
    for job in todo:
        if not result or job.gib() > left or len(result[-1]) >= most:
            result.append([])
            left = gib
        result[-1].append(job)
        left -= job.gib()
    return result


def add_ratios(rows: list[dict]) -> None:
    """To the unadapted backbone in the same mode; a merge step to the same backbone step too (its floor is in the notes)."""
    base = {(r["model"], r["mode"], r["batch"]): r["ms"] for r in rows if r["method"] == "backbone"}
    for row in rows:
        reference = base.get((row["model"], row["mode"], row["batch"]))
        row["ratio"] = round(row["ms"] / reference, 4) if reference else None


def copy_rate() -> float:
    """TB/s of reading and writing: what a merge cannot beat."""
    import torch

    source, target = (torch.randint(9, (2**29,), dtype=torch.int32, device="cuda") for _ in range(2))
    return round(2 * 2**31 / median_ms(lambda: target.copy_(source)) / 1e9, 3)


def linears_alone() -> dict:
    """The linear layers of Llama-2-7B in one CUDA graph (bench_linears.py): over pure reading, over cuBLAS."""
    import torch

    import bench_linears

    return bench_linears.measure("llama-2-7b", 8, [1], [0, 8, 16, 64], torch)


def header() -> dict:
    import peft
    import torch
    import transformers

    from peft_loraswitch import kernels

    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()
    return {
        "date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "driver": driver[0] if driver else "",
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "kernels": kernels.build_info() if kernels.available() else kernels.why_not(),
        "commit": os.environ.get("BENCH_COMMIT", commit), "dtype": "bfloat16", "num_experts": NUM_EXPERTS, "top_k": TOP_K,
    }  # fmt: skip


def draw(rows: list[dict], gpu: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [
        r for r in rows if r["model"] == "llama-2-7b" and r["mode"] == "compiled" and r["batch"] == 1 and r["ratio"]
    ]
    chosen.sort(key=lambda r: r["ratio"], reverse=True)
    names = {"kernels": "our kernels, no adapter", "lora": "PEFT LoRA", "torch": "routing in plain PyTorch"}
    labels = [names.get(r["method"], r["method"]) + (f", r = {r['rank']}" if r["rank"] else "") for r in chosen]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(chosen) + 1.2))
    colors = ["#4477aa" if r["method"] == "fused" else "#bbbbbb" for r in chosen]
    bars = axes.barh(labels, [r["ratio"] for r in chosen], color=colors)
    axes.bar_label(bars, labels=[f" {r['ratio']:.2f}x, {r['ms']:.2f} ms" for r in chosen])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlim(0, max(r["ratio"] for r in chosen) * 1.25)
    axes.set_xlabel(f"decode step over the unadapted backbone (Llama-2-7B shape, batch 1, compiled, bf16, {gpu})")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    methods = ["backbone", "lora", "torch", "kernels", "fused", "merge"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--modes", nargs="+", default=["compiled", "static", "eager", "prefill", "graph"])
    parser.add_argument("--layers", type=int, default=8, help="depth of the models other than llama-2-7b")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; the picture goes beside it")
    parser.add_argument("--no-linears", action="store_true", help="leave out the linear layers alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Job(**json.loads(args.worker)))
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU.")
    head = header()
    output = (
        args.output or HERE / "results" / f"decode_{head['gpu'].replace('NVIDIA ', '').replace(' ', '_').lower()}.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    print(head, flush=True)
    started = time.time()
    result = {"header": head, "linears": None, "rows": []}
    result["copy_tb_per_s"] = copy_rate()
    if not args.no_linears:
        result["linears"] = linears_alone()
        torch.cuda.empty_cache()
    memory = torch.cuda.mem_get_info()[0] / 2**30 - 4
    todo = jobs(args.models, args.methods, args.modes, args.layers)
    for n, wave in enumerate(plan := waves(todo, memory, max(2, (os.cpu_count() or 4) // 2))):
        print(f"wave {n + 1} of {len(plan)}: {len(wave)} jobs, {time.time() - started:.0f} s so far", flush=True)
        result["rows"] += run_wave(wave, output)
        add_ratios(result["rows"])
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'model':13s} {'method':9s} rank mode      batch        ms  ratio")
    for r in result["rows"]:
        print(
            f"{r['model']:13s} {r['method']:9s} {r['rank']:4d} {r['mode']:9s} {r['batch']:5d} {r['ms']:9.3f}  {r['ratio']}"
        )
    try:
        draw(result["rows"], head["gpu"], output.with_suffix(".png"))
    except (ImportError, ValueError) as error:
        print(f"no picture: {error}")
    print(f"{output}: {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
