"""Held-out loss per domain, exact match per task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recipes.quality.base import autocast
from recipes.quality.pool import IGNORED, Rows, of_tasks, of_text


@dataclass
class Split:
    """Validation or test rows of everything, on the device."""

    domains: list[Rows]
    families: list[Rows]  # of tasks


def rows_of(
    text: Mapping[str, Any], tasks: Mapping[str, Any], blocks: int, task_rows: int, device: torch.device
) -> Split:
    """The first `blocks` rows of each domain, the first `task_rows` of each family.

    Args:
        text: domain -> uint16 [n].
        tasks: task -> tokens, answer_mask, item_ids [n, LENGTH].
    """
    return Split(
        [of_text(name, stream, blocks).to(device) for name, stream in text.items()],
        [rows.to(device) for rows in of_tasks(dict(tasks), task_rows)],
    )


@dataclass
class Score:
    """Of one domain or task."""

    loss: float  # nats per scored token
    exact_match: float | None = None  # share of items all of whose answer tokens are right


@torch.no_grad()
def measure(model: nn.Module, split: Split, rows_at_once: int) -> dict[str, Score]:
    """Loss of every domain and task, exact match of every task; the model is left in eval mode."""
    model.eval()
    scores: dict[str, Score] = {}
    for rows in (*split.domains, *split.families):
        scores |= score(model, rows, rows_at_once)
    return scores


def mean_loss(scores: Mapping[str, Score]) -> float:
    """What learning rates are chosen by: every domain and every task counts the same."""
    return sum(each.loss for each in scores.values()) / len(scores)


@torch.no_grad()
def score(model: nn.Module, rows: Rows, rows_at_once: int) -> dict[str, Score]:
    """An item is right if each token of its answer is the most probable one given the true tokens before it.

    That is greedy decoding's verdict too: up to the first wrong token both see the same prefix, and from it on both are wrong.
    """
    device, count = rows.tokens.device, len(rows.names)
    losses, tokens, right, items = torch.zeros(4, count, dtype=torch.float64, device=device)
    for start in range(0, len(rows.tokens), rows_at_once):
        part = slice(start, start + rows_at_once)
        labels = rows.labels[part][:, 1:]
        with autocast(device):
            logits = model(input_ids=rows.tokens[part], use_cache=False).logits[:, :-1]
        scored = labels != IGNORED
        logits, labels = logits[scored].float(), labels[scored]
        owner = torch.zeros_like(labels) if rows.owner is None else rows.owner[part][:, 1:][scored]
        losses.index_add_(0, owner, F.cross_entropy(logits, labels, reduction="none").double())
        tokens += torch.bincount(owner, minlength=count)
        if rows.items is not None:
            hits = torch.zeros_like(scored).masked_scatter(scored, logits.argmax(-1) == labels)
            all_right, whose = right_items(hits, rows.items[part][:, 1:], rows.owner[part][:, 1:])  # type: ignore[index]
            right += torch.bincount(whose[all_right], minlength=count)
            items += torch.bincount(whose, minlength=count)
    found = zip(rows.names, (losses / tokens).tolist(), (right / items).tolist(), strict=True)
    return {name: Score(loss, match if rows.items is not None else None) for name, loss, match in found}


def right_items(hits: torch.Tensor, items: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [rows, length], int [rows, length] twice -> (bool [n], int [n]): of every item whether all its tokens are hits,
    and whose it is."""
    most = int(items.max()) + 1
    index = torch.where(items >= 0, items, most)  # the last column takes the tokens that belong to no item
    empty = torch.full((len(items), most + 1), 2, dtype=torch.int64, device=items.device)
    verdict = empty.scatter_reduce(1, index, hits.long(), "amin")[:, :most]
    whose = (empty - 3).scatter_reduce(1, index, owner, "amax")[:, :most]
    there = verdict < 2
    return verdict[there] == 1, whose[there]
