"""What callbacks of this package add to a trainer's logs, in time for TensorBoard, W&B and all others that report them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


class AddsToLogs(TrainerCallback):
    """A callback that adds entries to the logs of training steps, printed, reported and kept in `log_history` as a loss is."""

    adds_to_logs = True

    def entries(self, model: nn.Module | None) -> dict[str, float]:
        """What to add, of the steps since it was asked last."""
        raise NotImplementedError

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Adds the entries. Evaluation and the final summary have their own logs."""
        if logs is None or "loss" not in logs:
            return
        entries = self.entries(model)
        logs.update(entries)
        if state.log_history:  # a trainer appends a copy of the logs before callbacks see them
            state.log_history[-1].update(entries)


def log_after_all_is_added(original: Callable[..., Any], handler: CallbackHandler, *args: Any, **kwargs: Any) -> Any:
    """Callbacks that add to the logs come first: a trainer puts a user's callbacks behind those that report."""
    # a new list: somebody may log while the old one is gone through
    handler.callbacks = sorted(handler.callbacks, key=lambda callback: not getattr(callback, "adds_to_logs", False))
    return original(handler, *args, **kwargs)
