"""Weights whose changes are counted.

PyTorch counts the writes to a tensor (`tensor._version`). Fused layers keep copies of experts in another dtype, and learn from
that counter that a copy is old. Three ways of writing get around the counter, and are brought back to it here: tensors made
within `torch.inference_mode()` have none, what `parameter.data` returns has one of its own, and fused optimisers leave it alone.

Still unseen are writes of which PyTorch knows nothing: through NumPy, DLPack or a pointer that a kernel of one's own was given,
and through `parameter.data` if it was taken before the model was fused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ordinary import make_ordinary, ordinary


class CountedParameter(nn.Parameter):
    """A parameter that counts what is written by way of `.data`, too."""

    @property
    def data(self) -> Tensor:
        return self.detach()  # the same memory, and the parameter's own counter

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, ordinary(value))  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(self)  # new memory may have the old one's address


def is_counted(parameter: Tensor) -> bool:
    return type(parameter) is CountedParameter and not parameter.is_inference()


def count_writes(module: nn.Module) -> None:
    """From now on the parameters of `module` itself count all writes that can be counted."""
    make_ordinary(module)
    for parameter in module._parameters.values():
        if type(parameter) is nn.Parameter:
            parameter.__class__ = CountedParameter
            _count_steps_of_optimizers()


def count_as_before(module: nn.Module) -> None:
    """Take `count_writes()` back."""
    for parameter in module._parameters.values():
        if type(parameter) is CountedParameter:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]


@functools.cache
def _count_steps_of_optimizers() -> None:
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if type(parameter) is CountedParameter:
                torch.autograd.graph.increment_version(parameter)
