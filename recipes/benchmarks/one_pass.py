"""E experts trained in one pass, against E runs of PEFT's LoRA one after the other, on the same samples.

    python -m recipes.benchmarks.one_pass            # a small Llama in float32; into recipes/results/one_pass_cpu.json
    python -m recipes.benchmarks.one_pass --gpu      # Llama-3.2-1B's shape, bf16 autocast; into one_pass_gpu.json; 3 minutes

A step of a run: forward, backward and AdamW on `--batch` samples. A step of the one pass: the same on the samples of all E
runs, each with its own expert, by `ExpertLoss`: "one pass". "one pass, dense" is told the same experts token by token, and so
takes the wide product over all experts. All begin at the same weights; the losses of every step are compared.

The contestants take turns, in an order that alternates. Reported is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_loraswitch import LoRASwitchConfig, LoRASwitchLinear
from peft_loraswitch.compose.one_pass import expert_losses
from recipes.checkout import ROOT, processor, versions

SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
Losses = torch.Tensor  # [steps, E]


class Setting:
    """Backbone, data and the weights that all contestants begin with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if args.gpu else "cpu")
        torch.manual_seed(0)
        with self.device:
            config = LlamaConfig(**(LLAMA_1B if args.gpu else SMALL), max_position_embeddings=4096)
            self.backbone: Any = LlamaForCausalLM(config).to(torch.bfloat16 if args.gpu else torch.float32)
        shape = (args.steps, args.experts, args.batch, args.length)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, config.vocab_size, shape, generator=generator).to(self.device)
        self.fields = {"r": args.rank, "lora_alpha": args.rank, "target_modules": "all-linear"}
        self.start: list[dict[str, torch.Tensor]] = []
        for expert in range(args.experts):
            torch.manual_seed(100 + expert)
            lora = self.lora()
            self.start.append({name: p.detach().clone() for name, p in lora.named_parameters() if "lora_" in name})
            self.backbone = lora.unload()

    def lora(self) -> Any:
        return get_peft_model(self.backbone, LoraConfig(**self.fields)).train()

    def switch(self) -> Any:
        config = LoRASwitchConfig(**self.fields, num_experts=self.args.experts, top_k=1)
        model = get_peft_model(self.backbone, config).train()
        for name, layer in model.named_modules():
            if isinstance(layer, LoRASwitchLinear):
                for word in ("A", "B"):
                    weight = getattr(layer, f"loraswitch_{word}")["default"].weight
                    for expert, start in enumerate(self.start):
                        weight.data[expert] = start[f"{name}.lora_{word}.default.weight"]
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        weights = [p for n, p in model.named_parameters() if p.requires_grad and "router" not in n]
        return torch.optim.AdamW(weights, lr=1e-4)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.gpu)

    def now(self) -> float:
        if self.args.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, steps: Callable[[int], torch.Tensor]) -> tuple[list[torch.Tensor], float]:
        """Losses of all steps, and the seconds of those after the first `--warmup` ones."""
        losses, begin = [], 0.0
        for step in range(self.args.steps):
            if step == self.args.warmup:
                begin = self.now()
            losses.append(steps(step))
        return losses, self.now() - begin


def one_after_the_other(setting: Setting) -> tuple[Losses, float]:
    seconds, losses = 0.0, []
    for expert, start in enumerate(setting.start):
        model = setting.lora()
        model.load_state_dict(start, strict=False)
        optimizer = setting.optimizer(model)

        def step(
            number: int, model: Any = model, optimizer: torch.optim.Optimizer = optimizer, expert: int = expert
        ) -> torch.Tensor:
            ids = setting.ids[number, expert]
            with setting.autocast():
                loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        each, own = setting.timed(step)
        seconds += own
        losses.append(torch.stack(each))
        setting.backbone = model.unload()
    return torch.stack(losses, 1).float().cpu(), seconds


def one_pass(setting: Setting, dense: bool) -> tuple[Losses, float]:
    args, model = setting.args, setting.switch()
    optimizer = setting.optimizer(model)
    experts = torch.arange(args.experts, device=setting.device).repeat_interleave(args.batch)
    given = experts.unsqueeze(-1).expand(-1, args.length) if dense else experts

    def step(number: int) -> torch.Tensor:
        ids = setting.ids[number].flatten(0, 1)
        with setting.autocast():
            logits = model(input_ids=ids, experts=given).logits
            losses, _ = expert_losses(logits, ids, experts, args.experts)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach()

    losses, seconds = setting.timed(step)
    setting.backbone = model.unload()
    return torch.stack(losses).float().cpu(), seconds


CONTESTANTS: dict[str, Callable[[Setting], tuple[Losses, float]]] = {
    "one after the other": one_after_the_other,
    "one pass": lambda setting: one_pass(setting, False),
    "one pass, dense": lambda setting: one_pass(setting, True),
}


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    losses: dict[str, Losses] = {}
    for number in range(rounds):
        for name in list(CONTESTANTS) if number % 2 else reversed(CONTESTANTS):
            losses[name], taken = CONTESTANTS[name](setting)
            seconds[name].append(taken)
    wanted = losses["one after the other"]
    rows = {}
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(seconds["one after the other"], taken, strict=True)]
        rows[name] = {
            "seconds": taken,
            "times_as_fast": statistics.median(ratios),
            "largest_relative_difference_of_a_loss": float(((losses[name] - wanted).abs() / wanted).max()),
            "last_losses": losses[name][-1].tolist(),
        }
    return rows


def header(args: argparse.Namespace) -> dict[str, Any]:
    return {
        **versions("torch", "transformers", "peft"),
        "gpu": torch.cuda.get_device_name() if args.gpu else None,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "backbone": LLAMA_1B if args.gpu else SMALL,
        "precision": "bfloat16 backbone and autocast, float32 adapters" if args.gpu else "float32",
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="Llama-3.2-1B's shape on a GPU")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, help="of each expert (default 16 on a GPU, else 8)")
    parser.add_argument("--batch", type=int, default=1, help="samples of an expert in a step")
    parser.add_argument("--length", type=int, help="tokens of a sample (default 512 on a GPU, else 32)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file of results (default in recipes/results)")
    args = parser.parse_args(argv)
    args.rank = args.rank or (16 if args.gpu else 8)
    args.length = args.length or (512 if args.gpu else 32)
    args.output = args.output or ROOT / "recipes" / "results" / f"one_pass_{'gpu' if args.gpu else 'cpu'}.json"
    if not 0 <= args.warmup < args.steps:
        parser.error("--warmup must be less than --steps")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    report = {"header": header(args), "results": measure(Setting(args), args.rounds)}
    for name, row in report["results"].items():
        print(
            f"{name:22}{statistics.median(row['seconds']):>8.2f} s {row['times_as_fast']:>6.2f} times as fast, "
            f"losses within {row['largest_relative_difference_of_a_loss']:.1e}"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
