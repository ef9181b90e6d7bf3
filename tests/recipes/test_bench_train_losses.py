"""`recipes/benchmarks/train_losses.py` and `train_host*.py` at sizes that take seconds, on a CPU."""

from __future__ import annotations

import csv
import json

import pytest
from torch import Tensor

from peft_loraswitch.training import pair_kernels, pair_products, triton_launch
from recipes.benchmarks import train_host, train_host_pairs, train_host_plain, train_losses

TINY = "--hidden 64 --intermediate 96 --head-dim 16 --layers 2 --length 16 --batch 2 --device cpu".split()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def test_losses_of_all_runs_lie_on_one_another(tmp_path, capsys):
    losses = train_losses.main([*TINY, "--steps", "6", "--lr", "3e-3", "--output", str(tmp_path / "out.csv")])
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 6 and set(rows[0]) == {"step", *train_losses.RUNS}
    assert [float(row["fused"]) for row in rows] == pytest.approx(losses["fused"], abs=1e-5)
    assert losses["fused"] == pytest.approx(losses["plain"], abs=0.02)
    assert losses["float32"] == pytest.approx(losses["plain"], abs=0.05)
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "from plain" in capsys.readouterr().out


def test_every_step_has_a_batch_of_its_own():
    made = train_losses.batches(5, 2, 7)
    assert (
        made.shape == (5, 2, 7) and made.max() < 256 and len({tuple(batch.flatten().tolist()) for batch in made}) == 5
    )


def test_host_time_of_a_group_call(tmp_path):
    train_host.main(["--layers", "3", "--rounds", "3", "--output", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["calls"] > 20 and report["ops"] > 20 and "aten._foreach_copy_.default" in report["dispatched"]
    assert report["fused_us"] == pytest.approx(report["torch_us"] + report["beyond_us"], abs=0.1)


def test_host_time_of_a_group_call_by_pairs():
    """A launch of A and two of B (two experts a token) in each of two forwards, but for B in the last group's second; five in
    backward. With all experts at once one of the gates each time. Both cast in either forward."""
    before = {name: getattr(pair_kernels, name, None) for name in ("_launch_to_rank", "_launch_from_rank")}
    rows = train_host_pairs.main(["--layers", "3", "--rounds", "3"])
    assert rows["pairs"]["launches"] == pytest.approx((3 * (3 + 3 + 5) + 4 + 5 + 8) / 12, abs=0.01)
    assert rows["contracted"]["launches"] == pytest.approx((11 + 8) / 12, abs=0.01)
    assert 0 < rows["contracted"]["functions"] < rows["pairs"]["functions"] < 200
    assert before == {name: getattr(pair_kernels, name, None) for name in before}
    assert triton_launch._device_of is Tensor.get_device and pair_products._forced is None


def test_host_time_of_a_group_call_without_checkpointing():
    """Casts and gates in forward, gates in backward. PEFT's LoRA has an operation more in each linear's every product."""
    rows = train_host_plain.main(["--layers", "3", "--rounds", "3"])
    assert rows["fused"]["forward"]["launches"] == pytest.approx(2, abs=0.01)
    assert rows["fused"]["backward"]["launches"] == pytest.approx(1, abs=0.01)
    for phase in train_host_plain.PHASES:
        assert 0 < rows["fused"][phase]["ops"] < rows["lora"][phase]["ops"]
        assert rows["lora"][phase]["launches"] == 0 and rows["fused"][phase]["functions"] < 160
    assert triton_launch._device_of is Tensor.get_device
