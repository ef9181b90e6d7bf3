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


def ordinary(tensor: Tensor) -> Tensor:
    """`tensor`; if it was made within `torch.inference_mode()`, another one in the same memory that was not. Only such a one
    can ask for gradients and be written to in every mode, and only its changes are counted."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return twin.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]


def make_ordinary(module: nn.Module) -> None:
    """Have the parameters of `module` itself be ordinary tensors."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_inference():
            module.register_parameter(name, parameter)  # which `OrdinaryParameters` takes as an ordinary one


class OrdinaryParameters(nn.Module):
    """A module whose parameters are ordinary tensors, also if they are made, loaded or moved within `torch.inference_mode()`."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:  # assignment ends here
        if param is not None and param.is_inference():
            param = nn.Parameter(ordinary(param), param.requires_grad)
        super().register_parameter(name, param)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        make_ordinary(self)
        return result


class CountedParameter(nn.Parameter):
    """A parameter that counts what is written by way of `.data`, too."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
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


def versions_of(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """Changes whenever one of the two is written to or replaced, as far as it is counted."""
    try:
        return a._version, b._version, a.data_ptr(), b.data_ptr()
    except RuntimeError:  # an inference tensor, put straight into a module's dictionary
        return (object(),)  # not like anything before
