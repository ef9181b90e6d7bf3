"""The compose tables: the documents show exactly what the committed result holds, and tables say what rows say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from recipes.checkout import ROOT
from recipes.compose import domains, report
from recipes.compose.lab import COLUMNS
from recipes.documents import between_markers


@pytest.fixture
def table(tmp_path: Path) -> report.Table:
    """Two seeds of a few methods; the second router is better, one method lacks a domain."""
    rows = []

    def add(method: str, kind: str, values: tuple[float, float], parameters: int = 0, left_out: str = "") -> None:
        for seed, value in enumerate(values):
            for name in domains.EIGHT:
                if name != left_out:
                    rows.append((method, kind, seed, name, "exact_match", value, parameters))
                    rows.append((method, kind, seed, name, "loss", 1 - value, parameters))

    add("base", "base", (0.0, 0.0))
    add("oracle", "b", (0.5, 0.5))
    add("one_lora", "a", (0.3, 0.5), 1000)
    add("merge_ties", "c", (0.1, 0.1))
    add("merge_linear", "c", (0.05, 0.05))
    add("labels_decay_0", "g", (0.2, 0.2), 80)
    add("labels_decay_0.98", "g", (0.45, 0.47), 80)
    add("trained_decay_0.98", "g", (0.4, 0.4), 80, left_out="arc")
    with (tmp_path / "compose.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    header = {
        "settings": {"test_items": 9, "seeds": [0, 1], "rank": 4}, "base": "a base", "hardware": "a machine",
        "left_out": ["deep-seed0"], "failed": {}, "not_measured": ["something"],
    }  # fmt: skip
    (tmp_path / "compose.json").write_text(json.dumps(header))
    return report.read(tmp_path)


def test_the_documents_show_the_committed_results() -> None:
    if (ROOT / "recipes" / "results" / "compose.csv").exists():
        report.main(["--check"])
    else:  # nothing is shown before it is measured
        for document in (report.SUMMARY, report.FULL):
            text = (ROOT / document).read_text()
            assert between_markers(document, text, "", report.MARKERS).replace("\n\n", "\n") == text.replace(
                "\n\n", "\n"
            )


def test_the_summary_has_the_best_of_each_group_worst_first(table: report.Table) -> None:
    lines = [
        line for line in report.summary(table).splitlines() if line.startswith("| ") and not line.startswith("| |")
    ]
    assert [line.split("|")[1].strip() for line in lines] == ["base", "c", "a", "g", "b"]
    assert "`ties`" in lines[1]
    assert "| 40.0 ± 14.1 | 80 % | 0.600 | 1,000 |" in lines[2]
    assert "**46.0 ± 1.4**" in lines[3] and "`router_decay=0.98`" in lines[3] and "| 92 %" in lines[3]
    assert len(report.summary(table).splitlines()) <= 25


def test_a_method_without_all_domains_has_no_mean(table: report.Table) -> None:
    assert "trained on answers" not in report.section(table)


def test_what_is_missing_is_said(table: report.Table) -> None:
    text = report.section(table)
    assert "`deep-seed0`" in text and "Not measured: something" in text


def test_the_picture_is_drawn(table: report.Table, tmp_path: Path) -> None:
    report.draw(table, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_markers_are_needed() -> None:
    with pytest.raises(SystemExit, match="needs the lines"):
        between_markers("a.md", "no markers", "table", report.MARKERS)
