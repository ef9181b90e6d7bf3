"""What the tests of training in bitsandbytes' 4 bits share, on a CPU and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fast_linear_checks
from fast_linear_checks import NO_LOSSES, relative
from four_bit_linear import exact_weight, in_4_bits
from helpers import tiny_llama
from oracle import Oracle
from peft_loraswitch.inference.fuse import adapted_layers
from peft_loraswitch.training import fast_linears, group_plans
from peft_loraswitch.training.group_layout import Spec

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}  # blocks have at least 64 features
MODES = ["no checkpointing", "non-reentrant", "reentrant"]
SOFT = {"top_k": 4, **NO_LOSSES}  # all experts: rounding changes no choice
LINEARS = 14
Steps = list[dict[str, torch.Tensor]]  # gradients of each
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "double": {"double": True},
    "blocks of 128": {"blocksize": 128},
    "stored as bf16": {"storage": torch.bfloat16},
}


def noted_specs(monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    """Of each call of the autograd function from now on."""
    found: list[Spec] = []
    run = fast_linears.run
    monkeypatch.setattr(fast_linears, "run", lambda spec, *args: (found.append(spec), run(spec, *args))[1])
    return found


@contextmanager
def given() -> Iterator[None]:
    """Within it the library computes the base layers' products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_plans, "four_bit_form", lambda base: None)
        yield


def model_of(
    dtype: torch.dtype = torch.float32, mode: str = "no checkpointing", kind: dict[str, Any] | None = None,
    device: str = "cpu", shape: dict[str, Any] | None = None, **config: Any,
) -> Any:  # fmt: skip
    """Everything in one dtype."""
    model = fast_linear_checks.adapted(tiny_llama(**{**SHAPE, **(shape or {})}), **config).to(device, dtype)
    in_4_bits(model, **{"compute_dtype": dtype, **(kind or {})})
    return checkpointed(model.train(), mode)


def checkpointed(model: Any, mode: str) -> Any:
    if mode != "no checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    return model


def plain_twin(model: Any, dtype: torch.dtype) -> Any:
    """A copy of `model` without checkpointing, whose base layers are plain ones in float64 with the weights that the quantised
    ones have as numbers of `dtype`."""
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_disable()
    for layer in adapted_layers(twin):
        base, plain = (
            layer.base_layer,
            nn.Linear(layer.in_features, layer.out_features, layer.base_layer.bias is not None),
        )
        plain.weight = nn.Parameter(exact_weight(base).to(dtype).double(), requires_grad=False)
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.detach().double(), requires_grad=False)
        layer.base_layer = plain
    return twin


def definition(model: Any, dtype: torch.dtype) -> Oracle:
    """Of `model` with the weights of its base layers as numbers of `dtype`."""
    return Oracle(plain_twin(model, dtype))


def layers_of(model: Any) -> list[Any]:
    return list(adapted_layers(model))


def packed(specs: list[Spec]) -> int:
    """Linears whose base products the function has computed; the others must have been given."""
    assert all(spec.packed != spec.given for spec in specs)
    return sum(spec.size for spec in specs if spec.packed)


def agree(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, each in expected.items():
        assert relative(actual[name], each) < tolerance, name


def distance(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The mean relative error of all gradients."""
    return sum(relative(each, exact[name]) for name, each in actual.items()) / len(actual)


def no_further(ours: Steps, theirs: Steps, exact: Steps) -> None:
    """Our gradients are no further from the exact ones than the library's are. Both are off by rounding, by chance more or less:
    so by half as much again on average, and each tensor by twice what the library is off in it and on average."""
    expected = _distances(theirs, exact)
    usual = sum(expected.values()) / len(expected)
    found = _distances(ours, exact)
    assert sum(found.values()) / len(found) <= 1.5 * usual
    for name, each in found.items():
        assert each <= 2 * (expected[name] + usual), name


def _distances(actual: Steps, exact: Steps) -> dict[str, float]:
    """The relative error of each tensor, the mean of all steps."""
    found = dict.fromkeys(exact[0], 0.0)
    for gradients, wanted in zip(actual, exact, strict=True):
        assert gradients.keys() == wanted.keys() == found.keys()
        for name, each in wanted.items():
            found[name] += relative(gradients[name], each) / len(exact)
    return found
