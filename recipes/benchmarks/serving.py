"""What LoRA-Switch costs in vLLM, and whether bf16 with CUDA graphs gives what PEFT gives. Needs a GPU, vLLM and PEFT.

    python -m recipes.benchmarks.serving equality --output equality.json     # a tiny model, about 2 minutes
    python -m recipes.benchmarks.serving speed --output speed.json           # Llama-3.1-8B's shape, about 7 minutes

equality: logprobs that vLLM gives to PEFT's float32 tokens, for the base model, plain LoRA and LoRA-Switch adapters in one
batch. What the base model's differ by is vLLM's own noise; an adapter whose logprobs differ by more than three times that
fails, and one whose router is rolled has to.

speed (without PEFT): time of one decode step at batch 1, 8, 32 and 128, random weights. Three engines, each in a process of its
own: vLLM alone with max_lora_rank 16 and with E * r, and with the plugin. Base model, LoRA of rank 16, LoRA of rank E * r and
LoRA-Switch (E experts of rank r, top-k) on all linears take turns. A step is (time of 160 tokens - time of 32) / 128; the
smallest of `--rounds`.

Both run vLLM in the process itself and call the plugin's `register` where vLLM would, so the package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recipes.checkout import ROOT, commit

BATCHES = (1, 8, 32, 128)
SHORT, LONG = 32, 160  # tokens
PROMPT = 16  # tokens
NOISE_FACTOR = 3.0
TOOLS = ROOT / "tests" / "tools"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# ------------------------------------------------------------------------------------------------------------- engines


def prepare(plugin: bool) -> None:
    """This process as one of vLLM's: offline, in one process, our plugin only if it is asked for."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1")
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
    """What another run of this file prints last, as JSON."""
    command = [sys.executable, "-m", "recipes.benchmarks.serving", *arguments]
    path = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit status {done.returncode}:\n{done.stdout[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------ equality


def equality(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "files"
        in_a_process("reference", "--folder", str(folder))
        return dict(in_a_process("equality-engine", "--folder", str(folder), *(["--eager"] if args.eager else [])))


def reference(args: argparse.Namespace) -> dict[str, Any]:
    """Tiny model, adapters and PEFT's answers, by the tests' own tool."""
    import served_files  # of TOOLS

    files = served_files.make(args.folder, "llama")
    rolled = args.folder / "rolled"
    shutil.copytree(args.folder / "paper", rolled)
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
    answers = {**content["answers"], "rolled": content["answers"]["paper"]}
    routers = ["layers.1.self_attn.q_proj", "layers.0.mlp.gate_proj", "layers.1.mlp.down_proj"]
    llm = engine(
        args.folder / "base", 64, len(answers), max_model_len=256, max_num_seqs=64, max_logprobs=-1, enforce_eager=args.eager,
        gpu_memory_utilization=0.3, enable_prefix_caching=False, additional_config={"loraswitch": {"router_modules": routers}},
    )  # fmt: skip
    requests = {
        name: None if name == "base" else LoRARequest(name, number + 1, str(args.folder / name))
        for number, name in enumerate(answers)
    }
    jobs = [(name, index) for index in range(len(content["prompts"])) for name in answers]
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
    prefill = {name: statistics.fmean(values) for name, values in differences.items()}
    decode = {name: statistics.fmean(values) if values else None for name, values in decoded.items()}
    noise = max(prefill["base"], prefill["lora"])
    return {
        **versions(),
        "cuda_graphs": not args.eager,
        "mean_logprob_difference_prefill": prefill,
        "mean_logprob_difference_decode_until_tokens_differ": decode,
        "first_tokens_equal": {name: f"{count} of {len(content['prompts'])}" for name, count in first.items()},
        "passed": all(value <= NOISE_FACTOR * noise for name, value in prefill.items() if name != "rolled")
        and prefill["rolled"] > NOISE_FACTOR * noise,
    }


# --------------------------------------------------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_model(folder / "model", args.layers)
        wide = args.experts * args.rank
        write_lora(folder / "lora_16", 16, args)
        write_lora(folder / "lora_wide", wide, args)
        write_switch(folder / "switch", args)
        contestants = {
            "plugin": (str(wide), "yes", "base,lora_16,lora_wide,switch"),
            "vllm_rank_16": ("16", "no", "base,lora_16"),
            "vllm_rank_wide": (str(wide), "no", "base,lora_16,lora_wide"),
        }
        shape = ["--layers", str(args.layers), "--rounds", str(args.rounds), "--experts", str(args.experts)]
        rows = {}
        for name, (rank, plugin, names) in contestants.items():
            own = ["--max-rank", rank, "--plugin", plugin, "--contestants", names]
            rows[name] = in_a_process("speed-engine", "--folder", str(folder), *own, *shape)
            print(name, json.dumps(rows[name]), flush=True)  # an engine takes minutes
    milliseconds = {name: row.pop("milliseconds") for name, row in rows.items()}
    ours, bar = milliseconds["plugin"]["switch"], milliseconds["vllm_rank_16"]["lora_16"]
    return {
        **rows["plugin"],
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
        "speed_over_lora_16": {batch: round(bar[batch] / ours[batch], 3) for batch in ours},
        "base_with_plugin_over_without": {
            batch: round(milliseconds["vllm_rank_wide"]["base"][batch] / value, 3)
            for batch, value in milliseconds["plugin"]["base"].items()
        },
    }


def speed_engine(args: argparse.Namespace) -> dict[str, Any]:
    prepare(plugin=args.plugin == "yes")
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    names = args.contestants.split(",")
    llm = engine(
        args.folder / "model", int(args.max_rank), 2, load_format="dummy", max_model_len=512, max_num_seqs=max(BATCHES),
        gpu_memory_utilization=0.8, enable_prefix_caching=False, compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
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
    return {**versions(), "milliseconds": best}


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
    parser.add_argument("step", choices=steps, help="equality or speed; the others are their parts")
    parser.add_argument("--output", type=Path, help="where the result goes; it is printed as well")
    parser.add_argument("--eager", action="store_true", help="equality without CUDA graphs and compilation")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-rank", help=argparse.SUPPRESS)
    parser.add_argument("--plugin", choices=("yes", "no"), help=argparse.SUPPRESS)
    parser.add_argument("--contestants", help=argparse.SUPPRESS)
    args = parser.parse_args()
    result = steps[args.step](args)
    whole = args.step in ("equality", "speed")
    print(json.dumps(result, indent=1 if whole else None), flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.step == "equality" and not result["passed"]:
        raise SystemExit("not equal to within vLLM's own noise")


if __name__ == "__main__":
    main()
