"""`recipes/benchmarks/cpu_decode.py` at a size that takes seconds: it runs, and reports what it says."""

from __future__ import annotations

import json

import torch

from recipes.benchmarks import cpu_decode as bench


def test_it_measures_and_writes(tmp_path, capsys):
    threads, out = torch.get_num_threads(), tmp_path / "results" / "out.json"
    bench.main(["--tiny", "--rounds", "10", "--ranks", "4", "--threads", "1", "--output", str(out)])
    written = json.loads(out.read_text())
    assert written["header"]["threads"] == 1 and written["header"]["size"] == bench.TINY
    assert [row["case"] for row in written["rows"]] == list(bench.CASES)
    for row in written["rows"]:
        assert row["fused_over_unfused"] > 0 and all(
            row[f"{name}_ms"] > 0 and row[f"{name}_clock_ms"] > 0 for name in bench.METHODS
        )
    assert capsys.readouterr().out.count("fused/unfused") == len(bench.CASES)
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_the_methods_compute_the_same():
    model = bench.build(bench.TINY, 4)
    with torch.no_grad():
        step = bench.step_of(model, 2, 1)
        expected = step().logits
        with model.disable_adapter():
            assert (step().logits - expected).norm() > 0.01 * expected.norm()
        with model.fuse_for_inference() as fusion:
            torch.testing.assert_close(step().logits, expected, rtol=1e-4, atol=1e-4)
        assert fusion.strategy == "fused"
