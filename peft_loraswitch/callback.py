"""Logs the router's statistics next to the loss."""

from __future__ import annotations

from torch import nn

from .model import router_stats
from .training_logs import AddsToLogs


class RouterStatsCallback(AddsToLogs):
    """A Transformers `TrainerCallback` that adds routing statistics over the steps since the last log to what the Trainer logs:
    `router/entropy` (nats), `router/balance_loss` and `router/z_loss` (unweighted), `router/mean_experts` (routed experts that a
    token used), `router/dropped_experts` (number of experts that no token picked) and `router/load_<e>` (share of the picks that
    went to expert e; with `router/base_share`, of the base expert, the shares sum to 1).

    Args:
        adapter_name: which adapter; may be left out if only one trains.

    Raises:
        ValueError: while logging: the model has no LoRA-Switch adapter, or the name is unknown or ambiguous.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name

    def entries(self, model: nn.Module | None) -> dict[str, float]:
        """The statistics of its class's docstring."""
        if model is None:
            return {}
        stats = router_stats(model, self.adapter_name, reset=True)
        if not stats["tokens"]:
            return {}
        entries = {f"router/{name}": stats[name] for name in ("entropy", "balance_loss", "z_loss", "mean_experts")}
        entries["router/dropped_experts"] = len(stats["dropped_experts"])
        entries.update({f"router/load_{expert}": share for expert, share in enumerate(stats["load"])})
        if "base_share" in stats:
            entries["router/base_share"] = stats["base_share"]
        return entries
