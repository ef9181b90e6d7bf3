"""Which transforms of `torch.func` a forward runs under."""

from __future__ import annotations

import torch


def under_transform() -> bool:
    """Any: grad, vjp, jvp, vmap, ..."""
    return bool(torch._C._are_functorch_transforms_active())


def under_vmap() -> bool:
    """One that hides the values of tensors: there may be many."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in stack)


def is_transformed(x: torch.Tensor) -> bool:
    """Whether x is what a transform at work differentiates or maps over, or was made of it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
