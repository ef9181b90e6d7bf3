"""Held-out loss per domain, exact match per task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from base import autocast
from pool import IGNORED, Rows, of_task, of_text
from settings import Settings


@dataclass
class Split:
    """Validation or test rows of everything, on the device."""

    domains: dict[str, Rows]
    tasks: dict[str, Rows]


def validation_split(prepared: Any, settings: Settings, device: torch.device) -> Split:
    return _split(prepared.validation, {n: t.validation for n, t in prepared.tasks.items()}, settings, device)


def test_split(prepared: Any, settings: Settings, device: torch.device) -> Split:
    return _split(prepared.test, {n: t.test for n, t in prepared.tasks.items()}, settings, device)


test_split.__test__ = False  # type: ignore[attr-defined]  # pytest: no test, whatever its name


def _split(text: Mapping[str, Any], tasks: Mapping[str, Any], settings: Settings, device: torch.device) -> Split:
    return Split(
        {name: of_text(stream, settings.blocks).to(device) for name, stream in text.items()},
        {name: of_task(split, settings.task_rows).to(device) for name, split in tasks.items()},
    )


@dataclass
class Score:
    """Of one domain or task."""

    loss: float  # nats per scored token
    exact_match: float | None = None  # share of items all of whose answer tokens are right


@torch.no_grad()
def measure(model: nn.Module, split: Split, settings: Settings) -> dict[str, Score]:
    """Loss of every domain and task, exact match of every task; the model is left in eval mode."""
    model.eval()
    scores = {name: score(model, rows, settings) for name, rows in split.domains.items()}
    return scores | {name: score(model, rows, settings) for name, rows in split.tasks.items()}


def mean_loss(scores: Mapping[str, Score]) -> float:
    """What learning rates are chosen by: every domain and every task counts the same."""
    return sum(each.loss for each in scores.values()) / len(scores)


@torch.no_grad()
def score(model: nn.Module, rows: Rows, settings: Settings) -> Score:
    """An item is right if each token of its answer is the most probable one given the true tokens before it.

    That is greedy decoding's verdict too: up to the first wrong token both see the same prefix, and from it on both are wrong.
    """
    total, counted = torch.zeros(2, dtype=torch.float64, device=rows.tokens.device)
    right, items = torch.zeros(2, dtype=torch.float64, device=rows.tokens.device)
    for start in range(0, len(rows.tokens), settings.rows_at_once):
        part = slice(start, start + settings.rows_at_once)
        tokens, labels = rows.tokens[part], rows.labels[part][:, 1:]
        with autocast(tokens.device):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        scored = labels != IGNORED
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        total += losses
        counted += scored.sum()
        if rows.items is not None:
            hits = logits.argmax(-1) == labels
            all_right = right_items(hits, rows.items[part][:, 1:])
            right += (all_right == 1).sum()
            items += (all_right >= 0).sum()
    loss = float(total / counted)
    return Score(loss, float(right / items) if rows.items is not None else None)


def right_items(hits: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """bool, int [rows, length] -> int [rows, most items of a row]: 1 all tokens of the item hit, 0 not, -1 no such item."""
    most = int(items.max()) + 1
    result = torch.full((len(items), most + 1), 2, dtype=torch.int32, device=items.device)
    # the last column takes the tokens that belong to no item
    index = torch.where(items >= 0, items, most).long()
    result = result.scatter_reduce(1, index, hits.int(), "amin")[:, :most]
    return result.masked_fill(result == 2, -1)
