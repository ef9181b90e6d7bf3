"""`recipes/benchmarks/train_gpu.py` at a size that takes seconds, on a CPU: rows, ratios, what stays in the file."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from peft_loraswitch import LoRASwitchLinear
from recipes.benchmarks import train_gpu as bench
from recipes.benchmarks import train_phases

TINY = (
    "--hidden 128 --intermediate 192 --head-dim 32 --layers 1 --vocab 60 --length 8 --steps 2 --warmup 1 --device cpu"
).split()
FIELDS = ("model", "method", "mode", "experts", "top_k", "rank", "tokens", "ms", "ratio", "host_ms", "times", "gc_ms",
          "peak_gib")  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def run(output: Path, *words: str) -> list[dict]:
    bench.main([*TINY, *words, "--output", str(output)])
    return json.loads(output.read_text())["rows"]


def test_rows_of_two_modes_come_into_one_file(tmp_path, capsys):
    names = ["floor", "lora-4", "dense-3x2", "fused-3x2", "router_only-3x2", "layerwise-3x2"]
    first = run(tmp_path / "out.json", "--modes", "checkpointing", "--rows", *names)
    assert [row["method"] for row in first] == ["floor", "lora", "dense", "fused", "router_only", "layerwise"]
    assert all(field in row for row in first for field in FIELDS) and all(row["ms"] > 0 for row in first)
    assert first[0]["ratio"] == 1 and first[0]["tokens"] == 16 and (first[3]["experts"], first[3]["rank"]) == (3, 2)
    assert all(len(row["times"]) == 2 and 0 < row["host_ms"] <= max(row["times"]) + 0.1 for row in first)
    dense, fused = first[2], first[3]
    assert fused["loss"] == pytest.approx(dense["loss"], abs=2e-2) and fused["adapter_gib"] == dense["adapter_gib"] >= 0
    both = run(tmp_path / "out.json", "--modes", "plain", "--rows", "floor", "fused-3x2")
    assert [row["mode"] for row in both] == ["checkpointing"] * 6 + ["plain"] * 2 and both[-1]["tokens"] == 8
    other = run(tmp_path / "out.json", "--modes", "plain", "--rows", "floor", "--top-k", "1")  # other settings: alone
    assert len(other) == 1
    assert "fused-3x2" in capsys.readouterr().out


def test_both_ways_with_many_experts(tmp_path, capsys):
    """From the same seeds they start alike; each is what its name says."""
    sizes = ["floor", "contracted-6x2k3", "pairs-6x2k3", "pairs-6x2"]
    rows = run(tmp_path / "out.json", "--crossover", "--rows", *sizes)
    assert [(row["method"], row["top_k"]) for row in rows] == [
        ("floor", 0),
        ("pairs", 2),
        ("contracted", 3),
        ("pairs", 3),
    ]
    assert rows[2]["loss"] == pytest.approx(rows[3]["loss"], abs=2e-2)
    assert "pairs-6x2k3" in capsys.readouterr().out
    args = bench.parse(["--crossover"])
    assert args.modes == ["checkpointing"] and args.output.name.startswith("train_crossover_")
    assert {"pairs-128x16k2", "contracted-32x16k1"} < set(args.rows)


def test_a_row_leaves_the_backbone_as_it_was():
    args = bench.parse(TINY)
    model = bench.backbone(args, False)
    before = {name: type(module) for name, module in model.named_modules()}
    for name in ("lora-4", "fused-3x2", "layerwise-3x2"):
        adapted, take_off = bench.adapted(model, bench.Row.of(name), args)
        found = any(isinstance(module, LoRASwitchLinear) for module in adapted.modules())
        assert found == (name == "fused-3x2")
        take_off()
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_garbage_collector_is_timed_within_and_no_longer():
    before = list(gc.callbacks)
    with bench.Collecting() as collecting:
        gc.collect()
    took = collecting.seconds
    gc.collect()
    assert 0 < took == collecting.seconds and gc.callbacks == before


def test_no_row_begins_late(tmp_path, capsys):
    assert run(tmp_path / "out.json", "--modes", "plain", "--rows", "floor", "--seconds", "1e-6") == []
    assert "left out" in capsys.readouterr().err


def test_phases_of_a_step(tmp_path):
    """Their sum is the step; rows that train are measured with one thread, too."""
    path = tmp_path / "phases.json"
    small = ["--hidden", "64", "--intermediate", "128", "--head-dim", "16", "--layers", "1", "--length", "8"]
    small += ["--vocab", "64", "--device", "cpu", "--steps", "2", "--warmup", "1", "--modes", "checkpointing"]
    train_phases.main([*small, "--rows", "floor", "fused-8x8", "--functions", "3", "--quiet", "--output", str(path)])
    floor, fused = json.loads(path.read_text())["rows"]
    assert floor["row"] == "floor" and "one_thread" not in floor and floor["optimizer"] < fused["optimizer"]
    for row in (floor, fused, fused["one_thread"]):
        assert (
            row["step"] > 0
            and abs(sum(row[phase] for phase in train_phases.PHASES[:-1]) - row["step"]) < 0.5 * row["step"]
        )


class Restless:
    """A processor that is disturbed during every second step, or during all of them."""

    def __init__(self, always):
        self.always, self.steps = always, 0

    def seek(self):
        return True

    def is_quiet(self):
        self.steps += 1
        return self.steps % 2 == 0 and not self.always


def test_disturbed_steps_are_taken_again():
    took = iter([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 5.0])
    row = train_phases.measured(lambda: [0.0] * 4 + [next(took)], 0, 3, Restless(always=False))
    assert (row["step"], row["disturbed"], row["kept"]) == (2.0, 3, 0)


def test_where_all_steps_are_disturbed_the_fastest_count():
    took = iter(range(100, 0, -1))
    row = train_phases.measured(lambda: [0.0] * 4 + [float(next(took))], 1, 2, Restless(always=True))
    assert row["kept"] == 2 and row["disturbed"] == 2 * train_phases.MOST_DISTURBED
    assert row["step"] == 88.5  # of 99 to 88
