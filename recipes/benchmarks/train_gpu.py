"""What an adapter costs a training step on a GPU: Llama-3.1-8B's shape, all seven linears, random weights.

    python -m recipes.benchmarks.train_gpu                                  # every row; into recipes/results/train_<gpu>.json
    python -m recipes.benchmarks.train_gpu --modes checkpointing            # rows of one mode; those of others stay in the file
    python -m recipes.benchmarks.train_gpu --rows floor fused-8x8 --steps 3
    python -m recipes.benchmarks.train_gpu --modes 4bit compiled --rows floor fused-8x8 --seconds 200
    python -m recipes.benchmarks.train_gpu --crossover --layers 8           # many experts, both ways; its own file
    python -m recipes.benchmarks.train_gpu --products                       # single products, in other forms; its own file

A step is what Trainer and TRL make of it: bf16 autocast, a float32 adapter on a bf16 backbone, forward, backward, fused AdamW.
"floor" is the same step with nothing adapted: gradients of activations only. All rows run in one process on one backbone, whose
adapter is put on and taken off; times are medians, ratios are over the floor of the same mode and number of tokens.

A row is named `method-ExR`: lora-16 (PEFT's LoRA of rank 16), dense-8x8 (LoRA-Switch in the plain form of `layer.py`, 8
experts of rank 8), fused-8x8 (as it trains by itself), contracted-8x8 and pairs-8x8 (the same, but made to multiply by all
experts at once, or to go by (token, expert) pairs: what `CROSSOVER` of `training/pair_products.py` chooses between),
router_only-8x8 (experts frozen), layerwise-8x8 (a router in every linear, `recipes/quality/moe_lora.py`). With k3 at the end
(pairs-64x16k3) a token takes 3 experts. Modes: checkpointing (2 x 2,048 tokens, the default of TRL), plain (1 x 2,048,
nothing checkpointed), compiled (as checkpointing, `torch.compile` of the model), 4bit (as checkpointing, bitsandbytes' NF4
linears).

`times` are those of all measured steps, `host_ms` is the median time after which the host was done with a step (the GPU may have
been at work for longer), `gc_ms` what Python's garbage collector took in all measured steps together.

`bound_gib` is the floor's peak and the adapter's parameters, gradients and optimizer state; `peak_gib` is what was measured.
`loss` is that of the first step, `loss_end` of the last: from the same seeds, dense and fused rows start alike
(`train_losses.py` compares their course).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.training import fast_linears
from peft_loraswitch.training.pair_products import forced
from recipes.benchmarks import train_products
from recipes.checkout import ROOT, versions
from recipes.quality.moe_lora import MoELoRAModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODES = ("checkpointing", "plain", "compiled", "4bit")
ROWS = {
    "checkpointing": ["floor", "lora-16", "lora-64", "dense-8x8", "fused-8x8", "router_only-8x8", "fused-8x16", "fused-8x64",
                      "fused-32x16", "dense-8x64", "lora-512", "layerwise-8x8"],
    "plain": ["floor", "lora-16", "dense-8x8", "fused-8x8", "router_only-8x8"],
    "compiled": ["floor", "lora-16", "fused-8x8"],
    "4bit": ["floor", "lora-16", "dense-8x8", "fused-8x8"],
}  # fmt: skip
# Both ways at sizes around the crossover, for 2, 1 and 4 experts a token.
CROSSOVER_SIZES = ["16x16k2", "32x16k2", "48x16k2", "64x16k2", "128x16k2", "8x128k2",
                   "16x16k1", "32x16k1", "64x16k1", "64x16k4", "96x16k4", "128x16k4"]  # fmt: skip
CROSSOVER_ROWS = ["floor", *(f"{method}-{size}" for size in CROSSOVER_SIZES for method in ("contracted", "pairs"))]
BARS = {
    ("checkpointing", "fused-8x8"): 1.15, ("checkpointing", "fused-8x16"): 1.18, ("checkpointing", "fused-8x64"): 1.28,
    ("checkpointing", "fused-32x16"): 1.22, ("checkpointing", "router_only-8x8"): 1.08, ("plain", "fused-8x8"): 1.25,
    ("compiled", "fused-8x8"): 1.15, ("4bit", "fused-8x8"): 1.15,
}  # fmt: skip
KINDS = (  # of kernels, by words in their names; the first that fits
    ("pairs", ("_to_rank_kernel", "_from_rank_kernel", "_weight_gradient_kernel")),
    ("attention", ("flash", "fmha", "attention", "softmax_warp")),
    ("products", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "gemv", "wgmma", "xmma")),
    ("gates", ("_gate_kernel", "_gate_backward_kernel")),
    ("optimizer", ("multi_tensor", "foreach", "adam")),
    ("4bit", ("quantize",)),
    ("copies", ("copy", "memcpy", "memset", "cat", "fill")),
    ("sums", ("reduce",)),
    ("elementwise", ("elementwise", "triton")),
)


class Row(NamedTuple):
    """What is measured, from its name; top_k: 0 is that of all rows."""

    name: str
    method: str
    experts: int
    rank: int
    top_k: int = 0

    @classmethod
    def of(cls, name: str) -> Row:
        method, _, size = name.partition("-")
        size, _, top_k = size.partition("k")
        experts, _, rank = size.rpartition("x")
        return cls(name, method, int(experts or 0), int(rank or 0), int(top_k or 0))

    def way(self) -> AbstractContextManager[None]:
        """Within which the row's steps run."""
        if self.method == "dense":
            return fast_linears.plain()
        return forced(self.method == "pairs") if self.method in ("contracted", "pairs") else nullcontext()


def backbone(args: argparse.Namespace, quantised: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // args.head_dim, head_dim=args.head_dim,
        num_key_value_heads=max(args.hidden // args.head_dim // 4, 1), max_position_embeddings=4096, rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    return _in_4_bit(model, args.device) if quantised else model


def _in_4_bit(model: LlamaForCausalLM, device: str) -> LlamaForCausalLM:
    """Its linears as NF4, as `BitsAndBytesConfig(load_in_4bit=True)` would load them."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            four.weight = weight
            model.set_submodule(name, four.to(device))
            module.weight = None
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


def adapted(model: LlamaForCausalLM, row: Row, args: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """(the model with the row's adapter, what takes that off again)"""
    torch.manual_seed(1)
    if row.method == "floor":
        return model, lambda: None
    if row.method == "layerwise":
        ranks = {name: row.rank for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS}
        mixture = MoELoRAModel(model, ranks, row.experts, row.top_k or args.top_k)
        for module in mixture.modules():
            if hasattr(module, "experts_b"):
                torch.nn.init.normal_(module.experts_b, std=0.02)

        def take_off() -> None:
            for name in ranks:
                model.set_submodule(name, model.get_submodule(name).base_layer)

        return mixture, take_off
    if row.method == "lora":
        config: Any = LoraConfig(r=row.rank, target_modules=TARGETS, init_lora_weights=False)
    else:
        config = LoRASwitchConfig(
            r=row.rank, num_experts=row.experts, top_k=row.top_k or args.top_k, target_modules=TARGETS, init_weights=False,
            trainable="router" if row.method == "router_only" else "all",
        )  # fmt: skip
    with torch.device(args.device):
        peft = get_peft_model(model, config)
    return peft, peft.unload


def measure(model: LlamaForCausalLM, row: Row, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    samples = args.batch if mode != "plain" else max(args.batch // 2, 1)
    ids = torch.randint(0, args.vocab, (samples, args.length), generator=torch.Generator().manual_seed(0)).to(
        args.device
    )
    if mode == "plain":
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    target, take_off = adapted(model, row, args)
    if mode == "compiled" and any(hasattr(model, f"_require_grads_hook{s}") for s in ("", "s")):
        model.disable_input_require_grads()  # PEFT has enabled them, by a hook that is not compiled
    target.train()
    trained = [p for p in target.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, fused=args.device == "cuda") if trained else None
    called = torch.compile(target) if mode == "compiled" else target
    embed = model.get_input_embeddings()

    def step() -> torch.Tensor:
        inputs = {"input_ids": ids}
        if mode == "compiled":  # which knows no hook that has the embedding ask for a gradient
            inputs = {"inputs_embeds": embed(ids).requires_grad_()}
        with torch.autocast(args.device, torch.bfloat16):
            loss = called(**inputs, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    start = time.perf_counter()
    with row.way():
        losses = [step() for _ in range(args.warmup)]
        synchronize(args.device)
        warm = time.perf_counter() - start
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times, host_times = [], []
        with Collecting() as collecting:
            for _ in range(args.steps):
                start = time.perf_counter()
                losses.append(step())
                host_times.append((time.perf_counter() - start) * 1e3)
                synchronize(args.device)
                times.append((time.perf_counter() - start) * 1e3)
        peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
        profile = kernels_by_kind(step) if args.profile and args.device == "cuda" else {}
    adapter = sum(p.numel() for p in trained) if row.method != "floor" else 0
    frozen = sum(
        p.numel() * p.element_size() for n, p in target.named_parameters() if _of_adapter(n) and not p.requires_grad
    )
    result = {
        "model": args.model, "method": row.method, "mode": mode, "experts": row.experts,
        "top_k": (row.top_k or args.top_k) if row.experts else 0, "rank": row.rank, "tokens": samples * args.length,
        "ms": round(statistics.median(times), 2), "ms_fastest": round(min(times), 2), "ms_slowest": round(max(times), 2),
        "ratio": 0.0, "host_ms": round(statistics.median(host_times), 2), "times": [round(each, 1) for each in times],
        "gc_ms": round(collecting.seconds * 1e3, 1), "peak_gib": round(peak, 3),
        "adapter_gib": round((16 * adapter + frozen) / 2**30, 3),
        "loss": round(losses[0].item(), 5), "loss_end": round(losses[-1].item(), 5), "warmup_s": round(warm, 1),
    }  # fmt: skip
    if profile:
        result["kernels"] = profile
    take_off()
    return result


class Collecting:
    """The time that Python's garbage collector takes within it."""

    def __init__(self) -> None:
        self.seconds = self.start = 0.0

    def _note(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self.start = time.perf_counter()
        elif self.start:  # a collection may have begun before
            self.seconds += time.perf_counter() - self.start

    def __enter__(self) -> Collecting:
        gc.callbacks.append(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._note)


def _ask_for_gradient(module: Any, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_()


def let_go(device: str) -> None:
    """What a row has left: its adapter, its optimizer's state, its compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _of_adapter(name: str) -> bool:
    return any(word in name for word in ("lora_", "loraswitch_", "experts_a", "experts_b", "router"))


def kernels_by_kind(step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds and launches of one step's kernels, the longest of them, and all copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    copies: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    spans = []
    for event in traced.events() or []:
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        took = (event.time_range.end - event.time_range.start) / 1e3
        spans.append((event.time_range.start, event.time_range.end))
        lowered = event.name.lower()
        kind = next((kind for kind, words in KINDS if any(word in lowered for word in words)), "other")
        for table, key in ((kinds, kind), (names, event.name[:110]), (copies, event.name[:200])):
            if table is not copies or kind == "copies":
                table[key][0] += took
                table[key][1] += 1
    busy, until = 0.0, 0.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:25]
    return {
        "busy_ms": round(busy / 1e3, 2),
        "by_kind": {kind: [round(took, 2), int(count)] for kind, (took, count) in sorted(kinds.items())},
        "longest": {name: [round(took, 2), int(count)] for name, (took, count) in longest},
        "copies": {name: [round(took, 2), int(count)] for name, (took, count) in sorted(copies.items())},
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def header(args: argparse.Namespace) -> dict[str, Any]:
    made = versions("torch", "transformers", "peft", "peft_loraswitch", "accelerate")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    kept = ("hidden", "intermediate", "layers", "vocab", "batch", "length", "top_k", "steps", "warmup")
    return {"gpu": name, **made, "cuda": torch.version.cuda, "settings": {key: getattr(args, key) for key in kept}}


def write(report: dict[str, Any], path: Path) -> None:
    """With the rows that the file has from the same GPU, settings and commit, and that have not been measured again."""
    rows = {_key(row): row for row in report["rows"]}
    if path.exists():
        earlier = json.loads(path.read_text())
        alike = all(
            earlier["header"].get(key) == report["header"][key] for key in ("gpu", "torch", "commit", "settings")
        )
        for row in earlier["rows"] if alike else ():
            rows.setdefault(_key(row), row)
    ordered = sorted(
        rows.values(), key=lambda row: (MODES.index(row["mode"]), row["experts"], row["rank"], row["top_k"])
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": report["header"], "rows": ordered}, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "method", "mode", "experts", "top_k", "rank", "tokens"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'mode':14}{'row':18}{'ms':>9}{'ratio':>7}{'bar':>6}{'GiB':>8}{'over':>6}   kernels: ms (launches)"]
    for row in rows:
        size = f"{row['experts']}x{row['rank']}" if row["experts"] else f"{row['rank']}"
        name = row["method"] + (f"-{size}" if row["rank"] else "")
        shown_name = name + ("" if row["top_k"] in (0, 2) else f"k{row['top_k']}")
        bar = BARS.get((row["mode"], name))
        kinds = row.get("kernels", {}).get("by_kind", {})
        shown = ", ".join(f"{kind} {took:.0f} ({count})" for kind, (took, count) in kinds.items())
        over = row["peak_gib"] / row["bound_gib"] if row.get("bound_gib") else 0.0
        lines.append(
            f"{row['mode']:14}{shown_name:18}{row['ms']:>9.1f}{row['ratio']:>7.3f}{bar or '':>6}{row['peak_gib']:>8.2f}"
            f"{over:>6.3f}"
            f"   {shown}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rows", nargs="+", default=None, help="names of rows; without it those of each mode")
    parser.add_argument("--crossover", action="store_true", help="the rows of CROSSOVER_SIZES, checkpointing alone")
    parser.add_argument("--products", action="store_true", help="single products in other forms: `train_products.py`")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 512], help="E * r, with --products")
    parser.add_argument("--rank", type=int, default=8, help="with --products")
    parser.add_argument("--model", default="llama-3.1-8b", help="its name in the file")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="samples of a step (half of them in mode plain)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0, help="begin no row after so many seconds; 0: no limit")
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="no kernel times")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="left out: recipes/results/train_<gpu>.json")
    args = parser.parse_args(argv)
    if args.output is None:
        gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0] if args.device == "cuda" else args.device
        what = "train_crossover" if args.crossover else "train_products" if args.products else "train"
        args.output = ROOT / "recipes" / "results" / f"{what}_{gpu.lower()}.json"
    if args.crossover:
        args.modes, args.rows = ["checkpointing"], args.rows or CROSSOVER_ROWS
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.products:
        return train_products.main(args, header(args), args.output)
    begun = time.perf_counter()
    report: dict[str, Any] = {"header": header(args), "rows": []}
    model, four_bits = None, False
    asking: Any = None
    for mode in args.modes:
        if mode == "4bit":
            try:
                import bitsandbytes  # noqa: F401
            except ImportError:
                print("4bit: left out, bitsandbytes is not installed", file=sys.stderr)
                continue
        if model is None or four_bits != (mode == "4bit"):
            model = None
            gc.collect()
            model, four_bits = backbone(args, mode == "4bit"), mode == "4bit"
        if asking is not None:
            asking.remove()
        asking = None
        if mode != "compiled":  # what model.enable_input_require_grads() does
            asking = model.get_input_embeddings().register_forward_hook(_ask_for_gradient)
        floor: dict[str, Any] | None = None
        for name in args.rows or ROWS[mode]:
            if args.seconds and time.perf_counter() - begun > args.seconds:
                print(f"{mode} {name}: left out, {args.seconds:.0f} s are over", file=sys.stderr)
                continue
            try:
                row = measure(model, Row.of(name), mode, args)
            except torch.cuda.OutOfMemoryError as error:
                print(f"{mode} {name}: {str(error)[:100]}", file=sys.stderr)
                break  # what is left on the device belongs to nobody
            let_go(args.device)
            floor = row if row["method"] == "floor" else floor
            if floor is not None:
                row["ratio"] = round(row["ms"] / floor["ms"], 4)
                row["bound_gib"] = round(floor["peak_gib"] + row["adapter_gib"], 3)
            report["rows"].append(row)
            print(table([row]).splitlines()[-1], f"[{time.perf_counter() - begun:.0f} s]", flush=True)
            write(report, args.output)
    report["header"]["seconds"] = round(time.perf_counter() - begun)
    write(report, args.output)
    print(table(report["rows"]))
    return report


if __name__ == "__main__":
    main()
