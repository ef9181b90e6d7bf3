"""What LoRA-Switch costs in vLLM, and whether bf16 with CUDA graphs gives what PEFT gives. Needs a GPU, vLLM and PEFT.

    python -m recipes.benchmarks.serving equality --output equality.json     # a tiny model, about 2 minutes
    python -m recipes.benchmarks.serving speed --output speed.json           # Llama-3.1-8B's shape, about 7 minutes
    python -m recipes.benchmarks.serving speed --layers 16 --rounds 2 --profile --engines plugin vllm_rank_16   # 4 minutes
    python -m recipes.benchmarks.serving table serving.json   # the table of recipes/serve.md

equality: logprobs that vLLM gives to PEFT's float32 tokens, for the base model, plain LoRA and LoRA-Switch adapters in one
batch. What the base model's and the LoRA's differ by is vLLM's own noise; an adapter whose logprobs differ by more than three
times that fails, and one whose router is rolled has to, as have routers that forget the context. Compared are means of the
nine tenths of the logprobs that differ least: where a router finds two experts nearly equal, bf16 takes another one than
float32, and a single logprob then differs by up to 2. Both prefill and decoding are judged; `--prefix-caching` lets requests
go on from blocks of the KV cache that others have written.

speed (without PEFT): time of one decode step at batch 1, 8, 32 and 128, random weights. Three engines, each in a process of its
own: vLLM alone with max_lora_rank 16 and with E * r, and with the plugin; `--engines` takes some of them. Base model, LoRA of
rank 16, LoRA of rank E * r and LoRA-Switch (E experts of rank r, top-k) on all linears take turns. A step is (time of 160 tokens
- time of 32) / 128; the smallest of `--rounds`. With `--profile` also how much of a step the GPU computes, in how many kernels
(the rest is vLLM's work on the host), and which they are. The result is written after each engine.

Wanted: LoRA-Switch at 0.95 or more of the speed of a LoRA of rank 16 without the plugin (`speed_over_lora_16`), and the base
model with the plugin as fast as without (`base_speed_with_plugin`), at each batch.

Both run vLLM in the process itself and call the plugin's `register` where vLLM would, so the package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.checkout import ROOT, commit

BATCHES = (1, 8, 32, 128)
SHORT, LONG = 32, 160  # tokens
PROFILED = (1, 128)  # batches
KERNELS_SHOWN = 12
PROMPT = 16  # tokens
BLOCK = 32  # tokens in a block of the KV cache; prompts have up to three
NOISE_FACTOR = 3.0
NEAR_TIES = 0.1  # the part of the logprobs that may differ by any amount
TOOLS = ROOT / "tests" / "tools"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRONG = {"rolled": "paper", "forgets": "context_0.98"}  # adapters with a wrong router, and of which each is the copy


# ------------------------------------------------------------------------------------------------------------- engines


def prepare(plugin: bool) -> None:
    """This process as one of vLLM's: offline, in one process, our plugin only if it is asked for."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # all is greedy, and FlashInfer need not be installed
    if plugin:
        os.environ.setdefault("LORASWITCH_UNTESTED_VLLM", "1")
        from peft_loraswitch.vllm_plugin import register

        register()


def engine(model: Path, max_lora_rank: int, max_loras: int, **settings: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(model), dtype="bfloat16", enable_lora=True, max_loras=max_loras, max_cpu_loras=max(max_loras, 8),
        max_lora_rank=max_lora_rank, skip_tokenizer_init=True, disable_log_stats=True, **settings,
    )  # fmt: skip


def versions() -> dict[str, str]:
    import torch
    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"vllm": vllm.__version__, "torch": torch.__version__, "gpu": gpu, "commit": commit()}


def in_a_process(*arguments: str) -> Any:
    """What another run of this file prints as its last line of JSON; libraries may say something when it ends."""
    command = [sys.executable, "-m", "recipes.benchmarks.serving", *arguments]
    path = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit status {done.returncode}:\n{done.stdout[-3000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


# ------------------------------------------------------------------------------------------------------------ equality


def equality(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "files"
        in_a_process("reference", "--folder", str(folder))
        flags = ["--eager"] * args.eager + ["--prefix-caching"] * args.prefix_caching
        return dict(in_a_process("equality-engine", "--folder", str(folder), *flags))


def reference(args: argparse.Namespace) -> dict[str, Any]:
    """Tiny model, adapters and PEFT's answers, by the tests' own tool."""
    import served_files  # of TOOLS

    files = served_files.make(args.folder, "llama")
    rolled, forgets = (args.folder / name for name in WRONG)
    shutil.copytree(args.folder / WRONG["rolled"], rolled)
    shutil.copytree(args.folder / WRONG["forgets"], forgets)
    settings = json.loads((forgets / CONFIG).read_text())
    (forgets / CONFIG).write_text(json.dumps({**settings, "router_decay": 0.0}))
    from safetensors.torch import load_file, save_file

    tensors = load_file(rolled / WEIGHTS)
    (router,) = [name for name in tensors if "router" in name]
    save_file({**tensors, router: tensors[router].roll(1, 0).contiguous()}, rolled / WEIGHTS)
    return {"adapters": list(files.answers), "routers": served_files.declared_routers("llama")}


def equality_engine(args: argparse.Namespace) -> dict[str, Any]:
    prepare(plugin=True)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    content = json.loads((args.folder / "answers.json").read_text())
    answers = {**content["answers"], **{name: content["answers"][right] for name, right in WRONG.items()}}
    routers = ["layers.1.self_attn.q_proj", "layers.0.mlp.gate_proj", "layers.1.mlp.down_proj"]
    graphs = {} if args.eager else {"cudagraph_capture_sizes": [1, 8, 32, 64, 256]}
    llm = engine(
        args.folder / "base", 64, len(answers), max_model_len=256, max_num_seqs=64, max_logprobs=-1, enforce_eager=args.eager,
        gpu_memory_utilization=0.3, kv_cache_memory_bytes=1 << 30, block_size=BLOCK, enable_prefix_caching=args.prefix_caching,
        compilation_config=graphs, additional_config={"loraswitch": {"router_modules": routers}},
    )  # fmt: skip
    requests = {
        name: None if name == "base" else LoRARequest(name, number + 1, str(args.folder / name))
        for number, name in enumerate(answers)
    }
    jobs = [(name, index) for index in range(len(content["prompts"])) for name in answers if index < len(answers[name])]
    loras = [requests[name] for name, _ in jobs]
    forced = [(name, index, place) for name, index in jobs for place in range(len(answers[name][index]["tokens"]))]
    scored = llm.generate(
        [
            {"prompt_token_ids": content["prompts"][index] + answers[name][index]["tokens"][:place]}
            for name, index, place in forced
        ],
        SamplingParams(temperature=0, max_tokens=1, logprobs=-1),
        lora_request=[requests[name] for name, _, _ in forced],
    )
    free = llm.generate(
        [{"prompt_token_ids": content["prompts"][index]} for _, index in jobs],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0),
        lora_request=loras,
    )
    differences: dict[str, list[float]] = {name: [] for name in answers}
    decoded: dict[str, list[float]] = {name: [] for name in answers}
    first: dict[str, int] = dict.fromkeys(answers, 0)
    for (name, index, place), by_prefill in zip(forced, scored, strict=True):
        token, logprob = answers[name][index]["tokens"][place], answers[name][index]["logprobs"][place]
        differences[name].append(abs(by_prefill.outputs[0].logprobs[0][token].logprob - logprob))
    for (name, index), by_decode in zip(jobs, free, strict=True):
        wanted = answers[name][index]
        output = by_decode.outputs[0]
        first[name] += output.token_ids[0] == wanted["tokens"][0]
        for token, row, given, logprob in zip(
            output.token_ids, output.logprobs, wanted["tokens"], wanted["logprobs"], strict=True
        ):
            if token != given:
                break
            decoded[name].append(abs(row[token].logprob - logprob))
    prefill = {name: without_near_ties(values) for name, values in differences.items()}
    decode = {name: without_near_ties(values) for name, values in decoded.items()}
    return {
        **versions(),
        "cuda_graphs": not args.eager,
        "tokens_from_prefix_cache": sum(output.num_cached_tokens or 0 for output in (*scored, *free)),
        "mean_logprob_difference_prefill": prefill,
        "mean_logprob_difference_decode_until_tokens_differ": decode,
        "first_tokens_equal": {name: f"{count} of {len(answers[name])}" for name, count in first.items()},
        "largest_logprob_differences_prefill": {name: sorted(values)[-3:] for name, values in differences.items()},
        "passed": passes(prefill, decode),
    }


def without_near_ties(differences: list[float]) -> float | None:
    """The mean of all but the largest, of which `NEAR_TIES` may be anything; None if there are none."""
    kept = sorted(differences)[: math.ceil(len(differences) * (1 - NEAR_TIES))]
    return statistics.fmean(kept) if kept else None


def passes(prefill: dict[str, float | None], decode: dict[str, float | None]) -> bool:
    """Whether what is right differs by vLLM's own noise alone, in prefill and decoding, and what is wrong by more."""
    for found in (prefill, decode):
        noise = max(value for name in ("base", "lora") if (value := found[name]) is not None)
        right = [found[name] for name in found if name not in WRONG]
        if any(value is None or value > NOISE_FACTOR * noise for value in right):
            return False
        if found is prefill and any((found[name] or 0.0) <= NOISE_FACTOR * noise for name in WRONG):
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- speed


CONTESTANTS = {
    "plugin": ("base", "lora_16", "lora_wide", "switch"),
    "vllm_rank_16": ("base", "lora_16"),
    "vllm_rank_wide": ("base", "lora_16", "lora_wide"),
}


def speed(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_model(folder / "model", args.layers)
        wide = args.experts * args.rank
        write_lora(folder / "lora_16", 16, args)
        write_lora(folder / "lora_wide", wide, args)
        write_switch(folder / "switch", args)
        rows: dict[str, dict[str, Any]] = {}
        for name in args.engines:
            own = [
                "--max-rank",
                "16" if name == "vllm_rank_16" else str(wide),
                "--contestants",
                ",".join(CONTESTANTS[name]),
            ]
            own += ["--plugin", "yes" if name == "plugin" else "no", "--rounds", str(args.rounds)]
            rows[name] = in_a_process("speed-engine", "--folder", str(folder), *own, *["--profile"] * args.profile)
            print(name, json.dumps(rows[name]), flush=True)
            result = summary(args, rows)
            if args.output:  # an engine takes minutes, and the next may fail
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def summary(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    milliseconds = {name: row["milliseconds"] for name, row in rows.items()}
    result = {
        **{
            name: value for name, value in next(iter(rows.values())).items() if name not in ("milliseconds", "gpu_part")
        },
        "command": "python -m recipes.benchmarks.serving " + " ".join(sys.argv[1:]),
        "experts": args.experts,
        "rank": args.rank,
        "top_k": args.top_k,
        "layers": args.layers,
        "milliseconds_per_step": milliseconds,
        "tokens_per_second": {
            engine_name: {
                contestant: {batch: round(1000 * int(batch) / value, 1) for batch, value in by_batch.items()}
                for contestant, by_batch in by_contestant.items()
            }
            for engine_name, by_contestant in milliseconds.items()
        },
    }
    if "plugin" in milliseconds:
        ours = milliseconds["plugin"]
        without = {name: row for name, row in milliseconds.items() if name != "plugin"}
        result["base_speed_with_plugin"] = {name: faster(row["base"], ours["base"]) for name, row in without.items()}
        if "vllm_rank_16" in without:
            result["speed_over_lora_16"] = faster(without["vllm_rank_16"]["lora_16"], ours["switch"])
        if "vllm_rank_wide" in without:
            result["speed_over_lora_wide"] = faster(without["vllm_rank_wide"]["lora_wide"], ours["switch"])
    if args.profile:
        result["gpu_part"] = {name: row["gpu_part"] for name, row in rows.items()}
    return result


def faster(other: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    """Our speed as a part of the other's, by batch."""
    return {batch: round(other[batch] / value, 3) for batch, value in ours.items()}


def speed_engine(args: argparse.Namespace) -> dict[str, Any]:
    prepare(plugin=args.plugin == "yes")
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    names = args.contestants.split(",")
    # A fixed cache, and steps no longer than the prompts of the largest batch: vLLM starts sooner if it need not find out.
    llm = engine(
        args.folder / "model", int(args.max_rank), 2, load_format="dummy", max_model_len=512, max_num_seqs=max(BATCHES),
        max_num_batched_tokens=max(BATCHES) * PROMPT, gpu_memory_utilization=0.8, kv_cache_memory_bytes=4 << 30,
        enable_prefix_caching=False, compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
    )  # fmt: skip
    requests = {
        name: None if name == "base" else LoRARequest(name, number + 1, str(args.folder / name))
        for number, name in enumerate(names)
    }

    def seconds(name: str, batch: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [(7 * row + column) % 1000 + 5 for column in range(PROMPT)]} for row in range(batch)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate(prompts, sampling, lora_request=requests[name], use_tqdm=False)
        return time.perf_counter() - began

    best: dict[str, dict[str, float]] = {name: {} for name in names}
    for batch in BATCHES:
        for turn in range(args.rounds + 1):  # the first is to warm up
            for name in names if turn % 2 else reversed(names):
                step = (seconds(name, batch, LONG) - seconds(name, batch, SHORT)) / (LONG - SHORT) * 1000
                if turn:
                    best[name][str(batch)] = round(min(step, best[name].get(str(batch), step)), 4)
    result = {**versions(), "milliseconds": best}
    if args.profile:
        result["gpu_part"] = {
            name: {str(batch): gpu_part(lambda tokens: seconds(name, batch, tokens)) for batch in PROFILED}  # noqa: B023
            for name in names
        }
    return result


def gpu_part(generate: Callable[[int], float]) -> dict[str, Any]:
    """What the GPU does in one decode step: milliseconds and kernels, in all and of those that take most.

    generate: makes so many tokens.
    """
    from torch.profiler import ProfilerActivity, profile

    def kernels(tokens: int) -> dict[str, tuple[float, int]]:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            generate(tokens)
        totals: dict[str, tuple[float, int]] = {}
        for event in found.profiler.kineto_results.events():
            if event.device_type().name == "CUDA":
                time_, count = totals.get(event.name(), (0.0, 0))
                totals[event.name()] = time_ + event.duration_ns() / 1e6, count + 1
        return totals

    few, many = 8, 40
    short, long = kernels(few), kernels(many)
    steps = {
        name: tuple((now - before) / (many - few) for now, before in zip(total, short.get(name, (0, 0)), strict=True))
        for name, total in long.items()
    }
    largest = sorted(steps.items(), key=lambda step: -step[1][0])[:KERNELS_SHOWN]
    return {
        "milliseconds": round(sum(step[0] for step in steps.values()), 4),
        "kernels": round(sum(step[1] for step in steps.values()), 1),
        "largest": {name[:70]: [round(time_, 4), round(count, 1)] for name, (time_, count) in largest},
    }


def table(args: argparse.Namespace) -> None:
    """Print a result of `speed` as the table of recipes/serve.md."""
    result = json.loads(args.file.read_text())
    named = {
        "base": "base model", "lora_16": "LoRA, rank 16", "lora_wide": f"LoRA, rank {result['experts'] * result['rank']}",
        "switch": f"LoRA-Switch, {result['experts']} experts of rank {result['rank']}, top-{result['top_k']}",
    }  # fmt: skip
    engines = {
        "vllm_rank_16": "vLLM, `max_lora_rank` 16",
        "vllm_rank_wide": f"vLLM, `max_lora_rank` {result['experts'] * result['rank']}",
        "plugin": "with the plugin",
    }
    print("| engine | adapter | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |")
    print("|---|---|" + "---:|" * len(BATCHES))
    for name, title in engines.items():
        for contestant, by_batch in result["milliseconds_per_step"].get(name, {}).items():
            cells = " | ".join(f"{by_batch[str(batch)]:.2f}" for batch in BATCHES)
            print(f"| {title} | {named[contestant]} | {cells} |")
    where = f"{result['gpu']}, vLLM {result['vllm']}, PyTorch {result['torch']}, {result['layers']} layers"
    print(f"\nMilliseconds for one decode step; {where}: `{result['command']}`.")


def write_model(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": layers}))


def linears(layers: int) -> dict[str, tuple[int, int]]:
    """in_features and out_features of every linear of a block."""
    hidden, wide = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"]
    kv = hidden // LLAMA_8B["num_attention_heads"] * LLAMA_8B["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, wide), "mlp.up_proj": (hidden, wide),
        "mlp.down_proj": (wide, hidden),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}": size for layer in range(layers) for name, size in sizes.items()}


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"task_type": "CAUSAL_LM", "base_model_name_or_path": "random", **config}))
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, dtype=torch.bfloat16) * 0.01


def write_lora(folder: Path, rank: int, args: argparse.Namespace) -> None:
    tensors = {}
    for name, (inside, outside) in linears(args.layers).items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = random(rank, inside), random(outside, rank)
    names = sorted({name.rpartition(".")[2] for name in linears(1)})
    write_adapter(folder, {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}, tensors)


def write_switch(folder: Path, args: argparse.Namespace) -> None:
    tensors = {}
    for name, (inside, outside) in linears(args.layers).items():
        tensors[f"{name}.loraswitch_A.weight"] = random(args.experts, args.rank, inside)
        tensors[f"{name}.loraswitch_B.weight"] = random(args.experts, outside, args.rank)
    tensors["model.layers.0.self_attn.q_proj.loraswitch_router.weight"] = random(args.experts, LLAMA_8B["hidden_size"])
    settings = {"r": args.rank, "num_experts": args.experts, "top_k": args.top_k, "lora_alpha": args.rank}
    write_adapter(folder, {"peft_type": "LORASWITCH", **settings}, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {
        "equality": equality, "speed": speed, "reference": reference, "equality-engine": equality_engine,
        "speed-engine": speed_engine,
    }  # fmt: skip
    parser.add_argument(
        "step", choices=[*steps, "table"], help="equality, speed or table; the others are parts of them"
    )
    parser.add_argument("file", type=Path, nargs="?", help="table: a result of speed")
    parser.add_argument("--output", type=Path, help="where the result goes; it is printed as well")
    parser.add_argument("--eager", action="store_true", help="equality without CUDA graphs and compilation")
    parser.add_argument("--prefix-caching", action="store_true", help="equality with vLLM's prefix cache")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--engines", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="speed: which of the three"
    )
    parser.add_argument("--profile", action="store_true", help="speed: also what the GPU does in a step")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-rank", help=argparse.SUPPRESS)
    parser.add_argument("--plugin", choices=("yes", "no"), help=argparse.SUPPRESS)
    parser.add_argument("--contestants", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "table":
        if args.file is None:
            parser.error("table needs a FILE")
        table(args)
        return
    result = steps[args.step](args)
    whole = args.step in ("equality", "speed")
    print(json.dumps(result, indent=1 if whole else None), flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.step == "equality" and not result["passed"]:
        raise SystemExit("not equal to within vLLM's own noise")


if __name__ == "__main__":
    main()
