"""Parameters that are ordinary tensors, whatever mode they were made in.

A tensor made within `torch.inference_mode()` can never ask for gradients, cannot be written to outside of that mode and counts no
writes. A server may well load an adapter within it, and train, move or change it later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def ordinary(tensor: Tensor) -> Tensor:
    """`tensor`; if it was made within `torch.inference_mode()`, another one in the same memory that was not. Only such a one
    can ask for gradients and be written to in every mode, and only its changes are counted."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return twin.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def make_ordinary(module: nn.Module) -> None:
    """Have the parameters of `module` itself be ordinary tensors."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and parameter.is_inference():
            module.register_parameter(name, parameter)  # which `OrdinaryParameters` takes as an ordinary one


class OrdinaryParameters(nn.Module):
    """A module whose parameters are ordinary tensors, also if they are made, loaded or moved within `torch.inference_mode()`."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:  # assignment ends here
        if param is not None and param.is_inference():
            param = nn.Parameter(ordinary(param), param.requires_grad)
        super().register_parameter(name, param)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        make_ordinary(self)
        return result
