"""Logs the router's statistics next to the loss."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .model import router_stats


class RouterStatsCallback(TrainerCallback):
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

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        if model is None or logs is None or "loss" not in logs:  # evaluation and the final summary have their own logs
            return
        stats = router_stats(model, self.adapter_name, reset=True)
        if not stats["tokens"]:
            return
        entry = {f"router/{name}": stats[name] for name in ("entropy", "balance_loss", "z_loss", "mean_experts")}
        entry["router/dropped_experts"] = len(stats["dropped_experts"])
        entry.update({f"router/load_{expert}": share for expert, share in enumerate(stats["load"])})
        logs.update(entry)
        if "base_share" in stats:
            entry["router/base_share"] = stats["base_share"]
        if state.log_history:  # Trainer appends a copy of the logs before callbacks see them
            state.log_history[-1].update(entry)
