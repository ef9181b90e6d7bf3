"""From compose.csv to the table in the root README, the tables in recipes/compose/README.md, and the picture beside the CSV.

python -m recipes.compose.report            # writes both documents, and compose.png beside compose.csv
python -m recipes.compose.report --check    # only compares
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.checkout import ROOT
from recipes.compose import domains
from recipes.documents import between_markers

RESULTS = ROOT / "recipes" / "results"
SUMMARY, FULL = "README.md", "recipes/compose/README.md"
MARKERS = ("<!-- compose table: python -m recipes.compose.report -->", "<!-- end of compose table -->")
NAMES = {
    "base": "no LoRA",
    "oracle": "the right LoRA for each item",
    "one_lora": "one LoRA of rank E·r, trained on all domains together",
    "merge_linear": "PEFT `linear`",
    "merge_cat": "PEFT `cat` (sum of the changes)",
    "merge_ties": "PEFT `ties`",
    "merge_dare_linear": "PEFT `dare_linear`",
    "merge_dare_ties": "PEFT `dare_ties`",
    "lora_soups_cat": "LoRA Soups CAT, learned coefficients",
    "arrow_top1": "PEFT Arrow, top-1",
    "arrow_top2": "PEFT Arrow, top-2",
    "xlora": "PEFT X-LoRA",
    "new_lora_r": "a new LoRA of rank r, on the router's data and steps",
    "new_lora_Er": "a new LoRA of rank E·r, on the router's data and steps",
    "uniform": "all experts with gate 1/E",
    "labels_per_prompt": "router by labels, one decision for the whole prompt",
    "texts_per_prompt": "router from texts, one decision for the whole prompt",
    "deep_previous": "deeper router, each token follows the decision before it",
    "deep_per_prompt": "deeper router, one decision for the whole prompt",
}
WAYS = {
    "weights": "`router_from_weights`", "texts": "`router_from_texts`, 16 prompts of each", "labels": "router trained on labels",
    "trained": "router trained on answers",
}  # fmt: skip
# What the root README shows: the best of each kind.
SHORT = ("base", "uniform", "merges", "lora_soups_cat", "new_lora", "arrow", "xlora", "random", "texts", "labels", "one_lora",
         "oracle")  # fmt: skip
EM = "exact_match"
BEST = "; of several variants the best is shown"


class Key(NamedTuple):
    method: str
    kind: str


class Table(NamedTuple):
    """Values by (method, kind), metric, seed and domain; parameters that were trained on all domains together."""

    values: dict[Key, dict[str, dict[int, dict[str, float]]]]
    parameters: dict[Key, int]
    header: dict[str, Any]


def read(folder: Path) -> Table:
    values: dict[Key, dict[str, dict[int, dict[str, float]]]] = {}
    parameters: dict[Key, int] = {}
    with (folder / "compose.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = Key(row["method"], row["kind"])
            by_seed = values.setdefault(key, {}).setdefault(row["metric"], {})
            by_seed.setdefault(int(row["seed"]), {})[row["domain"]] = float(row["value"])
            parameters[key] = max(parameters.get(key, 0), int(row["trainable_params"]))
    return Table(values, parameters, json.loads((folder / "compose.json").read_text()))


def name_of(method: str) -> str:
    if method in NAMES:
        return NAMES[method]
    way, _, rest = method.partition("_decay_")
    decay, _, ending = rest.partition("_")
    what = {
        "": "",
        "top2": ", soft gates of two experts",
        "from_texts": ", begun from texts",
        "random_experts": ", above random experts",
    }
    context = ", token alone" if decay == "0" else f", `router_decay={decay}`"
    return WAYS.get(way, way) + context + what.get(ending, f", {ending}")


def means(table: Table, key: Key, metric: str = EM, names: Sequence[str] = domains.EIGHT) -> list[float]:
    """One number for each seed: the mean over the domains, all of which must be there."""
    return list(by_seed(table, key, metric, names).values())


def by_seed(table: Table, key: Key, metric: str = EM, names: Sequence[str] = domains.EIGHT) -> dict[int | None, float]:
    """`means`, with the seeds."""
    found = sorted(table.values.get(key, {}).get(metric, {}).items())
    return {
        seed: statistics.fmean(each[name] for name in names)
        for seed, each in found
        if all(name in each for name in names)
    }


def of_oracle(table: Table, key: Key) -> str:
    """Of what the right LoRA gets on the same seeds: seeds differ by more than routers do."""
    oracle, ours = by_seed(table, Key("oracle", "b")), by_seed(table, key)
    both = [seed for seed in ours if seed in oracle]
    right = sum(oracle[seed] for seed in both)
    return f"{100 * sum(ours[seed] for seed in both) / right:.0f} %" if right else ""


def shown(table: Table, values: Sequence[float]) -> str:
    """Mean and, of several seeds, their standard deviation. Fewer seeds than the others have are named."""
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):.1f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    fewer = f" ({len(values)} seeds)" if len(values) < len(table.header["settings"]["seeds"]) else ""
    return f"{mean} ± {100 * statistics.stdev(values):.1f}{fewer}"


def rows(table: Table) -> list[Key]:
    """The methods with a score on all eight domains, best first."""
    found = [key for key in table.values if key.kind in ("base", *"abcdefgh") and means(table, key)]
    return sorted(found, key=lambda key: -statistics.fmean(means(table, key)))


def group_of(key: Key) -> str:
    """Which line of the short table a method stands for; "" for none."""
    method = key.method
    if method.endswith("per_prompt"):
        return ""  # nothing that the package offers
    if method.endswith("random_experts"):
        return "random"
    if method.startswith("merge_"):
        return "merges"
    return next((group for group in SHORT if method == group or method.startswith(group + "_")), "")


def line(table: Table, key: Key) -> str:
    ours, share = means(table, key), of_oracle(table, key)
    loss = means(table, key, "loss")
    count = table.parameters[key]
    # The experts are trained each on its own domain: nothing is trained on all of them.
    trained = (
        "" if key.kind in ("base", "b", "h") or key.method.startswith("merge_") else f"{count:,}" if count else "0"
    )
    if key.method.startswith(("texts", "weights", "arrow")):
        trained = "0"
    mark = "**" if key.kind == "g" else ""
    losses = f"{statistics.fmean(loss):.3f}" if loss else ""
    name, score = f"{mark}{name_of(key.method)}{mark}", f"{mark}{shown(table, ours)}{mark}"
    return f"| {key.kind} | {name} | {score} | {share} | {losses} | {trained} |"


HEAD = ["| | | exact match, % | of (b), same seeds | loss | trained on all domains |", "|---" * 6 + "|"]


def summary(table: Table) -> str:
    """Between the markers of the root README: the best of each group, worst first."""
    best: dict[str, Key] = {}
    for key in rows(table):
        best.setdefault(group_of(key), key)
    chosen = sorted((best[g] for g in SHORT if g in best), key=lambda key: statistics.fmean(means(table, key)))
    return "\n".join([caption(table), "", *HEAD, *(line(table, key) for key in chosen)])


def caption(table: Table) -> str:
    head = table.header
    settings = head["settings"]
    return (
        f"Mean exact match over eight domains ({', '.join(domains.EIGHT)}), {settings['test_items']} held-out items each, "
        f"± standard deviation of {len(settings['seeds'])} seeds. {head['base']}, E = 8 LoRAs of rank {settings['rank']}, "
        f"{_hardware(head)} ([`compose.csv`](PATH/compose.csv), made by `python -m recipes.compose`). (g) is ours{BEST}."
    )


def _hardware(head: dict[str, Any]) -> str:
    """Of the run, or of all whose rows stand here."""
    return " and ".join(dict.fromkeys(run["hardware"] for run in head.get("runs", [head])))


# ------------------------------------------------------------------------------------------------------ the full page


def section(table: Table) -> str:
    text = [
        caption(table).replace(BEST, ""),
        "",
        *HEAD,
        *(line(table, k) for k in rows(table)),
        "",
    ]
    text += ["![Exact match of every method](../results/compose.png)", ""]
    for title, part in (
        ("Where routers are right", accuracy(table)),
        ("First tokens that follow another expert", first(table)),
        ("Text that switches domains", switch(table)),
        ("A ninth domain, and one expert less", growth(table)),
        ("Time", cost(table)),
    ):
        if part:
            text += [f"### {title}", "", *part, ""]
    text += notes(table)
    return "\n".join(text).strip()


def accuracy(table: Table) -> list[str]:
    """Share of tokens that choose the right expert, by their place."""
    columns = [f"token_{n}" for n in (1, 2, 4, 8, 16, 32)] + ["prompt", "last", "answer"]
    found = []
    for key in table.values:
        cells = []
        for column in columns:
            by_seed = table.values[key].get(f"accuracy_{column}", {})
            each = [value for domain in by_seed.values() for value in domain.values()]
            cells.append(f"{100 * statistics.fmean(each):.0f}" if each else "")
        if any(cells) and key.kind == "g":
            found.append((key.method, f"| {name_of(key.method)} | " + " | ".join(cells) + " |"))
    if not found:
        return []
    heads = [column.replace("token_", "token ") for column in columns]
    head = [
        "| % of tokens that choose the right expert | " + " | ".join(heads) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    return [*head, *(text for _, text in sorted(found))]


def first(table: Table) -> list[str]:
    found = []
    for how in ("base", "wrong"):
        counts = sorted(
            int(key.method.split("_")[1])
            for key in table.values
            if key.method.startswith("first_") and key.method.endswith(how)
        )
        cells = [shown(table, means(table, Key(f"first_{count}_{how}", "diagnostic"))) for count in counts]
        if cells:
            label = {"base": "no expert", "wrong": "another domain's expert"}[how]
            found.append((counts, f"| {label} | " + " | ".join(cells) + " |"))
    if not found:
        return []
    counts = found[0][0]
    head = [
        "| the first n tokens follow | " + " | ".join(f"n = {n}" for n in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    return [*head, *(text for columns, text in found if columns == counts)]


def switch(table: Table) -> list[str]:
    metrics = {
        "first_right": "first",
        "second_right": "second, first answer given",
        "second_right_in_turn": "second, after its own answer",
        "both_right": "both in turn",
    }
    lines = [
        f"| {name_of(key.method)} | "
        + " | ".join(shown(table, means(table, key, metric, ["switch"])) for metric in metrics)
        + " |"
        for key in table.values
        if "both_right" in table.values[key]
    ]
    return ["| exact match, % | " + " | ".join(metrics.values()) + " |", "|---" * 5 + "|", *lines] if lines else []


GROWTH = {
    "one_lora_before": "one LoRA (a), eight domains",
    "one_lora_after": "one LoRA (a), trained anew on nine",
    "texts_before": "ours from texts, eight experts",
    "texts_after": "ours, a ninth expert, router from texts anew",
    "labels_after": "ours, a ninth expert, router on labels anew",
    "trained_after": "ours, a ninth expert, trained router trained on",
    "labels_removed": f"ours, nine experts without {domains.EIGHT[4]}",
}


def growth(table: Table) -> list[str]:
    lines = []
    for method, label in GROWTH.items():
        key = Key(method, "growth")
        eight = means(
            table, key, names=[n for n in domains.EIGHT if method != "labels_removed" or n != domains.EIGHT[4]]
        )
        if method == "one_lora_before":
            eight = means(table, Key("one_lora", "a"))
        ninth = means(table, key, names=[domains.NINTH])
        general = means(table, key, "loss", ["general_text"])
        seconds = means(table, key, "seconds", ["all"])
        if not (eight or ninth):
            continue
        cells = [
            shown(table, ninth), shown(table, eight), f"{statistics.fmean(general):.3f}" if general else "",
            f"{statistics.fmean(seconds):.1f}" if seconds else "",
        ]  # fmt: skip
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    head = ["| | ninth, % | the others, % | loss on general text | seconds of the change |", "|---" * 5 + "|"]
    base = means(table, Key("base", "growth"), "loss", ["general_text"])
    if base:
        lines.append(f"| no LoRA | | | {statistics.fmean(base):.3f} | |")
    return [*head, *lines] if lines else []


COST = {
    "merged_or_base": "no LoRA, or one that is merged: (a), (b), (c), (e)",
    "one_lora_unmerged": "one LoRA, not merged",
    "ours_decay_0.98_fused": "ours, `router_decay=0.98`, fused",
    "ours_decay_0.98_unfused": "ours, `router_decay=0.98`, not fused",
    "ours_decay_0_fused": "ours, token alone, fused",
    "ours_decay_0_unfused": "ours, token alone, not fused",
    "arrow_top1": "PEFT Arrow, top-1",
    "xlora": "PEFT X-LoRA, without a cache",
}


def cost(table: Table) -> list[str]:
    lines = []
    for method, label in COST.items():
        found = [means(table, Key(method, "cost"), metric, ["all"]) for metric in ("decode_ms", "prefill_ms")]
        if all(found):
            lines.append(f"| {label} | " + " | ".join(f"{value:.1f}" for (value, *_) in found) + " |")
    return (
        ["| eager, batch 1 | decode step, ms | prefill of 2,048 tokens, ms |", "|---" * 3 + "|", *lines]
        if lines
        else []
    )


def notes(table: Table) -> list[str]:
    head = table.header
    text = [f"- Not measured: {note}" for note in head.get("not_measured", [])]
    if head.get("left_out"):
        text.append(
            f"- Left out, for lack of time or because it failed: {', '.join(f'`{name}`' for name in head['left_out'])}."
        )
    text += [
        f"- `{name}` failed: {error}"
        for name, error in {**head.get("failed", {}), **head.get("times_failed", {})}.items()
    ]
    return text


# -------------------------------------------------------------------------------------------------------------- picture


def draw(table: Table, path: Path) -> None:
    """Mean exact match as bars, the standard deviation as a line, and each seed as a point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = rows(table)[::-1]
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(keys) + 1.2))
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # where the oracle's line crosses
    colors = {"g": "#4477aa", "b": "#228833", "a": "#ccbb44"}
    for place, key in enumerate(keys):
        values = [100 * value for value in means(table, key)]
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        axes.barh(
            place, mean, xerr=spread, color=colors.get(key.kind, "#bbbbbb"), height=0.7, error_kw={"linewidth": 1}
        )
        axes.plot(values, [place] * len(values), ".", color="black", markersize=3)
        axes.text(max([mean + spread, *values]) + 0.7, place, f"{mean:.1f}", va="center", fontsize=8, bbox=plain)
    axes.set_yticks(range(len(keys)), [f"({k.kind}) {name_of(k.method)}".replace("`", "") for k in keys], fontsize=8)
    oracle = means(table, Key("oracle", "b"))
    if oracle:
        axes.axvline(100 * statistics.fmean(oracle), color="#228833", linewidth=0.8, linestyle="--")
    axes.set_ylim(-0.6, len(keys) - 0.4)
    axes.set_xlim(0, 1.12 * max(1.0, *(100 * max(means(table, key)) for key in keys)))
    axes.set_xlabel("exact match, %; points: seeds; blue: ours", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=RESULTS, help="folder of compose.csv and compose.json")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a document differs")
    parser.add_argument("--picture", type=Path, help="only draw, to this file")
    args = parser.parse_args(argv)
    table = read(args.source)
    if args.picture:
        draw(table, args.picture)
        print(section(table))
        return
    tables = {
        SUMMARY: summary(table).replace("PATH", "recipes/results"),
        FULL: section(table).replace("PATH", "../results"),
    }
    old = {document: (ROOT / document).read_text() for document in tables}
    new = {document: between_markers(document, old[document], each, MARKERS) for document, each in tables.items()}
    if args.check:
        if stale := [document for document in tables if new[document] != old[document]]:
            raise SystemExit(f"{' and '.join(stale)}: not what compose.csv holds; run python -m recipes.compose.report")
        return
    for document, text in new.items():
        (ROOT / document).write_text(text)
    draw(table, RESULTS / "compose.png")
    print(f"{', '.join(tables)} and {RESULTS / 'compose.png'} are written")


if __name__ == "__main__":
    main(sys.argv[1:])
