"""A configuration for a 7B or 8B model at its real size, where no Hub is: random weights, local text, everything else real.

    python -m recipes.train.real_size sft_llama31_8b                                # one GPU with 80 GB
    python -m recipes.train.real_size sft_llama31_8b --launch fsdp2 --processes 2   # recipes/train/accelerate/fsdp2.yaml
    python -m recipes.train.real_size sft_llama31_8b -- --load_in_4bit              # options behind -- go to the recipe
    python -m recipes.train.real_size sft_llama31_8b --tiny                         # a CPU: every step, with a tiny model

What it does: `accelerate launch -m recipes.train.sft CONFIG` for `--steps` steps, as a user would; the same again from the
checkpoint in the middle; then the adapter is loaded in a fresh process. What has to hold, or the exit status is 1:

- the loss falls;
- the losses behind the checkpoint are those of the first run;
- the fresh process has the loss on held-out text that the trainer had, or its preference loss on held-out pairs, and the base
  alone has another;
- the last checkpoint and the saved adapter give the same greedy tokens.

A row for each run goes into `--output` (real_size.json in recipes/results): seconds of a step, losses, and `reserved_gib`, what
PyTorch held at most for each process of the first training on its GPU. (`peak_gib` in older rows is what nvidia-smi said of every
GPU in sight, whatever else ran there.)
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from recipes.checkout import ROOT, module_command, module_environment, processor, versions
from recipes.train import real_models

CONFIGS, LAUNCH = ROOT / "recipes" / "train" / "configs", ROOT / "recipes" / "train" / "accelerate"
RESULTS = ROOT / "recipes" / "results" / "real_size.json"
EVALUATED = 8  # held-out conversations
SAME = 0.02  # relative: bf16 sums in another order
SAME_PREFERENCE = 0.05  # of a preference loss: the difference of two such sums


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args = _arguments(argv[:cut])
    if args.reload:
        print(json.dumps(reloaded(args, argv[cut + 1 :])))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    row, failed = run(args, argv[cut + 1 :])
    print(json.dumps(row, indent=1))
    write(args.output, row)
    if failed:
        raise SystemExit("FAILED: " + "; ".join(failed))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(f"{recipe}_{shape}" for recipe in ("sft", "dpo") for shape in real_models.SHAPES)
    parser.add_argument("config", choices=names, help="a file in recipes/train/configs")
    parser.add_argument(
        "--launch", choices=("one_gpu", "ddp", "fsdp2"), default="one_gpu", help="recipes/train/accelerate"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps; a checkpoint is saved in the middle")
    parser.add_argument("--accumulation", type=int, help="gradient_accumulation_steps in place of the configuration's")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "real_size", help="model, data, checkpoints")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short texts, on a CPU")
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps % 2 or args.steps < 2:
        parser.error("--steps must be even: a checkpoint is saved in the middle")
    args.work = args.work.resolve()
    return args


class Place:
    """Where model and data are, and how long a text is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.recipe, _, self.shape = args.config.partition("_")
        ending = "_tiny" if args.tiny else ""
        self.settings = _settings(CONFIGS / f"{args.config}.yaml")
        self.model, self.data = args.work / f"model_{self.shape}{ending}", args.work / f"data_{self.recipe}{ending}"
        self.length = 64 if args.tiny else int(self.settings["max_length"])


def run(args: argparse.Namespace, extra: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The row of results, and what did not hold."""
    place = Place(args)
    recipe, length = place.recipe, place.length
    accumulation = args.accumulation or (1 if args.tiny else int(place.settings["gradient_accumulation_steps"]))
    batch = 2 if args.tiny else int(place.settings["per_device_train_batch_size"])
    _say("model and data")
    if not (place.model / "tokenizer.json").exists():
        real_models.make_model(place.shape, place.model, args.tiny)
    rows = {"train": args.steps * batch * accumulation * args.processes, "test": EVALUATED}
    real_models.make_conversations(place.data, recipe == "dpo", rows, words=length)  # at least a token a word
    options = [
        "--model_name_or_path", str(place.model), "--dataset_name", str(place.data), "--max_length", str(length),
        "--max_steps", str(args.steps), "--save_steps", str(args.steps // 2), "--eval_steps", str(args.steps),
        "--logging_steps", "1", "--warmup_steps", "1", "--gradient_accumulation_steps", str(accumulation),
        "--per_device_train_batch_size", str(batch), "--per_device_eval_batch_size", str(batch), *extra,
    ]  # fmt: skip
    if args.tiny:
        options += ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--learning_rate", "2.0e-3"]
    first, second = args.work / "first", args.work / "second"
    for folder in (first, second):
        shutil.rmtree(folder, ignore_errors=True)
    _say("training")
    _train(args, recipe, [*options, "--output_dir", str(first)])
    _say("training again, from the checkpoint in the middle")
    middle = str(first / f"checkpoint-{args.steps // 2}")
    _train(args, recipe, [*options, "--output_dir", str(second), "--resume_from_checkpoint", middle])
    _say("loading in a fresh process")
    fresh = _fresh(args, extra)

    state = json.loads((first / "trainer_state.json").read_text())
    losses = _losses(first)
    behind, resumed = losses[args.steps // 2 :], _losses(second)[args.steps // 2 :]
    (evaluated,) = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    seconds = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry][-1]
    failed = []
    if not min(behind) < losses[0]:
        failed.append(f"the loss does not fall: {losses}")
    same = SAME if recipe == "sft" else SAME_PREFERENCE
    if not all(math.isclose(a, b, rel_tol=same) for a, b in zip(behind, resumed, strict=True)):
        failed.append(f"resumed losses differ: {behind} and {resumed}")
    if not math.isclose(fresh["loss"], evaluated, rel_tol=same):
        failed.append(f"held-out loss in a fresh process: {fresh['loss']}, in the trainer: {evaluated}")
    if math.isclose(fresh["loss"], fresh["base_loss"], rel_tol=1e-3):
        failed.append(f"the adapter changes nothing: {fresh['loss']} with it, {fresh['base_loss']} without")
    if fresh["tokens"] != fresh.pop("checkpoint_tokens"):
        failed.append("the last checkpoint and the saved adapter give different tokens")
    return {
        **versions("torch", "transformers", "peft", "trl", "accelerate"),
        "config": args.config,
        "model": "tiny" if args.tiny else "real shape, random weights",
        "hardware": f"{args.processes} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else processor(),
        "launch": args.launch,
        "options": extra,
        "steps": args.steps,
        "tokens_of_a_step_at_most": length * batch * accumulation * args.processes,
        "seconds_of_a_step": round(seconds / args.steps, 3),
        "reserved_gib": _reserved(state),
        "losses": losses,
        "resumed_losses": resumed,
        "eval_loss": evaluated,
        "fresh": fresh,
        "failed": failed,
    }, failed


def _settings(path: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def _say(text: str) -> None:
    print(f"--- {text} ({time.strftime('%H:%M:%S')})", flush=True)


def _train(args: argparse.Namespace, recipe: str, options: list[str]) -> None:
    """Run the recipe."""
    launch = ["--config_file", str(LAUNCH / f"{args.launch}.yaml"), "--num_processes", str(args.processes)]
    if args.tiny:
        launch = ["--cpu", "--num_processes", "1", "--mixed_precision", "no"]
    command = module_command(
        "accelerate.commands.launch", *launch, "-m", f"recipes.train.{recipe}", str(CONFIGS / f"{args.config}.yaml"), *options
    )  # fmt: skip
    done = subprocess.run(command, env=module_environment(HF_HUB_OFFLINE="1"), cwd=args.work, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit status {done.returncode}")


def _reserved(state: dict[str, Any]) -> list[float]:
    """By rank, from what the recipe has noted in the trainer's state (`trl_script.note_memory`); none without a GPU."""
    (noted,) = [entry["reserved_gib"] for entry in state["log_history"] if "reserved_gib" in entry] or [[]]
    return list(noted)


def _losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _fresh(args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    command = module_command("recipes.train.real_size", args.config, "--work", str(args.work), "--reload")
    command += ["--steps", str(args.steps), *(["--tiny"] if args.tiny else []), "--", *extra]
    done = subprocess.run(command, env=module_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@torch.no_grad()
def reloaded(args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """In a fresh process: held-out loss with and without the adapter, and greedy tokens after a held-out prompt, also those of
    the last checkpoint. The backbone is loaded as the recipe's options say: in 4 bits, say."""
    from peft import PeftModel
    from transformers import AutoTokenizer, HfArgumentParser
    from trl import ModelConfig

    import peft_loraswitch  # noqa: F401  (so that PEFT knows the adapter's type)
    from recipes.train.trl_script import load_model

    place = Place(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    dtype = "float32" if args.tiny else str(place.settings["dtype"])
    options = ["--model_name_or_path", str(place.model), "--attn_implementation", "sdpa", "--dtype", dtype, *extra]
    model_arguments, *_ = HfArgumentParser(ModelConfig).parse_args_into_dataclasses(
        options, return_remaining_strings=True
    )
    base = load_model(model_arguments, False)
    base = base if base.device.type == device else base.to(device)
    first = args.work / "first"
    model = PeftModel.from_pretrained(base, first).eval()
    talks = [json.loads(line) for line in (place.data / "test.jsonl").read_text().splitlines()]

    def encoded(text: list[dict[str, str]], **options: Any) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(text, return_dict=False, **options)[: place.length]
        return ids

    def surprise(row: list[int], behind: int = 0) -> tuple[float, int]:
        """Nats of the row's tokens from `behind` on (without the first), and how many those are."""
        ids, behind = torch.tensor([row], device=device), max(behind, 1)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids).logits[0, behind - 1 : -1].float()
        nats = torch.nn.functional.cross_entropy(logits, ids[0, behind:], reduction="sum")
        return float(nats), len(row) - behind

    def margins() -> list[float]:
        """By how many nats each rejected answer surprises more than the chosen one."""
        found = []
        for talk in talks:
            start = encoded(talk["prompt"], add_generation_prompt=True)
            pair = [encoded(talk["prompt"] + talk[side]) for side in ("chosen", "rejected")]
            shared = [
                sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(start, row, strict=False))) for row in pair
            ]
            chosen, rejected = (surprise(row, behind)[0] for row, behind in zip(pair, shared, strict=True))
            found.append(rejected - chosen)
        return found

    def loss() -> float:
        if place.recipe == "sft":
            nats, counts = zip(*(surprise(encoded(talk["messages"])) for talk in talks), strict=True)
            return sum(nats) / sum(counts)
        now, beta = margins(), float(place.settings["beta"])
        with model.disable_adapter():
            before = margins()
        return sum(math.log1p(math.exp(beta * (b - a))) for a, b in zip(now, before, strict=True)) / len(now)

    prompt = torch.tensor([encoded(talks[0].get("messages") or talks[0]["prompt"])[:32]], device=device)

    def tokens() -> list[int]:
        made = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        return list(made.tolist())

    found: dict[str, Any] = {"loss": loss(), "tokens": tokens()}
    with model.disable_adapter():
        found["base_loss"] = loss() if place.recipe == "sft" else math.log(2)
    model.load_adapter(first / f"checkpoint-{args.steps}", "checkpoint")
    model.set_adapter("checkpoint")
    found["checkpoint_tokens"] = tokens()
    return found


def write(path: Path, row: dict[str, Any]) -> None:
    """Into the file's rows, in place of one of the same run."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    same = ("config", "model", "launch", "options", "hardware")
    rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
