"""Logs the router's statistics next to the loss."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .model import router_stats


class RouterStatsCallback(TrainerCallback):
    """Adds `router/entropy`, `router/balance_loss`, `router/z_loss`, `router/dropped_experts` (their number) and
    `router/load_<e>` (share of picks per expert; `router/base_share`, of the base expert) to what the Trainer logs, over the
    steps since the last log.

    Args:
        adapter_name: which adapter; may be left out if only one trains.
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
        entry = {f"router/{name}": stats[name] for name in ("entropy", "balance_loss", "z_loss")}
        entry["router/dropped_experts"] = len(stats["dropped_experts"])
        entry.update({f"router/load_{expert}": share for expert, share in enumerate(stats["load"])})
        logs.update(entry)
        if "base_share" in stats:
            entry["router/base_share"] = stats["base_share"]
        if state.log_history:  # Trainer appends a copy of the logs before callbacks see them
            state.log_history[-1].update(entry)
