"""The plugin's two custom ops, opaque to `torch.compile`: what runs inside is decided when they run, not when vLLM compiles.

So both return at once, without a launch, for a batch in which no token has a LoRA: vLLM's own ops do so, and it captures CUDA
graphs for such batches apart. The flag that says so is a tensor in host memory, because a compiler would take a bool for a
constant.

    route    write the mask of the tokens of a batch, or leave it; for routers that see context also their sums, which it finds by
             the number `kept`
    expand   add what the tokens' LoRAs give, masked, to a linear's outputs: GPUs only
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op_library import only_library
from .kept_sums import find
from .routing_tables import write_mask

library = only_library("loraswitch_vllm")
library.define(
    "route(Tensor x, Tensor? router, Tensor here, Tensor settings, Tensor token_slots, Tensor no_lora, bool first, "
    "Tensor(a!) mask, Tensor kept) -> ()"
)
library.define(
    "expand(Tensor hidden, Tensor[] lora_b, Tensor mask, Tensor(a!) out, Tensor order, Tensor counts, Tensor starts, Tensor ids, "
    "Tensor no_lora, Tensor groups, int offset, bool add_inputs) -> ()"
)


def _route(
    x: Tensor, router: Tensor | None, here: Tensor, settings: Tensor, token_slots: Tensor, no_lora: Tensor, first: bool,
    mask: Tensor, kept: Tensor,
) -> None:  # fmt: skip
    if no_lora.item() or x.shape[0] == 0:
        return
    sums = find(kept)
    if not x.is_cuda:
        write_mask(x, router, here, settings, token_slots, first, mask, sums)
        return
    from . import context_kernel, route_kernel

    route_kernel.route(x, router, here, settings, token_slots, first, mask, None if sums is None else sums.own)
    if sums is not None and context_kernel.is_needed(sums) and (places := sums.places()) is not None:
        context_kernel.route(x.shape[0], here, settings, token_slots, mask, sums, places)


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
