"""How large everything is: the size that the published table comes from, and the one that only proves that each step works."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

LENGTH = 256  # tokens of a block of text and of a row of packed tasks


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on besides the data and the code."""

    size: str

    # the base: a Llama
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int

    # its pretraining: the whole of the general text, several times over
    pretrain_steps: int
    pretrain_rows: int
    pretrain_learning_rate: float

    # the adaptation
    steps: int
    rows: int  # per step, of LENGTH tokens
    task_share: float  # of the rows; the others are text, the same share from each domain
    warm_up: float  # share of the steps
    learning_rates: tuple[float, ...]  # tried for each method, ascending; the search starts at the three in the middle
    tuning_seed: int
    seeds: tuple[int, ...]

    # measuring: at most so many rows of each domain, and of each family of tasks
    validation_rows: int
    test_rows: int  # of a domain
    test_task_rows: int  # of a family
    routing_rows: int  # for the statistics of the router
    rows_at_once: int

    def fingerprint(self, *without: str) -> dict[str, Any]:
        """The fields as JSON has them, to tell results of other settings apart."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in without
        }

    def pretraining(self) -> dict[str, Any]:
        """The part that the base depends on."""
        names = ("size", "hidden", "intermediate", "layers", "heads", "key_value_heads")
        return {
            name: value for name, value in self.fingerprint().items() if name in names or name.startswith("pretrain")
        }

    def with_changes(self, **changes: Any) -> Settings:
        """A copy with the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


FULL = Settings(
    size="full",
    hidden=512,
    intermediate=1408,
    layers=8,
    heads=8,
    key_value_heads=4,
    pretrain_steps=900,
    pretrain_rows=256,
    pretrain_learning_rate=4e-3,
    steps=400,
    rows=64,
    task_share=0.3,
    warm_up=0.05,
    learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    tuning_seed=1000,
    seeds=(0, 1, 2),
    validation_rows=96,
    test_rows=256,
    test_task_rows=600,
    routing_rows=96,
    rows_at_once=128,
)

SMOKE = Settings(
    size="smoke",
    hidden=64,
    intermediate=160,
    layers=4,
    heads=4,
    key_value_heads=2,
    pretrain_steps=30,
    pretrain_rows=4,
    pretrain_learning_rate=6e-3,
    steps=6,
    rows=8,
    task_share=0.3,
    warm_up=0.1,
    learning_rates=(4e-3, 8e-3),
    tuning_seed=1000,
    seeds=(0,),
    validation_rows=2,
    test_rows=4,
    test_task_rows=4,
    routing_rows=4,
    rows_at_once=8,
)

SIZES = {settings.size: settings for settings in (FULL, SMOKE)}
