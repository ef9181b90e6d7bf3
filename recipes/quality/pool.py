"""The prepared tokens as rows on the device, and the order in which every method sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recipes.quality.settings import LENGTH, Settings

IGNORED = -100  # label of a token that the loss leaves out


@dataclass
class Rows:
    """Rows of one domain, or of the tasks that share their rows.

    Attributes:
        names: of the domain, or of the tasks.
        tokens: int64 [n, LENGTH].
        labels: int64 [n, LENGTH]: the tokens that are scored, `IGNORED` elsewhere. Text: all of them. Tasks: the answers.
        items: int64 [n, LENGTH], for tasks: which item of its row an answer's token belongs to, -1 elsewhere.
        owner: int64 [n, LENGTH], for tasks: whose item (index in `names`) a token belongs to, its instruction and question
            included; -1 after the last item.
    """

    names: tuple[str, ...]
    tokens: torch.Tensor
    labels: torch.Tensor
    items: torch.Tensor | None = None
    owner: torch.Tensor | None = None

    def to(self, device: torch.device) -> Rows:
        items, owner = (None if each is None else each.to(device) for each in (self.items, self.owner))
        return Rows(self.names, self.tokens.to(device), self.labels.to(device), items, owner)


def of_text(name: str, stream: np.ndarray, at_most: int | None = None) -> Rows:
    """uint16 [m] -> rows of consecutive text, the rest dropped."""
    count = len(stream) // LENGTH
    count = count if at_most is None else min(count, at_most)
    tokens = torch.from_numpy(stream[: count * LENGTH].astype(np.int64)).view(count, LENGTH)
    return Rows((name,), tokens, tokens)


def of_tasks(splits: dict[str, Any], at_most: int | None = None) -> list[Rows]:
    """Packed items, loss on the answers alone; tasks that share their rows (one family's instructions) come together.

    Args:
        splits: task -> tokens, answer_mask and item_ids [n, LENGTH].
    """
    groups: list[list[str]] = []
    for name, split in splits.items():
        for group in groups:
            if np.array_equal(splits[group[0]].tokens, split.tokens):
                group.append(name)
                break
        else:
            groups.append([name])
    return [_of_family(tuple(group), [splits[name] for name in group], at_most) for group in groups]


def _of_family(names: tuple[str, ...], splits: list[Any], at_most: int | None) -> Rows:
    tokens = splits[0].tokens[:at_most].astype(np.int64)
    items = np.full(tokens.shape, -1, dtype=np.int64)
    owner = np.full((len(tokens), LENGTH + 1), -1, dtype=np.int64)  # the last column: after the last answer
    for index, split in enumerate(splits):
        mask = split.answer_mask[:at_most]
        items[mask] = split.item_ids[:at_most][mask]
        owner[:, :-1][mask] = index
    labels = np.where(items >= 0, tokens, IGNORED)
    # a token that is no answer's belongs to the item of the next answer
    position = np.where(owner >= 0, np.arange(LENGTH + 1), LENGTH)
    following = np.minimum.accumulate(position[:, ::-1], axis=1)[:, ::-1]
    owner = np.take_along_axis(owner, following, axis=1)[:, :-1].copy()
    return Rows(names, *map(torch.from_numpy, (tokens, labels, items, owner)))


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
    text = {name: of_text(name, stream) for name, stream in prepared.train.items()}
    tasks = {name: of_tasks({name: task.train})[0] for name, task in prepared.tasks.items()}
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
            columns.append(
                _in_turns(list(groups.values()), settings.steps * rows, generator).reshape(settings.steps, rows)
            )
    return torch.from_numpy(np.concatenate(columns, axis=1))


def _in_turns(groups: list[tuple[int, int]], total: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [total]: one row of each group after the other."""
    each = -(-total // len(groups))
    columns = []
    for first, size in groups:
        epochs = [generator.permutation(size) for _ in range(-(-each // size))]
        columns.append(first + np.concatenate(epochs)[:each])
    return np.stack(columns, axis=1).reshape(-1)[:total]
