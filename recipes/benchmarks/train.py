"""What LoRA-Switch costs in plain PyTorch on a CPU: a training step against PEFT's LoRA, a forward against the backbone.

    python -m recipes.benchmarks.train                  # some minutes; into recipes/results/train_cpu.json
    python -m recipes.benchmarks.train --hidden 2048    # another size

On a GPU the same command runs `train_gpu.py` (with --cpu: this one).

Training step: forward, backward and AdamW, of LoRA-Switch with E experts of rank r and of PEFT's LoRA with rank E * r on
the same linears: the same number of adapter weights. Forward: 512 tokens without gradients, against the unadapted backbone.

The contestants take turns within one process, one round each in an order that alternates, and what is reported is the
median over rounds of the ratio *within* a round: other work on the machine slows all of them alike. Beside it stands the
same ratio of processor time, which other work hardly touches. Before anything is timed, outputs are compared to PEFT's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_loraswitch import LoRASwitchConfig, __version__
from recipes.benchmarks import train_gpu
from recipes.checkout import ROOT, git, processor

BARS = {"training_step": 0.95, "forward": 1.25}


def backbone(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 64, 1),
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype))


def switch(args: argparse.Namespace, **settings: Any) -> torch.nn.Module:
    # B random: with B = 0 the gradients of A and of the router are zero, and a benchmark should not multiply zeros
    config = LoRASwitchConfig(
        r=args.rank,
        num_experts=args.experts,
        top_k=args.top_k,
        lora_alpha=args.rank,
        target_modules="all-linear",
        init_weights=False,
        **settings,
    )
    return get_peft_model(backbone(args), config)


def lora(args: argparse.Namespace) -> torch.nn.Module:
    rank = args.experts * args.rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(backbone(args), config)


def forward_of(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    model.eval()

    def forward() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, logits_to_keep=1).logits

    return forward


def step_of(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> Any:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


Times = dict[str, list[tuple[float, float]]]  # per contestant and round: seconds, processor seconds of all threads


def take_turns(contestants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Times:
    """Times of each call; the order within a round alternates, so that no one always runs after the same other."""
    times: Times = {name: [] for name in contestants}
    for number in range(-warmup, rounds):
        names = list(contestants) if number % 2 else list(reversed(contestants))
        for name in names:
            start, cpu_start = time.perf_counter(), time.process_time()
            contestants[name]()
            if number >= 0:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
        if sys.stderr.isatty():
            print(f"\r  round {max(number + 1, 0)} of {rounds}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return times


def compare(times: Times, baseline: str, bar: float) -> dict[str, Any]:
    """Median seconds of each, and median and quartiles of the ratio to `baseline` within a round."""
    result: dict[str, Any] = {"baseline": baseline, "rounds": len(times[baseline]), "bar": bar, "contestants": {}}
    for name, values in times.items():
        rounds = list(zip(values, times[baseline], strict=True))
        ratios = [value[0] / base[0] for value, base in rounds]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result["contestants"][name] = {
            "median_seconds": statistics.median(value[0] for value in values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [quartiles[0], quartiles[2]],
            "cpu_time_ratio": statistics.median(value[1] / base[1] for value, base in rounds),
        }
    return result


def check_outputs(args: argparse.Namespace, ids: torch.Tensor) -> float:
    """Before timing: the routed model with one expert of rank E * r and LoRA's weights gives LoRA's output. Returns the
    largest relative difference, and refuses to go on above a rounding."""
    reference = lora(args).eval()
    one = argparse.Namespace(**{**vars(args), "rank": args.experts * args.rank, "experts": 1, "top_k": 1})
    ours = switch(one).eval()
    weights = reference.state_dict()
    for name, tensor in ours.state_dict().items():
        if "loraswitch_A" in name or "loraswitch_B" in name:
            tensor.copy_(weights[name.replace("loraswitch_", "lora_")])
    with torch.no_grad():
        expected, actual = reference(input_ids=ids).logits, ours(input_ids=ids).logits
    difference = ((actual - expected).norm() / expected.norm()).item()
    if not difference < 20 * torch.finfo(expected.dtype).eps:
        raise SystemExit(f"LoRA-Switch with one expert is not LoRA: {difference:.2e} apart. Nothing was timed.")
    return difference


def header(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "peft_loraswitch": __version__,
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", "peft_loraswitch")),
        "date": time.strftime("%Y-%m-%d"),
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
    }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'':16}{'':14}{'median':>10}{'ratio':>8}{'quartiles':>14}{'cpu time':>10}{'bar':>7}"]
    for name, result in results.items():
        for contestant, row in result["contestants"].items():
            low, high = row["ratio_quartiles"]
            bar = f"{result['bar']:.2f}" if contestant == "LoRA-Switch" else ""
            lines.append(
                f"{name:16}{contestant:14}{1000 * row['median_seconds']:>7.0f} ms{row['ratio']:>8.3f}"
                f"{f'{low:.3f}-{high:.3f}':>14}{row['cpu_time_ratio']:>10.3f}{bar:>7}"
            )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the Llama-shaped backbone")
    parser.add_argument("--intermediate", type=int, default=0, help="MLP size (default 11/4 of hidden)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample: batch * length tokens a step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "results" / "train_cpu.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"header": header(args)}
    ids = torch.randint(0, args.vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    report["header"]["one_expert_against_lora"] = check_outputs(args, ids)

    base = backbone(args)
    linears = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    report["header"]["backbone_parameters"] = sum(p.numel() for p in base.parameters())
    report["header"]["adapted_linears"] = len(linears)
    forwards = {"backbone": base, "LoRA-Switch": switch(args), f"LoRA r={args.experts * args.rank}": lora(args)}
    times = take_turns({name: forward_of(model, ids) for name, model in forwards.items()}, args.rounds)
    results = {"forward": compare(times, "backbone", BARS["forward"])}

    steps = {f"LoRA r={args.experts * args.rank}": lora(args), "LoRA-Switch": switch(args)}
    times = take_turns({name: step_of(model, ids) for name, model in steps.items()}, args.rounds)
    results["training_step"] = compare(times, next(iter(steps)), BARS["training_step"])
    report["header"]["load_after"] = round(os.getloadavg()[0], 2)
    report["results"] = results

    h = report["header"]
    print(f"{h['cpu']}, {h['threads']} threads, torch {h['torch']}, peft {h['peft']}, commit {h['commit']}")
    print(
        f"Llama-shaped, {h['backbone_parameters'] / 1e6:.0f} M parameters, hidden {args.hidden}, {args.layers} layers, "
        f"{len(linears)} adapted linears, {args.dtype}; E = {args.experts}, r = {args.rank}, k = {args.top_k}; "
        f"{args.batch} x {args.length} tokens"
    )
    print(table(results))
    for name, result in results.items():
        ratio = result["contestants"]["LoRA-Switch"]["ratio"]
        verdict = "within" if ratio <= result["bar"] else "ABOVE"
        print(f"{name}: {ratio:.3f} of {result['baseline']}, {verdict} the bar of {result['bar']:.2f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    if torch.cuda.is_available() and "--cpu" not in sys.argv:
        train_gpu.main(sys.argv[1:])
    else:
        main([word for word in sys.argv[1:] if word != "--cpu"])
