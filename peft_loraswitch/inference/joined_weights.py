"""The weights of linears that receive the same tensor, and lora_a of all their experts, in one matrix: one library product makes
of x all that a group needs of it, and is faster than one for each linear (q, k, v: 38 us for 50, docs/kernel_log.md).

Only on request (`fuse_for_inference(join_weights=True)`), since it moves weights in memory: they stay the parameters that they
were, with the values that they had, but views of the matrix. Nobody has to be told: whoever needs the matrix looks whether the
weights lie in it (`lies_in`), and multiplies by each of them if not, say after `model.to(...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..fingerprint import Fingerprint
from ..layer import LoRASwitchLinear
from .capabilities import base_of, facts_of, within_limits
from .expert_casts import Casts, current_casts
from .four_bit import HALVES

_MOST_RANKS = 128  # of all experts of a linear: what `kernels.expand` takes


def expandable(lora_b: Sequence[Tensor]) -> bool:
    """Whether `kernels.expand` takes these lora_b [E, out, r]."""
    shapes = [b.shape for b in lora_b]
    few = all(stack * rank <= _MOST_RANKS and out % 8 == 0 and rank % 8 == 0 for stack, out, rank in shapes)
    return few and lora_b[0].dtype in HALVES


def lies_in(matrix: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor]) -> bool:
    """Whether `matrix` is these, one after the other: weights [out, in] each, then lora_a [E, r, in] each."""
    at, rows = matrix.data_ptr(), 0
    for part in (*weights, *lora_a):
        here = part.dtype == matrix.dtype and part.device == matrix.device and part.is_contiguous()
        if not here or part.shape[-1] != matrix.shape[1] or part.data_ptr() != at + rows * matrix[:1].nbytes:
            return False
        rows += part.shape[:-1].numel()
    return rows == matrix.shape[0]


def why_not_joined(members: Sequence[LoRASwitchLinear], adapter: str, lora_b: Sequence[Tensor]) -> str | None:
    """Why the linears of a group stay as they are; None if they can be joined."""
    return _why_it_gains_nothing(members, adapter, lora_b) or _why_weights_stay(
        [base_of(member).weight for member in members]
    )


def _why_it_gains_nothing(members: Sequence[LoRASwitchLinear], adapter: str, lora_b: Sequence[Tensor]) -> str | None:
    facts, active = facts_of(members[0]), members[0].routing_options[adapter].num_active
    if not (facts.plain and facts.kernels and not facts.transposed):
        return "it is for plain nn.Linear without hooks, where the CUDA kernels run"
    if not (expandable(lora_b) and all(within_limits(member, adapter, active) for member in members)):
        return f"it is for 16 bits, sizes divisible by 8 and at most {_MOST_RANKS} ranks of all experts of a linear"
    return None


def _why_weights_stay(weights: Sequence[Tensor]) -> str | None:
    for weight in weights:
        if weight.is_inference() or not weight.is_contiguous():
            return "a weight was made within inference_mode, or is not contiguous"
        if weight.untyped_storage().nbytes() != weight.nbytes:
            return "a weight is part of a larger tensor"
    if len({weight.data_ptr() for weight in weights}) != len(weights):
        return "linears share a weight"
    return None


def join(members: Sequence[Any], adapter: str) -> None:
    """Move the base weights of `members` (fused layers, one group, its leader first) into a new matrix, with a copy of their
    lora_a of `adapter`: [sum of out + sum of E * r, in], kept at the leader's `fusing.joined`.

    Each weight is moved by itself, with its values: what cuts this short leaves a model that is right.

    Raises:
        torch.OutOfMemoryError: there is no room for one group's weights a second time. Nothing has been changed.
    """
    weights = [base_of(member).weight for member in members]
    experts = [member.loraswitch_A[adapter] for member in members]
    heights = [weight.shape[0] for weight in weights] + [a.weight.shape[:-1].numel() for a in experts]
    with torch.inference_mode(False), torch.no_grad():
        matrix = weights[0].new_empty(sum(heights), weights[0].shape[1])
        parts = matrix.split(heights)
        for part, weight in zip(parts, weights, strict=False):
            part.copy_(weight)
        for tensor in (matrix, *parts):
            torch._dynamo.mark_static_address(tensor, guard=False)  # CUDA graphs read it in place, like a parameter
        members[0].fusing.joined[adapter] = matrix
        for part, member in zip(parts[len(weights) :], members, strict=True):
            _keep_copy(member, adapter, part)
        if matrix.is_cuda:
            torch.cuda.synchronize(matrix.device)  # other streams have read the old memory before it goes
        for part, weight in zip(parts, weights, strict=False):
            weight.data = part


def _keep_copy(member: Any, adapter: str, part: Tensor) -> None:
    """Serve lora_a of `adapter` from a copy in `part` of a matrix."""
    fusing, a = member.fusing, member.loraswitch_A[adapter].weight
    before = fusing.casts.get(adapter)
    b = member.loraswitch_B[adapter]._parameters if before is None else before.b
    of_nothing = Fingerprint()
    of_nothing.invalidate()
    fusing.casts[adapter] = Casts({"weight": part.view(a.shape)}, b, of_nothing, joined=True)
    torch._dynamo.mark_static_address(fusing.casts[adapter].a["weight"], guard=False)
    current_casts(member, fusing.casts, adapter, fusing.seen)


def part(leader: Any, adapter: str) -> None:
    """Take `join(leader.fusing.members, adapter)` back: weights have memory of their own again, except where there is none."""
    matrix = leader.fusing.joined.get(adapter)
    for member in leader.fusing.members if matrix is not None else ():
        weight: Any = getattr(base_of(member), "weight", None)
        if _is_within(weight, matrix):
            try:
                with torch.inference_mode(False), torch.no_grad():
                    weight.data = weight.detach().clone()
            except torch.OutOfMemoryError:
                kernels.log_once(
                    "LoRA-Switch: too little memory to give joined weights memory of their own again: they stay where they are, "
                    "with the values that they have."
                )
                break
    for member in leader.fusing.members:
        casts = member.fusing.casts.get(adapter)
        if casts is not None and casts.joined:
            del member.fusing.casts[adapter]
    leader.fusing.joined.pop(adapter, None)  # last: what is cut short is done again


def _is_within(weight: Any, matrix: Tensor) -> bool:
    if type(weight) not in (nn.Parameter, Tensor) or weight.device != matrix.device:
        return False
    same: bool = weight.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
    return same
