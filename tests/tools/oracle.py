"""The definition of LoRA-Switch in float64: one token, one chosen expert at a time, nothing stacked, masked or fused.

Reads weights and configuration; calls none of the package's code. Tests and benchmarks compare against this, and
`test_layer.py` checks this against finite differences.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_loraswitch import LoRASwitchConfig, LoRASwitchLinear

Decision = list[list[tuple[int, torch.Tensor]]]  # for each token: (expert, gate) pairs, the likeliest expert first


def decide(x: torch.Tensor, router: torch.Tensor, top_k: int, normalize: bool, top_p: float = 1.0) -> Decision:
    """x [..., in] and router [E, in], both taken to float64 -> the decision for each token, in row-major order: the experts
    with the highest logits (NaN is as high as +Inf), of equal ones those that come first; with top_p < 1 the first of them alone
    whose probabilities sum to top_p."""
    decision: Decision = []
    for token in x.double().reshape(-1, x.shape[-1]):
        logits = [(token * row).sum() for row in router.double()]
        exponentials = [torch.exp(logit - max(logits).detach()) for logit in logits]
        probabilities = [e / sum(exponentials) for e in exponentials]
        heights = [math.inf if logit.isnan() else float(logit.detach()) for logit in logits]
        chosen = sorted(range(len(logits)), key=lambda e, heights=heights: -heights[e])[:top_k]  # a stable sort
        if top_p < 1:
            sums = [float(sum(probabilities[e].detach() for e in chosen[:n])) for n in range(1, len(chosen) + 1)]
            chosen = chosen[: next((n for n, reached in enumerate(sums, 1) if reached >= top_p), len(chosen))]
        total = sum(probabilities[e] for e in chosen) if normalize else 1.0
        if normalize and len(chosen) == 1:  # the hard gate: 1 in value, the softmax in its gradient
            probability = probabilities[chosen[0]]
            decision.append([(chosen[0], 1.0 + (probability - probability.detach()))])
        else:
            decision.append([(e, probabilities[e] / total) for e in chosen])
    return decision


def in_context(x: torch.Tensor, decay: float, real: torch.Tensor | None = None) -> torch.Tensor:
    """What a router with `router_decay` sees, float64: of each token of x [batch, tokens, in] the mean of the real tokens up
    to it (`real` [batch, tokens]), weighted by decay^distance, counted in real tokens; the token itself if there is none."""
    x = x.double()
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            seen = [i for i in range(t, -1, -1) if real is None or real[b, i]]
            weights = [decay**distance for distance in range(len(seen))]
            mean = sum(w * x[b, i] for i, w in zip(seen, weights, strict=True)) / max(sum(weights), 1)
            rows.append(mean if seen else x[b, t])
    return torch.stack(rows).view_as(x)


def with_shared(decision: Decision, config: LoRASwitchConfig, routed: bool = True) -> Decision:
    """What a linear follows: each token's decision, then the shared experts, stacked after the routed ones, with gate
    1 / top_k. The base expert, behind the routed ones, is left out: it adds nothing.
    A linear that is not `routed` (one before the router) has the shared ones only."""
    first = config.num_experts if routed else 0
    gate = torch.ones((), dtype=torch.float64) / config.top_k
    shared = [(first + i, gate) for i in range(config.num_shared_experts)]
    routed_ones = [[(e, g) for e, g in choice if e < config.num_experts] if routed else [] for choice in decision]
    return [choice + shared for choice in routed_ones]


def delta(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, decision: Decision, scaling: float) -> torch.Tensor:
    """s * sum_j g_j B[e_j] A[e_j] x for each token: x [..., in], a [E, r, in], b [E, out, r] -> float64 [..., out]"""
    a, b = a.double(), b.double()
    rows = []
    for token, choice in zip(x.double().reshape(-1, x.shape[-1]), decision, strict=True):
        row = torch.zeros(b.shape[1], dtype=torch.float64)
        for expert, gate in choice:
            row = row + scaling * gate * (b[expert] @ (a[expert] @ token))
        rows.append(row)
    return torch.stack(rows).reshape(*x.shape[:-1], -1) if rows else x.new_zeros(*x.shape[:-1], b.shape[1]).double()


def scaling_of(config: LoRASwitchConfig, name: str, rank: int) -> float:
    """s of the linear `name`: alpha_pattern wins over lora_alpha, where its key is the end of the name or a regex of it."""
    alpha = config.lora_alpha
    for key, value in config.alpha_pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            alpha = value
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def base_output(base: nn.Module, x: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    """W x + b in float64; with `absolute` |W| |x| + |b|, which bounds what rounding can do to it."""
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight  # Conv1D stores [in, out]
    bias = torch.zeros(weight.shape[0]) if base.bias is None else base.bias
    weight, bias, x = weight.double(), bias.double(), x.double()
    return x.abs() @ weight.abs().T + bias.abs() if absolute else x @ weight.T + bias


class OracleLinear(nn.Module):
    """An adapted linear in float64. The first that is `routed` and runs fills the one `decision`, all others follow it."""

    def __init__(
        self, layer: LoRASwitchLinear, adapter: str, name: str, config: Any, decision: Decision, routed: bool
    ) -> None:
        super().__init__()
        self.base = copy.deepcopy(layer.get_base_layer()).double()
        self.A = nn.Parameter(layer.loraswitch_A[adapter].weight.detach().double())
        self.B = nn.Parameter(layer.loraswitch_B[adapter].weight.detach().double())
        self.router: nn.Parameter | None = None
        self.config, self.decision, self.routed = config, decision, routed
        self.real: torch.Tensor | None = None
        self.scaling = scaling_of(config, name, self.A.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.routed and not self.decision:
            if self.config.router_decay:
                x_seen = in_context(x, self.config.router_decay, self.real)
            else:
                x_seen = x
            k, normalize, p = self.config.top_k, self.config.normalize_gates, self.config.top_p
            self.decision[:] = decide(x_seen, self.router, k, normalize, p)
        decision = self.decision if self.routed else [[] for _ in range(x.shape[:-1].numel())]
        choice = with_shared(decision, self.config, self.routed)
        return base_output(self.base, x) + delta(x, self.A, self.B, choice, self.scaling)


class Oracle:
    """A float64 copy of a `PeftModel` with one LoRA-Switch adapter, to be called like it.

    (Norms and rotary embeddings of Transformers compute in float32 whatever the model's dtype; the copy's do too.)
    """

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        backbone = copy.deepcopy(model.get_base_model())
        self.adapter = adapter
        self.layers: dict[str, OracleLinear] = {}
        self.decision: Decision = []
        routed = False  # from the router on, in the modules' order
        for name, layer in list(backbone.named_modules()):
            if isinstance(layer, LoRASwitchLinear) and adapter in layer.loraswitch_A:
                routed = routed or adapter in layer.loraswitch_router
                replacement = OracleLinear(layer, adapter, name, model.peft_config[adapter], self.decision, routed)
                if adapter in layer.loraswitch_router:
                    self.router_name = name
                    self.router = nn.Parameter(layer.loraswitch_router[adapter].weight.detach().double())
                parent, _, child = name.rpartition(".")
                setattr(backbone.get_submodule(parent) if parent else backbone, child, replacement)
                self.layers[name] = replacement
        for replacement in self.layers.values():
            replacement.router = self.router
        self.backbone = backbone.double()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.decision.clear()
        for layer in self.layers.values():
            layer.real = kwargs.get("attention_mask")
        return self.backbone(*args, **kwargs)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients under the names that the adapter's parameters have in the `PeftModel`."""
        found = {}
        for name, layer in self.layers.items():
            for word in ("A", "B"):
                found[f"base_model.model.{name}.loraswitch_{word}.{self.adapter}.weight"] = getattr(layer, word).grad
        found[f"base_model.model.{self.router_name}.loraswitch_router.{self.adapter}.weight"] = self.router.grad
        return found
