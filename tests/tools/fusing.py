"""What the tests of fused models share: adapters without gradients, on a CPU or a GPU, and what to compare of them."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers import tiny_gpt2, tiny_llama, tiny_opt
from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.inference import joined_weights
from peft_loraswitch.inference.capabilities import facts_of
from peft_loraswitch.inference.fuse import adapted_layers

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


def check_as_unfused(model: nn.Module, batches: list[torch.Tensor], tolerance: float) -> list[torch.Tensor]:
    """Fused as unfused: the first batch of each shape packs, the others find it packed. Returns the unfused model's logits. The
    model stays fused."""
    expected = [logits(model, tokens) for tokens in batches]
    model.fuse_for_inference("fused")
    for _ in range(2):
        for tokens, value in zip(batches, expected, strict=True):
            assert close(logits(model, tokens).float(), value.float(), tolerance)
    return expected


@torch.no_grad()
def check_fused(model: nn.Module, tokens: torch.Tensor) -> None:
    """Fusing changes no logits. The model stays fused."""
    expected = model(input_ids=tokens).logits
    model.fuse_for_inference("fused")
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_merged(model: nn.Module, tokens: torch.Tensor, in_place: bool) -> None:
    """Nor does merging the experts of one token after the other."""
    one_by_one = tokens.split(1, dim=1)
    expected = [model(input_ids=token).logits for token in one_by_one]
    model.fuse_for_inference("merge", in_place=in_place)
    for token, wanted in zip(one_by_one, expected, strict=True):
        torch.testing.assert_close(model(input_ids=token).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_fused_in_16_bit(model: nn.Module, tokens: torch.Tensor) -> None:
    """Of a model in 16 bit, whose own forward rounds too: fused it is about as near to the float32 model."""
    expected = copy.deepcopy(model).float()(input_ids=tokens).logits
    unfused = model(input_ids=tokens).logits
    model.fuse_for_inference("fused")
    fused = model(input_ids=tokens).logits
    error, bound = (fused.float() - expected).abs().mean(), (unfused.float() - expected).abs().mean()
    assert error < 2 * bound + 1e-3


def layer_of(model: nn.Module, name: str) -> Any:
    return next(layer for layer in adapted_layers(model) if layer.name.endswith(name))


def fused(model: nn.Module) -> nn.Module:
    model.fuse_for_inference("fused")
    return model


def groups(model: nn.Module) -> list[Any]:
    return [layer.fused_groups["default"] for layer in adapted_layers(model)]


def as_on_a_gpu(model: nn.Module, most: int | None = None) -> None:
    """A fused model's groups take the ways that they take where the kernels run.

    Args:
        most: tokens that compiled code gives to the fused op; None: as many as it does.
    """
    for layer in adapted_layers(model):
        for group in layer.fused_groups.values():
            group.kernels = True
            if most is not None:
                group.compiled_tokens = most


def join_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be joined on every device and in every dtype, though only the kernels on a GPU gain by it."""

    def why(members, adapter, lora_b):
        facts = facts_of(members[0])
        return None if facts.plain and not facts.transposed else "it is for plain nn.Linear"

    monkeypatch.setattr(joined_weights, "_why_it_gains_nothing", why)


def load_that_fails(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_adapter` of an adapter on more linears than `model` has adapted, which fails when all layers are there."""
    adapted(tiny_llama(), "cpu", next(model.parameters()).dtype).save_pretrained(folder)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr("peft.peft_model.set_peft_model_state_dict", fails)
        model.load_adapter(folder, "second")
    model.eval()
    gc.collect()
