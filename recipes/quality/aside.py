"""A table of results that stand in a file of their own: optimizers, or `top_p`.

    python -m recipes.quality.aside outputs/quality/aside.csv

Markdown, a line for each method: means over seeds and their standard deviation, the learning rate that the search found, the mean
number of experts that a token of the domains chose, and milliseconds of a step (other methods ran on the same GPU at that time).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from recipes.quality import methods, results, tables
from recipes.quality.summary import Quantity, Summary

HEADER = ("", "what it is", "held-out loss", "exact match, %", "experts a token", "learning rate", "ms a step", "seeds")


def lines(path: Path) -> list[str]:
    """Of a file of results.

    Raises:
        ValueError: it holds none.
    """
    found = results.read(path)
    summary = Summary(found)
    rows = []
    for name in summary.methods:
        rate = summary.rows[name]["learning_rate"]
        times = [run["ms_per_step"] for run in summary.runs[name] if run["ms_per_step"]]
        experts = summary.spread(name, Quantity("mean_experts", ("domains",)))
        rows.append(
            [
                f"`{name}`",
                methods.EVERY[name].what,
                tables.cell(summary, name, "loss", summary.domains),
                tables.cell(summary, name, "exact_match", summary.tasks),
                f"{experts.mean:.2f}" if experts else "",
                tables.rate(rate) if rate else "",
                f"{statistics.median(times):.0f}" if times else "",
                str(len(summary.values[name])),
            ]
        )
    head, settings = found["header"], found["header"]["settings"]
    first = (
        f"[`{path.name}`]({path.name}): {head['gpu']}, {head['date']}, commit {head['commit']}, torch {head['torch']}; a base of "
        f"{head['base']['parameters'] / 1e6:.1f} M parameters (held-out loss {head['base']['held_out_loss']:.3f}), "
        f"{settings['steps']} steps of {settings['rows']} rows."
    )
    return [first, "", *tables.table(HEADER, rows), *tables.at_the_edge(summary)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of results, .csv")
    for path in parser.parse_args(argv).results:
        print("\n".join(lines(path)))


if __name__ == "__main__":
    main()
