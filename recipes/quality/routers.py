"""Routers other than the package's, for the comparison: modules that take the place of `routing.decision.Router`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_loraswitch.layer import LoRASwitchLayer

NEVER = -1e4  # logit of an expert that must not be chosen: its softmax is exactly 0, and it is finite


def replace(model: nn.Module, router: nn.Module) -> None:
    """Put `router` in the place of the router of the adapter 'default', on its device."""
    for module in model.modules():
        if isinstance(module, LoRASwitchLayer) and "default" in module.loraswitch_router:
            old: Any = module.loraswitch_router["default"]
            module.loraswitch_router["default"] = router.to(old.weight.device)
            return
    raise ValueError("the model carries no LoRA-Switch adapter.")


class SigmoidRouter(nn.Module):
    """Sigmoid gates, balanced by a bias that only the choice sees (DeepSeek-V3, arXiv 2412.19437).

    The k experts with the largest sigmoid(z) + bias are chosen; their gates are sigmoid(z), rescaled to sum to 1. After each
    step the bias of experts that had more than their share of the tokens goes down by `speed`, that of the others up. The
    logits are log sigmoid(z) of the chosen experts and `NEVER` for the others, so that softmax, top-k and rescaling, which
    the tuner does with any logits, give exactly these gates. Use it with both auxiliary losses at 0.
    """

    bias: torch.Tensor
    load: torch.Tensor

    def __init__(self, in_features: int, num_experts: int, top_k: int, speed: float = 0.003) -> None:
        super().__init__()
        self.top_k, self.speed = top_k, speed
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.register_buffer("bias", torch.zeros(num_experts), persistent=False)
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias.zero_()
        self.load.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> logits [..., num_experts], float32."""
        with torch.autocast(x.device.type, enabled=False):
            z = F.linear(x.float(), self.weight)
        _, experts = (z.detach().sigmoid() + self.bias).topk(self.top_k, dim=-1)
        chosen = torch.zeros_like(z, dtype=torch.bool).scatter(-1, experts, True)
        if self.training and torch.is_grad_enabled():  # the statistics' second call counts the same tokens again
            self.load.add_(chosen.reshape(-1, chosen.shape[-1]).float().sum(0))
        return torch.where(chosen, F.logsigmoid(z), NEVER)

    @torch.no_grad()
    def after_step(self) -> None:
        self.bias.add_(self.speed * torch.sign(self.load.mean() - self.load))
        self.load.zero_()


class ContextRouter(nn.Module):
    """Linear router that also sees running means of its own input along the sequence: context for an early router.

        logits_t = W x_t + sum_d V_d norm(m_dt)        m_dt = sum_{s<=t} a_d^(t-s) x_s / sum_{s<=t} a_d^(t-s)

    with learned decays a_d in (0, 1). Decoding needs numerator and denominator of each mean from the token before:
    `len(decays)` vectors of the model's width per sequence, as much as a few keys of one layer.
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int, decays: tuple[float, ...] = (0.8, 0.98)) -> None:
        super().__init__()
        self.initial = decays
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.context_weight = nn.Parameter(torch.empty(num_experts, len(decays) * in_features))
        self.decay = nn.Parameter(torch.empty(len(decays)))  # logit of a
        self.length = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.context_weight, -bound, bound)
        with torch.no_grad():
            self.decay.copy_(torch.logit(torch.tensor(self.initial)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, in_features], or the same tokens flattened (the tuner's losses) -> logits [..., E], float32."""
        if x.dim() == 3:
            self.length = x.shape[1]
        sequences = x.float().reshape(-1, self.length, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            means = [self.running_mean(sequences, decay) for decay in self.decay.sigmoid()]
            context = torch.cat([F.rms_norm(mean, mean.shape[-1:]) for mean in means], dim=-1)
            logits = F.linear(sequences, self.weight) + F.linear(context, self.context_weight)
        return logits.view(*x.shape[:-1], -1)

    @staticmethod
    def running_mean(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """[batch, length, d], scalar -> [batch, length, d], from a whole sequence at once."""
        position = torch.arange(x.shape[1], device=x.device)
        age = position.unsqueeze(1) - position  # [t, s]
        weights = torch.where(age >= 0, decay ** age.clamp(min=0), 0.0)
        return (weights / weights.sum(-1, keepdim=True)) @ x
