"""What was asked for, decided from the figures: each bar met or not, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.quality.summary import LAYER_WISE, LORA, Quantity, Spread, Summary


@dataclass(frozen=True)
class Bar:
    """One thing asked for.

    Attributes:
        met: None where the figures cannot decide it (one seed has no spread).
        short: for a table of many methods.
        text: the figures.
    """

    what: str
    met: bool | None
    short: str
    text: str

    @property
    def word(self) -> str:
        return {True: "met", False: "**not met**", None: "undecided"}[self.met]


def number(spread: Spread, metric: str, sign: bool = False) -> str:
    """2.3456 ± 0.0012 for a loss, 81.2 ± 0.5 for an exact match (in %)."""
    factor, digits = (100, 1) if metric == "exact_match" else (1, 4)
    mean = round(factor * spread.mean, digits) + 0.0  # no -0.0
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if spread.sd is None else f"{text} ± {factor * spread.sd:.{digits}f}"


def bars(summary: Summary, method: str) -> list[Bar]:
    """The four bars for one variant, those whose figures are there."""
    found = [
        _everywhere(summary, method, "loss", summary.domains, "domain"),
        _everywhere(summary, method, "exact_match", summary.tasks, "task"),
        _on_the_mean(summary, method, "loss", summary.loss, "domains"),
        _on_the_mean(summary, method, "exact_match", summary.exact_match, "tasks"),
    ]
    return [bar for bar in found if bar is not None]


def _gain(difference: float, metric: str) -> float:
    """Positive where the method is better: a loss is better when lower."""
    return difference if metric == "exact_match" else -difference


def _name(metric: str) -> str:
    return "exact match" if metric == "exact_match" else "held-out loss"


def _unit(metric: str) -> str:
    return "points" if metric == "exact_match" else "nats"


def _everywhere(summary: Summary, method: str, metric: str, names: tuple[str, ...], kind: str) -> Bar | None:
    """At least as good as equal-parameter LoRA on each domain or task, by the means over seeds."""
    compared = {name: summary.difference(method, LORA, Quantity(metric, (name,))) for name in names}
    found = {name: spread for name, spread in compared.items() if spread is not None}
    if not found:
        return None
    gains = {name: _gain(spread.mean, metric) for name, spread in found.items()}
    worse = sorted((name for name, gain in gains.items() if gain < 0), key=lambda name: gains[name])
    good = f"{len(found) - len(worse)} of {len(found)}"
    if worse:
        listed = ", ".join(f"{name} {number(found[name], metric, sign=True)}" for name in worse)
        text = f"at least as good on {good} {kind}s; worse on {listed} {_unit(metric)}"
    else:
        least = min(gains, key=lambda name: gains[name])
        text = f"on {good} {kind}s; smallest gain: {least} {number(found[least], metric, sign=True)} {_unit(metric)}"
    what = f"At least as good as equal-parameter LoRA on every {kind}, {_name(metric)}"
    return Bar(what, not worse, good, text)


def _on_the_mean(summary: Summary, method: str, metric: str, quantity: Quantity, kind: str) -> Bar | None:
    """Better than layer-wise routing on the mean, or worse by no more than the spread of layer-wise routing's seeds."""
    mine, theirs = summary.spread(method, quantity), summary.spread(LAYER_WISE, quantity)
    if mine is None or theirs is None:
        return None
    gain = _gain(mine.mean - theirs.mean, metric)
    met = True if gain >= 0 else None if theirs.sd is None else -gain <= theirs.sd
    change = number(Spread(mine.mean - theirs.mean, None, 1), metric, sign=True)
    text = f"{number(mine, metric)} against {number(theirs, metric)}: {change} {_unit(metric)}"
    if theirs.sd is None:
        text += "; one seed of layer-wise routing, so no spread to compare with"
    what = f"Within the seeds' spread of layer-wise routing or better on the mean of the {kind}, {_name(metric)}"
    return Bar(what, met, change, text)


def section(summary: Summary) -> list[str]:
    """Markdown: the bars of the best variant, and of the best one that reads no more than the paper's; then of all."""
    best, cheap = summary.best(), summary.best_at_paper_rank()
    if best is None or not bars(summary, best):
        return []
    how = (
        "the lowest validation loss (mean over domains and tasks, on a seed of its own: not the figures below)"
        if summary.chosen_by_validation
        else "the lowest test loss, mean over domains and tasks (no learning rates were searched, so there is no other figure)"
    )
    lines = [f"The best variant is the one with {how}: `{best}`.", ""]
    for name in dict.fromkeys((best, cheap)):
        if name is None:
            continue
        if name != best:
            lines += [f"The best one whose tokens use no more rank than with the paper's router: `{name}`.", ""]
        lines += [f"| `{name}` | | |", "|---|---|---|"]
        lines += [f"| {bar.what} | {bar.word} | {bar.text} |" for bar in bars(summary, name)]
        lines.append("")
    return lines + _all_variants(summary)


def _all_variants(summary: Summary) -> list[str]:
    table = {name: bars(summary, name) for name in summary.variants}
    table = {name: found for name, found in table.items() if found}
    columns = list(dict.fromkeys(bar.what for found in table.values() for bar in found))
    short = {
        what: what.replace("Within the seeds' spread of", "against").replace(
            " or better on the mean of the", ", mean of"
        )
        for what in columns
    }
    lines = ["<details><summary>The same for every variant</summary>", ""]
    lines += ["| | " + " | ".join(short[what] for what in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, found in table.items():
        by_what = {bar.what: bar for bar in found}
        cells = [f"{by_what[what].short}: {by_what[what].word}" if what in by_what else "" for what in columns]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return [*lines, "", "</details>", ""]
