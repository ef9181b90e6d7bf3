"""A linear on whose input tokens are routed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import custom_ops
from .routing_tables import RoutingTables, own_logits


class RoutingSite:
    """The router weights of the adapters that decide at one linear.

    Attributes:
        router: float32 [slots, max_choices, in_features], of this process' part of the input if that is sharded.
        here: bool [slots]: the adapter in the slot decides at this linear.
        first: it is the first linear that runs: the mask of all other tokens is set here as well.
        begins: the first feature of this process' part of the input.
        sum_shards: adds the logits of all parts of a sharded input; None if the input is whole.
    """

    def __init__(
        self,
        tables: RoutingTables,
        in_features: int,
        first: bool,
        begins: int = 0,
        sum_shards: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.tables, self.first, self.begins, self.sum_shards = tables, first, begins, sum_shards
        self.router = torch.zeros(tables.slots, tables.max_choices, in_features, device=tables.device)
        self.here = torch.zeros(tables.slots, dtype=torch.bool, device=tables.device)

    def place(self, slot: int, router: torch.Tensor | None) -> None:
        """The adapter in `slot` decides here with `router` [choices, in_features]; None: it does not decide here."""
        self.here[slot] = router is not None
        self.router[slot] = 0
        if router is not None:
            part = router[:, self.begins : self.begins + self.router.shape[2]]
            self.router[slot, : router.shape[0]] = part.to(self.router)

    def route(self, x: torch.Tensor, token_slots: torch.Tensor, no_lora: torch.Tensor) -> None:
        """Write the mask of the tokens x [tokens, in_features], whose adapters are in `token_slots` (-1: none).

        no_lora: bool [1], in host memory: no token has an adapter, and nothing is written.
        """
        tables = self.tables
        router: torch.Tensor | None = self.router
        if self.sum_shards is not None:
            slot = token_slots[: x.shape[0]].clamp(0, tables.slots - 1)
            x, router = self.sum_shards(own_logits(x, self.router, slot)), None
        custom_ops.route(
            x, router, self.here, tables.settings, token_slots, no_lora, self.first, tables.mask, tables.kept.number
        )
