"""Where the mask goes into vLLM's computation of LoRAs, and where it is made: in vLLM's "punica wrappers", the objects through
which every linear adds `B (A x)` of each token's LoRA."""

from __future__ import annotations

from typing import Any

import torch

from .routing_tables import RoutingSite, RoutingTables


def masked(wrapper_class: type) -> type:
    """A subclass of one of vLLM's wrapper classes that multiplies what A gives by the mask, before B."""

    class Masked(wrapper_class):  # type: ignore[misc]
        loraswitch_tables: RoutingTables

        def add_expand(self, y: torch.Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
            # x: [tokens, max_rank] for each part of a packed linear, stacked (on GPUs) or in a tuple
            mask = self.loraswitch_tables.mask
            for hidden in (x,) if isinstance(x, torch.Tensor) else x:
                hidden.mul_(mask[: hidden.shape[-2]])
            return super().add_expand(y, x, *args, **kwargs)

    Masked.__name__ = Masked.__qualname__ = f"Masked{wrapper_class.__name__}"
    return Masked


class RoutingWrapper:
    """The wrapper of a linear that routes: decides first, then does what that of all linears does."""

    def __init__(self, wrapper: Any, site: RoutingSite) -> None:
        self.wrapper, self.site = wrapper, site

    def route(self, x: torch.Tensor) -> None:
        self.site.route(x.reshape(-1, x.shape[-1]), self.wrapper._token_lora_indices)

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.route(x)
        return self.wrapper.add_lora_linear(y, x, *args, **kwargs)

    def add_shrink(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # fully sharded linears call this and add_expand by themselves
        self.route(x)
        return self.wrapper.add_shrink(y, x, *args, **kwargs)

    def add_expand(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper.add_expand(*args, **kwargs)
