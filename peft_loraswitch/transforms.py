"""Which transforms of `torch.func` a forward runs under, and other ways of asking more of it than values and gradients."""

from __future__ import annotations

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_of_transforms

__all__ = ["is_transformed", "more_than_gradients", "outside_of_transforms", "under_transform", "under_vmap"]
# Read as they are now; no name here is a module of torch's, see `routing.frame.traced`.
_transforms_active = torch._C._are_functorch_transforms_active
_forward_mode = vars(torch.autograd.forward_ad)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def more_than_gradients() -> bool:
    """Whether a forward may be mapped over, or differentiated in another way than by `backward()`: a transform of torch.func is
    at work, or a level of forward-mode derivatives is open. Our own ops know neither. (A compiler guards both by itself.)"""
    return bool(_transforms_active()) or _forward_mode["_current_level"] >= 0


def under_transform() -> bool:
    """Any: grad, vjp, jvp, vmap, ..."""
    return bool(_transforms_active())


def under_vmap() -> bool:
    """One that hides the values of tensors: there may be many."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in stack)


def is_transformed(x: torch.Tensor) -> bool:
    """Whether x is what a transform at work differentiates or maps over, or was made of it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
