"""The decode tables: README.md and the benchmarks' README show exactly what the committed result files hold."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from recipes.benchmarks.decode import report
from recipes.checkout import ROOT
from recipes.documents import between_markers

SOURCE = "recipes/results/decode_h200.json"


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads((ROOT / SOURCE).read_text())


def documents() -> dict[str, str]:
    return {name: (ROOT / name).read_text() for name in (report.SUMMARY, report.FULL)}


def test_the_documents_show_the_committed_results():
    report.main(["--check"])


def test_the_readme_keeps_its_commands_and_shows_cost_in_five_rows():
    text = documents()[report.SUMMARY]
    for marker in ("<!-- quickstart command -->", "<!-- test command -->"):
        command = text.split(marker)
        assert len(command) == 2 and command[1].startswith("\n```bash\npython3 -m venv .venv && ")
    begin, end = report.MARKERS
    table = text.split(begin)[1].split(end)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert len(rows) == 5


def test_the_summary_is_a_part_of_the_full_table(result):
    full = report.model_table(result, report.FIRST)
    values = {line.split(" | ")[0]: [cell.strip() for cell in line.strip("| ").split("|")] for line in full}
    for line in report.model_table(result, report.FIRST, report.SUMMARY_LINES, report.SUMMARY_COLUMNS)[2:]:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert cells[0] and all(cell in values[line.split(" | ")[0]] for cell in cells)


def test_every_row_of_the_first_model_is_in_the_table(result):
    table = "\n".join(report.model_table(result, "llama-2-7b"))
    for row in result["rows"]:
        if row["model"] == "llama-2-7b" and row["method"] != "backbone":
            assert f"{row['ratio']:.2f}" in table
    compiled = report.find(result, "llama-2-7b", "backbone", 0, "compiled")
    assert compiled is not None and f"| compiled loop, batch 1 | {compiled['ms']:.2f} ms | **" in table


def test_a_changed_number_is_noticed(result, monkeypatch, tmp_path):
    before = documents()
    changed = copy.deepcopy(result)
    row = report.find(changed, "llama-2-7b", "fused", 8, "compiled")
    assert row is not None
    row["ratio"] += 0.07
    folder = tmp_path / "recipes" / "results"
    folder.mkdir(parents=True)
    (folder / "decode_h200.json").write_text(json.dumps(changed))
    (folder.parent / "benchmarks").mkdir()
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    for source in report.OTHER_GPUS:
        (tmp_path / source).write_text((ROOT / source).read_text())
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(
        SystemExit, match="README.md and recipes/benchmarks/README.md: not what .*decode_h200.json holds"
    ):
        report.main(["--check"])
    assert documents() == before
    report.main([])
    assert all(f"**{row['ratio']:.2f}**" in text for text in documents().values())
    report.main(["--check"])
    (tmp_path / report.FULL).write_text(before[report.FULL])
    with pytest.raises(SystemExit, match="^recipes/benchmarks/README.md: not what"):
        report.main(["--check"])


def test_other_models_stand_side_by_side(result):
    rows = [row for row in result["rows"] if row["model"] == "llama-2-7b"]
    result["rows"] = rows + [{**row, "model": "mistral-7b", "layers": 8} for row in rows]
    table = report.models_table(result, ["mistral-7b", "qwen3-0.6b"])
    assert table[0] == "| fused over backbone | Mistral-7B |" and any(
        "prefill of 2,048 tokens, r = 64" in line for line in table
    )
    assert "Shortened: Mistral-7B with 8 of 32 layers." in report.section(result, SOURCE, {}, {})
    assert not report.models_table(result, ["qwen3-0.6b"])


def test_another_gpu_is_a_sentence_of_its_steady_rows():
    (source,) = report.OTHER_GPUS
    result = json.loads((ROOT / source).read_text())
    sentence = report.other_gpu(result, source)
    assert sentence in documents()[report.FULL]
    rows = [row for row in result["rows"] if row["method"] == "fused" and row["model"] == "llama-2-7b"]
    steady = [row for row in rows if row["spread"] <= 0.5]
    assert sentence.count("(r = ") == len(steady)
    for row in rows:
        row["spread"] = 0.6
    assert "(r = " not in report.other_gpu(result, source)
    assert all(f"{row['ratio']:.2f} (r = {row['rank']})" in sentence for row in steady)


def test_bars_say_what_is_met():
    def row(method: str, rank: int, mode: str, ms: float, peak: float = 12.0) -> dict[str, Any]:
        row = {"model": "llama-2-7b", "layers": 32, "method": method, "rank": rank, "mode": mode, "batch": 1, "ms": ms}
        return {
            **row,
            "ratio": ms / 4,
            "peak_gib": peak,
            "adapted_bytes": 8 * 10**9,
            "adapter_gib": 0.5,
            "fuse_seconds": 0.6,
        }

    rows = [row("backbone", 0, "compiled", 4.0), row("backbone", 0, "graph", 4.0)]
    rows += [row("fused", 8, "compiled", 3.9, 12.6), row("fused", 64, "compiled", 4.4, 13.0)]
    rows += [row("merge", 8, "graph", 8.8)]
    linears = {"llama-2-7b": {"rows": [{"rank": 8, "tokens": 1, "over_read": 1.3, "over_cublas": 0.8}]}}
    result = {"header": {}, "linears": linears, "copy_tb_per_s": 4.0, "rows": rows}
    report.complete(result)
    assert rows[-1]["floor_ms"] == 8.0 and rows[-1]["over_floor"] == 1.1
    assert rows[2]["peak_over_parts"] == 1.008 and rows[3]["peak_over_parts"] == 1.04
    met = {bar["what"]: bar["met"] for bar in report.bars(result)}
    assert met == {
        "compiled, batch 1, r = 8": True, "compiled, batch 1, r = 64": False, "merge over its floor, r = 8": True,
        "peak memory over backbone and adapter, r = 8": True, "peak memory over backbone and adapter, r = 64": False,
        "seconds of fuse_for_inference(), r = 8": True, "linears alone over pure reading, r = 8": False,
        "linears alone over cuBLAS, r = 8": True,
    }  # fmt: skip


def test_markers_that_are_missing_or_swapped_are_named():
    begin, end = report.MARKERS
    for text in ("no markers", end + begin, 2 * (begin + end)):
        with pytest.raises(SystemExit, match="^a.md needs the lines"):
            between_markers("a.md", text, "table", report.MARKERS)


def test_parts_have_a_line_for_each_row_and_the_later_file_counts():
    row = {
        "model": report.FIRST, "method": "fused", "rank": 8, "mode": "graph", "batch": 1, "tokens": 1, "backbone": "nf4",
        "ms": 2.2, "backbone_ms": 2.0, "ratio": 1.1,
    }  # fmt: skip
    others = [
        {**row, "mode": "compiled", "ms": 1.04, "backbone_ms": 1.0, "ratio": 1.04},
        {**row, "mode": "compiled", "batch": 64, "backbone": "bf16", "ratio": 1.07, "over_faster": 1.09},
    ]
    alone = {**others[0], "method": "backbone", "rank": 0, "ms": 1.0, "ratio": 1.0}
    first = {"header": {"commit": "a"}, "rows": [row, *others, alone]}
    later = {"header": {"commit": "b"}, "rows": [{**others[0], "ms": 1.06, "ratio": 1.06}, alone]}
    table, files = report.parts_table({"x": first, "y": later, "z": {"header": {"commit": "c"}, "rows": [alone]}})
    assert files == ["x", "y"]
    assert table[2:] == [
        "| nf4 | graph, batch 1, r = 8 | 2.00 ms | **1.100** |  | a |",
        "| nf4 | compiled, batch 1, r = 8 | 1.00 ms | **1.060** | 1.05, missed | b |",
        "| bf16 | compiled, batch 64, r = 8 | 2.00 ms | **1.090** | 1.06, missed | a |",
    ]
    assert report.parts_table({}) == ([], [])
    table, files = report.parts_table({"x": first, "y": later}, {"rows": [row, others[1]]})
    assert len(table) == 3 and files == ["y"], "what the whole table has is left out"
