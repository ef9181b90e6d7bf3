"""Plain LoRAs on disk, what they compute (by PEFT, and in float64), and a router that has decided. Nothing here asserts."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import router_layer
from oracle import base_output

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def save_lora(
    folder: Path, backbone: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> str:
    """A LoRA for (a copy of) `backbone` whose weights all differ from zero, saved by PEFT. Returns its folder."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(backbone), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return str(folder)


# Different in every way that an expert can be.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "large": {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj"]},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 2,
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 5, "up_proj": 1.7},
    },
    "bf16": {"dtype": torch.bfloat16, "target_modules": r"model\.layers\.1\..*(q|v|gate)_proj"},
    "fp16": {"dtype": torch.float16, "lora_alpha": 1, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}


def save_variants(folder: Path, backbone: nn.Module, names: Any = tuple(VARIANTS)) -> list[str]:
    return [save_lora(folder / name, backbone, seed, **VARIANTS[name]) for seed, name in enumerate(names)]


def peft_logits(folder: str, backbone: nn.Module, *inputs: Any, **kwargs: Any) -> torch.Tensor:
    """What PEFT's own LoRA makes of it."""
    model = PeftModel.from_pretrained(copy.deepcopy(backbone), folder).eval()
    with torch.no_grad():
        return model(*inputs, **kwargs).logits


class LoraOracleLinear(nn.Module):
    """`W x + b + s B A x` in float64, from the files' numbers."""

    def __init__(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a.double(), b.double(), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return base_output(self.base, x) + self.scale * (x.double() @ self.a.T @ self.b.T)


def lora_oracle(folder: str, backbone: nn.Module) -> nn.Module:
    """A float64 copy of the backbone with the LoRA, by the definition; none of PEFT's nor of the package's code."""
    model = copy.deepcopy(backbone).double()
    config = json.loads((Path(folder) / CONFIG).read_text())
    tensors = load_file(Path(folder) / WEIGHTS)
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, alpha = config["r"], config["lora_alpha"]
        for pattern, value in config["rank_pattern"].items():
            rank = value if re.fullmatch(rf"(.*\.)?({pattern})", name) else rank
        for pattern, value in reversed(config["alpha_pattern"].items()):
            alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", name) else alpha
        scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        parent, _, child = name.rpartition(".")
        layer = LoraOracleLinear(
            model.get_submodule(name), tensors[key], tensors[key.replace("lora_A", "lora_B")], scale
        )
        setattr(model.get_submodule(parent), child, layer)
    return model


class _Decided(nn.Module):
    """A router whose softmax is exactly 1 for one expert and 0 for the others."""

    def __init__(self, router: nn.Module, expert: int) -> None:
        super().__init__()
        self.weight, self.expert = router.weight, expert

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*x.shape[:-1], self.weight.shape[0])
        logits[..., self.expert] = 1e4
        return logits


@contextmanager
def alone(model: nn.Module, expert: int, adapter: str = "default") -> Iterator[None]:
    """Every token chooses `expert` with gate 1."""
    layer = router_layer(model, adapter)
    router = layer.loraswitch_router[adapter]
    layer.loraswitch_router[adapter] = _Decided(router, expert)
    try:
        yield
    finally:
        layer.loraswitch_router[adapter] = router


def logits_of(model: nn.Module, *inputs: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs, **kwargs).logits
