"""What the tests of the fused training path share, on a CPU and on a GPU: models in training, their gradients, every setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from helpers import adapter_gradients, padded, randomize_adapter, switch_config, tiny_llama
from peft_loraswitch.training import fast_linears, group_function
from peft_loraswitch.training.group_layout import Spec

NO_LOSSES = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "top-1": {"top_k": 1},
    "hard-gate": {"top_k": 1, "normalize_gates": True},
    "all-experts": {"top_k": 4},
    "one-expert": {"num_experts": 1, "top_k": 1},
    "shared": {"num_shared_experts": 2},
    "base-expert": {"base_expert": True},
    "deep-router": {"num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj"},
    "odd-ranks": {"r": 3, "rank_pattern": {"up_proj": 5, "k_proj": 1}, "alpha_pattern": {"v_proj": 7.0}},
    "router-only": {"trainable": "router"},
}


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each call of the autograd function computes, from now on."""
    calls: list[int] = []
    run = group_function.run

    def counting(spec: Spec, *args: Any) -> Any:
        calls.append(spec.size)
        return run(spec, *args)

    monkeypatch.setattr(fast_linears, "run", counting)
    return calls


def adapted(backbone: nn.Module | None = None, dtype: torch.dtype | None = None, **config: Any) -> Any:
    backbone = tiny_llama() if backbone is None else backbone
    settings = {"num_experts": 4, "top_k": 2, "target_modules": "all-linear", **config}
    model = get_peft_model(backbone if dtype is None else backbone.to(dtype), switch_config(**settings))
    randomize_adapter(model)
    return model.train()


def step(model: Any, batch: dict[str, Any], autocast: torch.dtype | None = None) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), {name: g.clone() for name, g in adapter_gradients(model).items()}


def course(model: Any) -> list[float]:
    """Losses of 12 steps with AdamW, three batches in turn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for seed in range(12):
        loss = model(**padded([7, 4], seed=seed % 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


def on_both_devices(
    kind: str, checkpointed: bool, **config: Any
) -> tuple[dict[str, torch.Tensor], Callable[[], dict[str, torch.Tensor]]]:
    """(gradients in float32 on a CPU, a step that gives those of the same model on a GPU). kind: float32, bfloat16, autocast."""
    exact_model = adapted(tiny_llama(hidden_size=64, intermediate_size=160), **config)
    if kind != "float32":
        exact_model.to(torch.bfloat16).float()  # weights that both can hold
    model = copy.deepcopy(exact_model).cuda()
    for name, parameter in model.named_parameters():
        if kind == "bfloat16" or kind == "autocast" and "loraswitch_" not in name:
            parameter.data = parameter.data.bfloat16()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    batch = padded([7, 4])
    _, exact = step(exact_model, batch)
    on_gpu = {key: value.cuda() for key, value in batch.items()}

    def gpu_step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
            loss = model(**on_gpu).loss
        loss.backward()
        return {name: g.clone().cpu() for name, g in adapter_gradients(model).items()}

    return exact, gpu_step
