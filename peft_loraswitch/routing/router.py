"""The router: hidden states in, one logit for each expert out. LoRA-Switch (arXiv 2405.17741) has one linear on the input of
the first adapted linear. Which experts the logits mean: `decision.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ordinary import OrdinaryParameters


class Router(OrdinaryParameters):
    """Linear router without bias. `weight` is [num_choices, in_features]: a row for each expert, and a last one for the base
    expert if there is one; logits are computed in float32, whatever the dtype of the weight, of the input or of autocast (a
    bf16 softmax changes which experts win)."""

    def __init__(self, in_features: int, num_choices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_choices, in_features))

    def reset_parameters(self) -> None:
        # Not zero: equal logits would send every token to the first k experts, and nothing would ever break the tie.
        # On inputs of unit RMS (after a norm) this gives logits with a standard deviation of 1/sqrt(3).
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features], any float dtype -> logits [..., num_experts], float32."""
        return router_logits(x, self.weight)


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in_features], weight [num_choices, in_features], any float dtypes -> logits [..., num_choices], float32."""
    with full_precision(x.device):
        return F.linear(x.float(), weight.float())


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast."""
    if device.type == "meta":  # shapes and costs without data; autocast knows no such device
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def jitter(x: torch.Tensor, amount: float) -> torch.Tensor:
    """x times noise from [1 - amount, 1 + amount], element by element (Switch Transformer, arXiv 2101.03961)."""
    return x * torch.empty_like(x).uniform_(1 - amount, 1 + amount)
