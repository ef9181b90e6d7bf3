"""Adding, choosing, switching off and deleting adapters, in any order: the model always computes what a freshly built one does.

The adapters differ in what else they train: nothing, a head, a head and a norm, some tokens.
"""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn

from helpers import adapted, randomize_adapter, switch_config, tiny_llama, tokens
from peft_loraswitch.layer import LoRASwitchLayer

pytestmark = pytest.mark.compat
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "default": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    "tokens": {"target_modules": ["o_proj", "q_proj"], "trainable_token_indices": [3, 5, 7]},
    "other": {"target_modules": ["up_proj"], "trainable_token_indices": [4, 6]},
    "all": {"target_modules": ["v_proj"], "trainable_token_indices": [5, 9], "modules_to_save": ["norm"]},
}
EXCLUSIVE = [{"head", "default"}, {"default", "all"}, {"tokens", "other"}, {"tokens", "all"}, {"other", "all"}]
IDS = torch.arange(3, 13)[None]


def backbone() -> nn.Module:
    return tiny_llama()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Each adapter saved, with values of which none is that of the backbone."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        model = randomize_adapter(get_peft_model(backbone(), switch_config(**fields)), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "modules_to_save" in key or "trainable_tokens_delta" in key:
                    value.add_(torch.randn(value.shape, generator=generator) * 0.3)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Any:
    """Logits by active adapters, in order, of a model that was built with no others."""

    @functools.cache
    def of(active: tuple[str, ...]) -> torch.Tensor:
        model = backbone()
        if not active:
            return logits(model)
        model = PeftModel.from_pretrained(model, folder / active[0], adapter_name=active[0])
        for name in active[1:]:
            model.load_adapter(folder / name, name)
        model.base_model.set_adapter(list(active))
        return logits(model.eval())

    values = [of((name,)) for name in ADAPTERS] + [of(())]
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in itertools.combinations(values, 2))
    return of


def compatible(names: list[str]) -> bool:
    return not any(pair <= set(names) for pair in EXCLUSIVE)


class Walk:
    """A model and what is expected of it; the operations of `PeftModel`."""

    def __init__(self, folder: Path, wanted: Any) -> None:
        self.folder, self.wanted = folder, wanted
        self.loaded: list[str] = []
        self.active: list[str] = []
        self.off = False
        self.model: Any = None

    def load(self, name: str) -> None:
        if self.model is None:
            self.model = PeftModel.from_pretrained(backbone(), self.folder / name, adapter_name=name).eval()
            self.active = [name]
        else:
            self.model.load_adapter(self.folder / name, name)
        self.loaded.append(name)

    def activate(self, *names: str) -> None:
        if len(names) == 1:
            self.model.set_adapter(names[0])
        elif compatible(list(names)):
            self.model.base_model.set_adapter(list(names))
        else:
            with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
                self.model.base_model.set_adapter(list(names))
            return
        self.active = list(names)

    def switch(self, off: bool) -> None:
        self.model.base_model.disable_adapter_layers() if off else self.model.base_model.enable_adapter_layers()
        self.off = off

    def delete(self, name: str) -> None:
        self.model.delete_adapter(name)
        self.deleted(name)

    def deleted(self, name: str) -> None:
        self.loaded.remove(name)
        if self.active == [name] and self.loaded:
            self.active = [sorted(self.loaded)[0]]
        else:
            self.active = [other for other in self.active if other != name]

    def active_names(self) -> list[str]:
        return list(self.model.active_adapters)

    def check(self) -> None:
        assert self.active_names() == self.active
        assert torch.equal(logits(self.model), self.wanted(() if self.off else tuple(self.active)))
        if self.loaded and not self.off and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                assert torch.equal(logits(self.model), self.wanted(()))

    def step(self, chance: random.Random) -> str:
        missing = sorted(set(ADAPTERS) - set(self.loaded))
        operations = ["load"] * 2 * (len(self.loaded) < 4 and bool(missing))
        operations += ["activate", "activate", "several", "switch"] if self.loaded else []
        operations += ["delete"] * 2 if len(self.loaded) > self.at_least else []
        operation = chance.choice(operations)
        if operation == "load":
            self.load(chance.choice(missing))
        elif operation == "activate":
            self.activate(chance.choice(self.loaded))
        elif operation == "several":
            self.activate(*chance.sample(self.loaded, min(2, len(self.loaded))))
        elif operation == "switch":
            self.switch(not self.off)
        else:
            self.delete(chance.choice(self.loaded))
        return operation

    at_least = 0


class TransformersWalk(Walk):
    """The methods that Transformers gives every model."""

    def load(self, name: str) -> None:
        if self.model is None:
            self.model = backbone()
        self.model.load_adapter(str(self.folder / name), adapter_name=name)
        self.model.eval()
        self.loaded.append(name)
        self.active = [name]

    def activate(self, *names: str) -> None:
        if compatible(list(names)):
            self.model.set_adapter(list(names) if len(names) > 1 else names[0])
            self.active = list(names)
        else:
            with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
                self.model.set_adapter(list(names))

    def switch(self, off: bool) -> None:
        self.model.disable_adapters() if off else self.model.enable_adapters()
        self.off = off

    def delete(self, name: str) -> None:
        self.model.delete_adapter(name)
        self.deleted(name)
        if not self.loaded:
            assert not self.model._hf_peft_config_loaded and not hasattr(self.model, "peft_config")

    def active_names(self) -> list[str]:
        return list(self.model.active_adapters()) if self.loaded else []


# Older versions do not load modules_to_save (see test_loading.py).
LOADS = Version(transformers.__version__) >= Version("5.20")
KINDS = [Walk, pytest.param(TransformersWalk, marks=pytest.mark.skipif(not LOADS, reason="needs Transformers 5.20"))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_walk(kind: type[Walk], seed: int, folder: Path, wanted: Any):
    chance = random.Random(seed)
    walk = kind(folder, wanted)
    done: list[str] = []
    for _ in range(60):
        done.append(walk.step(chance) if walk.model is not None else walk.load(chance.choice(list(ADAPTERS))) or "load")
        walk.check()
    assert set(done) == {"load", "activate", "several", "switch", "delete"}


# -------------------------------------------------------------------------------------------------------- by themselves


def test_deleting_the_active_adapter_gives_the_head_to_the_next(folder: Path, wanted: Any):
    model = PeftModel.from_pretrained(backbone(), folder / "plain", adapter_name="plain").eval()
    model.load_adapter(folder / "head", "head")
    with pytest.warns(UserWarning, match="Setting active adapter to head"):
        model.delete_adapter("plain")
    assert torch.equal(logits(model), wanted(("head",)))


def test_deleting_default_while_two_others_are_active(folder: Path, wanted: Any):
    model = PeftModel.from_pretrained(backbone(), folder / "default").eval()
    for name in ("plain", "head"):
        model.load_adapter(folder / name, name)
    model.base_model.set_adapter(["plain", "head"])
    model.delete_adapter("default")
    assert torch.equal(logits(model), wanted(("plain", "head")))
    assert model.active_peft_config is model.peft_config["plain"]
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted(()))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [("head", "default"), ("plain", "head"), ("tokens", "other"), ("all", "plain")]
)
def test_the_next_adapter_trains_if_the_deleted_one_did(first: str, second: str, trains: bool, folder: Path):
    model = PeftModel.from_pretrained(backbone(), folder / first, adapter_name=first, is_trainable=trains)
    model.load_adapter(folder / second, second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter(first)
    own = {name for name, p in model.named_parameters() if second in name.split(".")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == (own if trains else set())


@pytest.mark.parametrize("trains", [False, True])
def test_deleting_an_inactive_adapter_changes_no_flag(trains: bool, folder: Path):
    model = PeftModel.from_pretrained(backbone(), folder / "head", adapter_name="head", is_trainable=trains)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.load_adapter(folder / "default", "default")
    model.delete_adapter("default")
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(after[name] == flag for name, flag in flags.items() if name in after)
    assert not any(flag for name, flag in after.items() if name not in flags)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_active_together_changes_nothing(kind: type[Walk], folder: Path, wanted: Any):
    walk = kind(folder, wanted)
    for name in ("plain", "head", "default"):
        walk.load(name)
    walk.activate("plain")
    walk.activate("head", "default")
    walk.check()
    assert walk.active == ["plain"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_added_to_a_model_that_is_switched_off(kind: type[Walk], folder: Path, wanted: Any):
    walk = kind(folder, wanted)
    walk.load("plain")
    walk.switch(True)
    walk.load("all")
    walk.activate("all")
    walk.check()
    walk.switch(False)
    walk.check()


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_all_and_beginning_again(kind: type[Walk], folder: Path, wanted: Any):
    walk = kind(folder, wanted)
    for _ in range(2):
        for name in ("head", "tokens"):
            walk.load(name)
        for name in ("tokens", "head"):
            walk.delete(name)
        walk.check()
        layers = [m for m in walk.model.modules() if isinstance(m, LoRASwitchLayer)]
        assert layers and not any(layer.loraswitch_A for layer in layers)


def test_every_adapter_is_saved_again(folder: Path, wanted: Any, tmp_path):
    """Also those without trainable tokens, beside one that has them."""
    walk = Walk(folder, wanted)
    for name in ("tokens", "plain", "head", "default"):
        walk.load(name)
    walk.model.save_pretrained(tmp_path)
    for name in walk.loaded:
        source = tmp_path if name == "default" else tmp_path / name
        again = PeftModel.from_pretrained(backbone(), source, adapter_name=name).eval()
        assert torch.equal(logits(again), wanted((name,)))


def test_names_that_are_not_there():
    model = adapted(tiny_llama())
    with pytest.raises(ValueError, match="no_such does not exist"):
        model.delete_adapter("no_such")
    model = tiny_llama()
    for method in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="No adapter loaded"):
            method("no_such")
    for method in (model.disable_adapters, model.enable_adapters):
        with pytest.raises(ValueError, match="No adapter loaded"):
            method()
    model.add_adapter(switch_config())
    with pytest.raises(ValueError, match="no_such"):
        model.set_adapter(["no_such"])
    with pytest.raises(ValueError, match="no_such"):
        model.delete_adapter(["default", "no_such"])
    assert list(model.peft_config) == ["default"]
    assert model(tokens()).logits.isfinite().all()
