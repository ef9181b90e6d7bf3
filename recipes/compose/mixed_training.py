"""Training on all domains together: a LoRA, coefficients, a router, all with the same batches and schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from recipes.compose.experts import schedule
from recipes.compose.lab import Lab
from recipes.compose.stacked_lora import StackedAdamW
from recipes.compose.text_batches import Example, answer_losses, batch_of

ROWS_IN_MEMORY = 64
Loss = Callable[[Any, list[Example]], torch.Tensor]


def loss_of(model: Any, tokenizer: Any, chosen: list[Example]) -> torch.Tensor:
    """Mean loss of the answers' tokens."""
    device = model.get_output_embeddings().weight.device
    return answer_losses(model, batch_of(chosen, tokenizer.pad_token_id).to(device)).mean()


def train_stacked(
    lab: Lab,
    stack: Any,
    flat: torch.Tensor,
    rates: Sequence[float],
    steps: list[list[Example]],
    use: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Candidates that differ in their learning rate, all on the same batches.

    Args:
        stack: a `StackedLora`, or a `RoutedLora` whose coefficients are trained.
        flat: [candidates, ...], the weights to begin with; trained in place.
        use: how the model takes them up (default: `stack.use`).
    """
    gradients = (use or stack.use)(flat)
    assert gradients is not None
    candidates = len(flat)
    optimizer = StackedAdamW(flat.view(candidates, -1))
    each_rate = torch.tensor(rates, device=flat.device)
    pad = lab.tokenizer.pad_token_id
    for step, chosen in enumerate(steps):
        total = sum(len(example.answer) for example in chosen)
        share = max(1, ROWS_IN_MEMORY // candidates)
        for begin in range(0, len(chosen), share):
            part = chosen[begin : begin + share]
            batch = batch_of(part * candidates, pad).to(flat.device)
            (answer_losses(stack.model, batch).sum() / total).backward()
        optimizer.step(gradients.view(candidates, -1), each_rate * schedule(step, len(steps)))
        stack.refresh(flat, gradients)
    return flat


def train_parameters(
    parameters: Sequence[torch.nn.Parameter], rate: float, steps: list[list[Example]], loss: Loss, model: Any
) -> None:
    """AdamW on these parameters of a model."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    for step, chosen in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, len(steps))
        loss(model, chosen).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
