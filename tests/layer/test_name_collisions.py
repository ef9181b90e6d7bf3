"""Backbones whose modules are called as ours are (`router`, `A`, ...): PEFT looks modules up by the ends of their names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import nn

from architectures import build
from helpers import _seeded, randomize_adapter, switch_config, switch_layers, tiny_llama, tokens
from peft_loraswitch.layer import LoRASwitchLayer

pytestmark = pytest.mark.compat
# ends of the names within an adapted linear: "q_proj.loraswitch_router.default", "q_proj.base_layer"
OURS = ["router", "record", "pending", "A", "B", "dropout", "base_layer", "default", "layer"]


class Block(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.inner = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.q_proj(x)
        for module in self.inner.values():
            x = x + 0.3 * module(x)
        return x


class Wrapped(nn.Module):
    """A ModuleDict cannot be trained in full."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        super().__init__()
        self.all = modules

    def values(self) -> Any:
        return self.all.values()


class Toy(nn.Module):
    """Has modules of these names within its blocks and at the top, all of which take part."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(Block(names) for _ in range(2))
        for name in names:
            setattr(self, name, nn.Linear(16, 16))
        self.names = names

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        for name in self.names:
            x = x + 0.3 * getattr(self, name)(x)
        return x


def toy(*names: str) -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy(list(names))


def wrapped(model: nn.Module) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }


def assert_nothing_of_ours_is_wrapped(model: nn.Module) -> None:
    for name, layer in switch_layers(model).items():
        inside = [
            m for m in layer.modules() if isinstance(m, AuxiliaryTrainingWrapper | LoRASwitchLayer) and m is not layer
        ]
        assert not inside, name


def train_a_little(model: nn.Module, **inputs: Any) -> None:
    """One step that moves everything trainable by as much as a test can see."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = model.train()(**inputs)
    loss = getattr(output, "loss", None)
    (output.square().mean() if loss is None else loss).backward()
    assert any("modules_to_save" in n and p.grad is not None and p.grad.any() for n, p in model.named_parameters())
    torch.optim.SGD(parameters, lr=0.1).step()
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("name", OURS)
def test_modules_to_save(name: str, tmp_path):
    """Trained, saved under its own name, and back again; also with a second adapter, and with one of that name."""
    backbone = toy(name, "other")
    config = {"target_modules": ["q_proj"], "modules_to_save": [name]}
    first = "default" if name != "default" else "first"
    model = randomize_adapter(get_peft_model(copy.deepcopy(backbone), switch_config(**config), adapter_name=first))
    wanted = {name, *(f"blocks.{i}.inner.{name}" for i in range(2))}
    assert wrapped(model) == wanted
    assert_nothing_of_ours_is_wrapped(model)
    assert set(switch_layers(model.get_base_model())) == {"blocks.0.q_proj", "blocks.1.q_proj"}
    train_a_little(model, ids=tokens())
    output = model(ids=tokens())
    assert model.peft_config[first].modules_to_save == [name], "what the user wrote"

    model.save_pretrained(tmp_path)
    folder = tmp_path / ("" if first == "default" else first)
    keys = {key.removeprefix("base_model.model.") for key in load_file(folder / "adapter_model.safetensors")}
    assert {key.removesuffix(".weight") for key in keys if "loraswitch_" not in key and "bias" not in key} == wanted
    for low in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(backbone), folder, first, low_cpu_mem_usage=low).eval()
        assert torch.equal(again(ids=tokens()), output)
    for adapter in ("second", "third"):
        again.load_adapter(folder, adapter)
        again.set_adapter(adapter)
        assert torch.equal(again(ids=tokens()), output)
    assert wrapped(again) == wanted
    assert_nothing_of_ours_is_wrapped(again)
    again.delete_adapter(first)
    assert torch.equal(again(ids=tokens()), output)
    with again.disable_adapter():
        assert torch.equal(again(ids=tokens()), backbone(tokens()))


@pytest.mark.parametrize("name", ["router", "A", "dropout", "default"])
def test_names_of_which_the_backbone_has_none(name: str):
    """As in LoRA: nothing is trained in full, and nothing is said (PEFT adds 'score' and 'classifier' to every classifier)."""
    model = get_peft_model(toy("other"), switch_config(target_modules=["q_proj"], modules_to_save=[name]))
    assert wrapped(model) == set()


class TokenToy(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.block = Block([])
        self.tables = nn.ModuleDict({name: nn.Embedding(64, 16)})
        setattr(self, name, nn.Embedding(64, 16))
        self.name = name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.block(self.tables[self.name](ids) + getattr(self, self.name)(ids))


@pytest.mark.parametrize("name", ["router", "A", "record"])
def test_trainable_tokens(name: str, tmp_path):
    backbone = TokenToy(name)
    config = switch_config(target_modules=["q_proj"], trainable_token_indices={name: [3, 5]})
    model = get_peft_model(copy.deepcopy(backbone), config)
    assert wrapped(model) == {name, f"tables.{name}"}
    assert_nothing_of_ours_is_wrapped(model)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "trainable_tokens_delta" in key:
                value.add_(1.0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    assert torch.equal(again(ids=tokens()), model.eval()(ids=tokens()))
    assert not torch.equal(again(ids=torch.tensor([[3]])), backbone(torch.tensor([[3]])))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"A": [64]}, "'A' has 64 tokens, none of index 64"),
        ({"no_such": [1]}, "no module whose name ends in 'no_such'"),
        ({"A": [1, 1]}, "names a token twice"),
    ],
)
def test_tokens_that_are_not_there(indices: Any, message: str):
    model = TokenToy("A")
    with pytest.raises(ValueError, match=f"trainable_token_indices.*{message}"):
        get_peft_model(model, switch_config(target_modules=["q_proj"], trainable_token_indices=indices))
    assert not switch_layers(model)


@pytest.mark.parametrize("name", OURS[:8])
def test_targets_and_exclusions_of_further_adapters(name: str):
    """The second adapter meets a model with the modules of the first one."""
    model = get_peft_model(toy(name, "other"), switch_config(target_modules=["q_proj"]))
    model.add_adapter("second", switch_config(target_modules=[name, "q_proj"]))
    layers = switch_layers(model.get_base_model())
    assert {n for n, layer in layers.items() if "second" in layer.loraswitch_A} == {
        *(f"blocks.{i}.{end}" for i in range(2) for end in ("q_proj", f"inner.{name}")), name,
    }  # fmt: skip
    model.add_adapter("third", switch_config(target_modules=["q_proj", "other", name], exclude_modules=[name]))
    assert {n for n, layer in layers.items() if "third" in layer.loraswitch_A} == {"blocks.0.q_proj", "blocks.1.q_proj"}
    layers = switch_layers(model.get_base_model())
    assert "third" in layers["blocks.0.inner.other"].loraswitch_A
    assert not any(isinstance(m, LoRASwitchLayer) for layer in layers.values() for m in layer.children())


@pytest.mark.parametrize("adapter", ["record", "q_proj", "loraswitch", "other"])
def test_adapters_with_such_names(adapter: str, tmp_path):
    backbone = toy("router", "A", "record")
    config = switch_config(target_modules=["q_proj"], modules_to_save=["router", "A"])
    model = randomize_adapter(get_peft_model(copy.deepcopy(backbone), config, adapter_name=adapter))
    train_a_little(model, ids=tokens())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path / adapter, adapter_name=adapter).eval()
    assert torch.equal(again(ids=tokens()), model(ids=tokens()))


@pytest.mark.parametrize("adapter", ["__base__", "loraswitch_A"])
def test_adapters_with_names_that_mean_something_else(adapter: str):
    with pytest.raises(ValueError, match="has a meaning of its own"):
        get_peft_model(toy("other"), switch_config(target_modules=["q_proj"]), adapter_name=adapter)


@pytest.mark.parametrize("adapter", ["router", "inner", "blocks"])
def test_adapters_whose_weights_peft_would_lose(adapter: str):
    """PEFT takes the adapter's name out of the keys it saves, and leaves out keys with other adapters' names."""
    config = {"target_modules": ["q_proj"]}
    backbone = toy("router", "other")
    message = f"adapter name '{adapter}' is part of the name of a module that modules_to_save"
    with pytest.raises(ValueError, match=message):
        get_peft_model(backbone, switch_config(**config, modules_to_save=["router"]), adapter_name=adapter)
    assert not switch_layers(backbone)
    model = get_peft_model(backbone, switch_config(**config, modules_to_save=["router"]))
    with pytest.raises(ValueError, match=message):
        model.add_adapter(adapter, switch_config(**config))
    assert list(model.peft_config) == ["default"]
    model = get_peft_model(toy("router", "other"), switch_config(**config), adapter_name=adapter)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", switch_config(**config, modules_to_save=["router"]))
    assert list(model.peft_config) == [adapter]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"modules_to_save": ["inner"]},
            {"target_modules": ["other"]},
            "target_modules: .*inner.*another adapter trains in full",
        ),
        (
            {"target_modules": ["q_proj", "other"]},
            {"modules_to_save": ["blocks"]},
            "modules_to_save: 'blocks' .* experts on",
        ),
        (
            {"target_modules": ["other"]},
            {"modules_to_save": ["other"]},
            "modules_to_save: '.*other' .* experts on '.*other'",
        ),
    ],
)
def test_one_adapter_in_the_modules_of_another(first: dict, second: dict, message: str, tmp_path):
    """They could be injected, and not saved."""
    base = {"target_modules": ["q_proj"]}
    backbone = toy("other")
    backbone.blocks[0].inner = Wrapped(backbone.blocks[0].inner)
    backbone.blocks[1].inner = Wrapped(backbone.blocks[1].inner)
    model = randomize_adapter(get_peft_model(backbone, switch_config(**{**base, **first}))).eval()
    output = model(ids=tokens())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", switch_config(**{**base, **second}))
    assert list(model.peft_config) == ["default"] and torch.equal(model(ids=tokens()), output)
    model.save_pretrained(tmp_path)


def test_all_linear_leaves_out_what_another_adapter_trains_in_full(tmp_path):
    backbone = tiny_llama()
    model = get_peft_model(copy.deepcopy(backbone), switch_config(target_modules=["q_proj"], modules_to_save=["mlp"]))
    with pytest.warns(
        UserWarning, match="leaves out .*mlp.* and .* more .it lies within a module that another adapter trains"
    ):
        model.add_adapter("second", switch_config())
    layers = switch_layers(model.get_base_model())
    assert not any("mlp" in name for name in layers) and len(layers) == 8
    randomize_adapter(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    again = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path / "second", adapter_name="second").eval()
    assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)


# -------------------------------------------------------------------------------------------------- real architectures


def gpt_oss() -> tf.PreTrainedModel:
    return build("gpt_oss", tf.AutoModelForCausalLM)


def llama4() -> tf.PreTrainedModel:
    config = tf.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=1, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return _seeded(tf.Llama4ForCausalLM, config, 0)


def switch_transformer() -> tf.PreTrainedModel:
    config = tf.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_decoder_layers=2, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return _seeded(tf.SwitchTransformersForConditionalGeneration, config, 0)


REAL = {
    "gpt_oss": (gpt_oss, {"target_modules": ["q_proj", "v_proj"]}),
    "llama4": (llama4, {"target_modules": ["q_proj", "v_proj"]}),
    "switch": (switch_transformer, {"target_modules": r"decoder\..*SelfAttention\.(q|v)"}),
}


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


# Older versions leave modules_to_save as they were, which a load refuses (see test_loading.py).
TRANSFORMERS_LOADS = Version(tf.__version__) >= Version("5.20")


@pytest.mark.parametrize("kind", REAL)
def test_routers_of_a_mixture_of_experts(kind: str, tmp_path):
    make, targets = REAL[kind]
    backbone = make()
    config = {**targets, "modules_to_save": ["router"]}
    routers = {name for name, _ in backbone.named_modules() if name.endswith("router")}
    assert routers

    model = randomize_adapter(get_peft_model(copy.deepcopy(backbone), switch_config(**config)))
    assert wrapped(model) == routers
    train_a_little(model, **batch_for(model))
    output = model(**batch_for(model)).logits
    model.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path / "peft").eval()
    assert torch.equal(again(**batch_for(model)).logits, output)
    again.load_adapter(tmp_path / "peft", "second")
    again.set_adapter("second")
    assert torch.equal(again(**batch_for(model)).logits, output)

    # and through Transformers
    model = copy.deepcopy(backbone)
    model.add_adapter(switch_config(**config))
    assert wrapped(model) == routers
    randomize_adapter(model)
    train_a_little(model, **batch_for(model))
    output = model(**batch_for(model)).logits
    model.save_pretrained(tmp_path / "transformers")
    again = copy.deepcopy(backbone)
    if TRANSFORMERS_LOADS:
        again.load_adapter(str(tmp_path / "transformers"))
        assert torch.equal(again.eval()(**batch_for(model)).logits, output)
    else:
        again.add_adapter(switch_config(**config))
    again.add_adapter(switch_config(**config), adapter_name="second")
    assert wrapped(again) == routers
    assert all("second" in m.modules_to_save for m in again.modules() if isinstance(m, ModulesToSaveWrapper))
