"""Exact match of greedy answers and the loss of right answers, domain by domain, for any model."""

from __future__ import annotations

from typing import Any

import torch

from recipes.compose.routed_lora import GivenRoutes
from recipes.compose.settings import Settings
from recipes.compose.text_batches import Example, answer_losses, batch_of, greedy_answers, right

LENGTHS = (6, 26)  # of answers: domains up to the first, up to the second, and the others are generated apart
ROWS_OF_A_LOSS = 128
Sets = dict[str, list[Example]]
Scores = dict[str, dict[str, float]]  # domain -> metric -> value


@torch.no_grad()
def losses(model: Any, tokenizer: Any, sets: Sets, routes: GivenRoutes | None = None) -> dict[str, float]:
    """Mean loss of an answer token in each domain."""
    device = model.get_output_embeddings().weight.device
    names = list(sets)
    rows = sorted(
        ((index, example) for index, name in enumerate(names) for example in sets[name]), key=lambda row: len(row[1])
    )
    sums, counts = (torch.zeros(len(names), dtype=torch.float64, device=device) for _ in range(2))
    for begin in range(0, len(rows), ROWS_OF_A_LOSS):
        part = rows[begin : begin + ROWS_OF_A_LOSS]
        chosen = [example for _, example in part]
        batch = batch_of(chosen, tokenizer.pad_token_id).to(device)
        if routes is not None:
            routes.begin_losses(chosen, batch.ids.shape[1])
        each = answer_losses(model, batch).double()
        owner = torch.tensor([index for index, _ in part], device=device)[batch.rows]
        sums.index_add_(0, owner, each)
        counts.index_add_(0, owner, torch.ones_like(each))
    return dict(zip(names, (sums / counts).tolist(), strict=True))


def answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    longest: int,
    settings: Settings,
    routes: GivenRoutes | None = None,
) -> list[list[int]]:
    """Greedy answers, in the prompts' order."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    made: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), settings.rows_at_once):
        chosen = order[begin : begin + settings.rows_at_once]
        part = [prompts[index] for index in chosen]
        after = None
        if routes is not None:
            routes.begin_answers(part, -(-max(map(len, part)) // 8) * 8)
            after = routes.after_prompt
        for index, answer in zip(chosen, greedy_answers(model, tokenizer, part, longest, after), strict=True):
            made[index] = answer
    return made


def by_answer_length(sets: Sets, settings: Settings) -> list[tuple[int, list[str]]]:
    """Domains whose answers are about equally long, with the number of tokens to generate. The number is that of the domain's
    longest right answer, so that it tells nothing of an item."""
    longest = {name: max(len(example.answer) for example in items) for name, items in sets.items()}
    groups: dict[int, list[str]] = {}
    for name, length in longest.items():
        groups.setdefault(next((i for i, limit in enumerate(LENGTHS) if length <= limit), len(LENGTHS)), []).append(
            name
        )
    return [(min(settings.new_tokens, max(longest[n] for n in names)), names) for _, names in sorted(groups.items())]


def score(model: Any, tokenizer: Any, sets: Sets, settings: Settings, routes: GivenRoutes | None = None) -> Scores:
    """`exact_match` and `loss` of each domain."""
    found = {name: {"loss": loss} for name, loss in losses(model, tokenizer, sets, routes).items()}
    for longest, names in by_answer_length(sets, settings):
        rows = [(name, example) for name in names for example in sets[name]]
        made = answers(model, tokenizer, [example.prompt for _, example in rows], longest, settings, routes)
        texts = tokenizer.batch_decode(made)
        hits = {name: [0, 0] for name in names}
        for (name, example), text in zip(rows, texts, strict=True):
            hits[name][0] += right(text, example.text)
            hits[name][1] += 1
        for name, (good, count) in hits.items():
            found[name]["exact_match"] = good / count
    return found


def mean(scores: Scores, metric: str) -> float:
    return sum(each[metric] for each in scores.values()) / len(scores)
