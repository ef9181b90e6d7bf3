"""What the tests of fused models share: adapters without gradients, on a CPU or a GPU, and what to compare of them."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers import tiny_gpt2, tiny_llama, tiny_opt
from peft_loraswitch import LoRASwitchConfig

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)


devices = pytest.mark.parametrize("device", ["cpu", GPU])


MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "loraswitch_B" in name:
            nn.init.normal_(parameter, std=0.3)


def adapted(base: nn.Module, device: str = "cpu", dtype=torch.float32, **settings) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 8, "num_experts": 4, "top_k": 2, "target_modules": "all-linear", **settings}
    model = get_peft_model(base.to(dtype), LoRASwitchConfig(**options), autocast_adapter_dtype=False)
    randomize(model)
    return model.eval().requires_grad_(False).to(device)


def ids(batch: int, length: int, device: str, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (batch, length), generator=generator).to(device)


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(input_ids=tokens, **kwargs)[0]


def trainable(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters with `part` in their names, from now on trained."""
    found = [parameter.requires_grad_(True) for name, parameter in model.named_parameters() if part in name]
    assert found
    return found


def gradients(model: nn.Module, tokens: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(input_ids=tokens).logits.square().mean(), parameters))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())
