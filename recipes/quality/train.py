"""Adapting the base with one method: the loop, and the search for the method's learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from recipes.quality import methods
from recipes.quality.base import autocast
from recipes.quality.optimizers import Maker, adamw
from recipes.quality.pool import Pool, plan
from recipes.quality.settings import Settings


class Trainer:
    """One method on one base, trained any number of times: built and compiled once.

    Args:
        model: the adapted base in train mode, adapter in float32.
        pool: training rows, on the device of the model.
        make_optimizer: from the model and its learning rate.
        compiled: whether to compile the model; with some thousand small kernels a step this halves the time of a step.
    """

    def __init__(
        self, model: nn.Module, pool: Pool, settings: Settings, device: torch.device, compiled: bool,
        make_optimizer: Maker = adamw,
    ) -> None:  # fmt: skip
        self.make_optimizer = make_optimizer
        self.model, self.pool, self.settings, self.device = model, pool, settings, device
        self.forward: Any = torch.compile(model) if compiled else model
        self.after_step: list[Callable[[], None]] = [
            module.after_step for module in model.modules() if hasattr(module, "after_step")
        ]
        self.ms_per_step = math.nan

    def warm_up(self) -> float:
        """Seconds that compiling and the first steps take."""
        begun = time.perf_counter()
        self.run(self.settings.learning_rates[0], seed=0, steps=2)
        return time.perf_counter() - begun

    def run(self, learning_rate: float, seed: int, steps: int | None = None) -> float:
        """Train from new weights. No weight decay, warm-up and cosine; the seed fixes weights and data order.

        Returns:
            Mean training loss of the last tenth of the steps (with the router's losses).
        """
        settings, pool = self.settings, self.pool
        methods.reset(self.model, seed)
        self.model.train()
        parameters = methods.trainable(self.model)
        optimizer = self.make_optimizer(self.model, learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        rows = plan(pool, settings, seed).to(self.device)
        tail = max(1, settings.steps // 10)
        last_losses = torch.zeros((), device=self.device)
        total = settings.steps if steps is None else steps
        begun, warm = time.perf_counter(), 0
        for step in range(total):
            batch, labels = pool.tokens[rows[step]].long(), pool.labels[rows[step]].long()
            with autocast(self.device):
                loss = self.forward(input_ids=batch, labels=labels, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, settings)
            optimizer.step()
            self.model.zero_grad()
            for call in self.after_step:
                call()
            if step >= total - tail:
                last_losses += loss.detach()
            if step == 9:
                loss.item()  # the clock below starts when the device is here
                begun, warm = time.perf_counter(), step + 1
        result = last_losses.item() / min(tail, total)
        self.ms_per_step = 1000 * (time.perf_counter() - begun) / max(1, total - warm)
        return result


def schedule(step: int, settings: Settings) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine to zero."""
    warm = max(1, round(settings.warm_up * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def search(grid: Sequence[float], score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The value of an ascending grid with the lowest score, found from the middle outwards.

    The three values in the middle are tried; while the best of those tried is at the edge of them, so is the next one
    outwards. The result has a worse neighbour on either side that the grid has. A score that is not finite counts as the
    worst.

    Returns:
        (best value, every score by value)
    """
    middle = len(grid) // 2
    low, high = max(0, middle - 1), min(len(grid) - 1, middle + 1)
    scores: dict[float, float] = {}

    def try_one(index: int) -> None:
        value = score(grid[index])
        scores[grid[index]] = value if math.isfinite(value) else math.inf

    for index in range(low, high + 1):
        try_one(index)
    while True:
        best = min(scores, key=lambda value: scores[value])
        if best == grid[low] and low > 0:
            low -= 1
            try_one(low)
        elif best == grid[high] and high < len(grid) - 1:
            high += 1
            try_one(high)
        else:
            return best, scores
