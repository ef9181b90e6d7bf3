"""How large everything is: the size that the published figures come from, and the one that only proves that each step works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    size: str
    seeds: tuple[int, ...]  # learning rates are tuned with the first
    rank: int
    alpha: float
    longest: int  # tokens of prompt and answer; longer items are left out of every split
    longest_answer: int
    new_tokens: int  # at most so many are generated

    expert_steps: int
    expert_rows: int  # items of a step
    rates: tuple[float, ...]
    tokens_at_once: int  # of one training step, all LoRAs together: what the GPU's memory holds

    validation_items: int
    test_items: int  # of a domain
    confusion_items: int
    rows_at_once: int  # of greedy answers


FULL = Settings(
    size="full", seeds=(0, 1, 2), rank=16, alpha=32.0, longest=176, longest_answer=72, new_tokens=72,
    expert_steps=300, expert_rows=16, rates=(3e-4, 1e-3, 3e-3), tokens_at_once=32_000,
    validation_items=100, test_items=250, confusion_items=120, rows_at_once=3000,
)  # fmt: skip
SMOKE = Settings(
    size="smoke", seeds=(0,), rank=2, alpha=4.0, longest=200, longest_answer=72, new_tokens=3,
    expert_steps=2, expert_rows=2, rates=(1e-3, 3e-3), tokens_at_once=3_000,
    validation_items=2, test_items=2, confusion_items=2, rows_at_once=100,
)  # fmt: skip
SIZES = {settings.size: settings for settings in (FULL, SMOKE)}
