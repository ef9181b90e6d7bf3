"""The recipes run end to end on the CPU, with nothing downloaded; the processes that they start are forks (tools/fresh.py)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file, save_file

from fresh import Finished, run_module
from recipes.checkout import module_environment

for _package in ("trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(_package, reason="the recipes need the extra `recipes`")

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "train" / "configs"
MODELS = ("llama31_8b", "mistral_7b", "qwen3_8b", "smoke")

pytestmark = pytest.mark.slow


TRL = ("datasets", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer")


def run(folder: Path, module: str, *arguments: str) -> str:
    """Run a recipe in `folder` with one thread and without a network; return what it printed.

    One thread, because tests may run side by side: two processes with two spinning threads each take far longer.
    """
    environment = module_environment(HF_HUB_OFFLINE="1")
    done = run_module(module, *arguments, cwd=folder, environment=environment, timeout=600, libraries=TRL)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Forks:
    """In place of the module `subprocess` of a recipe: what it starts is a fork with the libraries imported."""

    PIPE = subprocess.PIPE

    @staticmethod
    def run(command: list[str], env: dict[str, str], cwd: Path = ROOT, **options: Any) -> Finished:
        """Of `accelerate launch` for one process, which starts another Python, only that one runs."""
        assert command[:2] == [sys.executable, "-m"] and env["PYTHONPATH"].startswith(str(ROOT))
        if command[2] == "accelerate.commands.launch":
            args, *_ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
            command, variables = prepare_simple_launcher_cmd_env(args)
            assert command[1] == "-m"
            env = {**variables, **env}
        done = run_module(*command[2:], cwd=cwd, environment=env, timeout=600, libraries=TRL)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from recipes.train import quickstart

    monkeypatch.setattr(quickstart, "subprocess", Forks)
    folder = tmp_path / "outputs" / "quickstart"
    assert quickstart.main(folder, quickstart.SMOKE) == 0
    printed = capsys.readouterr().out
    assert (folder / "experts.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert len(result["checks"]) == 5 and all(result["checks"].values())
    assert len(result["expert_use"]) >= 4
    for name, loads in result["expert_use"].items():
        assert math.isclose(sum(loads), 1, abs_tol=1e-5), name
    assert sum(result["lora_switch"].values()) < sum(result["base"].values())
    # The comparison is fair: as many trainable parameters within 2 %.
    row = next(line for line in printed.splitlines() if line.strip().startswith("trainable"))
    lora, routed = (int(cell.replace(",", "")) for cell in row.split()[2:])
    assert abs(lora / routed - 1) < 0.02
    assert "FAIL" not in printed

    # Its last check is worth something: a file that holds other weights gives other tokens.
    path = folder / "adapter" / "adapter_model.safetensors"
    weights = {name: -8 * weight if "_B." in name else weight for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    quickstart.reload(folder)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) != result["tokens"]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_training_script(tmp_path: Path, method: str) -> None:
    run(tmp_path, f"recipes.train.{method}", str(CONFIGS / f"{method}_smoke.yaml"))
    folder = tmp_path / "outputs" / "smoke" / method
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_experts"], config["r"]) == ("LORASWITCH", 4, 4)
    assert (folder / "adapter_model.safetensors").stat().st_size > 10_000
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    trained = [entry for entry in history if "loss" in entry]
    for entry in trained:
        assert math.isclose(sum(entry[f"router/load_{expert}"] for expert in range(4)), 1, abs_tol=1e-5)
    evaluated = next(entry for entry in history if "eval_loss" in entry)
    if method == "dpo":
        # Before the first step policy and reference are the same model (the routing losses are not part of this number).
        assert math.isclose(trained[0]["loss"], math.log(2), abs_tol=1e-3)
        assert evaluated["eval_loss"] < math.log(2) - 0.02
    else:
        assert evaluated["eval_loss"] < trained[0]["loss"]


def parse(monkeypatch: pytest.MonkeyPatch, method: str, *command: str) -> tuple:
    from trl import DPOConfig, SFTConfig

    from recipes.train import arguments

    # This machine need not have the GPU that the configuration is for.
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *command, "--use_cpu", "true", "--bf16", "false"])
    return arguments.parse(SFTConfig if method == "sft" else DPOConfig)


def test_command_line_overrides_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--learning_rate", "0.25", "--adapter", '{"r": 2, "num_experts": 3}')
    _, training, _, recipe = parse(monkeypatch, "sft", str(CONFIGS / "sft_smoke.yaml"), *options)
    config = recipe.adapter_config
    assert (training.learning_rate, config.r, config.num_experts, config.top_k) == (0.25, 2, 3, 2)


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("model", MODELS)
def test_configurations_parse(monkeypatch: pytest.MonkeyPatch, method: str, model: str) -> None:
    """Every field of every YAML is one that TRL, the recipes or LoRASwitchConfig know."""
    path = CONFIGS / f"{method}_{model}.yaml"
    script, training, model_arguments, recipe = parse(monkeypatch, method, str(path))
    assert script.dataset_name and model_arguments.model_name_or_path
    assert training.output_dir.startswith("outputs/")
    assert recipe.adapter_config.peft_type == "LORASWITCH" and recipe.adapter_config.task_type == "CAUSAL_LM"
    assert recipe.local_assets == (model == "smoke")


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2"])
def test_accelerate_reads_its_configurations(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What `accelerate launch --config_file` makes of each, up to the point where it would start processes."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    path = CONFIGS.parent / "accelerate" / f"{name}.yaml"
    module = "recipes.train.sft"
    line = ["--config_file", str(path), "-m", module, "config.yaml", "--seed", "1"]
    parser = launch_command_parser()
    args, found, _ = _validate_launch_command(parser.parse_args(line))
    assert set(found.fsdp_config) <= set(vars(parser.parse_args(["script.py"]))), "fields that accelerate would ignore"
    assert (args.multi_gpu, args.use_fsdp) == (name == "ddp", name == "fsdp2") and args.mixed_precision == "bf16"
    if name == "one_gpu":
        command, environment = prepare_simple_launcher_cmd_env(args)
        assert command[-5:] == ["-m", module, "config.yaml", "--seed", "1"]
    else:
        environment = prepare_multi_gpu_env(args)
        assert args.module and args.num_processes == 2
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "fsdp2":
        for key, value in environment.items():
            if "FSDP" in key:
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert not plugin.cpu_ram_efficient_loading and plugin.state_dict_type.name == "FULL_STATE_DICT"
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


def test_a_wrong_adapter_field_is_named() -> None:
    from recipes.train import arguments

    with pytest.raises(ValueError, match="num_expert"):
        arguments.RecipeArguments(adapter={"num_expert": 4})
    with pytest.raises(ValueError, match="mapping"):
        arguments.RecipeArguments(adapter="[1, 2]")


def test_corpora_hold_out_whole_groups() -> None:
    from recipes import corpora

    for name, documents_of in corpora.DOMAINS.items():
        train, held_out = corpora.split(documents_of())
        assert train and held_out, name
        groups = [{document.group or document.name for document in side} for side in (train, held_out)]
        assert not groups[0] & groups[1], name
        assert not {document.text for document in train} & {document.text for document in held_out}, name
        share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in train + held_out)
        assert 0.15 < share < 0.5, (name, share)
        assert [d.name for d in documents_of()] == [d.name for d in documents_of()], name
    with pytest.raises(ValueError, match="cannot be split"):
        corpora.split([corpora.Document("a", "x")])


@pytest.mark.parametrize("config", ["sft_mistral_7b", "dpo_qwen3_8b"])
def test_real_size_rehearsed(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of `real_size` with a tiny model; its own checks have to hold (it raises otherwise)."""
    from recipes.train import real_size

    monkeypatch.setattr(real_size, "subprocess", Forks)
    options = ["--tiny", "--steps", "4", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "rows.json")]
    real_size.main([config, *options])
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["failed"] == [] and len(row["losses"]) == 4 and len(row["resumed_losses"]) == 2
    assert row["reserved_gib"] == []  # on a CPU
    # Of an answer, TRL may count one token more or less at its beginning.
    assert math.isclose(row["fresh"]["loss"], row["eval_loss"], rel_tol=1e-4 if config.startswith("sft") else 3e-3)


def test_memory_of_a_real_size_is_that_of_its_own_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process says what it has held on its own GPU, and the row has what the processes said."""
    from transformers import TrainerState

    from recipes.train import real_size, trl_script

    asked = []

    class Accelerator:
        device = SimpleNamespace(type="cuda", index=1)

        @staticmethod
        def gather(mine: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.tensor([41.96]), mine])

    def held(device: Any) -> float:
        asked.append(device)
        return 38.25 * 2**30

    monkeypatch.setattr(torch.cuda, "max_memory_reserved", held)
    monkeypatch.setattr(trl_script.torch, "tensor", lambda values, device=None, make=torch.tensor: make(values))
    trainer = SimpleNamespace(accelerator=Accelerator, state=TrainerState(global_step=8, log_history=[{"loss": 1.0}]))
    trl_script.note_memory(trainer)
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert asked == [Accelerator.device]
    assert real_size._reserved(json.loads((tmp_path / "state.json").read_text())) == [42.0, 38.2]
    assert real_size._reserved({"log_history": [{"loss": 1.0}]}) == []
