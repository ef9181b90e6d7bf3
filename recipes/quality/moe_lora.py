"""Layer-wise routed MoE-LoRA, the reference that LoRA-Switch is measured against: every linear has a router of its own.

    y = W x + s * sum_j g_j B[e_j] A[e_j] x        with (e, g) = top-k of softmax(R x), R of this very linear

The family of MixLoRA (arXiv 2404.15159), MoLA (arXiv 2402.08562) and their like, without what is special to each of them.
As in LoRA-Switch the gates of the chosen experts are rescaled to sum to 1, logits are float32, and the experts are
computed as two dense products around masked gates, so that a comparison of the two compares where routing happens, and
nothing else. The load-balance and z-loss have the same form and weight; they are means over the linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class MoELoRALinear(nn.Module):
    """A frozen linear with routed LoRA experts and its own router.

    Args:
        base: the linear.
        num_experts, rank, top_k: E, r, k.
        scale: s.
        losses: where each forward in training puts this router's (balance, z) losses.
    """

    def __init__(
        self, base: nn.Linear, num_experts: int, rank: int, top_k: int, scale: float, losses: list[torch.Tensor]
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.top_k, self.scale, self.losses = top_k, scale, losses
        device = base.weight.device
        self.experts_a = nn.Parameter(torch.empty(num_experts, rank, base.in_features, device=device))
        self.experts_b = nn.Parameter(torch.empty(num_experts, base.out_features, rank, device=device))
        self.router = nn.Linear(base.in_features, num_experts, bias=False, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As LoRA-Switch starts: A uniform as in LoRA, B zero, the router's logits small but not zero."""
        bound = self.experts_a.shape[2] ** -0.5
        nn.init.uniform_(self.experts_a, -bound, bound)
        nn.init.zeros_(self.experts_b)
        nn.init.uniform_(self.router.weight, -bound, bound)

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., in] -> float32 [..., E] each: logits, their softmax, gates (0 where not chosen)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.float())
        probabilities = logits.softmax(-1)
        values, experts = probabilities.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            values = values / values.sum(-1, keepdim=True)
        return logits, probabilities, torch.zeros_like(probabilities).scatter(-1, experts, values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]"""
        result = self.base_layer(x)
        logits, probabilities, gates = self.gates(x)
        if self.training and torch.is_grad_enabled():
            self.losses.append(balance_and_z(logits, probabilities, gates))
        hidden = F.linear(x, self.experts_a.flatten(0, 1)).unflatten(-1, self.experts_a.shape[:2])
        hidden = (hidden * (self.scale * gates).to(hidden.dtype).unsqueeze(-1)).flatten(-2)
        delta = hidden @ self.experts_b.transpose(1, 2).flatten(0, 1)
        return result + delta.to(result.dtype)


def balance_and_z(logits: torch.Tensor, probabilities: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """float32 [2]: E * sum_e load_e * mean p_e (Switch Transformer, top-k form of Mixtral), and mean logsumexp^2 (ST-MoE)."""
    num_experts = gates.shape[-1]
    load = (gates > 0).float().reshape(-1, num_experts).mean(0)
    balance = num_experts * (load * probabilities.reshape(-1, num_experts).mean(0)).sum()
    return torch.stack((balance, logits.logsumexp(-1).square().mean()))


class MoELoRAModel(nn.Module):
    """A causal language model whose linears are replaced by `MoELoRALinear`; adds the routers' losses to the loss.

    Args:
        model: the frozen backbone, changed in place.
        ranks: rank of each linear to adapt, by its full name.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int],
        num_experts: int = 8,
        top_k: int = 2,
        scale: float = 1.0,
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.001,
    ) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.coefficients = (aux_loss_coef, z_loss_coef)
        for name, rank in ranks.items():
            parent, _, child = name.rpartition(".")
            base: Any = model.get_submodule(name)
            setattr(
                model.get_submodule(parent), child, MoELoRALinear(base, num_experts, rank, top_k, scale, self.losses)
            )
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        self.losses.clear()
        output = self.model(**inputs)
        if self.losses and output.loss is not None:
            balance, z = torch.stack(self.losses).mean(0)
            aux, z_weight = self.coefficients
            output.loss = output.loss + aux * balance + z_weight * z
        self.losses.clear()
        return output
