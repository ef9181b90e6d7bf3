"""The tables of README.md, as lines of Markdown; a table whose figures are missing is no lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.quality import methods
from recipes.quality.summary import LAYER_WISE, LORA, PAPER, Quantity, Summary
from recipes.quality.verdict import number

NAMES = {LORA: "LoRA, equal parameters", LAYER_WISE: "layer-wise", PAPER: "paper's router", "base": "base"}


def label(name: str) -> str:
    """`switch` (paper's router)"""
    return f"`{name}` ({NAMES[name]})" if name in NAMES and name != "base" else f"`{name}`"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """No lines if there is no row; columns without any value are left out."""
    if not lines:
        return []
    kept = [index for index in range(len(header)) if index == 0 or any(line[index] for line in lines)]
    rows = [[line[index] for index in kept] for line in (header, *lines)]
    return [
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(kept) + "|",
        *("| " + " | ".join(row) + " |" for row in rows[1:]),
        "",
    ]


def cell(summary: Summary, method: str, metric: str, where: tuple[str, ...]) -> str:
    spread = summary.spread(method, Quantity(metric, where))
    return number(spread, metric) if spread else ""


def routing_cell(summary: Summary, method: str, metric: str, where: str = "domains", digits: int = 3) -> str:
    """Figures of the router are rounded more."""
    spread = summary.spread(method, Quantity(metric, (where,)))
    if spread is None:
        return ""
    mean = round(spread.mean, digits) + 0.0
    return f"{mean:.{digits}f}" + ("" if spread.sd is None else f" ± {spread.sd:.{digits}f}")


def rate(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


# ------------------------------------------------------------------------------------------------ all methods


def all_methods(summary: Summary) -> list[str]:
    lines = []
    best = summary.best()
    for name in summary.methods:
        row, rank = summary.rows[name], summary.active_rank(name)
        trained = row["trainable_params"] > 0
        lines.append(
            [
                f"**{label(name)}**" if name == best else label(name),
                cell(summary, name, "loss", summary.domains),
                cell(summary, name, "exact_match", summary.tasks),
                routing_cell(summary, name, "mi_domain"),
                routing_cell(summary, name, "context_information"),
                routing_cell(summary, name, "effective_experts", digits=2),
                f"{row['trainable_params'] / 1e6:.2f} M" if trained else "",
                f"{rank:.1f}" if rank else "",
                rate(row["learning_rate"]) if trained else "",
            ]
        )
    header = ["", "held-out loss", "exact match, %", "MI(expert; domain)", "context information", "effective experts",
              "trainable parameters", "active rank", "learning rate"]  # fmt: skip
    return table(header, lines) + _missing_seeds(summary)


def _missing_seeds(summary: Summary) -> list[str]:
    wanted = summary.header["settings"]["seeds"]
    lacking = {name: [s for s in wanted if s not in summary.values[name]] for name in summary.methods if name != "base"}
    listed = [f"`{name}` lacks {', '.join(map(str, seeds))}" for name, seeds in lacking.items() if seeds]
    return [f"Seeds that are missing: {'; '.join(listed)}.", ""] if listed else []


def what_each_is(summary: Summary) -> list[str]:
    lines = [[label(name), methods.BY_NAME[name].what] for name in summary.methods if name in methods.BY_NAME]
    return table(["", "what it is"], lines)


def against_the_paper(summary: Summary, reasons: Mapping[str, str]) -> list[str]:
    """Each variant less the paper's router, seed by seed."""
    lines = []
    for name in summary.variants:
        loss = summary.difference(name, PAPER, summary.loss)
        match = summary.difference(name, PAPER, summary.exact_match)
        if name == PAPER or loss is None:
            continue
        seeds = summary.per_seed(name, summary.loss), summary.per_seed(PAPER, summary.loss)
        better = sum(seeds[0][seed] < seeds[1][seed] for seed in seeds[0] if seed in seeds[1])
        lines.append(
            [
                f"`{name}`",
                number(loss, "loss", sign=True),
                f"{better} of {loss.count}",
                number(match, "exact_match", sign=True) if match else "",
                reasons.get(name, ""),
            ]
        )
    header = ["against the paper's router", "held-out loss", "seeds with a lower loss", "exact match, points", "why"]
    return table(header, lines)


# --------------------------------------------------------------------------------------- domains, tasks, routing


def _columns(summary: Summary) -> list[str]:
    return [name for name in dict.fromkeys(("base", *summary.highlights())) if name in summary.methods]


def per_domain(summary: Summary) -> list[str]:
    columns = _columns(summary)
    lines = [
        [name, *(cell(summary, method, "loss", (name,)) for method in columns)]
        for name in summary.domains
    ]  # fmt: skip
    lines.append(["**mean**", *(cell(summary, method, "loss", summary.domains) for method in columns)])
    return table(["held-out loss", *map(label, columns)], lines) if summary.domains else []


def per_task(summary: Summary) -> list[str]:
    """Exact match, then what the router knows of the instruction."""
    if not summary.tasks:
        return []
    columns = _columns(summary)
    lines = [[name, *(cell(summary, m, "exact_match", (name,)) for m in columns)] for name in summary.tasks]
    lines.append(["**mean**", *(cell(summary, method, "exact_match", summary.tasks) for method in columns)])
    for family in summary.families:
        what = f"I(expert; instruction \\| token), {family_name(family)}"
        lines.append([what, *(routing_cell(summary, m, "mi_instruction_given_token", family) for m in columns)])
    return table(["exact match, %", *map(label, columns)], lines)


def family_name(family: str) -> str:
    """sort-up+sort-down -> sort"""
    return family.split("+")[0].rpartition("-")[0] or family


def routing(summary: Summary) -> list[str]:
    metrics = ("mi_domain", "mi_domain_given_token", "context_information", "context_variance", "effective_experts")
    lines = []
    for name in summary.methods:
        cells = [routing_cell(summary, name, metric) for metric in metrics]
        cells += [routing_cell(summary, name, "mi_instruction_given_token", family) for family in summary.families]
        if any(cells):
            lines.append([label(name), *cells])
    header = ["", "I(expert; domain)", "I(expert; domain \\| token)", "context information", "context share of variance",
              "effective experts"]  # fmt: skip
    header += [f"I(expert; instruction \\| token), {family_name(family)}" for family in summary.families]
    return table(header, lines)


# ------------------------------------------------------------------------------------------ tuning, cost, sources


def tuning(summary: Summary) -> list[str]:
    """Validation loss of each learning rate tried; the chosen one bold."""
    rates = sorted({value for name in summary.methods for value in summary.tuning(name)})
    lines = []
    for name in summary.methods:
        tried = summary.tuning(name)
        if not tried:
            continue
        chosen = summary.rows[name]["learning_rate"]
        cells = []
        for value in rates:
            text = "" if value not in tried else "diverged" if tried[value] is None else f"{tried[value]:.4f}"
            cells.append(f"**{text}**" if value == chosen and text else text)
        lines.append([label(name), *cells])
    return table(["validation loss at learning rate", *map(rate, rates)], lines)


def at_the_edge(summary: Summary) -> list[str]:
    """Methods whose best learning rate is the first or last of all that could be tried."""
    grid = summary.header["settings"]["learning_rates"]
    edge = [
        f"`{name}`"
        for name in summary.methods
        if len(summary.tuning(name)) > 1 and summary.rows[name]["learning_rate"] in (grid[0], grid[-1])
    ]
    return [f"At the edge of the grid, so perhaps not at its best: {', '.join(edge)}.", ""] if edge else []


def decode_cost(summary: Summary) -> list[str]:
    cost = summary.header.get("decode_cost")
    if not cost:
        return []
    lines = []
    for name in summary.methods:
        each = cost["methods"].get(name)
        if each and name != "base":
            measured = f"{each['measured']:.3f} ({each['how']})" if "measured" in each else ""
            lines.append(
                [label(name), f"{each['mb_per_token']:.0f}", f"{each['launches']}", f"{each['computed']:.4f}", measured]
            )
    header = ["", "adapter read per token, MB", "launches of routers", "decode step, computed", "decode step, measured"]
    return table(header, lines)


def sources(summary: Summary) -> list[str]:
    """Text: package, version, licence, size."""
    lines = []
    for each in summary.header.get("sources") or ():
        tokens = [each.get(f"{place}_tokens") for place in ("train", "validation", "test")]
        lines.append(
            [
                each["split"], f"{each['package']} {each['version']}", each["licence"], f"{each['files']:,}",
                f"{each['characters'] / 1e6:.2f}", *(f"{count:,}" if count else "" for count in tokens),
            ]
        )  # fmt: skip
    header = ["used for", "package", "licence", "files", "M characters", "tokens for training", "validation", "test"]
    return table(header, lines)


def sizes(summary: Summary) -> list[str]:
    """What each domain and task was trained on and measured with."""
    data = summary.header.get("data") or {}
    count: Callable[[Any], str] = lambda value: f"{value:,}" if isinstance(value, int) else ""  # noqa: E731
    text = [
        [name, *(count(each.get(f"{place}_tokens")) for place in ("train", "validation", "test"))]
        for name, each in data.get("domains", {}).items()
    ]
    tasks = [
        [name, *(count(each.get(field)) for field in ("train_items", "validation_items", "test_items"))]
        for name, each in data.get("tasks", {}).items()
    ]
    measured = ["tokens for training", "measured: validation", "test"]
    return [
        *table(["domain", *measured], text),
        *table(["task", "items for training", *measured[1:]], tasks),
    ]
