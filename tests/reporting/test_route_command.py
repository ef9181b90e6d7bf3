"""`python -m peft_loraswitch route`, in a process of its own, with a tiny model in a folder."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from fresh import Finished, run_module
from helpers import adapted, tiny_llama
from peft_loraswitch import from_loras
from peft_loraswitch.loading import weights_file
from peft_loraswitch.reporting.route_command import _has_tokenizer as has_tokenizer
from peft_loraswitch.reporting.route_command import load
from trainer_tools import tokenizer

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """base/ with a tokenizer, and adapter/ for it."""
    made = tmp_path_factory.mktemp("route")
    tiny_llama().save_pretrained(made / "base")
    tokenizer().save_pretrained(made / "base")
    save_adapter(made / "adapter", str(made / "base"), task_type="CAUSAL_LM")
    return made


def save_adapter(path: Path, base: str | None, **settings) -> None:
    model = adapted(tiny_llama(), expert_names=["maths", "code", "law", "art"], **settings)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(path)


def route(*arguments: object) -> Finished:
    return run_module("peft_loraswitch", "route", *arguments, environment=ENVIRONMENT)


@pytest.mark.slow
def test_the_command_prints_and_writes_a_page(folder, tmp_path):
    (tmp_path / "text.txt").write_text("w9 w10\nw11", encoding="utf-8")
    done = route(
        folder / "adapter", "--text", "w3 w4", "--text", "w5", "--file", tmp_path / "text.txt", "--html", tmp_path / "r.html",
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, its_tokenizer = load(str(folder / "adapter"), None, "cpu")
    report = model.routing_report(["w3 w4", "w5", "w9 w10\nw11"], its_tokenizer)
    assert done.stdout == report.terminal(False) + "\n"
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == report.html()


@pytest.mark.slow
def test_without_a_command_it_tells_of_the_kernels():
    from peft_loraswitch.__main__ import report

    done = run_module("peft_loraswitch", environment=ENVIRONMENT)
    assert done.returncode == 0 and done.stdout == report() + "\n"


@pytest.mark.slow
def test_an_error_is_one_line(folder):
    done = route(folder / "no_such_adapter", "--text", "w3")
    assert done.returncode == 2 and not done.stdout
    assert "error: " in done.stderr and "no_such_adapter" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def run(capsys, monkeypatch):
    """The command in this process: (status, what it says)."""
    from peft_loraswitch import __main__

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["peft_loraswitch", "route", *map(str, arguments)])
        status = __main__.main()
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def test_what_is_missing_is_named(folder, tmp_path, run):
    adapter = folder / "adapter"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    (tmp_path / "nothing").mkdir()
    for arguments, match in [
        ((adapter,), "there is nothing to route: give --text or --file"),
        ((adapter, "--text", ""), "--text is empty"),
        ((adapter, "--file", tmp_path / "empty.txt"), "empty.txt is empty"),
        ((adapter, "--file", tmp_path / "latin.txt"), "latin.txt is not UTF-8"),
        ((adapter, "--file", tmp_path / "no.txt"), "no.txt"),
        ((tmp_path / "nothing", "--text", "w3"), "nothing is no adapter: there is no adapter_config.json"),
        ((tmp_path / "nowhere", "--text", "w3"), "nowhere is no adapter: there is no adapter_config.json"),
        ((adapter, "--text", "w3", "--base-model", tmp_path / "nothing"), "--base-model names another place"),
        ((adapter, "--text", "w3", "--device", "gpu9"), "--device gpu9 cannot be used here"),
        ((adapter, "--text", "w3", "--max-length", 0), "max_length=0"),
        ((adapter, "--text", "w3", "--html", tmp_path / "no" / "r.html"), "r.html"),
    ]:
        status, said = run(*arguments)
        assert status == 2 and match in said, (arguments, said)


def test_adapters_that_do_not_fit_are_named(folder, tmp_path, run):
    save_adapter(tmp_path / "nameless", None)
    status, said = run(tmp_path / "nameless", "--text", "w3")
    assert status == 2 and "base_model_name_or_path is empty: give --base-model" in said
    for base in (folder / "base",):
        assert run(tmp_path / "nameless", "--text", "w3", "--base-model", base)[0] == 0
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    status, said = run(tmp_path / "lora", "--text", "w3")
    assert status == 2 and "peft_type='LORA' is not LORASWITCH" in said
    tiny_llama().save_pretrained(tmp_path / "bare")
    status, said = run(folder / "adapter", "--text", "w3", "--base-model", tmp_path / "bare")
    assert status == 2 and "There is no tokenizer at" in said


def test_what_nobody_could_look_for_is_not_said_to_be_missing(folder, tmp_path, run, monkeypatch):
    """Without a network an adapter is in the cache, or nothing is known of it."""
    monkeypatch.setattr(weights_file, "hf_hub_download", offline(tmp_path))
    status, said = run("you/adapter", "--text", "w3")
    assert status == 2 and "you/adapter" in said and "adapter_config.json" in said
    assert "cannot be asked (no network" in said and "there is no adapter_config.json" not in said
    with pytest.raises(OSError, match="you/adapter.*adapter_config.json.*cannot be asked"):
        from_loras(tiny_llama(), ["you/adapter", "you/other"])

    cached = tmp_path / "models--you--adapter" / "snapshots" / "0"
    shutil.copytree(folder / "adapter", cached)
    (cached.parents[1] / "refs").mkdir()
    (cached.parents[1] / "refs" / "main").write_text("0")
    weights = "adapter_model.safetensors"
    for pickle_first in (False, True):
        path = weights_file.find_weights_file("you/adapter", pickle_first=pickle_first)
        assert path is not None and path.endswith(weights)
    assert not has_tokenizer("you/adapter")
    (cached / weights).unlink()
    with pytest.raises(OSError, match=f"you/adapter.*{weights}.*cannot be asked"):
        weights_file.find_weights_file("you/adapter")


def offline(cache: Path):
    return functools.partial(huggingface_hub.hf_hub_download, cache_dir=cache, local_files_only=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(folder, run):
    for device in ("cuda:0", "xpu", "mps"):
        status, said = run(folder / "adapter", "--text", "w3", "--device", device)
        assert status == 2 and f"error: --device {device} cannot be used here" in said, said


def test_the_adapters_own_tokenizer_comes_first(folder, tmp_path, run):
    tiny_llama().save_pretrained(tmp_path / "bare")
    save_adapter(tmp_path / "adapter", str(tmp_path / "bare"))
    tokenizer().save_pretrained(tmp_path / "adapter")
    status, said = run(tmp_path / "adapter", "--text", "w3 w4")
    assert status == 0 and "2 tokens" in said
