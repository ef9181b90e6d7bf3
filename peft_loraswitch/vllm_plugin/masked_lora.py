"""Where the mask goes into vLLM's computation of LoRAs, and where it is made: in vLLM's "punica wrappers", the objects through
which every linear adds `B (A x)` of each token's LoRA."""

from __future__ import annotations

from typing import Any

import torch

from . import custom_ops, internals
from .routing_site import RoutingSite
from .routing_tables import RoutingTables


def mask_wrapper(wrapper: Any, tables: RoutingTables) -> None:
    """Have one of vLLM's wrappers, of CPUs or GPUs, multiply what A gives by the tables' mask, before B."""
    masked = _masked_on_gpu if internals.has_lora_groups(wrapper) else _masked_on_cpu
    wrapper.loraswitch_tables = tables
    wrapper.loraswitch_flag = torch.zeros(1, dtype=torch.bool)  # on CPUs: there may be a LoRA in any batch
    wrapper.__class__ = masked(type(wrapper))


def _masked_on_gpu(wrapper_class: type) -> type:
    """The mask goes where B does, into the launch that takes the place of vLLM's own."""

    class MaskedOnGPU(wrapper_class):  # type: ignore[misc]
        loraswitch_tables: RoutingTables

        def loraswitch_no_lora(self) -> torch.Tensor:
            return internals.no_lora_flag(self)

        def add_expand(
            self,
            y: torch.Tensor,
            x: torch.Tensor,
            lora_b_stacked: tuple[torch.Tensor, ...],
            output_slices: tuple[int, ...],
            offset_start: int = 0,
            add_inputs: bool = True,
            **kwargs: Any,
        ) -> None:
            # x: [parts of a packed linear, tokens, max_rank]
            groups = internals.lora_groups(self, x.shape[1])
            custom_ops.expand(
                x, list(lora_b_stacked), self.loraswitch_tables.mask, y.view(-1, y.shape[-1]),
                groups.order, groups.counts, groups.starts, groups.ids, groups.no_lora, groups.number,
                offset_start, add_inputs,
            )  # fmt: skip

    return MaskedOnGPU


def _masked_on_cpu(wrapper_class: type) -> type:
    """What A gives is multiplied by the mask, and vLLM goes on."""

    class MaskedOnCPU(wrapper_class):  # type: ignore[misc]
        loraswitch_tables: RoutingTables
        loraswitch_flag: torch.Tensor

        def loraswitch_no_lora(self) -> torch.Tensor:
            return self.loraswitch_flag

        def add_expand(self, y: torch.Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
            # x: [tokens, max_rank] for each part of a packed linear, stacked or in a tuple
            mask = self.loraswitch_tables.mask
            for hidden in (x,) if isinstance(x, torch.Tensor) else x:
                hidden.mul_(mask[: hidden.shape[-2]])
            return super().add_expand(y, x, *args, **kwargs)

    return MaskedOnCPU


class RoutingWrapper:
    """The wrapper of a linear that routes: decides first, then does what that of all linears does."""

    def __init__(self, wrapper: Any, site: RoutingSite) -> None:
        self.wrapper, self.site = wrapper, site

    def route(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        self.site.route(x, self.wrapper._token_lora_indices, self.wrapper.loraswitch_no_lora())

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.route(x)
        return self.wrapper.add_lora_linear(y, x, *args, **kwargs)

    def add_shrink(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # fully sharded linears call this and add_expand by themselves
        self.route(x)
        return self.wrapper.add_shrink(y, x, *args, **kwargs)

    def add_expand(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper.add_expand(*args, **kwargs)
