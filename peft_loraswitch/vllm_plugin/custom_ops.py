"""The plugin's two custom ops, opaque to `torch.compile`: what runs inside is decided when they run, not when vLLM compiles.

So both return at once, without a launch, for a batch in which no token has a LoRA: vLLM's own ops do so, and it captures CUDA
graphs for such batches apart. The flag that says so is a tensor in host memory, because a compiler would take a bool for a
constant.

    route    write the mask of the tokens of a batch, or leave it
    expand   add what the tokens' LoRAs give, masked, to a linear's outputs: GPUs only
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op_library import only_library
from .routing_tables import write_mask

library = only_library("loraswitch_vllm")
library.define(
    "route(Tensor x, Tensor? router, Tensor here, Tensor settings, Tensor token_slots, Tensor no_lora, bool first, "
    "Tensor(a!) mask) -> ()"
)
library.define(
    "expand(Tensor hidden, Tensor[] lora_b, Tensor mask, Tensor(a!) out, Tensor order, Tensor counts, Tensor starts, Tensor ids, "
    "Tensor no_lora, Tensor groups, int offset, bool add_inputs) -> ()"
)


def _route(
    x: Tensor, router: Tensor | None, here: Tensor, settings: Tensor, token_slots: Tensor, no_lora: Tensor, first: bool,
    mask: Tensor,
) -> None:  # fmt: skip
    if no_lora.item() or x.shape[0] == 0:
        return
    if x.is_cuda:
        from . import route_kernel

        route_kernel.route(x, router, here, settings, token_slots, first, mask)
    else:
        write_mask(x, router, here, settings, token_slots, first, mask)


def _expand(
    hidden: Tensor, lora_b: list[Tensor], mask: Tensor, out: Tensor, order: Tensor, counts: Tensor, starts: Tensor,
    ids: Tensor, no_lora: Tensor, groups: Tensor, offset: int, add_inputs: bool,
) -> None:  # fmt: skip
    if no_lora.item() or hidden.shape[1] == 0:
        return
    from . import expand_kernel

    number = int(groups.item())
    expand_kernel.expand(hidden, lora_b, mask, out, order, counts, starts, ids, number, offset, add_inputs)


def _nothing(*arguments: object) -> None:
    """Nothing is returned, so for a compiler there is nothing to say."""


for _name, _function in (("route", _route), ("expand", _expand)):
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"loraswitch_vllm::{_name}", _nothing, lib=library)

route = torch.ops.loraswitch_vllm.route
expand = torch.ops.loraswitch_vllm.expand
