"""A tiny base and rows of made-up tasks for the tests of recipes/quality."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from recipes.quality import base
from recipes.quality.settings import LENGTH, SMOKE

CPU = torch.device("cpu")
VOCABULARY = 128


def tiny(**changes: Any) -> Any:
    settings = SMOKE.with_changes(hidden=32, intermediate=48, layers=4, heads=2, key_value_heads=1, **changes)
    return base.new_model(VOCABULARY, settings).requires_grad_(False)


def task_split(items: list[list[tuple[list[int], list[int]]]]) -> SimpleNamespace:
    """Rows of (prompt, answer) items -> arrays as prepare.py makes them."""
    tokens = np.zeros((len(items), LENGTH), dtype=np.uint16)
    item_ids = np.full((len(items), LENGTH), -1, dtype=np.int32)
    for row, packed in enumerate(items):
        at = 1
        for place, (prompt, answer) in enumerate(packed):
            for ids, where in ((prompt, -1), (answer, place)):
                tokens[row, at : at + len(ids)] = ids
                item_ids[row, at : at + len(ids)] = where
                at += len(ids)
    return SimpleNamespace(tokens=tokens, answer_mask=item_ids >= 0, item_ids=item_ids)


def copy_items(rows: int, generator: np.random.Generator, each: int = 12) -> list:
    made = []
    for _ in range(rows):
        questions = [generator.integers(10, 18, 4).tolist() for _ in range(each)]
        made.append([([5, *question, 6], [*question, 7]) for question in questions])
    return made
