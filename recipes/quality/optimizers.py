"""The optimizers that the comparison trains an adapter with: (model, learning rate) -> optimizer, without weight decay.

All but AdamW are told which weights are A and which B: PEFT's helpers, which take LoRA-Switch's stacks of experts expert by
expert, and LoRA-RITE.
"""

from __future__ import annotations

from collections.abc import Callable

import peft.optimizers
import torch
from torch import nn
from torch.optim import Optimizer

from peft_loraswitch.lora_rite import create_lorarite_optimizer

Maker = Callable[[nn.Module, float], Optimizer]
RATIO = 16.0  # of LoRA+: the learning rate of B over that of A, as its paper advises


def adamw(model: nn.Module, lr: float) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=parameters[0].is_cuda)


def loraplus(model: nn.Module, lr: float) -> Optimizer:
    return peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=RATIO, weight_decay=0.0
    )


def lorafa(model: nn.Module, lr: float) -> Optimizer:
    """A stays as it began."""
    return peft.optimizers.create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=lr, weight_decay=0.0)


def riemannian(model: nn.Module, lr: float) -> Optimizer:
    return peft.optimizers.create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)


def lorarite(model: nn.Module, lr: float) -> Optimizer:
    return create_lorarite_optimizer(model, lr=lr)
