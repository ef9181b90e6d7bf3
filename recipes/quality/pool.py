"""The prepared tokens as rows on the device, and the order in which every method sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from settings import LENGTH, Settings

IGNORED = -100  # label of a token that the loss leaves out


@dataclass
class Rows:
    """Rows of one domain or task.

    Attributes:
        tokens: int64 [n, LENGTH].
        labels: int64 [n, LENGTH]: the tokens that are scored, `IGNORED` elsewhere. Text: all of them. Tasks: the answers.
        items: int32 [n, LENGTH], for tasks: which item of its row an answer's token belongs to, -1 elsewhere.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    items: torch.Tensor | None = None

    def to(self, device: torch.device) -> Rows:
        return Rows(self.tokens.to(device), self.labels.to(device), None if self.items is None else self.items.to(device))


def of_text(stream: np.ndarray, at_most: int | None = None) -> Rows:
    """uint16 [m] -> rows of consecutive text, the rest dropped."""
    count = len(stream) // LENGTH
    count = count if at_most is None else min(count, at_most)
    tokens = torch.from_numpy(stream[: count * LENGTH].astype(np.int64)).view(count, LENGTH)
    return Rows(tokens, tokens)


def of_task(split: Any, at_most: int | None = None) -> Rows:
    """Packed items, loss on the answers alone; `split` has tokens, answer_mask and item_ids [n, LENGTH]."""
    tokens = torch.from_numpy(split.tokens[:at_most].astype(np.int64))
    mask = torch.from_numpy(split.answer_mask[:at_most].astype(bool))
    items = torch.from_numpy(split.item_ids[:at_most].astype(np.int32))
    return Rows(tokens, tokens.masked_fill(~mask, IGNORED), items)


@dataclass
class Pool:
    """Training rows of everything in two tensors, and where each domain and task lies in them.

    Attributes:
        tokens, labels: int32 [rows, LENGTH], on the device.
        domains, tasks: name -> (first row, number of rows).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    domains: dict[str, tuple[int, int]]
    tasks: dict[str, tuple[int, int]]


def training_pool(prepared: Any, device: torch.device) -> Pool:
    """All training rows of a `Prepared`, on the device.

    Raises:
        ValueError: a domain or task has no row.
    """
    pieces: list[Rows] = []
    where: tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]] = ({}, {})
    first = 0
    text = {name: of_text(stream) for name, stream in prepared.train.items()}
    tasks = {name: of_task(task.train) for name, task in prepared.tasks.items()}
    for group, found in zip((text, tasks), where, strict=True):
        for name, rows in group.items():
            if not len(rows.tokens):
                raise ValueError(f"'{name}' has no training row of {LENGTH} tokens: prepare the texts again.")
            found[name] = (first, len(rows.tokens))
            first += len(rows.tokens)
            pieces.append(rows)
    tokens = torch.cat([rows.tokens for rows in pieces]).to(device, torch.int32)
    labels = torch.cat([rows.labels for rows in pieces]).to(device, torch.int32)
    return Pool(tokens, labels, *where)


def plan(pool: Pool, settings: Settings, seed: int) -> torch.Tensor:
    """int64 [steps, rows], on the CPU: which rows each step takes. Depends on the seed alone, so it is the same for all methods.

    Domains take turns, and so do tasks; each is shuffled anew every time that it has been seen in full.
    """
    generator = np.random.default_rng(seed)
    task_rows = round(settings.rows * settings.task_share) if pool.tasks else 0
    columns = []
    for groups, rows in ((pool.domains, settings.rows - task_rows), (pool.tasks, task_rows)):
        if rows:
            columns.append(_in_turns(list(groups.values()), settings.steps * rows, generator).reshape(settings.steps, rows))
    return torch.from_numpy(np.concatenate(columns, axis=1))


def _in_turns(groups: list[tuple[int, int]], total: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [total]: one row of each group after the other."""
    each = -(-total // len(groups))
    columns = []
    for first, size in groups:
        epochs = [generator.permutation(size) for _ in range(-(-each // size))]
        columns.append(first + np.concatenate(epochs)[:each])
    return np.stack(columns, axis=1).reshape(-1)[:total]
