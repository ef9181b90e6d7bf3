"""Items as token ids, batches of them, the loss on answers, and greedy answers. For any model, adapted or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

POOL = 8  # batches that are sorted by length together
POSITIONS_AT_ONCE = 512  # rows of logits, each as long as the vocabulary


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, with BOS, and of its answer, with EOS."""

    prompt: list[int]
    answer: list[int]
    text: str  # the answer

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def examples(tokenizer: Any, items: list[dict[str, str]]) -> list[Example]:
    """Without BOS the loss of Gemma's models more than doubles."""
    if not items:
        return []
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = tokenizer([item["prompt"] for item in items], add_special_tokens=False).input_ids
    answers = tokenizer([" " + item["answer"] for item in items], add_special_tokens=False).input_ids
    return [
        Example(begin + prompt, answer + [tokenizer.eos_token_id], item["answer"])
        for prompt, answer, item in zip(prompts, answers, items, strict=True)
    ]


def padded(rows: list[list[int]], pad: int, left: bool, multiple: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), [rows, longest, rounded up]."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask


@dataclass
class Batch:
    """Rows padded on the right, so that causal attention needs no mask, and where the answers' tokens are predicted."""

    ids: torch.Tensor  # [rows, length]
    rows: torch.Tensor  # [answer tokens]
    columns: torch.Tensor  # [answer tokens]: the position that predicts the token
    targets: torch.Tensor  # [answer tokens]

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return Batch(moved(self.ids), moved(self.rows), moved(self.columns), moved(self.targets))


def batch_of(chosen: list[Example], pad: int) -> Batch:
    ids, _ = padded([example.prompt + example.answer for example in chosen], pad, left=False)
    places = [
        (row, len(example.prompt) + offset - 1, token)
        for row, example in enumerate(chosen)
        for offset, token in enumerate(example.answer)
    ]
    rows, columns, targets = torch.tensor(places).T.contiguous()
    return Batch(ids, rows, columns, targets)


def answer_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Loss of every answer token, float32 [answer tokens]. Logits are made for these alone, and again in backward."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.rows, batch.columns]
    head = model.get_output_embeddings().weight
    pieces = []
    for states, targets in zip(hidden.split(POSITIONS_AT_ONCE), batch.targets.split(POSITIONS_AT_ONCE), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_token_losses, states, head, targets, use_reentrant=False))
        else:
            pieces.append(_token_losses(states, head, targets))
    return torch.cat(pieces)


def _token_losses(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(states, head).float(), targets, reduction="none")


def by_length(count: int, batch: int, lengths: list[int], generator: torch.Generator) -> Iterator[list[int]]:
    """Indices of `count` items, epoch after epoch, in batches of similar length.

    Items are shuffled, sorted by length within pools of `POOL` batches, and those batches come shortest first: whoever draws from
    other data at the same time is at its short items at the same time. What fills no pool waits for another epoch's order.
    """
    pool = min(POOL * batch, count // batch * batch)
    if not pool:
        raise ValueError(f"{count} items do not fill a batch of {batch}.")
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for begin in range(0, count - pool + 1, pool):
            chosen = sorted(order[begin : begin + pool], key=lambda index: lengths[index])
            for first in range(0, pool, batch):
                yield chosen[first : first + batch]


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: list[list[int]], longest: int, after_prompt: Callable[[], None] | None = None
) -> list[list[int]]:
    """Up to `longest` tokens for each prompt, without EOS and what follows it. One batch; the caller splits.

    Args:
        after_prompt: called when the prompts have been read.
    """
    device = model.get_output_embeddings().weight.device
    ids, mask = (tensor.to(device) for tensor in padded(prompts, tokenizer.pad_token_id, left=True))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, step = None, ids
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    made = []
    for number in range(longest):
        out = model(
            input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = out.past_key_values
        if after_prompt is not None and number == 0:
            after_prompt()
        token = out.logits[:, -1].argmax(-1).masked_fill(ended, tokenizer.eos_token_id)
        ended |= token == tokenizer.eos_token_id
        made.append(token)
        if number % 4 == 3 and bool(ended.all()):
            break
        step, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    rows = torch.stack(made, dim=1).tolist()
    end = tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows]


def right(answer: str, item: str) -> bool:
    """Exact match, but for white space around it; a solution counts by what stands behind its last semicolon."""
    return answer.strip().rsplit("; ", 1)[-1] == item.strip().rsplit("; ", 1)[-1]
