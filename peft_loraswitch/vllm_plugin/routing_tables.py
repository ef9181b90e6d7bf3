"""The routing decision for a batch whose tokens belong to different adapters: static shapes, no branch on data.

vLLM compiles a model and captures it in CUDA graphs once, and loads adapters afterwards. So everything that depends on the
adapters stands in tables that are written when one is loaded, a row for each of vLLM's slots, and a forward always runs the
same operations. It leaves the decision as a mask, `[tokens, max_lora_rank]` (`wide_lora.py` says why one is enough).

The rule is that of `routing/decision.py`: highest logits, of equal ones the lowest index, until they sum to top_p; shared experts
with gate 1 / top_k. With `router_decay` the logits are first made the mean of those so far (`kept_sums.py`).
Here it is written with PyTorch's operations, for CPUs and as the definition of what `route_kernel.py` does on a GPU.
"""

from __future__ import annotations

import math

import torch

from ..routing.options import RoutingOptions
from .kept_sums import KeptSums, mean_logits

# Columns of the table of settings.
CHOICES, TOP_K, NORMALIZE, HARD, EXPERTS, STACKED, TOP_P, DECAY, LOG2_DECAY = range(9)


class RoutingTables:
    """The mask, and what deciding needs to know of the adapter in each slot.

    Attributes:
        mask: float32 [max_tokens, max_rank]: what the hidden vectors of each token are multiplied with. A row of ones for a
            plain LoRA, and for a LoRA-Switch adapter before its router; for the backbone alone, of zeros or not written.
        settings: int32 [slots, 9], a row for each slot: choices of the router, top_k, gates normalised, gate 1 (top-1 with
            normalised gates), routed experts, routed and shared experts, and the bits of three float32: top_p, the decay (0:
            the router sees no context), and log2 of the decay.
        kept: the sums of routers that see context.
    """

    def __init__(
        self, slots: int, max_rank: int, max_choices: int, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.slots, self.max_choices, self.device = slots, max_choices, device
        self.mask = torch.ones(max_tokens, max_rank, device=device)
        self.settings = torch.ones(slots, 9, dtype=torch.int32, device=device)
        self.settings[:, DECAY:] = 0
        self.kept = KeptSums(max_tokens, max_choices, device)

    def place(self, slot: int, options: RoutingOptions) -> None:
        """Write the settings of the adapter in `slot`. The base expert, if there is one, is the choice after the experts."""
        hard = options.normalize_gates and options.top_k == 1
        row = [
            options.num_choices, options.top_k, options.normalize_gates, hard, options.num_experts, options.num_stacked,
        ]  # fmt: skip
        log2_decay = math.log2(options.decay) if options.decay else 0.0
        floats = torch.tensor([options.top_p, options.decay, log2_decay], dtype=torch.float32).view(torch.int32)
        self.settings[slot] = torch.cat([torch.tensor(row, dtype=torch.int32), floats]).to(self.device)


def decide(logits: torch.Tensor, settings: torch.Tensor, max_rank: int) -> torch.Tensor:
    """Mask rows [tokens, max_rank] for logits [tokens, max_choices] (float32, or float64 in tests), with the settings
    [tokens, 9] of each token's adapter.

    NaN among a token's logits make all of its row NaN, so that its output shows it.
    """
    choices, top_k, normalize, hard, experts, stacked = (
        settings[:, :TOP_P].long().unsqueeze(2).unbind(1)
    )  # each [tokens, 1]
    top_p = floats_of(settings, TOP_P)
    index = torch.arange(logits.shape[1], device=logits.device)
    closed = index >= choices  # no choice of the adapter
    limits = torch.finfo(logits.dtype)
    heights = torch.nan_to_num(logits, nan=limits.max).masked_fill(closed, limits.min)
    ours, others = heights.unsqueeze(2), heights.unsqueeze(1)
    earlier = index < index.unsqueeze(1)  # [choice, other]: other has the lower index
    ahead = (others > ours) | ((others == ours) & earlier)
    shares = torch.softmax(logits.masked_fill(closed, -torch.inf), dim=-1)
    place, reached = ahead.sum(-1), (shares.unsqueeze(1) * ahead).sum(-1)  # how many are ahead, and their sum
    enough = (place > 0) & (top_p < 1) & (reached >= top_p)  # not so for NaN
    chosen = ((place < top_k) & ~enough).to(logits.dtype)
    gates = shares * chosen  # not where(): NaN stays
    gates = torch.where(normalize.bool(), gates / gates.sum(-1, keepdim=True), gates)
    gates = torch.where(hard.bool(), chosen + shares * 0, gates)
    expert = torch.arange(max_rank, device=logits.device) % stacked  # of each column, [tokens, max_rank]
    routed = expert < experts
    shared_gate = routed.logical_not().to(logits.dtype) / top_k
    return gates.gather(1, expert.where(routed, 0)) * routed + shared_gate


def write_mask(
    x: torch.Tensor,
    router: torch.Tensor | None,
    here: torch.Tensor,
    settings: torch.Tensor,
    token_slots: torch.Tensor,
    first: bool,
    mask: torch.Tensor,
    kept: KeptSums | None = None,
) -> None:
    """Write the mask rows of the tokens that are routed at one linear.

    Args:
        x: [tokens, in_features], the linear's input; without `router` each token's logits by its own adapter, float32
            [tokens, max_choices].
        router: float32 [slots, max_choices, in_features].
        here: bool [slots], the adapter in the slot routes at this linear.
        settings: as in `RoutingTables`.
        token_slots: int64 [at least tokens], the slot of each token's adapter; anything else, such as -1: none.
        first: also write ones for the tokens of other adapters, and zeros for those of none.
        mask: float32 [at least tokens, max_rank].
        kept: the sums of routers that see context; None, or without room for sums: no adapter has such a router.
    """
    tokens, slots = x.shape[0], here.shape[0]
    index = token_slots[:tokens]
    adapted = (index >= 0) & (index < slots)
    slot = index.where(adapted, 0)
    logits = x if router is None else own_logits(x, router, slot)
    otherwise = adapted.unsqueeze(1).to(mask.dtype) if first else mask[:tokens]
    routed = (here[slot] & adapted).unsqueeze(1)
    places = None if kept is None or kept.sums is None else kept.places()
    if kept is not None and kept.sums is not None and places is not None:
        decays = torch.where(routed, floats_of(settings[slot], DECAY), 0.0).squeeze(1)
        logits = mean_logits(logits, decays, places, kept.sums)
    mask[:tokens] = torch.where(routed, decide(logits, settings[slot], mask.shape[1]), otherwise)


def floats_of(settings: torch.Tensor, column: int) -> torch.Tensor:
    """float32 [tokens, 1]: a column of the settings that holds bits of float32."""
    return settings[:, column : column + 1].contiguous().view(torch.float32)


def own_logits(x: torch.Tensor, router: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, max_choices]: of each token by the router in its slot, int64 [tokens]."""
    slots, choices = router.shape[:2]
    logits = torch.nn.functional.linear(x.float(), router.flatten(0, 1)).view(-1, slots, choices)
    return logits.gather(1, slot.view(-1, 1, 1).expand(-1, 1, choices)).squeeze(1)
