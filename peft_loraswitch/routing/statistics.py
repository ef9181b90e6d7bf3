"""Statistics of routing: sums over tokens that stay on their device, and what they say.

Everything that lasts from one forward to the next is a buffer that is updated in place, so that a compiled step has no guard on
a value that changes from step to step, and its graph no additional output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import nn

from .router import router_logits


@dataclass
class RoutedTokens:
    """The tokens of one pass of a forward, with their decision, flattened: x [T, d], experts [T, k] (E for one that was not
    taken), real float32 [T, 1]."""

    x: torch.Tensor
    experts: torch.Tensor
    real: torch.Tensor
    num_experts: InitVar[int]
    weight: InitVar[torch.Tensor]  # the router's
    logits: InitVar[torch.Tensor | None] = None  # [T, E]; None: the router's of x
    probabilities: torch.Tensor = field(init=False)  # [T, E]
    logsumexp: torch.Tensor = field(init=False)  # [T]
    sums: tuple[torch.Tensor, ...] = field(
        init=False
    )  # over real tokens: their number, counts [E], probabilities [E], z

    def __post_init__(self, num_experts: int, weight: torch.Tensor, logits: torch.Tensor | None) -> None:
        if logits is None:
            logits = router_logits(self.x, weight)
        self.probabilities, self.logsumexp = logits.softmax(-1), logits.logsumexp(-1)
        chosen = self.real.expand(-1, self.experts.shape[-1]).flatten()
        # the last is of what was not taken
        counts = torch.zeros(num_experts + 1, dtype=torch.float32, device=self.x.device)
        counts = counts.scatter_add(0, self.experts.flatten(), chosen)[:num_experts]
        z = (self.logsumexp.square() * self.real.squeeze(-1)).sum()
        self.sums = self.real.sum(), counts, (self.probabilities * self.real).sum(0), z


class RoutingRecord(nn.Module):
    """Sums over any number of forwards of one adapter's routing statistics; they stay on their device until read.

    A module with non-persistent buffers: it moves with the layer that holds it, is not saved, and a compiled training step
    updates it in place instead of returning it.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    probabilities: torch.Tensor
    entropy: torch.Tensor
    z: torch.Tensor

    def __init__(
        self,
        num_experts: int,
        device: torch.device | None = None,
        expert_names: Sequence[str] | None = None,
        base_expert: bool = False,
    ) -> None:
        """`num_experts`: of the routed ones; with `base_expert` that is counted as well, last."""
        super().__init__()
        self.expert_names = None if expert_names is None else tuple(expert_names)
        self.num_experts = num_experts
        num_choices = num_experts + base_expert
        for name, size in (
            ("tokens", 1),
            ("counts", num_choices),
            ("probabilities", num_choices),
            ("entropy", 1),
            ("z", 1),
        ):
            # float32 stops counting at 2**24, a few steps of a large run
            dtype = torch.int64 if name in ("tokens", "counts") else torch.float32
            with torch.inference_mode(False):  # forwards of every mode write to it
                self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutingRecord:
        return apply_but_keep_dtypes(self, super()._apply, fn, recurse)

    def emptied(self) -> RoutingRecord:
        """Another one of the same experts, which has counted nothing."""
        base_expert = len(self.counts) > self.num_experts
        return RoutingRecord(self.num_experts, self.counts.device, self.expert_names, base_expert)

    def counts_like(self, other: RoutingRecord) -> bool:
        """Whether both count the same experts."""
        return len(self.counts) == len(other.counts) and self.expert_names == other.expert_names

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def add(self, batch: RoutedTokens) -> None:
        tokens, counts, probabilities, z = batch.sums
        self.tokens.add_(tokens.long())
        self.counts.add_(counts.long())
        self.probabilities.add_(probabilities)
        self.entropy.add_((torch.special.entr(batch.probabilities).sum(-1) * batch.real.squeeze(-1)).sum())
        self.z.add_(z)

    def summary(self) -> dict[str, Any]:
        """tokens (int), load (E floats, sum 1), entropy of the router's softmax (nats, mean over tokens), dropped_experts
        (indices never chosen), mean_experts (routed experts that a token used, mean over tokens: top_k, or fewer with `top_p`
        or a base expert, which does not count), balance_loss and z_loss (unweighted), and expert_names if the experts have some;
        with a base expert also its share of the picks, base_share, which makes up with load the sum of 1. Waits for the
        device."""
        tokens = max(float(self.tokens), 1.0)
        counts = self.counts.double().cpu()
        probabilities = self.probabilities.double().cpu() / tokens
        seen = float(self.tokens) > 0
        names = {} if self.expert_names is None else {"expert_names": list(self.expert_names)}
        shares = (counts / counts.sum().clamp(min=1)).tolist()
        dropped = (counts[: self.num_experts] == 0).nonzero().flatten()
        summary = {
            "tokens": int(self.tokens),
            **names,
            "load": shares[: self.num_experts],
            "entropy": float(self.entropy) / tokens,
            "dropped_experts": [int(e) for e in dropped] if seen else [],
            "mean_experts": float(counts[: self.num_experts].sum()) / tokens,
            "balance_loss": float(len(counts) * (counts / tokens * probabilities).sum()),
            "z_loss": float(self.z) / tokens,
        }
        return {**summary, "base_share": shares[-1]} if len(counts) > self.num_experts else summary


class RoutingRecorder:
    """What `model.record_routing()` yields: statistics of every forward within the block, by adapter."""

    def __init__(self, records: dict[str, RoutingRecord]) -> None:
        self.records = records

    def record_like(self, adapter: str, own: RoutingRecord) -> RoutingRecord:
        """The adapter's, whose layer counts by `own`; a new one if there is none, or if another adapter had the name before."""
        record = self.records.get(adapter)
        if record is None or not record.counts_like(own):
            record = self.records[adapter] = own.emptied()
        return record

    def summary(self, adapter_name: str | None = None) -> dict[str, Any]:
        """As `router_stats()`; `adapter_name` may be left out if only one adapter was used."""
        return summary_of(self.records, adapter_name)


def summary_of(records: dict[str, RoutingRecord], adapter_name: str | None) -> dict[str, Any]:
    """The summary of one record; without a name, of the only one, or of the only one that has counted anything."""
    if adapter_name is None:
        used = [name for name, record in records.items() if float(record.tokens) > 0] or list(records)
        if len(used) != 1:
            raise ValueError(f"adapter_name must be one of {', '.join(records) or 'no adapters: none is loaded'}.")
        adapter_name = used[0]
    if adapter_name not in records:
        raise ValueError(f"adapter_name={adapter_name!r} is unknown: choose from {', '.join(records)}.")
    return records[adapter_name].summary()


def apply_but_keep_dtypes(module: nn.Module, apply: Any, fn: Any, recurse: bool) -> Any:
    """`nn.Module._apply` (to, cuda, bfloat16, ...) that moves counters, but does not round them."""
    before = dict(module.named_buffers(recurse=False))
    apply(fn, recurse)
    for name, value in before.items():
        moved = getattr(module, name)
        # to_empty(), which moves modules off the meta device, does not initialise memory
        source = torch.zeros_like(moved) if value.device.type == "meta" else value
        with torch.inference_mode(False):
            setattr(module, name, source.to(device=moved.device, dtype=value.dtype))
    return module
