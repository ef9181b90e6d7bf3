"""The three pictures. Each is drawn from a plain dictionary, whose checksum goes into the file, so that a test can tell whether
a picture shows the results that lie beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.quality import files
from recipes.quality.summary import LAYER_WISE, LORA, PAPER, Quantity, Summary

Data = dict[str, Any]
# the same in every picture: text, colour, marker
STYLES = {
    "lora-r16": ("LoRA, the active rank", "#ccbb44", "^"),
    LORA: ("LoRA, equal parameters", "#4477aa", "o"),
    LAYER_WISE: ("layer-wise routing", "#ee6677", "s"),
    PAPER: ("LoRA-Switch, paper's router", "#228833", "D"),
    "variant": ("LoRA-Switch, other routers", "#aa3377", "v"),
    "second": ("", "#66ccee", "P"),
}
DIGEST = "Description"  # the field of the PNG that holds the checksum


def _title(name: str) -> str:
    known = {PAPER: "paper's router", LAYER_WISE: "layer-wise routing", LORA: "LoRA, equal parameters"}
    return f"{name} ({known[name]})" if name in known else name


# -------------------------------------------------------------------------------------------------- what is drawn


def loss_by_domain(summary: Summary) -> Data | None:
    """Differences to the LoRA of equal parameters, seed by seed: mean and spread, per domain and per task."""
    shown = [name for name in ("lora-r16", *summary.highlights()) if name != LORA and name in summary.methods]
    found: Data = {"loss": {}, "exact_match": {}}
    for metric, names in (("loss", summary.domains), ("exact_match", summary.tasks)):
        factor = 100 if metric == "exact_match" else 1
        for method in shown:
            for name in names:
                spread = summary.difference(method, LORA, Quantity(metric, (name,)))
                if spread is not None:
                    sd = None if spread.sd is None else factor * spread.sd
                    found[metric].setdefault(method, {})[name] = (factor * spread.mean, sd)
    return found if found["loss"] else None


def expert_use(summary: Summary) -> Data | None:
    """Load per domain and expert, of the first seed (another seed numbers its experts otherwise)."""
    shown = [name for name in (PAPER, summary.best_at_paper_rank(), summary.best()) if name is not None]
    found: Data = {}
    for method in dict.fromkeys(shown):
        seeds = sorted(summary.values.get(method, {}))
        if not seeds:
            continue
        values = summary.values[method][seeds[0]]
        loads = {
            name: [values[name, f"load_{expert}"] for expert in range(64) if (name, f"load_{expert}") in values]
            for name in summary.domains
        }
        if all(loads.values()):
            found[method] = {
                "seed": seeds[0], "loads": loads,
                "mi": values.get(("domains", "mi_domain")), "context": values.get(("domains", "context_information")),
            }  # fmt: skip
    return found or None


def quality_by_cost(summary: Summary) -> Data | None:
    """Per method: computed and measured decode step (percent over the backbone), loss and exact match."""
    cost = summary.header.get("decode_cost")
    if not cost:
        return None
    found: Data = {"gpu": cost["gpu"], "launch_us": cost["launch_us"], "methods": {}, "base": {}}
    for method in summary.methods:
        each = cost["methods"].get(method)
        loss, match = summary.spread(method, summary.loss), summary.spread(method, summary.exact_match)
        if each is None or loss is None or match is None:
            continue
        point = {
            "loss": (loss.mean, loss.sd),
            "exact_match": (100 * match.mean, None if match.sd is None else 100 * match.sd),
        }
        if method == "base":
            found["base"] = point
            continue
        point["computed"] = 100 * (each["computed"] - 1)
        if "measured" in each:
            point["measured"] = 100 * (each["measured"] - 1)
        group = method if method in (LORA, LAYER_WISE, PAPER, "lora-r16") else "variant"
        found["methods"][method] = {**point, "group": group, "best": method == summary.best()}
    return found if found["methods"] else None


# ------------------------------------------------------------------------------------------------------- drawing


def draw_loss_by_domain(plt: Any, data: Data) -> Any:
    names = {metric: list(dict.fromkeys(n for of in data[metric].values() for n in of)) for metric in data}
    panels = [metric for metric in ("loss", "exact_match") if names[metric]]
    tallest = max(len(names[metric]) for metric in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 1.9 + 0.5 * tallest), squeeze=False)
    methods = list(data["loss"])
    other = iter(("variant", "second"))
    styles = {
        name: STYLES[name] if name in STYLES else (f"LoRA-Switch, {name}", *STYLES[next(other)][1:]) for name in methods
    }
    for metric, axis in zip(panels, axes[0], strict=True):
        for index, method in enumerate(methods):
            text, colour, marker = styles[method]
            points = [
                (place, *data[metric][method][n]) for place, n in enumerate(names[metric]) if n in data[metric][method]
            ]
            offset = 0.64 * ((index + 0.5) / len(methods) - 0.5)
            axis.errorbar(
                [mean for _, mean, _ in points], [place + offset for place, _, _ in points],
                xerr=[0 if sd is None else sd for _, _, sd in points],
                fmt=marker, color=colour, markersize=5, elinewidth=1.2, capsize=2, label=text,
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.9)
        for place in range(1, len(names[metric])):
            axis.axhline(place - 0.5, color="#dddddd", linewidth=0.7)
        axis.set_yticks(range(len(names[metric])), names[metric])
        axis.set_ylim(len(names[metric]) - 0.5, -0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel(
            "held-out loss less LoRA's, nats a token (left is better)" if metric == "loss"
            else "exact match less LoRA's, points (right is better)"
        )  # fmt: skip
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(
        "Against LoRA of equal parameters, per domain and task: mean and sd of the seeds' differences", fontsize=10
    )
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    return figure


def draw_expert_use(plt: Any, data: Data) -> Any:
    widths = [max(3.0, 0.36 * len(next(iter(each["loads"].values())))) for each in data.values()]
    domains = len(next(iter(data.values()))["loads"])
    figure, axes = plt.subplots(
        1, len(data), figsize=(1.8 + 1.25 * sum(widths), 1.5 + 0.36 * domains), squeeze=False, sharey=True,
        gridspec_kw={"width_ratios": widths}, layout="constrained",
    )  # fmt: skip
    # The colour is the share over an even share: 1 everywhere if experts are used evenly, whatever their number.
    top = max(len(load) * max(load) for each in data.values() for load in each["loads"].values())
    image = None
    for axis, (method, each) in zip(axes[0], data.items(), strict=True):
        loads = list(each["loads"].values())
        relative = [[len(load) * share for share in load] for load in loads]
        image = axis.imshow(relative, cmap="viridis", vmin=0, vmax=max(2.0, top), aspect="auto")
        if len(loads[0]) <= 16:
            for y, load in enumerate(loads):
                for x, share in enumerate(load):
                    colour = "black" if relative[y][x] > 0.6 * max(2.0, top) else "white"
                    axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(loads[0])))
        axis.tick_params(labelsize=8)
        axis.set_yticks(range(domains), list(each["loads"]))
        axis.set_xlabel("expert")
        facts = [
            f"{text} {each[name]:.2f}"
            for name, text in (("mi", "MI"), ("context", "context"))
            if each[name] is not None
        ]
        axis.set_title(f"{_title(method)}\n" + ", ".join(facts) + " nats", fontsize=9)
    figure.colorbar(image, ax=list(axes[0]), label="use over an even share", fraction=0.05, pad=0.02)
    figure.suptitle("Share of each domain's picks that an expert gets, in % (first seed)", fontsize=10)
    return figure


def draw_quality_by_cost(plt: Any, data: Data) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 6.4))
    for axis, metric in zip(axes, ("loss", "exact_match"), strict=True):
        seen: set[str] = set()
        placed = []
        for method, each in data["methods"].items():
            text, colour, marker = STYLES[each["group"]]
            mean, sd = each[metric]
            if "measured" in each:
                axis.plot(
                    [each["computed"], each["measured"]], [mean, mean], color=colour, linewidth=0.8, linestyle=":"
                )
                axis.plot(each["measured"], mean, marker=marker, color=colour, markersize=8, linestyle="none")
            axis.errorbar(
                each["computed"], mean, yerr=sd or 0, fmt=marker, color=colour, markerfacecolor="white", markersize=8,
                elinewidth=1, capsize=2, label=None if text in seen else text,
            )  # fmt: skip
            seen.add(text)
            placed.append((each["computed"], mean, method + (" (best)" if each["best"] else "")))
        highest = max(max(each["computed"], each.get("measured", 0)) for each in data["methods"].values())
        axis.set_xscale("symlog", linthresh=1, linscale=1.2)
        lowest = min([0.0, *(each.get("measured", 0.0) for each in data["methods"].values())])
        axis.set_xlim(1.4 * lowest if lowest < 0 else 0, 1.8 * highest)
        ticks = [x for x in (-10, -5, -2, -1, 0, 0.5, 1, 2, 5, 10, 20, 50, 100) if 1.4 * lowest <= x <= 1.8 * highest]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        spreads = [each[metric] for each in data["methods"].values()]
        values = [mean + sign * (sd or 0) for mean, sd in spreads for sign in (-1, 1)]
        room = 0.08 * (max(values) - min(values) or 1)
        axis.set_ylim(min(values) - room, max(values) + room)
        if metric == "loss":
            axis.invert_yaxis()
        _label(
            axis,
            placed,
            [(each["measured"], each[metric][0]) for each in data["methods"].values() if "measured" in each],
        )
        axis.grid(axis="y", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("decode step over the backbone's, %: hollow computed, filled measured")
        axis.set_ylabel(
            "held-out loss, mean of domains (up is better)" if metric == "loss" else "exact match, mean of tasks, %"
        )
        if data["base"]:
            mean = data["base"][metric][0]
            figures = f"{mean:.3f}" if metric == "loss" else f"{mean:.1f} %"
            axis.set_title(f"base without adapter: {figures}", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle("Quality against the cost of decoding (Llama-2-7B shape, batch 1, bf16)", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _label(axis: Any, placed: list[tuple[float, float, str]], others: list[tuple[float, float]]) -> None:
    """Names beside the points; one that would cover a point or another name moves up or down, with a line to its point.

    Args:
        placed: x, y and name of each point.
        others: x and y of points without a name.
    """
    figure = axis.figure
    figure.canvas.draw()
    unit = figure.dpi / 100
    points = sorted(((*axis.transData.transform(each[:2]), *each) for each in placed), key=lambda each: -each[1])
    drawn = [(x, y) for x, y, *_ in points] + [tuple(axis.transData.transform(each)) for each in others]
    taken = [(x - 6 * unit, x + 6 * unit, y) for x, y in drawn]  # left, right, middle of what is there, in pixels

    def free(left: float, right: float, middle: float) -> bool:
        return not any(left < b and right > a and abs(middle - y) < 12 * unit for a, b, y in taken)

    for x, y, *point, text in points:
        width = 6 * len(text) * unit
        moves = sorted(range(-60, 61, 2), key=abs)
        spots = [(abs(move) + 5 * left, x - 9 * unit - width if left else x + 9 * unit, y + move * unit, left)
                 for left in (False, True) for move in moves]  # fmt: skip
        axis_left = axis.transAxes.transform((0, 0))[0]
        open_spots = [each for each in spots if each[1] > axis_left and free(each[1], each[1] + width, each[2])]
        _, start, middle, left = min(open_spots or spots[:1])
        taken.append((start, start + width, middle))
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#999999", "shrinkB": 3, "relpos": (float(left), 0.5)}
        axis.annotate(
            text, point, xytext=axis.transData.inverted().transform((start + left * width, middle)), textcoords="data",
            fontsize=7.5, va="center", ha="right" if left else "left", arrowprops=line if abs(middle - y) > 3 * unit else None,
        )  # fmt: skip


PICTURES: dict[str, tuple[Callable[[Summary], Data | None], Callable[[Any, Data], Any]]] = {
    "loss_by_domain.png": (loss_by_domain, draw_loss_by_domain),
    "experts_by_domain.png": (expert_use, draw_expert_use),
    "quality_by_cost.png": (quality_by_cost, draw_quality_by_cost),
}


def digest(data: Data) -> str:
    return files.digest(data)


def shown(path: Path) -> str | None:
    """The checksum of the data that a picture was drawn from; None if it is not there or has none."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(DIGEST)


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Write every picture whose data is there, remove those whose data is not; return the written ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name, (collect, paint) in PICTURES.items():
        data = collect(summary)
        path = folder / name
        if data is None:
            path.unlink(missing_ok=True)
            continue
        figure = paint(plt, data)
        files.write_atomically(path, lambda temporary, f=figure, d=data: f.savefig(  # type: ignore[misc]
            temporary, format="png", dpi=130, metadata={DIGEST: digest(d)}
        ))  # fmt: skip
        plt.close(figure)
        written.append(path)
    return written
