"""From the rows of the decode benchmark to its JSON file, its picture, its bars, and the tables in the documents: five rows in
README.md, all of them in recipes/benchmarks/README.md.

python -m recipes.benchmarks.decode.report            # recipes/results/decode_h200.json into both documents
python -m recipes.benchmarks.decode.report --check    # only compare
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from recipes.benchmarks.decode.bars import BARS, BYTES_SAVED, LINEAR_BARS, Bar
from recipes.benchmarks.decode.plan import FIRST, FUSED, METHODS, PREFILL, SHAPES, Adapter, usual_adapter
from recipes.checkout import ROOT
from recipes.documents import between_markers

Result = dict[str, Any]
Row = dict[str, Any]
SOURCE = "recipes/results/decode_h200.json"
OTHER_GPUS = ("recipes/results/decode_h100.json",)
# Of `--only`; where two have a row, the later one counts.
PARTS = (
    "recipes/results/decode_h200_parts_aaa3520.json",
    "recipes/results/decode_h200_parts.json",
    "recipes/results/decode_h200_parts_452f508.json",
    "recipes/results/decode_h200_parts_2db9912.json",
    "recipes/results/decode_h200_parts_2eca9d4.json",
    "recipes/results/decode_h200_parts_63c9e2a.json",
    "recipes/results/decode_h200_parts_57c5685.json",
    "recipes/results/decode_h200_parts_ba0a8cd.json",
)
NAMES = {
    "llama-2-7b": "Llama-2-7B",
    "mistral-7b": "Mistral-7B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen3-0.6b": "Qwen3-0.6B",
}
MARKERS = ("<!-- decode table: python -m recipes.benchmarks.decode.report -->", "<!-- end of decode table -->")


def line(row: Row) -> str:
    ratio = f"{row['ratio']:.3f}" if row["ratio"] else "     "
    adapter = adapter_of(row)
    kind = "" if adapter == usual_adapter(row["method"]) else str(adapter)
    kind += f" {row['tokens']} tokens" if row["mode"] == "prefill" and row["tokens"] != PREFILL else ""
    kind += f" on {row['backbone']}" if row.get("backbone", "bf16") != "bf16" else ""
    faster = f"  over the faster backbone {row['over_faster']:.3f}" if "over_faster" in row else ""
    return (
        f"{row['model']:13s} {row['method']:9s} r={row['rank']:<3d} {row['mode']:9s} batch {row['batch']:<3d}"
        f"{row['ms']:9.3f} ms  {ratio}  {row['gb_per_s']:6.0f} GB/s{kind}{faster}"
    )


def adapter_of(row: Row) -> Adapter:
    """Of a row, which may be older than the fields that say it."""
    usual = usual_adapter(row["method"])
    mean = row.get("mean_experts")
    return Adapter(
        row.get("experts", usual.experts), row.get("top_k", usual.top_k), row.get("shared_experts", 0),
        None if mean is None else round(mean, 1), row.get("deep_router", False),
    )  # fmt: skip


def find(
    result: Result, model: str, method: str, rank: int, mode: str, batch: int = 1, adapter: Adapter | None = None,
    backbone: str = "bf16", tokens: int = PREFILL,
) -> Row | None:  # fmt: skip
    """The row of a method in a mode, or None if it was not measured.

    Args:
        adapter: None: the method's usual one.
        tokens: of a prefill.
    """
    wanted = (model, method, rank, mode, batch, adapter or usual_adapter(method), backbone)
    for row in result["rows"]:
        what = tuple(row[name] for name in ("model", "method", "rank", "mode", "batch"))
        right_length = mode != "prefill" or row.get("tokens", PREFILL) == tokens
        if (*what, adapter_of(row), row.get("backbone", "bf16")) == wanted and right_length:
            return row
    return None


def of_bar(result: Result, model: str, bar: Bar) -> list[Row]:
    """The rows that a bar speaks of, in its order of modes; without those that were not measured."""
    rows = [
        find(result, model, bar.method, bar.rank, mode, bar.batch, bar.adapter, bar.backbone, bar.tokens)
        for mode in bar.modes
    ]
    return [row for row in rows if row is not None]


# ------------------------------------------------------------------------------------------------------ derived numbers


def complete(result: Result) -> None:
    """Add to the rows what needs two of them: a merge over its floor, a peak over backbone and adapter, and the time over the
    faster of two compiled backbones, where both were measured."""
    for row in result["rows"]:
        where = {"backbone": row.get("backbone", "bf16"), "tokens": row.get("tokens", PREFILL)}
        base, tuned = (
            find(result, row["model"], method, 0, row["mode"], row["batch"], **where)
            for method in ("backbone", "tuned")
        )
        if base is None or row["method"] == "backbone":
            continue
        if tuned is not None and tuned["ratio"] and row["ratio"] and tuned is not row:
            row["over_faster"] = round(row["ratio"] / min(1.0, tuned["ratio"]), 4)
        if row["method"] == "merge" and result["copy_tb_per_s"] and "adapted_bytes" in row:
            floor = base["ms"] + 2 * row["adapted_bytes"] / result["copy_tb_per_s"] / 1e9
            row["floor_ms"], row["over_floor"] = round(floor, 4), round(row["ms"] / floor, 4)
        if "adapter_gib" in row and base["peak_gib"]:
            row["peak_over_parts"] = round(row["peak_gib"] / (base["peak_gib"] + row["adapter_gib"]), 4)


def bars(result: Result) -> list[dict[str, Any]]:
    """Each thing asked for and measured: model, what, value, bar, met."""
    found = []

    def add(model: str, what: str, value: float, bar: float, met: bool) -> None:
        found.append({"model": model, "what": what, "value": value, "bar": bar, "met": met})

    for model, shape in SHAPES.items():
        for bar in BARS:
            if (value := value_of(result, model, bar)) is not None:
                add(model, bar.what, value, bar.bar, value <= bar.bar)
        if (saved := saved_by_fewer(result, model)) is not None:
            add(model, BYTES_SAVED.what, saved, BYTES_SAVED.bar, saved >= BYTES_SAVED.bar)
        linears = result["linears"].get(shape.linears)
        for what, name, most in LINEAR_BARS if linears and any(row["model"] == model for row in result["rows"]) else ():
            value = next((row[name] for row in linears["rows"] if row["rank"] == 8 and row["tokens"] == 1), None)
            if value is not None:
                add(model, what, value, most, value <= most)
    return found


def value_of(result: Result, model: str, bar: Bar) -> float | None:
    """What is compared with the bar. Of several modes the best, over the backbone's best."""
    rows = of_bar(result, model, bar)
    if not rows:
        return None
    if len(bar.modes) == 1:
        value = rows[0].get("over_faster", rows[0]["ratio"]) if bar.field == "ratio" else rows[0].get(bar.field)
        return None if value is None else float(value)
    references = of_bar(result, model, bar._replace(method="backbone", rank=0, adapter=None))
    return round(min(row["ms"] for row in rows) / min(row["ms"] for row in references), 4) if references else None


def saved_by_fewer(result: Result, model: str) -> float | None:
    """Of the time that a row's bytes let expect, how much fewer experts save: (1 - ratio of times) / (1 - ratio of bytes)."""
    fewer = next(iter(of_bar(result, model, BYTES_SAVED)), None)
    all_of_them = next(iter(of_bar(result, model, BYTES_SAVED._replace(adapter=None))), None)
    if not fewer or not all_of_them or not fewer["ratio"] or not all_of_them["ratio"]:
        return None
    read = fewer["read_bytes"] / all_of_them["read_bytes"]
    return round((1 - fewer["ratio"] / all_of_them["ratio"]) / (1 - read), 4)


# --------------------------------------------------------------------------------------------------------------- files


def write(result: Result, path: Path) -> None:
    """The result as JSON, all of it or nothing."""
    complete(result)
    result["bars"] = bars(result)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, path)


def merge(parts: list[Result], missing: list[str]) -> Result:
    """One result of several, each of other models on a GPU of the same kind.

    Raises:
        SystemExit: the GPUs or the versions differ, so that rows cannot be compared; or there is no part.
    """
    if not parts:
        raise SystemExit(f"No device wrote a result: {'; '.join(missing)}")
    same = ("gpu", "driver", "torch", "transformers", "peft", "kernels", "commit")
    for part in parts[1:]:
        differ = [name for name in same if part["header"].get(name) != parts[0]["header"].get(name)]
        if differ:
            raise SystemExit(
                f"The devices differ in {', '.join(differ)}: run them one by one, into files of their own."
            )
    header = {**parts[0]["header"], "devices": len(parts)}
    header["missing"] = [text for part in parts for text in part["header"]["missing"]] + missing
    rows = [row for model in SHAPES for part in parts for row in part["rows"] if row["model"] == model]
    rates = sorted(part["copy_tb_per_s"] for part in parts if part["copy_tb_per_s"])
    result: Result = {
        "header": header,
        "linears": {},
        "copy_tb_per_s": rates[len(rates) // 2] if rates else None,
        "rows": rows,
    }
    for part in parts:
        result["linears"].update(part["linears"])
        if "profile" in part:
            result.setdefault("profile", {}).update(part["profile"])
    return result


def draw(result: Result, path: Path) -> str:
    """The first model's compiled loop at batch 1 as bars, to `path`. Returns a line about it."""
    model = next((name for name in (FIRST, *SHAPES) if find(result, name, "backbone", 0, "compiled")), None)
    rows = [r for r in result["rows"] if (r["model"], r["mode"], r["batch"]) == (model, "compiled", 1) and r["ratio"]]
    if not rows:
        return "no picture: nothing was measured in the compiled loop with batch 1"
    try:
        import matplotlib
    except ImportError as error:
        return f"no picture: {error}"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows.sort(key=lambda r: -r["ratio"])
    labels = [METHODS[r["method"]] + (f", r = {r['rank']}" if r["rank"] else "") for r in rows]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    bars = axes.barh(
        labels, [r["ratio"] for r in rows], color=["#4477aa" if r["method"] in FUSED else "#bbbbbb" for r in rows]
    )
    axes.axvline(1.0, color="black", linewidth=0.8)
    for bar, row in zip(bars, rows, strict=True):  # inside, where no line crosses it
        text, middle = f"{row['ratio']:.2f}x, {row['ms']:.2f} ms ", bar.get_y() + bar.get_height() / 2
        at = min(row["ratio"], 1.0) if row["ratio"] < 1.2 else row["ratio"]
        axes.text(at, middle, text, ha="right", va="center", color="white" if row["method"] in FUSED else "black")
    axes.set_xlim(0, max(r["ratio"] for r in rows) * 1.05)
    axes.set_xlabel("time of a decode step over the unadapted backbone's")
    title = f"{NAMES[rows[0]['model']]} shape, batch 1, compiled, bf16, {result['header']['gpu']}"
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"picture: {path}"


# ------------------------------------------------------------------------------------------------ tables of the documents

SUMMARY, FULL = "README.md", "recipes/benchmarks/README.md"

# label, mode, batch
LINES = (
    ("compiled loop, batch 1", "compiled", 1),
    ("compiled loop, batch 8", "compiled", 8),
    ("compiled loop, batch 32", "compiled", 32),
    ('`generate(cache_implementation="static")`', "static", 1),
    ("eager `generate`", "eager", 1),
    ("prefill of 2,048 tokens", "prefill", 1),
    ("one captured CUDA graph", "graph", 1),
)
COLUMNS = (
    ("**fused, r = 8**", "fused", 8), ("**r = 16**", "fused", 16), ("**r = 64**", "fused", 64),
    ("our kernels, no adapter", "kernels", 0), ("PEFT LoRA, r = 16", "lora", 16), ("routing in plain PyTorch, r = 8", "torch", 8),
    ("merge per token, r = 8", "merge", 8), ("experts of LoRAs, router with context, r = 8", "imported", 8),
)  # fmt: skip
SUMMARY_LINES = tuple(line for line in LINES if line[1:] not in (("compiled", 8), ("graph", 1)))
SUMMARY_COLUMNS = tuple(column for column in COLUMNS if column[1] in ("fused", "lora"))


STEADY = 0.5  # (longest - shortest) / median of a row's samples


def cell(row: Row | None) -> str:
    if row is None or not row["ratio"]:
        return ""
    return f"**{row['ratio']:.2f}**" if row["method"] == "fused" else f"{row['ratio']:.2f}"


def model_table(result: Result, model: str, lines: Any = LINES, columns: Any = COLUMNS) -> list[str]:
    """One model's rows: a line for each mode, a column for each method; those without a value are left out."""
    columns = [c for c in columns if any(find(result, model, c[1], c[2], mode, batch) for _, mode, batch in lines)]
    lines = [(label, mode, batch) for label, mode, batch in lines if find(result, model, "backbone", 0, mode, batch)]
    lines = [x for x in lines if any(find(result, model, c[1], c[2], x[1], x[2]) for c in columns)]
    if not lines:
        return []
    table = ["| | backbone | " + " | ".join(label for label, _, _ in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for label, mode, batch in lines:
        base = find(result, model, "backbone", 0, mode, batch)
        assert base is not None
        cells = [cell(find(result, model, method, rank, mode, batch)) for _, method, rank in columns]
        table.append(f"| {label} | {base['ms']:.2f} ms | " + " | ".join(cells) + " |")
    return table


def models_table(result: Result, models: list[str]) -> list[str]:
    """The other models: fused over backbone, a line for each mode and rank, a column for each model."""
    models = [model for model in models if any(row["model"] == model for row in result["rows"])]
    if not models:
        return []
    table = [
        "| fused over backbone | " + " | ".join(NAMES[model] for model in models) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    for label, mode, batch in LINES:
        for rank in (8, 16, 64):
            rows = [find(result, model, "fused", rank, mode, batch) for model in models]
            if any(rows):
                table.append(f"| {label}, r = {rank} | " + " | ".join(cell(row) for row in rows) + " |")
    return table


def caption(result: Result, source: str, document: str) -> list[str]:
    """What the numbers are, and the command and the file that they come from."""
    head = result["header"]
    versions = f"torch {head['torch'].split('+')[0]}, transformers {head['transformers']}"
    return [
        "Time of one decode step (of one forward, for prefill), divided by the time of the backbone without an adapter",
        f"in the same mode of the same run: {NAMES[FIRST]} shape, random bf16 weights, {head['num_experts']} experts, "
        f"top-{head['top_k']}, all seven linears of each layer, one {head['gpu']}, {versions}",
        f"([`{source}`]({link(source, document)}), made by `python -m recipes.benchmarks.decode`).",
    ]


def link(path: str, document: str) -> str:
    """A path of the repository, as a link from a document."""
    return Path(os.path.relpath(path, Path(document).parent)).as_posix()


def summary(result: Result, source: str) -> str:
    """What stands between the markers of the root README: the first model's most common cases."""
    return "\n".join(
        [*caption(result, source, SUMMARY), "", *model_table(result, FIRST, SUMMARY_LINES, SUMMARY_COLUMNS)]
    )


def described(row: Row) -> str:
    """What a row measures, its time apart."""
    mode = f"{row['mode']}, batch {row['batch']}" if row["mode"] != "prefill" else f"prefill of {row['tokens']} tokens"
    adapter = adapter_of(row)
    kind = "" if adapter == usual_adapter(row["method"]) else f",{adapter}"
    kind += ", `join_weights=True`" if row["method"] == "joined" else ""
    return f"{row.get('backbone', 'bf16')} | {mode}, r = {row['rank']}{kind}"


def parts_table(parts: dict[str, Result], whole: Result | None = None) -> tuple[list[str], list[str]]:
    """What `--only` has measured: a line for each fused row of the first model that the whole table has not, with the bar that
    speaks of it alone; and the files that the lines are of."""
    shown = {described(row) for row in whole["rows"] if row["model"] == FIRST} if whole else set()
    asked = {}
    for part in parts.values():
        for bar in BARS:
            value = value_of(part, FIRST, bar) if bar.field == "ratio" else None
            if value is not None:
                best = min(of_bar(part, FIRST, bar), key=lambda row: row["ms"])
                asked[id(best)] = f"{bar.bar:.2f}, {'met' if value <= bar.bar else 'missed'}"
    lines, files = {}, {}
    for path, part in parts.items():
        for row in part["rows"]:
            counts = row["model"] == FIRST and row["method"] in ("fused", "joined") and row["ratio"]
            if counts and described(row) not in shown:
                value, bar = row.get("over_faster", row["ratio"]), asked.get(id(row), "")
                cells = f"{row['backbone_ms']:.2f} ms | **{value:.3f}** | {bar} | {part['header']['commit']}"
                lines[described(row)], files[described(row)] = f"| {described(row)} | {cells} |", path
    if not lines:
        return [], []
    head = ["| weights | | backbone | **fused over it** | bar | commit |", "|---" * 6 + "|"]
    return [*head, *lines.values()], [path for path in parts if path in files.values()]


def section(result: Result, source: str, others: dict[str, Result], parts: dict[str, Result]) -> str:
    """What stands between the markers of the benchmarks' README: all rows, the other models, parts, and runs on other GPUs."""
    picture = link(Path(source).with_suffix(".png").as_posix(), FULL)
    text = [*caption(result, source, FULL), "", *model_table(result, FIRST), ""]
    text += [f"![Decode step over the unadapted backbone's, by method]({picture})", ""]
    if models := models_table(result, [model for model in SHAPES if model != FIRST]):
        text += [*models, ""]
    table, paths = parts_table(parts, result)
    if table:
        files = ", ".join(f"[`{Path(path).stem}`]({link(path, FULL)})" for path in paths)
        gpu = next(iter(parts.values()))["header"]["gpu"]
        text += [
            f"Parts, by `--only`, each row from the newest run that has it, on one {gpu} ({files}):",
            "",
            *table,
            "",
        ]
    text += [f"- {fact}" for fact in facts(result)]
    text += [f"- {other_gpu(other, path)}" for path, other in others.items()]
    return "\n".join(text).strip()


def facts(result: Result) -> list[str]:
    """Sentences below the tables."""
    head, text = result["header"], []
    prefill = find(result, FIRST, "kernels", 0, "prefill")
    if kernels := find(result, FIRST, "kernels", 0, "compiled"):
        text.append(
            f"Our kernels without an adapter take {kernels['ratio']:.2f} of the backbone's time in the compiled loop"
            + (f" and {prefill['ratio']:.2f} in the prefill" if prefill else "")
            + ": this part of the difference comes from other GEMM kernels than cuBLAS's, not from the adapter."
        )
    if (merged := find(result, FIRST, "merge", 8, "graph")) and merged.get("over_floor"):
        text.append(
            f"Merging per token takes {merged['over_floor']:.2f} of its lower bound, which is one step of the backbone plus the "
            "time to read and write every adapted weight once."
        )
    if fused := find(result, FIRST, "fused", 8, "compiled"):
        if fused.get("peak_over_parts"):
            text.append(
                f"Peak memory is {fused['peak_over_parts']:.2f} of the backbone's and the adapter's sizes together."
            )
        text.append(f"`fuse_for_inference()` takes {fused['fuse_seconds']:.1f} s.")
    if linears := result["linears"].get(FIRST):
        row = next(r for r in linears["rows"] if r["rank"] == 8 and r["tokens"] == 1)
        text.append(
            f"The linears alone in one CUDA graph, one token, r = 8: {row['over_read']:.2f} of the time that only reading "
            f"the same bytes takes, {row['over_cublas']:.2f} of cuBLAS without an adapter."
        )
    layers = {row["model"]: row["layers"] for row in result["rows"]}
    short = [f"{NAMES[m]} with {n} of {SHAPES[m].layers} layers" for m, n in layers.items() if n != SHAPES[m].layers]
    if short:
        text.append(f"Shortened: {', '.join(short)}.")
    text += head.get("notes", [])
    if head.get("missing"):
        text.append(f"Not measured in that run: {len(head['missing'])} rows, named in the file's header.")
    return text


def other_gpu(result: Result, source: str) -> str:
    """A sentence on the first model on another GPU; rows whose samples differ by more than half of their median are left out."""
    found = []
    for label, mode, batch in LINES:
        rows = [find(result, FIRST, "backbone", 0, mode, batch)]
        rows += [find(result, FIRST, "fused", rank, mode, batch) for rank in (8, 16, 64)]
        if rows[0] and rows[0]["spread"] <= STEADY:
            ratios = [f"{row['ratio']:.2f} (r = {row['rank']})" for row in rows[1:] if row and row["spread"] <= STEADY]
            found += [f"{label}: {', '.join(ratios)}"] if ratios else []
    head = result["header"]
    return (
        f"Fused over backbone on one {head['gpu']}, commit {head['commit']} ([`{source}`]({link(source, FULL)}); rows whose "
        f"samples differ by more than half of their median are left out): {'; '.join(found)}."
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=SOURCE, help="result file, relative to the repository")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a document differs")
    args = parser.parse_args(argv)
    result = json.loads((ROOT / args.source).read_text())
    others = {path: json.loads((ROOT / path).read_text()) for path in OTHER_GPUS if (ROOT / path).exists()}
    parts = {path: json.loads((ROOT / path).read_text()) for path in PARTS if (ROOT / path).exists()}
    tables = {SUMMARY: summary(result, args.source), FULL: section(result, args.source, others, parts)}
    old = {document: (ROOT / document).read_text() for document in tables}
    new = {document: between_markers(document, old[document], table, MARKERS) for document, table in tables.items()}
    if args.check:
        if stale := [document for document in tables if new[document] != old[document]]:
            raise SystemExit(
                f"{' and '.join(stale)}: not what {args.source} holds; run python -m recipes.benchmarks.decode.report"
            )
        return
    for document, text in new.items():
        (ROOT / document).write_text(text)
    print(draw(result, (ROOT / args.source).with_suffix(".png")))


if __name__ == "__main__":
    main(sys.argv[1:])
