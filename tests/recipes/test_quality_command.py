"""recipes/quality: a base and files that are kept, and a stopped command that goes on."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fresh import run_module
from quality_tools import CPU, VOCABULARY
from recipes.quality import aside, base, files, methods, results
from recipes.quality import run as command
from recipes.quality.settings import LENGTH, SMOKE

# ------------------------------------------------------------------------------------------------ base and files


def streams(length: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    made = (np.cumsum(np.random.default_rng(0).integers(1, 3, length)) % VOCABULARY).astype(np.uint16)
    return made, made[: 3 * LENGTH]


def test_base_is_kept_and_made_again_when_it_must_be(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = SMOKE.with_changes(hidden=32, intermediate=48, heads=2, key_value_heads=1, pretrain_steps=12)
    general, held_out = streams()
    wanted = base.fingerprint(general, VOCABULARY, settings)
    assert base.cached(tmp_path, wanted) is None and capsys.readouterr().out == ""
    info = base.make(tmp_path, general, held_out, VOCABULARY, settings, CPU)
    assert info["held_out_loss"] < math.log(VOCABULARY) - 0.1
    assert base.cached(tmp_path, wanted) == info == files.read_json(tmp_path / "base.json")
    model = base.load(tmp_path, VOCABULARY, settings, CPU)
    assert base.held_out_loss(model, held_out, settings, CPU) == pytest.approx(info["held_out_loss"], abs=0.01)  # bf16
    assert not any(parameter.requires_grad for parameter in model.parameters())

    # other text, other settings of the base; settings of the adaptation do not matter
    assert base.fingerprint(held_out, VOCABULARY, settings) != wanted
    assert base.fingerprint(general, VOCABULARY, settings.with_changes(pretrain_steps=13)) != wanted
    assert base.fingerprint(general, VOCABULARY, settings.with_changes(steps=99, seeds=(5,))) == wanted
    assert base.cached(tmp_path, "another") is None and "other text or settings" in capsys.readouterr().out
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert base.cached(tmp_path, wanted) is None and "damaged" in capsys.readouterr().out
    weights.write_bytes(whole)
    assert base.cached(tmp_path, wanted) == info
    (tmp_path / "base.json").write_text("{")
    assert base.cached(tmp_path, wanted) is None and "incomplete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="general_held_out holds 10 tokens"):
        base.make(tmp_path, general, held_out[:10], VOCABULARY, settings, CPU)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, [1])

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*value.json: No space left"):
        files.write_atomically(path, fails)
    assert files.read_json(path) == [1] and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------- the command


class Forks:
    """In place of the module `subprocess` of the command: what it starts is a fork with the libraries imported, one at a time."""

    one_at_a_time = threading.Lock()

    class Popen:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert command[:2] == [sys.executable, "-m"]
            with Forks.one_at_a_time:
                done = run_module(*command[2:], environment=env, cwd=Path.cwd())
            print(done.stdout, end="")
            print(done.stderr, end="", file=sys.stderr)
            self.returncode = done.returncode

        def poll(self) -> int:
            return self.returncode


@pytest.mark.slow
def test_the_command_runs_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Once in this process, once with a process for each method, with the same results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(command, "subprocess", Forks)
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("PYTHONWARNINGS", "ignore")):  # of the methods' processes
        monkeypatch.setenv(name, value)
    words = ("--size", "smoke", "--steps", "2", "--methods", "base", "lora-r64", "moe-lora")
    assert command.main(command.parse(words[:-1])) == 0
    assert "base: pretraining" in capfd.readouterr().out
    out = tmp_path / "outputs" / "quality" / "smoke"
    first = results.read(out / "results.csv")
    assert {row["method"] for row in first["rows"]} == {"base", "lora-r64"}
    # one run is lost, one method is new: these are trained, and nothing else
    (out / "runs" / "lora-r64-0.json").unlink()
    both = [word for word in words if word != "base"]
    assert command.main(command.parse([*both, "--parallel", "2", "--results", "copy.csv"])) == 0
    printed = capfd.readouterr().out
    assert "pretraining" not in printed
    assert printed.count("lora-r64: seed 0") == 1 and "lora-r64: learning rate" not in printed
    found = results.read(tmp_path / "copy.csv")
    assert found == results.read(out / "results.csv")
    assert {row["method"] for row in found["rows"]} == {"base", "lora-r64", "moe-lora"}
    assert [r for r in found["rows"] if r["method"] == "base"] == [r for r in first["rows"] if r["method"] == "base"]
    again, before = (
        {(row["domain_or_task"], row["metric"]): row["value"] for row in each["rows"] if row["method"] == "lora-r64"}
        for each in (found, first)
    )
    assert again == pytest.approx(before)
    header = found["header"]
    assert {"gpu", "torch", "transformers", "peft", "commit", "settings", "base", "sources"} <= set(header)
    assert header["sources"] and header["base"]["parameters"] > 0
    for row in found["rows"]:
        assert list(row) == list(results.COLUMNS)
    # a limit that is over at once: nothing new, no failure
    kept = (out / "runs" / "moe-lora-0.json").read_text()
    (out / "runs" / "moe-lora-0.json").unlink()
    assert command.main(command.parse([*words, "--limit", "0"])) == 0
    assert "2 runs" in capfd.readouterr().out
    # and without one: what is finished is not begun again
    (out / "runs" / "moe-lora-0.json").write_text(kept)
    assert command.main(command.parse(words)) == 0
    printed = capfd.readouterr().out
    assert all(f"{name}: finished before" in printed for name in ("base", "lora-r64", "moe-lora"))


@pytest.mark.slow
def test_results_of_a_file_of_their_own_are_kept_beside_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder of the runs is new, as long as the base is the same one; and are a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["--size", "smoke", "--steps", "2", "--results", "aside.csv", "--learning-rate", "0.004", "--out"]
    assert command.main(command.parse([*words, "one", "--methods", "switch-lorafa", "switch-k2-p50"])) == 0
    first = results.read(Path("aside.csv"))
    shutil.copytree("one/base", "two/base")
    assert command.main(command.parse([*words, "two", "--methods", "switch-k2-p50", "switch"])) == 0
    both = results.read(Path("aside.csv"))
    assert [run["method"] for run in both["runs"]] == ["switch", "switch-lorafa", "switch-k2-p50"]
    kept = [row for row in both["rows"] if row["method"] == "switch-lorafa"]
    assert kept == [row for row in first["rows"] if row["method"] == "switch-lorafa"]
    assert {row["method"] for row in results.read(Path("two/results.csv"))["rows"]} == {"switch", "switch-k2-p50"}
    table = "\n".join(aside.lines(Path("aside.csv")))
    assert table.count("\n| `switch") == 3 and "| 0.004 |" in table and "| 2.00 |" in table
    with pytest.raises(ValueError, match="different settings"):
        command.main(command.parse(["--size", "smoke", "--steps", "3", *words[4:], "two", "--methods", "base"]))
    assert results.read(Path("aside.csv")) == both


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lora-r46"], "unknown method lora-r46: choose from base,"),
        (["--family", "papers"], "unknown family papers: choose from baselines,"),
        ([], "no GPU is visible"),
        (["--size", "smoke", "--devices", "0"], "no GPU is visible"),
    ],
)
def test_what_cannot_run_is_said(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        command.main(command.parse(words))


def test_a_file_of_results_that_could_not_be_written_is_said_before_the_work(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--results", "results.json"])
    assert "--results results.json: must end in .csv" in capsys.readouterr().err


def test_methods_run_wherever_there_is_room(monkeypatch) -> None:
    """The next method goes to the first device that is free; none waits for a device that is slow."""
    chosen = list(methods.METHODS[:6])
    jobs, places = command.Jobs(None), {}

    def one(method, device):
        places[method.name] = device
        time.sleep(0.6 if device == "cuda:0" else 0.01)
        return 0

    monkeypatch.setattr(jobs, "_one", one)
    jobs.run(chosen, {"cuda:0": 1, "cuda:1": 1})
    assert set(places) == {method.name for method in chosen} and jobs.finished == 6 and not jobs.failed
    assert list(places.values()).count("cuda:0") == 1
