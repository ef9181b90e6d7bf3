"""The weights of linears that receive the same tensor, and lora_a of all their experts, in one matrix: one library product makes
of x all that a group needs of it, and is faster than one for each linear (q, k, v: 38 us for 50, docs/kernel_log.md).

Only on request (`fuse_for_inference(join_weights=True)`), since it moves weights in memory: they stay the parameters that they
were, with the values that they had, but views of the matrix. Nobody has to be told: whoever needs the matrix looks whether the
weights lie in it (`lies_in`), and multiplies by each of them if not, say after `model.to(...)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

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
    for each in (*weights, *lora_a):
        here = each.dtype == matrix.dtype and each.device == matrix.device and each.is_contiguous()
        if not here or each.shape[-1] != matrix.shape[1] or each.data_ptr() != at + rows * matrix[:1].nbytes:
            return False
        rows += each.shape[:-1].numel()
    return rows == matrix.shape[0]


def why_not_joined(
    members: Sequence[LoRASwitchLinear], adapter: str, lora_b: Sequence[Tensor], shared: Container[int] = ()
) -> str | None:  # fmt: skip
    """Why the linears of a group stay as they are; None if they can be joined.

    Args:
        shared: of the model, see `shared_memory`.
    """
    return _why_it_gains_nothing(members, adapter, lora_b) or _why_weights_stay(
        [base_of(member).weight for member in members], shared
    )


def _why_it_gains_nothing(members: Sequence[LoRASwitchLinear], adapter: str, lora_b: Sequence[Tensor]) -> str | None:
    facts, active = facts_of(members[0]), members[0].routing_options[adapter].num_active
    if not (facts.plain and facts.kernels and not facts.transposed):
        return "it is for plain nn.Linear without hooks, where the CUDA kernels run"
    if not (expandable(lora_b) and all(within_limits(member, adapter, active) for member in members)):
        return f"it is for 16 bits, sizes divisible by 8 and at most {_MOST_RANKS} ranks of all experts of a linear"
    return None


def _why_weights_stay(weights: Sequence[Tensor], shared: Container[int]) -> str | None:
    for weight in weights:
        if weight in _moved or len({id(each) for each in weights}) != len(weights):
            return "linears share a weight"
        if weight.is_inference() or not weight.is_contiguous():
            return "a weight was made within inference_mode, or is not contiguous"
        if weight.untyped_storage().data_ptr() in shared:
            return "a weight shares its memory with another tensor of the model"
        if weight.untyped_storage().nbytes() != weight.nbytes:
            return "a weight is part of a larger tensor"
    return None


def shared_memory(model: nn.Module) -> set[int]:
    """Where memory begins that several parameters and buffers of `model` have, by intention: it must not be split."""
    first: dict[int, int] = {}
    shared = set()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
            address = tensor.untyped_storage().data_ptr()
            if first.setdefault(address, id(tensor)) != id(tensor):
                shared.add(address)
    return shared


_moved = WeakIdKeyDictionary()  # parameters that `join` has moved, and where the memory begins that they were moved to


def join(members: Sequence[Any], adapter: str) -> list[Tensor]:
    """Move the base weights of `members` (fused layers, one group, its leader first) into a new matrix, with a copy of their
    lora_a of `adapter`: [sum of out + sum of E * r, in], kept at the leader's `fusing.joined`.

    Each weight is moved by itself, with its values: what cuts this short leaves a model that is right.

    Returns:
        The weights' old memory, for a caller who keeps it a little longer: another thread may just have read an address.

    Raises:
        torch.OutOfMemoryError: there is no room for one group's weights a second time. Nothing has been changed.
    """
    weights = [base_of(member).weight for member in members]
    experts = [member.loraswitch_A[adapter] for member in members]
    heights = [weight.shape[0] for weight in weights] + [a.weight.shape[:-1].numel() for a in experts]
    with torch.inference_mode(False), torch.no_grad():
        matrix = weights[0].new_empty(sum(heights), weights[0].shape[1])
        parts = matrix.split(heights)
        for rows, weight in zip(parts, weights, strict=False):
            rows.copy_(weight)
        for tensor in (matrix, *parts):
            torch._dynamo.mark_static_address(tensor, guard=False)  # CUDA graphs read it in place, like a parameter
        try:
            for rows, member in zip(parts[len(weights) :], members, strict=True):
                _keep_copy(member, adapter, rows)
            members[0].fusing.joined[adapter] = matrix
        except BaseException:
            leave(members[0], adapter)
            raise
        return [_move(weight, rows) for rows, weight in zip(parts, weights, strict=False)]


def _keep_copy(member: Any, adapter: str, rows: Tensor) -> None:
    """Serve lora_a of `adapter` from a copy in some rows of a matrix."""
    fusing, a = member.fusing, member.loraswitch_A[adapter].weight
    before = fusing.casts.get(adapter)
    of_nothing = Fingerprint()
    of_nothing.invalidate()
    b = {} if before is None else before.b
    fusing.casts[adapter] = Casts({"weight": rows.view(a.shape)}, b, of_nothing, joined=True)
    torch._dynamo.mark_static_address(fusing.casts[adapter].a["weight"], guard=False)
    current_casts(member, fusing.casts, adapter, fusing.seen)


def _move(parameter: nn.Parameter, to: Tensor) -> Tensor:
    """Give a parameter the memory of `to`, which has its values. Returns the old."""
    _synchronize(to)  # other streams may read the new memory at once
    old = parameter.detach()
    _moved[parameter] = to.untyped_storage().data_ptr()
    parameter.data = to
    _synchronize(old)  # and have read the old
    return old


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def leave(leader: Any, adapter: str) -> None:
    """The matrix of a group is used no more, since a weight has left it, or there is none for it yet. Weights that are in it stay
    there until `part`."""
    for member in leader.fusing.members:
        fusing = vars(member).get("fusing")
        casts = None if fusing is None else fusing.casts.get(adapter)
        if casts is not None and casts.joined:
            del fusing.casts[adapter]
    leader.fusing.joined.pop(adapter, None)


def part(layers: Sequence[Any]) -> None:
    """Give all weights of `layers` that `join` has moved memory of their own again; those for which there is none stay."""
    for layer in layers:
        fusing = vars(layer).get("fusing")
        for adapter in () if fusing is None else list(fusing.joined):
            leave(layer, adapter)
        # Also those that are weights under another name now, or were somewhere else when somebody looked last.
        for parameter in layer.get_base_layer().parameters():
            if parameter in _moved and not _part(parameter):
                return


def _part(parameter: nn.Parameter) -> bool:
    """False: there is no memory for it."""
    if type(parameter) is nn.Parameter and parameter.untyped_storage().data_ptr() == _moved[parameter]:
        try:
            with torch.inference_mode(False), torch.no_grad():
                _move(parameter, parameter.detach().clone())
        except torch.OutOfMemoryError:
            kernels.log_once(
                "LoRA-Switch: too little memory to give joined weights memory of their own again: they stay where they are, "
                "with the values that they have."
            )
            return False
    del _moved[parameter]
    return True
