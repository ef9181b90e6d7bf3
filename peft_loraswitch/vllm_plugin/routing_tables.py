"""The routing decision for a batch whose tokens belong to different adapters: static shapes, no branch on data.

vLLM compiles a model and captures it in CUDA graphs once, and loads adapters afterwards. So everything that depends on the
adapters stands in tables that are written when one is loaded, a row for each of vLLM's slots, and a forward always runs the
same operations. It leaves the decision as a mask, `[tokens, max_lora_rank]` (`wide_lora.py` says why one is enough).

The rule is that of `routing/decision.py`: highest logits, of equal ones the lowest index, shared experts with gate 1 / top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..routing.options import RoutingOptions


class RoutingTables:
    """The mask, and what deciding needs to know of the adapter in each slot.

    Attributes:
        mask: float32 [max_tokens, max_rank]: what the hidden vectors of each token are multiplied with. A row of ones for a
            plain LoRA, and for a LoRA-Switch adapter before its router; of zeros for the backbone alone.
    """

    def __init__(
        self, slots: int, max_rank: int, max_choices: int, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.slots, self.max_choices, self.device = slots, max_choices, device
        new = partial(torch.zeros, device=device)
        self.mask = torch.ones(max_tokens, max_rank, device=device)
        self.closed = new(slots, max_choices, dtype=torch.bool)  # no choice of the adapter
        self.top_k = new(slots, 1, dtype=torch.long)
        self.normalize = new(slots, 1, dtype=torch.bool)
        self.hard = new(slots, 1, dtype=torch.bool)  # gate 1
        self.column_choice = new(slots, max_rank, dtype=torch.long)
        self.column_factor = new(slots, max_rank)  # 1 on columns of routed experts, 0 on those of shared ones
        self.column_constant = new(slots, max_rank)  # gate of shared experts, on their columns
        index = torch.arange(max_choices, device=device)
        self.earlier = index < index.unsqueeze(1)  # [choice, other]: other has the lower index

    def place(self, slot: int, options: RoutingOptions) -> None:
        """Write the settings of the adapter in `slot`. The base expert, if there is one, is the choice after the experts."""
        columns = torch.arange(self.column_choice.shape[1]) % options.num_stacked
        routed = columns < options.num_experts
        self.closed[slot] = (torch.arange(self.max_choices) >= options.num_choices).to(self.device)
        self.top_k[slot] = options.top_k
        self.normalize[slot] = options.normalize_gates
        self.hard[slot] = options.normalize_gates and options.top_k == 1
        self.column_choice[slot] = columns.where(routed, 0).to(self.device)
        self.column_factor[slot] = routed.to(self.column_factor)
        self.column_constant[slot] = (~routed).to(self.column_constant) / options.top_k

    def decide(self, logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """Mask rows float32 [tokens, max_rank] for logits float32 [tokens, max_choices] of adapters in `slot` int64 [tokens].

        NaN among a token's logits make all of its row NaN, so that its output shows it.
        """
        closed = self.closed[slot]
        limits = torch.finfo(logits.dtype)
        heights = torch.nan_to_num(logits, nan=limits.max).masked_fill(closed, limits.min)
        ours, others = heights.unsqueeze(2), heights.unsqueeze(1)
        ahead = (others > ours) | ((others == ours) & self.earlier)
        chosen = (ahead.sum(-1) < self.top_k[slot]).to(logits.dtype)
        shares = torch.softmax(logits.masked_fill(closed, -torch.inf), dim=-1)
        gates = shares * chosen  # not where(): NaN stays
        gates = torch.where(self.normalize[slot], gates / gates.sum(-1, keepdim=True), gates)
        gates = torch.where(self.hard[slot], chosen + shares * 0, gates)
        return gates.gather(1, self.column_choice[slot]) * self.column_factor[slot] + self.column_constant[slot]


class RoutingSite:
    """A linear on whose input tokens are routed: the router weights of the adapters that decide here.

    Attributes:
        router: float32 [slots, max_choices, in_features], of this process' part of the input if that is sharded.
        here: bool [slots, 1]: the adapter in the slot decides at this linear.
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
        self.here = torch.zeros(tables.slots, 1, dtype=torch.bool, device=tables.device)

    def place(self, slot: int, router: torch.Tensor | None) -> None:
        """The adapter in `slot` decides here with `router` [choices, in_features]; None: it does not decide here."""
        self.here[slot] = router is not None
        self.router[slot] = 0
        if router is not None:
            part = router[:, self.begins : self.begins + self.router.shape[2]]
            self.router[slot, : router.shape[0]] = part.to(self.router)

    def route(self, x: torch.Tensor, token_slots: torch.Tensor) -> None:
        """Write the mask of the tokens x [tokens, in_features], whose adapters are in `token_slots` (-1: none)."""
        tables = self.tables
        tokens = x.shape[0]
        index = token_slots[:tokens]
        adapted = (index >= 0).unsqueeze(1)
        slot = index.clamp(0, tables.slots - 1)
        logits = torch.nn.functional.linear(x.float(), self.router.flatten(0, 1))
        if self.sum_shards is not None:
            logits = self.sum_shards(logits)
        logits = logits.view(tokens, tables.slots, tables.max_choices)
        logits = logits.gather(1, slot.view(tokens, 1, 1).expand(tokens, 1, tables.max_choices)).squeeze(1)
        otherwise = adapted.to(tables.mask.dtype) if self.first else tables.mask[:tokens]
        tables.mask[:tokens] = torch.where(self.here[slot] & adapted, tables.decide(logits, slot), otherwise)
