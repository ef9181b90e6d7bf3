"""`recipes/benchmarks/one_pass.py` at a size that takes seconds: it runs, and its contestants have the same losses."""

from __future__ import annotations

import json

import pytest

from recipes.benchmarks import one_pass as bench


def test_it_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "results" / "out.json"
    words = "--experts 2 --rank 2 --batch 2 --length 6 --steps 3 --warmup 1 --rounds 2"
    report = bench.main([*words.split(), "--output", str(out)])
    assert json.loads(out.read_text()) == report
    assert report["header"]["torch"] and report["header"]["cpu"] and report["header"]["commit"]
    assert set(report["results"]) == set(bench.CONTESTANTS)
    for row in report["results"].values():
        assert row["largest_relative_difference_of_a_loss"] < 1e-5
        assert len(row["last_losses"]) == 2 and len(set(row["last_losses"])) == 2
        assert len(row["seconds"]) == 2 and row["times_as_fast"] > 0
    assert "one pass" in capsys.readouterr().out


def test_refused():
    with pytest.raises(SystemExit):
        bench.parse(["--steps", "2", "--warmup", "2"])
