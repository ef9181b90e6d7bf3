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

    mixed_steps: int  # training on all domains together: routers, coefficients, a new LoRA
    mixed_rows: int
    lora_rates: tuple[
        float, ...
    ]  # of a LoRA on all domains together: the rate that was never best in stage 1 is left out
    router_rates: tuple[float, ...]
    xlora_rates: tuple[float, ...]
    label_rates: tuple[float, ...]
    coefficient_rates: tuple[float, ...]
    merge_weights: tuple[float, ...]
    example_prompts: int  # of a domain, for a router from texts
    deep_block: int  # whose input a deep router reads
    mixed_items: int  # of a domain, for label training
    tuning_items: int  # of a domain's validation split, for everything that is tuned on all domains together
    switch_pairs: int
    xlora_items: int  # of a domain: X-LoRA has no KV cache, so that each token of an answer costs the whole text again
    text_blocks: int  # of 256 tokens, for the loss on general text


FULL = Settings(
    size="full", seeds=(0, 1, 2), rank=16, alpha=32.0, longest=176, longest_answer=56, new_tokens=56,
    expert_steps=300, expert_rows=16, rates=(3e-4, 1e-3, 3e-3), tokens_at_once=12_000,
    validation_items=100, test_items=200, confusion_items=120, rows_at_once=1000,
    mixed_steps=150, mixed_rows=32, lora_rates=(3e-4, 1e-3), router_rates=(1e-3, 5e-3, 2e-2),
    xlora_rates=(1e-3, 1e-2), label_rates=(1e-3, 3e-3, 1e-2),
    coefficient_rates=(1e-2, 1e-1), merge_weights=(0.125, 0.35, 1.0), example_prompts=16, deep_block=6, mixed_items=250,
    tuning_items=40, switch_pairs=240, xlora_items=40, text_blocks=48,
)  # fmt: skip
SMOKE = Settings(
    size="smoke", seeds=(0, 1), rank=2, alpha=4.0, longest=200, longest_answer=72, new_tokens=3,
    expert_steps=2, expert_rows=2, rates=(1e-3, 3e-3), tokens_at_once=3_000,
    validation_items=2, test_items=2, confusion_items=2, rows_at_once=100,
    mixed_steps=2, mixed_rows=4, lora_rates=(3e-4, 1e-3), router_rates=(1e-3, 1e-2),
    xlora_rates=(1e-3,), label_rates=(3e-3, 3e-2),
    coefficient_rates=(1e-2, 1e-1), merge_weights=(0.125, 1.0), example_prompts=4, deep_block=1, mixed_items=4,
    tuning_items=2, switch_pairs=4, xlora_items=2, text_blocks=2,
)  # fmt: skip
SIZES = {settings.size: settings for settings in (FULL, SMOKE)}
