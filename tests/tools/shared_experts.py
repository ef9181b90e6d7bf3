"""Models with shared experts, in every arrangement of them, for the tests of layers, of training and of inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from peft import PeftModel
from torch import nn

import multistream
from helpers import (
    adapted,
    switch_layers,
    tiny_llama,
)

DEEP = "layers.1.self_attn.k_proj"  # q_proj of the same layer runs before it and sees the same tensor


CONFIGS: dict[str, dict[str, Any]] = {
    "beside": {"num_shared_experts": 1},
    "before": {"num_shared_experts": 2, "router_module": DEEP},
    "one-routed": {"num_shared_experts": 1, "num_experts": 1, "top_k": 1, "router_module": DEEP},
    "top1": {"num_shared_experts": 3, "top_k": 1, "router_module": "layers.1.mlp.up_proj"},
    "all-at-work": {  # what recipes/quality found best
        "num_shared_experts": 1,
        "num_experts": 3,
        "top_k": 3,
        "router_module": "layers.1.self_attn.q_proj",
        "rank_pattern": {r".*layers\.0\..*": 16},
        "alpha_pattern": {r".*layers\.0\..*": 32.0},
    },
    "all-raw-gates": {"num_shared_experts": 2, "top_k": 4, "normalize_gates": False},
    "larger-rank-before": {
        "num_shared_experts": 1,
        "router_module": "layers.1.self_attn.q_proj",
        "rank_pattern": {r".*layers\.0\..*": 7},
        "alpha_pattern": {"layers.0.mlp.up_proj": 3.0},
    },
}


each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def llama(**config: Any) -> PeftModel:
    return adapted(tiny_llama(), **config)


def by_name(model: nn.Module) -> dict[str, Any]:
    return {name.removeprefix("model."): layer for name, layer in switch_layers(model.get_base_model()).items()}


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs)[0]


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def llava_with_both_streams() -> PeftModel:
    router = "language_model.layers.0.self_attn.q_proj"
    return adapted(multistream.llava(), num_shared_experts=1, router_module=router)
