"""Everything there is to measure, most important first, and what each part needs. What is ready may run beside anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from recipes.compose import baselines, decisions, growth, peft_routers, routers
from recipes.compose.lab import Lab
from recipes.compose.settings import Settings

# Together in one pass, so that lengths are alike and passes about equally long.
PARTS = (
    ("arc", "gsm8k", "word_sorting", "boolq"),
    ("openbookqa", "word_sequence_reversal", "chain_sum", "number_filtering", "letter_counting"),
)


@dataclass(frozen=True)
class Task:
    name: str
    run: Callable[[Lab], None]
    needs: tuple[str, ...] = ()


def all_tasks(settings: Settings) -> list[Task]:
    first, *others = settings.seeds
    tasks = [
        Task(f"experts-{part}-seed{seed}", partial(baselines.train_experts, seed=seed, names=names))
        for seed in settings.seeds
        for part, names in enumerate(PARTS)
    ]
    tasks += [
        Task(f"one_lora-rate{index}", partial(baselines.one_lora_try, index=index))
        for index in range(len(settings.lora_rates))
    ]
    tries = [
        Task(f"xlora-rate{index}", partial(peft_routers.xlora_try, seed=first, index=index), experts(first))
        for index in range(len(settings.xlora_rates))
    ]
    tasks += tries  # early, because they take longest
    tasks += _of_seed(settings, first, first)[:CORE]
    for seed in others:
        tasks += _of_seed(settings, seed, first)[:CORE]
    tasks += [
        Task("xlora", partial(peft_routers.xlora, seed=first), (*experts(first), *(each.name for each in tries))),
        *_once(first),
    ]
    tasks += _of_seed(settings, first, first)[CORE:]
    for seed in others:
        tasks += _switch(seed)
    for seed in others:
        tasks += _growth(seed)
    for seed in others:
        tasks += _of_seed(settings, seed, first)[CORE:]
    return tasks


CORE = 15  # of a seed's tasks: first for all seeds


def _of_seed(settings: Settings, seed: int, first: int) -> list[Task]:
    def task(name: str, run: Callable[..., None], *needs: str, tuned: bool = False, **arguments: object) -> Task:
        """tuned: the other seeds wait for what the first one finds."""
        if tuned and seed != first:
            needs = (*needs, f"{name}-seed{first}")
        return Task(f"{name}-seed{seed}", partial(run, seed=seed, **arguments), (*experts(seed), *needs))

    one_lora = Task(
        f"one_lora-seed{seed}",
        partial(baselines.one_lora, seed=seed),
        tuple(f"one_lora-rate{index}" for index in range(len(settings.lora_rates))),
    )
    return [
        one_lora,
        task("trained-0.98", routers.trained, tuned=True, decay=0.98),
        task("oracle", baselines.oracle),
        task("labels-0.98", routers.labels, tuned=True, decay=0.98),
        task("texts-0.98", routers.untrained, how="texts", decay=0.98),
        task("merges", baselines.merges, tuned=True, methods=("merge_cat", "merge_linear", "merge_ties")),
        task("soups", baselines.soups, tuned=True),
        task("arrow", peft_routers.arrow, top_k=1),
        task("labels-per-prompt", decisions.per_prompt, how="labels"),
        task("texts-per-prompt", decisions.per_prompt, how="texts"),
        task("trained-0", routers.trained, tuned=True, decay=0.0),
        task("trained-texts", routers.trained, tuned=True, decay=0.98, start="texts"),
        task("random", routers.trained, tuned=True, decay=0.98, start="random"),
        task("labels-1", routers.labels, tuned=True, decay=1.0),
        task("dare", baselines.merges, tuned=True, methods=("merge_dare_linear", "merge_dare_ties")),
        # less important from here on
        task("labels-0", routers.labels, tuned=True, decay=0.0),
        task("labels-0.9", routers.labels, tuned=True, decay=0.9),
        task("texts-1", routers.untrained, how="texts", decay=1.0),
        task("texts-0", routers.untrained, how="texts", decay=0.0),
        task("deep", decisions.deep),
        task("top2", routers.trained, tuned=True, decay=0.98, top_k=2),
        task("trained-1", routers.trained, tuned=True, decay=1.0),
        task("weights-0", routers.untrained, how="weights", decay=0.0),
        task("arrow-top2", peft_routers.arrow, top_k=2),
        task("weights-0.98", routers.untrained, how="weights", decay=0.98),
        task("texts-0.9", routers.untrained, how="texts", decay=0.9),
        task("trained-0.9", routers.trained, tuned=True, decay=0.9),
    ]


def experts(seed: int) -> tuple[str, ...]:
    return tuple(f"experts-{part}-seed{seed}" for part in range(len(PARTS)))


def _once(seed: int) -> list[Task]:
    return [
        Task("base", baselines.base),
        Task("base-general", growth.base),
        Task("new_lora_r", partial(baselines.new_lora, rank_factor=1)),
        *_growth(seed),
        *_switch(seed),
        Task("first-base", partial(decisions.first_tokens, seed=seed, how="base"), experts(seed)),
        Task("first-wrong", partial(decisions.first_tokens, seed=seed, how="wrong"), experts(seed)),
        Task("confusion", partial(baselines.confusion, seed=seed), experts(seed)),
        Task("new_lora_Er", partial(baselines.new_lora, rank_factor=8)),
    ]


def _growth(seed: int) -> list[Task]:
    return [
        Task(f"growth-routed-seed{seed}", partial(growth.routed, seed=seed), experts(seed)),
        Task(f"growth-one_lora-seed{seed}", partial(growth.one_lora, seed=seed), (f"one_lora-seed{seed}",)),
        Task(f"growth-trained-seed{seed}", partial(growth.trained, seed=seed), (f"trained-0.98-seed{seed}",)),
    ]


def _switch(seed: int) -> list[Task]:
    return [
        Task(f"switch-seed{seed}", partial(decisions.switch, seed=seed), experts(seed)),
        Task(f"switch-one_lora-seed{seed}", partial(decisions.switch_one_lora, seed=seed), (f"one_lora-seed{seed}",)),
    ]
