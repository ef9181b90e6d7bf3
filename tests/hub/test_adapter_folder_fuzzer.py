"""Adapter folders with random damage, through everything that loads one.

Either the load is refused, at once, with little memory, by an error that names a file or a field, and no bit of the model has
changed; or it is accepted, and then the model computes what the file says. `adapter_mutations.py` does the damage.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from adapter_mutations import FIELDS, MUTATIONS, PREFIX
from helpers import adapted, switch_config, tiny_llama, tokens
from loaders import CONFIG, LOADERS, WEIGHTS, bounded
from peft_loraswitch import LoRASwitchConfig
from unchanged import check_unchanged, fingerprint

pytestmark = pytest.mark.compat

CASES = 50  # of each of the nine loaders
SECONDS, MEGABYTES = 10, 400  # for one case, on a machine that does other things as well
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"num_shared_experts": 1, "router_module": "layers.0.self_attn.v_proj", "rank_pattern": {"q_proj": 4}},
    "head": {"modules_to_save": ["lm_head"], "use_rslora": True},
    "tokens": {"trainable_token_indices": [5, 9], "alpha_pattern": {"down_proj": 3}},
}
NAMED = (CONFIG, WEIGHTS, "adapter_model.bin", "adapter", *FIELDS)  # one of these is in every error


def backbone() -> nn.Module:
    return tiny_llama(num_hidden_layers=1)


def settings(kind: str) -> dict[str, Any]:
    return {
        "num_experts": 3,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **ADAPTERS[kind],
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A folder for each kind of ADAPTERS, and "base"."""
    folder = tmp_path_factory.mktemp("saved")
    backbone().save_pretrained(folder / "base")
    for kind in ADAPTERS:
        model = adapted(backbone(), seed=5, **settings(kind))
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / kind)
    return folder


def with_first(model: nn.Module) -> nn.Module:
    model.add_adapter(switch_config(init_weights=False, target_modules=["q_proj", "up_proj"]), "first")
    return model.eval()


def model_for(loader: str, kind: str) -> nn.Module:
    if loader == "PeftModel.load_adapter":
        return adapted(backbone(), target_modules=["q_proj", "up_proj"])
    if loader == "into an adapter that exists":
        return adapted(backbone(), seed=9, **settings(kind))
    return with_first(backbone()) if loader == "second model.load_adapter" else backbone()


def what_the_file_says(folder: Path) -> Callable[[], torch.Tensor]:
    """The adapter of this folder on a fresh backbone, without any loader: its tensors by their names, and then embeddings, by
    whatever name, from what is left."""
    fields = {k: v for k, v in json.loads((folder / CONFIG).read_text()).items() if k != "inference_mode"}
    model = get_peft_model(backbone(), LoRASwitchConfig(**{**fields, "task_type": None})).eval()
    # Transformers takes the prefix off as often as it is there.
    tensors = {key.replace(PREFIX, ""): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    state = model.get_base_model().state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in state.items():
            key = (
                name.replace(".modules_to_save.default", "")
                .replace("_delta.default", "_delta")
                .replace(".default.", ".")
            )
            if key != name:
                tensor.copy_(tensors.pop(key))
        for key in [key for key in tensors if "modules_to_save" not in key]:
            for name in [name for name in state if without_wrappers(name) == without_wrappers(key)]:
                state[name].copy_(tensors[key])
    return lambda: logits_of(model)


def without_wrappers(name: str) -> str:
    return re.sub(r"\.(original_module|base_layer|token_adapter)\b", "", name)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return getattr(model, "get_base_model", lambda: model)().eval()(tokens()).logits


def outcome(compute: Callable[[], torch.Tensor]) -> Any:
    """Logits, or the error that they end in (the router refuses NaN and Inf)."""
    try:
        return compute()
    except ValueError as error:
        return str(error).partition(" of adapter")[0]


def ours(folder: Path) -> bool:
    """Whether the configuration still says that this is an adapter of ours; otherwise the words are PEFT's."""
    path = folder / CONFIG
    try:
        return (
            path.is_file() and path.stat().st_size < 10**6 and json.loads(path.read_text())["peft_type"] == "LORASWITCH"
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@pytest.mark.parametrize("loader", LOADERS)
def test_random_damage(loader, adapters, tmp_path, record_property):
    rng = random.Random(f"seed 1 {loader}")
    models: dict[str, nn.Module] = {}
    outcomes: Counter[str] = Counter()
    with bounded(seconds=600, megabytes=MEGABYTES):
        for case in range(CASES):
            kind, mutate = rng.choice(sorted(ADAPTERS)), rng.choice(MUTATIONS)
            folder = Path(shutil.copytree(adapters / kind, tmp_path / str(case)))
            case_of = f"case {case}: {loader}, {kind}, {mutate(rng, folder)}"
            model = models.pop(kind, None) or model_for(loader, kind)
            result = try_to_load(loader, model, folder, case_of)
            outcomes["refused" if result is None else "accepted"] += 1
            if result is None:
                models[kind] = model  # as good as new
    record_property("outcomes", dict(outcomes))
    assert outcomes["refused"] >= CASES / 2 and outcomes["accepted"] >= CASES / 20


def try_to_load(loader: str, model: nn.Module, folder: Path, case_of: str) -> nn.Module | None:
    """The model that has been loaded into, after a check of what it computes; or None, after a check of the refusal."""
    before = fingerprint(model)
    try:
        with bounded(SECONDS, MEGABYTES), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = LOADERS[loader][1](model, folder)
    except Exception as error:
        check_unchanged(model, before)
        if ours(folder):
            assert isinstance(error, (ValueError, OSError)), f"{case_of}: {type(error).__name__}: {error}"
            assert any(word in str(error) for word in NAMED), f"{case_of}: {error}"
        return None
    loaded = result if isinstance(result, nn.Module) else model
    if loader in ("PeftModel.load_adapter", "second model.load_adapter"):
        loaded.set_adapter("new")
    found, wanted = outcome(lambda: logits_of(loaded)), outcome(what_the_file_says(folder))
    same = (
        found == wanted
        if isinstance(wanted, str) or isinstance(found, str)
        else torch.allclose(found, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)
    )
    assert same, f"{case_of}: accepted, but the file says something else"
    return loaded
