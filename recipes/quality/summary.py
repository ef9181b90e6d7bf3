"""What tables, pictures and verdict ask of the results: means over seeds, spreads, differences, which variant is best."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.quality import methods

LORA = "lora-r64"  # equal parameters
LAYER_WISE = "moe-lora"
PAPER = "switch"
LIKE_THE_PAPER = 1.05  # times the paper's active rank: what still reads as many bytes per token


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and sample standard deviation (None with one seed)."""

    mean: float
    sd: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None if there are no values."""
        found = list(values)
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Quantity:
    """A metric, mean over some domains or tasks. A seed counts only if it has all of them."""

    metric: str
    where: tuple[str, ...]

    def of(self, values: Mapping[tuple[str, str], float]) -> float | None:
        found = [values[name, self.metric] for name in self.where if (name, self.metric) in values]
        return statistics.fmean(found) if found and len(found) == len(self.where) else None


class Summary:
    """Results (`results.read`) in the form that questions are asked in.

    Attributes:
        methods: names, in the order of the table.
        domains, tasks: names, as measured. Tasks are those with an exact match.
        families: names of task families ("sort-up+sort-down") that routing was measured on.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.header: dict[str, Any] = results["header"]
        self.values: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
        self.rows: dict[str, dict[str, Any]] = {}  # one of each method, for what is the same in all
        names: dict[str, list[str]] = {"loss": [], "exact_match": [], "mi_instruction_given_token": []}
        for row in results["rows"]:
            self.rows.setdefault(row["method"], row)
            of_seed = self.values.setdefault(row["method"], {}).setdefault(row["seed"], {})
            where, metric = row["domain_or_task"], row["metric"]
            if row["value"] is not None:
                of_seed[where, metric] = row["value"]
            if metric in names:
                names[metric].append(where)
        self.tasks = tuple(dict.fromkeys(names["exact_match"]))
        self.domains = tuple(name for name in dict.fromkeys(names["loss"]) if name not in self.tasks)
        self.families = tuple(dict.fromkeys(names["mi_instruction_given_token"]))
        self.methods = tuple(self.values)
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for run in results["runs"]:
            self.runs.setdefault(run["method"], []).append(run)
        self.loss = Quantity("loss", self.domains)
        self.exact_match = Quantity("exact_match", self.tasks)

    # ------------------------------------------------------------------------------------------------ figures

    def per_seed(self, method: str, quantity: Quantity) -> dict[int, float]:
        found = {seed: quantity.of(values) for seed, values in self.values.get(method, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def spread(self, method: str, quantity: Quantity) -> Spread | None:
        """None if it was not measured."""
        return Spread.of(self.per_seed(method, quantity).values())

    def difference(self, method: str, other: str, quantity: Quantity) -> Spread | None:
        """`method` less `other`, seed by seed (the same seed is the same order of the data); None if they share no seed."""
        mine, theirs = self.per_seed(method, quantity), self.per_seed(other, quantity)
        return Spread.of(mine[seed] - theirs[seed] for seed in mine if seed in theirs)

    def tuning(self, method: str) -> dict[float, float | None]:
        """Learning rate -> validation loss of every one tried; None where it was not finite."""
        return {float(rate): loss for run in self.runs[method][:1] for rate, loss in run["tuning"].items()}

    def validation_loss(self, method: str) -> float | None:
        """The lowest of the search for the learning rate: mean over domains and tasks, on a seed that is not reported."""
        found = [loss for loss in self.tuning(method).values() if loss is not None]
        return min(found) if found else None

    def active_rank(self, method: str) -> float | None:
        found = self.spread(method, Quantity("active_rank", ("all",)))
        return found.mean if found else None

    # ------------------------------------------------------------------------------------------------ choices

    @property
    def variants(self) -> list[str]:
        """LoRA-Switch with whatever router: what is no baseline."""
        return [name for name in self.methods if self.family(name) != "baselines"]

    def family(self, method: str) -> str:
        runs = self.runs.get(method)
        return runs[0]["family"] if runs else methods.BY_NAME[method].family

    @property
    def chosen_by_validation(self) -> bool:
        """Whether every variant has a validation loss to choose the best one by."""
        return all(self.validation_loss(name) is not None for name in self.variants)

    def best(self, among: Iterable[str] | None = None) -> str | None:
        """The variant with the lowest validation loss; without a search for learning rates, with the lowest test loss."""
        candidates = list(self.variants if among is None else among)
        if self.chosen_by_validation:
            score = {name: self.validation_loss(name) for name in candidates}
        else:
            everything = Quantity("loss", (*self.domains, *self.tasks))
            spreads = {name: self.spread(name, everything) for name in candidates}
            score = {name: found.mean for name, found in spreads.items() if found}
        known = {name: value for name, value in score.items() if value is not None}
        return min(known, key=lambda name: known[name]) if known else None

    def best_at_paper_rank(self) -> str | None:
        """The best variant whose tokens use no more rank, so read no more bytes, than the paper's router's do."""
        rank = self.active_rank(PAPER)
        if rank is None:
            return None
        ranks = {name: self.active_rank(name) for name in self.variants}
        return self.best([name for name, mine in ranks.items() if mine is not None and mine <= LIKE_THE_PAPER * rank])

    def highlights(self) -> list[str]:
        """The few methods that pictures and detailed tables show: baselines, the paper's router, the best variants."""
        wanted = (LORA, LAYER_WISE, PAPER, self.best_at_paper_rank(), self.best())
        return [name for name in dict.fromkeys(wanted) if name is not None and name in self.methods]
