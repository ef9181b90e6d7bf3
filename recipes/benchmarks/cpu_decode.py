"""Decoding on a CPU: what `fuse_for_inference()` changes there, for a model of a laptop's size.

    python -m recipes.benchmarks.cpu_decode                 # two threads; into recipes/results/cpu_decode.json
    python -m recipes.benchmarks.cpu_decode --threads 4 --output other.json

A Llama with random weights (hidden size 1024, 2 layers, float32), 8 experts of rank 8 or 64, top-2, all linears, eager: a decode
step of one sample and of several, and a prompt. The backbone, the adapter unfused and the adapter fused take turns. A ratio is
that of processor time (of all threads, which do not spin while they wait), lowest tenth: it hardly depends on what else runs on
the same processors. The clock's lowest tenth stands beside it, and is worth something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")  # before PyTorch is imported

from recipes.benchmarks.decode.plan import TARGETS
from recipes.checkout import ROOT, processor, versions

SIZE = {"vocabulary": 8192, "hidden": 1024, "intermediate": 2816, "layers": 2, "heads": 16}
TINY = {"vocabulary": 96, "hidden": 32, "intermediate": 48, "layers": 2, "heads": 4}
# name: batch, tokens of each sample in one forward
CASES = {"decode, batch 1": (1, 1), "decode, batch 8": (8, 1), "prompt of 128": (1, 128)}
METHODS = ("backbone", "unfused", "fused")
PAST = 32  # tokens in the cache before
EACH_TURN = 5  # samples


def build(size: dict[str, int], rank: int) -> Any:
    """A Llama with a routed adapter on all linears."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_loraswitch import LoRASwitchConfig

    config = LlamaConfig(
        vocab_size=size["vocabulary"], hidden_size=size["hidden"], intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["heads"],
    )  # fmt: skip
    torch.manual_seed(0)
    adapter = LoRASwitchConfig(r=rank, num_experts=8, top_k=2, target_modules=TARGETS, init_weights=False)
    return get_peft_model(LlamaForCausalLM(config), adapter).eval().requires_grad_(False)


def step_of(model: Any, batch: int, tokens: int) -> Any:
    """A function that runs one forward, after `PAST` cached tokens if it decodes."""
    import torch
    from transformers import StaticCache

    ids = torch.randint(5, model.config.vocab_size, (batch, PAST + tokens))
    if tokens > 1:
        return lambda: model(input_ids=ids[:, PAST:], use_cache=False, logits_to_keep=1)
    cache: Any = StaticCache(config=model.config, max_cache_len=2 * PAST)
    model(input_ids=ids[:, :PAST], past_key_values=cache)

    def step() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PAST)
        return model(input_ids=ids[:, PAST:], past_key_values=cache)

    return step


def measure(model: Any, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a forward by each method, of processor time and by the clock, in turns, and ratios of the first."""
    step = step_of(model, batch, tokens)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    clocks: dict[str, list[float]] = {name: [] for name in METHODS}

    def sample(name: str) -> None:
        step()
        for _ in range(EACH_TURN):
            clock, start = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.process_time() - start) * 1e3)
            clocks[name].append((time.perf_counter() - clock) * 1e3)

    for n in range(max(1, rounds // EACH_TURN)):
        with model.disable_adapter():
            sample("backbone")
        for name in ("unfused", "fused") if n % 2 else ("fused", "unfused"):
            with model.fuse_for_inference() if name == "fused" else contextlib.nullcontext():
                sample(name)
    low = {name: statistics.quantiles(values, n=10)[0] for name, values in times.items()}
    return {
        **{f"{name}_ms": round(value, 3) for name, value in low.items()},
        **{f"{name}_clock_ms": round(statistics.quantiles(values, n=10)[0], 3) for name, values in clocks.items()},
        "unfused_over_backbone": round(low["unfused"] / low["backbone"], 3),
        "fused_over_backbone": round(low["fused"] / low["backbone"], 3),
        "fused_over_unfused": round(low["fused"] / low["unfused"], 3),
    }


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:16s} r={row['rank']:<3d} backbone {row['backbone_ms']:7.2f} ms  unfused {row['unfused_over_backbone']:.3f}"
        f"  fused {row['fused_over_backbone']:.3f}  fused/unfused {row['fused_over_unfused']:.3f}"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: everything but the numbers")
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "results" / "cpu_decode.json")
    args = parser.parse_args(argv)
    import torch

    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        for rank in args.ranks:
            model = build(TINY if args.tiny else SIZE, rank)
            for name, (batch, tokens) in CASES.items():
                row = {"case": name, "batch": batch, "tokens": tokens, "rank": rank}
                rows.append(row | measure(model, batch, tokens, args.rounds))
                print(line(rows[-1]), flush=True)
    torch.set_num_threads(threads)
    header = {
        **versions("torch", "transformers"), "processor": processor(), "threads": args.threads, "rounds": args.rounds,
        "size": TINY if args.tiny else SIZE,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    print(args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
