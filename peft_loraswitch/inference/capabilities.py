"""What the fused ops can serve: the base layers whose weights they can read, the adapters within the sizes that they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import kernels, ops
from ..layer import LoRASwitchLinear
from .four_bit import FourBitFormat, format_of

# Up to so many tokens in flight the kernels beat library products (docs/kernel_log.md, measured on an H200); float32 and
# other cases of the generic kernel read the weight once for every four tokens.
FEW_TOKENS = kernels.FAST_TOKENS
FEW_TOKENS_GENERIC = 4


@dataclass(frozen=True)
class BaseFacts:
    """What the ops ask of a base layer.

    Attributes:
        plain: it is a 16/32-bit nn.Linear or Conv1D without hooks, whose weight the ops can read.
        four_bit: it is one of bitsandbytes' or torchao's without hooks, whose weight of 4 bits the kernels can read; else None.
        hooked: it has hooks, which are to see what they see without fusing: it runs when its own layer does.
        transposed: it is a Conv1D.
        kernels: the kernels run on its device; few_tokens: up to how many tokens the fused ops are used.
    """

    plain: bool
    four_bit: FourBitFormat | None
    hooked: bool
    transposed: bool
    kernels: bool
    few_tokens: int


def base_of(layer: LoRASwitchLinear) -> Any:
    return layer.get_base_layer()


def device_of(base: nn.Module) -> torch.device:
    return next(iter([*base.parameters(), *base.buffers()])).device  # a quantised one may have no `weight`


def kernels_serve(device: torch.device) -> bool:
    """Whether the kernels run on `device`; they get their workspace then."""
    if device.type != "cuda" or not kernels.available(device.index or 0):
        return False
    kernels.give_workspace(device.index or 0)
    return True


def facts_of(layer: LoRASwitchLinear) -> BaseFacts:
    base = base_of(layer)
    transposed = type(base) is Conv1D
    plain = type(base) in (nn.Linear, Conv1D) and base.weight.dtype in ops.FLOATS
    plain = plain and type(base.weight) in (nn.Parameter, Tensor)  # torchao's weights are of other classes
    # Hooks on the base layer (accelerate's offloading, a user's) must run, so its own forward must.
    hook = getattr(base, "_hf_hook", None)  # one that only moves inputs is not needed: other devices go unfused
    only_moves = isinstance(hook, AlignDevicesHook) and not hook.offload
    watched = hooked(base) or hooked(layer.base_layer)
    own_forward = watched or layer.base_layer is not base or not (hook is None or only_moves)
    plain = plain and not own_forward
    device = device_of(base)
    usable = kernels_serve(device)
    fast = not transposed and not (plain and base.weight.dtype == torch.float32)
    few_tokens = FEW_TOKENS if fast or device.type != "cuda" else FEW_TOKENS_GENERIC
    if device.type == "cuda" and not usable:
        few_tokens = 0  # library products beat the ops' PyTorch path on a GPU
    four_bit = format_of(base) if usable and not own_forward else None
    return BaseFacts(plain, four_bit, watched, transposed, usable, few_tokens)


def hooked(base: nn.Module) -> bool:
    return bool(base._forward_hooks or base._forward_pre_hooks)


def within_limits(layer: LoRASwitchLinear, adapter: str, active: int) -> bool:
    """Whether the ops take an adapter of this size, with so many experts for each token; beyond, two dense products serve
    it, with one line of log."""
    stack, rank, _ = layer.loraswitch_A[adapter].weight.shape
    if active <= kernels.MAX_TOP_K and stack <= kernels.MAX_EXPERTS and rank <= kernels.MAX_RANK:
        return True
    kernels.log_once(
        f"LoRA-Switch: adapter '{adapter}' is served by PyTorch operations: the fused ones take at most "
        f"{kernels.MAX_TOP_K} experts per token (top_k + num_shared_experts), {kernels.MAX_EXPERTS} experts and rank "
        f"{kernels.MAX_RANK}."
    )
    return False
