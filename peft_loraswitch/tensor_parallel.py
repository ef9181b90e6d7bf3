"""Adapted linears of a backbone whose weights are split over processes (`tp_plan="auto"` of `from_pretrained`).

Every process holds all experts whole, and the router: files, optimizers and statistics are those of one process. What is
computed follows the base layer (Megatron-LM, arXiv 1909.08053):

- its outputs are split (column-wise): each process computes the hidden of all experts, and the rows of B that are its own.
  In backward the hidden's gradient is summed over the processes, so everything before it has its whole gradient everywhere;
- its inputs are split (row-wise): each process has its columns of A, and the hidden is summed over the processes. B is whole.

Gradients of A and B are nonzero only in the part that a process has used, and summed, so that they are equal everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor


class Split(NamedTuple):
    """The part of a linear that this process computes.

    Attributes:
        group: the processes that hold the other parts.
        of_inputs: whether the inputs are split; else the outputs.
        start, stop: of the features that are here.
    """

    group: Any
    of_inputs: bool
    start: int
    stop: int

    def weight_a(self, weight: Tensor) -> Tensor:
        """[E, r, in] -> what multiplies the inputs that are here."""
        return _sum_in_backward(weight, self.group)[..., self.start : self.stop] if self.of_inputs else weight

    def weight_b(self, weight: Tensor) -> Tensor:
        """[E, out, r] -> what makes the outputs that are here."""
        return weight if self.of_inputs else _sum_in_backward(weight, self.group)[:, self.start : self.stop]

    def hidden(self, hidden: Tensor) -> Tensor:
        """The hidden of all inputs, from that of those here."""
        return _Sum.apply(hidden, self.group) if self.of_inputs else hidden  # type: ignore[no-untyped-call]

    def gated(self, gated: Tensor) -> Tensor:
        """The hidden as B takes it."""
        return gated if self.of_inputs else _sum_in_backward(gated, self.group)

    def whole_input(self, x: Tensor, features: int) -> Tensor:
        """x [..., in] of all processes, for a router; its gradient must be the same in all of them."""
        return _Whole.apply(x, self, features) if self.of_inputs else x  # type: ignore[no-untyped-call]


def split_of(base: Any, of_inputs: bool) -> Split | None:
    """How the base layer is split; None if its weight does not say."""
    weight = getattr(base, "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)  # type: ignore[union-attr]
    dim = 1 if of_inputs else 0
    if _transposed(base):
        dim = 1 - dim
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return Split(group, of_inputs, offset[dim], offset[dim] + shape[dim])


def features_of(base: Any) -> tuple[Any, Any]:
    """(in_features, out_features) of a linear, of all processes together."""
    if is_split(base) and base.weight.dim() == 2:
        out, inputs = base.weight.shape
        return (out, inputs) if _transposed(base) else (inputs, out)
    features: tuple[Any, Any] = _get_in_out_features(base)
    return features


def _transposed(base: Any) -> bool:
    return getattr(base, "nf", None) is not None  # Conv1D: [in, out]


def is_split(base: Any) -> bool:
    return hasattr(getattr(base, "weight", None), "device_mesh")


def num_sharing(base: Any) -> int:
    """How many processes compute this linear together, each a part of it: they see the same tokens. Those of FSDP share its
    memory only, and their dimension of the mesh has another name."""
    mesh = getattr(getattr(base, "weight", None), "device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return int(mesh.size(names.index("tp"))) if "tp" in names else 1  # type: ignore[union-attr]


def _sum_in_backward(x: Tensor, group: Any) -> Tensor:
    summed: Tensor = _SumInBackward.apply(x, group)  # type: ignore[no-untyped-call]
    return summed


def _all_reduce(x: Tensor, group: Any) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _SumInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _all_reduce(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, features: int) -> Tensor:
        ctx.split = split
        whole = x.new_zeros(
            (*x.shape[:-1], features)
        )  # parts may differ in size: a sum of parts instead of a gathering
        whole[..., split.start : split.stop] = x
        dist.all_reduce(whole, group=split.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient[..., ctx.split.start : ctx.split.stop], None, None
