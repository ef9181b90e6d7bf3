"""From files of results to the tables, pictures and verdict of this folder's README.

    python -m recipes.quality.report outputs/quality/full/results.csv     # one file, or several of different families
    python -m recipes.quality.report                                       # again from recipes/quality/results.csv
    python -m recipes.quality.report --check                               # change nothing; exit status 1 if they differ
    python -m recipes.quality.report outputs/quality/smoke/results.csv --folder outputs/quality/report     # elsewhere

Several files are merged into recipes/quality/results.csv (and results.json beside it), if they answer the same question
(merge.py). Everything between the README's markers is made from that; a part whose figures are missing is left out. Sentences
on why a variant lost, if there are any, are in reasons.json: method -> sentence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.quality import cost, files, methods, pictures, results, tables, verdict
from recipes.quality.merge import merge
from recipes.quality.summary import Summary

HERE = Path(__file__).resolve().parent
RESULTS, README, REASONS = "results.csv", "README.md", "reasons.json"
BLOCKS = ("answer", "results", "sources")


def begin(block: str) -> str:
    return f"<!-- {block}: made by report.py, do not edit -->"


def end(block: str) -> str:
    return f"<!-- end of {block} -->"


# ---------------------------------------------------------------------------------------------- the README's blocks


def run_facts(summary: Summary) -> list[str]:
    """One paragraph: on what, with what, from what the figures come."""
    head, settings, base = summary.header, summary.header["settings"], summary.header["base"]
    text = [
        f"[`{RESULTS}`]({RESULTS}): {head['gpu']}, {head['date']}, commit {head['commit']}, torch {head['torch']}, "
        f"transformers {head['transformers']}, PEFT {head['peft']}.",
        f"The base is a Llama of {base['parameters'] / 1e6:.1f} M parameters ({settings['layers']} layers of width "
        f"{settings['hidden']}), pretrained on {base['tokens'] / 1e6:.1f} M tokens to a held-out loss of "
        f"{base['held_out_loss']:.3f} nats a token.",
        f"Every method is adapted for {settings['steps']:,} steps of {settings['rows']} rows of 256 tokens, "
        f"{100 * settings['task_share']:.0f} % of them tasks, with {_seeds(summary)}.",
    ]
    if settings["size"] != "full":
        text.append(
            f"**The size is '{settings['size']}', which only shows that every step works: its figures mean nothing.**"
        )
    return [" ".join(text), ""]


def _seeds(summary: Summary) -> str:
    count = len(summary.header["settings"]["seeds"])
    return "one seed" if count == 1 else f"{count} seeds; ± is the standard deviation over them"


def answer(summary: Summary, folder: Path) -> list[str]:
    section = verdict.section(summary)
    return ["## The answer", "", *run_facts(summary), *section] if section else []


def results_block(summary: Summary, folder: Path) -> list[str]:
    reasons = read_reasons(folder)
    parts: list[tuple[str, list[str]]] = [
        ("### All methods", tables.all_methods(summary)),
        ("", folded("What each method is", tables.what_each_is(summary))),
        ("", tables.against_the_paper(summary, reasons)),
        ("### Per domain", tables.per_domain(summary)),
        ("", picture("loss_by_domain.png", "Loss per domain and exact match per task, less those of LoRA", summary)),
        ("### Per task: the paper's router and the best variants side by side", tables.per_task(summary)),
        (
            "### What routing depends on",
            picture("experts_by_domain.png", "Experts' share of each domain's tokens", summary),
        ),
        ("", folded("Every method's routing in numbers", tables.routing(summary))),
        ("### Quality against decode cost", tables.decode_cost(summary)),
        ("", picture("quality_by_cost.png", "Loss and exact match over the cost of a decode step", summary)),
        (
            "### Learning rates",
            folded("Every learning rate tried", tables.tuning(summary) + tables.at_the_edge(summary)),
        ),
    ]
    lines = []
    for heading, body in parts:
        if body:
            lines += [heading, "", *body] if heading else body
    return ["## Results", "", *lines] if lines else []


def sources_block(summary: Summary, folder: Path) -> list[str]:
    return [*tables.sources(summary), *folded("Sizes of the data", tables.sizes(summary))]


def folded(title: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""] if lines else []


def picture(name: str, alternative: str, summary: Summary) -> list[str]:
    collect, _ = pictures.PICTURES[name]
    return [f"![{alternative}]({name})", ""] if collect(summary) is not None else []


def read_reasons(folder: Path) -> dict[str, str]:
    """Method -> why it lost; hand-written, may be missing.

    Raises:
        ValueError: it names a method that there is not.
    """
    path = folder / REASONS
    found = files.read_json(path)
    if found is None:
        if path.exists():
            raise ValueError(f"{path} is no JSON: it must hold an object, method -> sentence.")
        return {}
    unknown = sorted(set(found) - set(methods.BY_NAME))
    if unknown:
        raise ValueError(f"{path} names {', '.join(unknown)}, which is no method of methods.py: correct the name.")
    return found


def blocks(found: dict[str, Any] | None, folder: Path) -> dict[str, str]:
    """What stands between the markers; nothing without results."""
    if found is None:
        return dict.fromkeys(BLOCKS, "")
    summary = Summary(found)
    made = {"answer": answer, "results": results_block, "sources": sources_block}
    return {name: "\n".join(made[name](summary, folder)).strip() for name in BLOCKS}


def skeleton() -> str:
    """A README that is nothing but the blocks, for a folder that has none."""
    return "# Quality comparison\n\n" + "\n\n".join(f"{begin(name)}\n{end(name)}" for name in BLOCKS) + "\n"


def into_readme(text: str, made: dict[str, str]) -> str:
    """`text` with every block between its markers.

    Raises:
        ValueError: a marker is not there once.
    """
    for name, body in made.items():
        first, last = begin(name), end(name)
        if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
            raise ValueError(f"{README} needs the lines {first!r} and {last!r}, once each, in this order.")
        before, after = text.split(first)[0], text.split(last)[1]
        text = f"{before}{first}\n{body}\n{last}{after}" if body else f"{before}{first}\n{last}{after}"
    return text


# ------------------------------------------------------------------------------------------------------------- main


def differences(folder: Path) -> list[str]:
    """What in `folder` does not show its results.csv and the decode benchmark's; empty if all is well."""
    path = folder / RESULTS
    found = results.read(path) if path.exists() else None
    text = (folder / README).read_text(encoding="utf-8")
    wrong = [README] if into_readme(text, blocks(found, folder)) != text else []
    for name, (collect, _) in pictures.PICTURES.items():
        data = collect(Summary(found)) if found is not None else None
        if pictures.shown(folder / name) != (None if data is None else pictures.digest(data)):
            wrong.append(name)
    costs = found["header"].get("decode_cost") if found is not None else None
    if costs and cost.is_outdated(costs):
        wrong.append(f"{results.about(path).name} (its costs of decoding)")
    return wrong


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files of results; none: the committed one again")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if something differs")
    parser.add_argument(
        "--folder", type=Path, default=HERE, help="of results.csv, README.md and pictures (default: here)"
    )
    options = parser.parse_args(argv)
    folder: Path = options.folder
    if options.check:
        wrong = differences(folder)
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)} in {folder} do not show {RESULTS} and {cost.DECODE.name}: "
                "run python -m recipes.quality.report"
            )
        return
    found = merge(options.files or [folder / RESULTS])
    found["header"]["decode_cost"] = cost.decode_costs(list(dict.fromkeys(run["method"] for run in found["runs"])))
    path = folder / README
    text = path.read_text(encoding="utf-8") if path.exists() else skeleton()
    new = into_readme(text, blocks(found, folder))  # before anything is written: it can fail
    results.write(folder / RESULTS, found["header"], found["rows"], found["runs"])
    files.write_atomically(folder / README, lambda temporary: temporary.write_text(new, encoding="utf-8"))
    drawn = pictures.draw(Summary(found), folder)
    print(f"{folder}: {RESULTS} ({len(found['rows'])} rows of {len(found['runs'])} runs), {README}, "
          f"{', '.join(path.name for path in drawn)}")  # fmt: skip
    for line in verdict.section(Summary(found)):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
