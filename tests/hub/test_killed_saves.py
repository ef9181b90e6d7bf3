"""A process that is killed while it saves over an adapter: what loads afterwards is the old one, the new one, or refused.

Children are forks of this process, which has imported everything; SIGKILL leaves them no time to clean up.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

import peft_loraswitch.saving.safe_save
from helpers import randomize_adapter, switch_config, switch_layers, tiny_llama, tokens
from peft_loraswitch.saving.safe_save import UNFINISHED

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
FILE_CALLS = {("posix", name) for name in ("replace", "rename", "unlink", "mkdir", "rmdir")} | {
    ("safetensors._safetensors_rust", "serialize_file")
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_progress_bars():
    """Their lock is shared between processes: one that is killed while it holds it would stop this one."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def backbone() -> nn.Module:
    return tiny_llama(num_hidden_layers=1)


def variant(route: str, number: int) -> nn.Module:
    """Two adapters of the same shapes, of which both the weights and the configuration differ."""
    model = backbone()
    config = switch_config(lora_alpha=(6, 24)[number], top_k=(2, 3)[number], target_modules=["q_proj", "down_proj"])
    if route == "peft":
        from peft import get_peft_model

        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    return randomize_adapter(model, seed=number).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def load(route: str, folder: Path) -> torch.Tensor:
    model = backbone()
    if route == "peft":
        model = PeftModel.from_pretrained(model, folder)
    else:
        model.load_adapter(str(folder))
    return logits(model.eval())


def in_child(work: Callable[[], Any]) -> tuple[int, int]:
    """Run `work` in a fork; return its process id and the end of a pipe that it has written a byte to when it began."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            os.write(writing, b"x")
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def save_and_die(model: nn.Module, folder: Path, event: int) -> None:
    """Save, and be killed at the `event`-th call or return of a function that touches files."""
    seen = 0

    def profile(frame: Any, kind: str, function: Any) -> None:
        nonlocal seen
        if kind in ("c_call", "c_return") and (getattr(function, "__module__", ""), function.__name__) in FILE_CALLS:
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.setprofile(profile)
    model.save_pretrained(folder)
    sys.setprofile(None)


def outcome(route: str, folder: Path, wanted: list[torch.Tensor]) -> str:
    try:
        found = load(route, folder)
    except ValueError as error:
        assert "was broken off while the files were replaced" in str(error)
        assert UNFINISHED in json.loads((folder / "adapter_config.json").read_text())
        return "refused"
    same = [torch.equal(found, logits) for logits in wanted]
    assert any(same), "neither the old adapter nor the new one"
    return "new" if same[1] else "old"


@pytest.mark.slow
@pytest.mark.parametrize("route", ["peft", "transformers"])
def test_killed_at_every_file_operation(route: str, tmp_path):
    models = [variant(route, number) for number in range(2)]
    wanted = [logits(model) for model in models]
    assert not torch.allclose(*wanted)
    counts: Counter[str] = Counter()
    for event in range(200):
        models[0].save_pretrained(tmp_path)
        pid, reading = in_child(lambda at=event: save_and_die(models[1], tmp_path, at))
        _, status = os.waitpid(pid, 0)
        os.close(reading)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break  # there are no more events
        counts[outcome(route, tmp_path, wanted)] += 1
        if event % 5 == 0:  # whatever was left there is in nobody's way
            models[1].save_pretrained(tmp_path)
            assert outcome(route, tmp_path, wanted) == "new"
    assert outcome(route, tmp_path, wanted) == "new"
    assert counts["old"] > 10 and counts["new"] > 5, counts
    print(counts)
    assert 0 < counts["refused"] <= 0.2 * counts.total(), counts


@pytest.mark.slow
@pytest.mark.parametrize("route", ["peft", "transformers"])
def test_killed_at_any_time(route: str, tmp_path):
    chance = random.Random(0)
    models = [variant(route, number) for number in range(2)]
    wanted = [logits(model) for model in models]
    models[0].save_pretrained(tmp_path)

    def save_for_ever() -> None:
        while True:
            for model in models:
                model.save_pretrained(tmp_path)

    counts: Counter[str] = Counter()
    for _ in range(30):
        pid, reading = in_child(save_for_ever)
        os.read(reading, 1)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        found = outcome(route, tmp_path, wanted)
        counts[found] += 1
        models[found != "new"].save_pretrained(tmp_path)  # the next child begins with the other one
    print(counts)
    assert counts["old"] and counts["new"] and counts["refused"] <= 10, counts


def test_a_save_that_fails_midway_leaves_the_old_adapter(tmp_path, monkeypatch):
    models = [variant("peft", number) for number in range(2)]
    wanted = [logits(model) for model in models]
    models[0].save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))
    original = os.replace
    for name in ("adapter_model.safetensors", "adapter_config.json"):

        def full(source: str, target: str, name: str = name) -> None:
            if str(target).endswith(name) and UNFINISHED not in Path(source).read_text(errors="ignore"):
                raise OSError(28, "No space left on device")
            original(source, target)

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            models[1].save_pretrained(tmp_path)
        monkeypatch.setattr(os, "replace", original)
        assert sorted(os.listdir(tmp_path)) == before
        assert outcome("peft", tmp_path, wanted) == ("old" if name.endswith("safetensors") else "refused")
        models[1].save_pretrained(tmp_path)
        models[0].save_pretrained(tmp_path)
        assert outcome("peft", tmp_path, wanted) == "old"


def test_what_killed_saves_have_left(tmp_path):
    """It is no adapter of the folder, and goes away after a while."""
    model = variant("peft", 0)
    model.save_pretrained(tmp_path)
    left = [
        tmp_path / ".adapter_model.safetensors-old",
        tmp_path / ".adapter_config.json-old",
        tmp_path / ".adapter_config.json-new",
    ]
    for folder in left:
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((tmp_path / "adapter_config.json").read_bytes())
    for folder in left[:2]:
        os.utime(folder, (0, 0))
    model.save_pretrained(tmp_path)
    assert [folder.exists() for folder in left] == [False, False, True]
    assert "### Adapter" not in (tmp_path / "README.md").read_text()


def test_adapters_of_other_methods_are_saved_by_peft_alone(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(peft_loraswitch.saving.safe_save, "Written", None)
    model = get_peft_model(backbone(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "peft")
    model = backbone()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "transformers")
    backbone().save_pretrained(tmp_path / "model")
    assert all((tmp_path / name / "adapter_model.safetensors").exists() for name in ("peft", "transformers"))


def test_permissions_and_several_adapters(tmp_path):
    model = variant("peft", 0)
    model.add_adapter("other", switch_config())
    model.save_pretrained(tmp_path)
    files = [tmp_path / part / "adapter_model.safetensors" for part in ("", "other")]
    files[0].chmod(0o640)
    model.save_pretrained(tmp_path)
    assert files[0].stat().st_mode & 0o777 == 0o640
    assert all(UNFINISHED not in (file.parent / "adapter_config.json").read_text() for file in files)
    assert sorted(os.listdir(tmp_path / "other")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert len(switch_layers(copy.deepcopy(model))) == 7


def test_a_pickle_beside_old_weights(tmp_path):
    """It would not be seen, and the old weights loaded with the new configuration."""
    models = [variant("peft", number) for number in range(2)]
    models[0].save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in ({"safe_serialization": False}, {}):
        with pytest.raises(ValueError, match="safe_serialization=False writes a pickle"):
            models[1].save_pretrained(tmp_path, *(() if arguments else (False,)), **arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
