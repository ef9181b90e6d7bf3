"""`recipes/benchmarks/train.py` at a size that takes seconds: it runs, reports what it says, and refuses wrong outputs."""

from __future__ import annotations

import json

import pytest
import torch

from recipes.benchmarks import train as bench

TINY = "--hidden 64 --intermediate 96 --layers 1 --vocab 50 --length 9 --experts 3 --rank 2 --rounds 3".split()


def test_it_measures_and_writes(tmp_path, capsys):
    report = bench.main([*TINY, "--output", str(tmp_path / "results" / "out.json")])
    assert json.loads((tmp_path / "results" / "out.json").read_text()) == report
    header, results = report["header"], report["results"]
    assert (
        header["adapted_linears"] == 7 and header["torch"] == torch.__version__ and header["cpu"] and header["commit"]
    )
    assert header["one_expert_against_lora"] < 1e-6
    assert (results["forward"]["baseline"], results["forward"]["bar"]) == ("backbone", 1.25)
    assert (results["training_step"]["baseline"], results["training_step"]["bar"]) == ("LoRA r=6", 0.95)
    for result in results.values():
        assert result["contestants"][result["baseline"]]["ratio"] == 1
        assert all(row["median_seconds"] > 0 for row in result["contestants"].values())
        assert result["rounds"] == 3
    printed = capsys.readouterr().out
    assert "forward: " in printed and "training_step: " in printed and "the bar of 0.95" in printed


def test_ratios_are_taken_within_rounds():
    """A machine that gets twice as slow half-way does not move the result."""
    wall = {"base": [1.0, 1.0, 2.0, 2.0, 2.0], "other": [1.1, 1.2, 2.2, 2.4, 2.2]}
    times = {name: [(value, 3.0 if name == "other" else 2.0) for value in values] for name, values in wall.items()}
    row = bench.compare(times, "base", 1.1)["contestants"]["other"]
    assert row["ratio"] == pytest.approx(1.1) and row["median_seconds"] == 2.2 and row["cpu_time_ratio"] == 1.5
    one_round = bench.compare({"base": [(1.0, 1.0)], "other": [(3.0, 1.0)]}, "base", 1.1)
    assert one_round["contestants"]["other"]["ratio"] == 3


def test_turns_alternate_and_warm_up_is_not_counted():
    order = []
    contestants = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench.take_turns(contestants, rounds=3, warmup=1)
    assert "".join(order) in ("abbaabba", "baabbaab") and all(len(values) == 3 for values in times.values())


def test_both_train_the_same_number_of_expert_weights():
    args = bench.parse(TINY)
    counts = []
    for model in (bench.switch(args), bench.lora(args)):
        counts.append(sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "router" not in n))
    assert counts[0] == counts[1] > 0


def test_wrong_outputs_are_not_timed(monkeypatch):
    args = bench.parse(TINY)
    wrong = bench.lora

    def other_weights(args):
        model = wrong(args)
        model.get_base_model().model.norm.weight.data *= 1.01
        return model

    monkeypatch.setattr(bench, "lora", other_weights)
    with pytest.raises(SystemExit, match="Nothing was timed"):
        bench.check_outputs(args, torch.zeros((1, 4), dtype=torch.int64))
