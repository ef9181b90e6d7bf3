"""A quantised linear in a few lines, in place of a library's: fused ops cannot read its weight, so its own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_loraswitch.inference import eager_launch
from peft_loraswitch.inference.fuse import adapted_layers

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Int8Linear(nn.Module):
    """The weight in 8 bits, with one scale for each output.

    Args:
        linear: what to quantise.
        finish: what is done to the result.
    """

    def __init__(self, linear: nn.Linear, finish: Callable[[torch.Tensor], torch.Tensor] = torch.positive) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.finish, weight = finish, linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.rounded = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(nn.functional.linear(x, self.rounded.to(x.dtype) * self.scale, self.bias))


def quantised(model: nn.Module, names: tuple[str, ...] = ALL, **settings: Any) -> nn.Module:
    """`model`, the base layers of its adapted linears quantised that go by `names`."""
    for layer in adapted_layers(model):
        if layer.name.rpartition(".")[2] in names:
            layer.base_layer = Int8Linear(layer.base_layer, **settings)
    return model


class Launches(TorchDispatchMode):
    """Within it, `of` gets the name and the number of linears of each op of this package that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "loraswitch" and isinstance(result, (list, torch.Tensor)):
            self.of.append((func._schema.name.partition("::")[2], len(result) if isinstance(result, list) else 1))
        return result


@contextmanager
def launches() -> Iterator[list[tuple[str, int]]]:
    """Name and number of linears of each op of this package that is called within it, and of each call of the kernels that
    eager code makes in an op's place."""
    launch = eager_launch._Direct._launch

    def noted(self: Any, x: Any, routing: Any, shape: Any, bases: Any = ()) -> Any:
        results = launch(self, x, routing, shape, bases)
        mode.of.append(("deltas" if bases else "linear", len(results)))
        return results

    with Launches() as mode, mock.patch.object(eager_launch._Direct, "_launch", noted):
        yield mode.of
