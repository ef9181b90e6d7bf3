"""`get_peft_model` to `unload`: PEFT's own calls on a LoRA-Switch adapter, alone and with others beside it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    inject_adapter_in_model,
)
from safetensors.torch import load_file

import oracle
from helpers import (
    adapted,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
    tokens,
)
from peft_loraswitch import LoRASwitchConfig, LoRASwitchLinear, LoRASwitchModel

pytestmark = pytest.mark.compat

# Another E, k, r, scale, other layers, and a router somewhere else than in the default adapter
OTHERS: dict[str, dict[str, Any]] = {
    "small": {"num_experts": 3, "top_k": 1, "r": 2, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"num_experts": 6, "top_k": 4, "r": 5, "lora_alpha": 3, "target_modules": ["down_proj", "o_proj"]},
    "deep": {"num_experts": 2, "top_k": 2, "router_module": "layers.1.self_attn.q_proj"},
}


def logits(model: torch.nn.Module, ids: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **kwargs).logits


def several(**settings: Any) -> PeftModel:
    """A llama with the adapters default, small, wide and deep."""
    model = adapted(tiny_llama(**settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for seed, (name, config) in enumerate(OTHERS.items(), start=2):
            model.add_adapter(name, switch_config(**config))
            randomize_adapter(model, name, seed=seed)
    return model.eval()


def alone(name: str) -> torch.Tensor:
    """Logits of a model that has only this adapter, with the same weights."""
    model = several()
    state = {k.replace(f".{name}.", ".default."): v for k, v in model.state_dict().items() if f".{name}." in k}
    single = adapted(tiny_llama(), **OTHERS.get(name, {}))
    assert not single.load_state_dict(state, strict=False).unexpected_keys
    return logits(single)


# ---------------------------------------------------------------------------------------------------- save, load


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt, tiny_bert, tiny_llama_classifier])
def test_save_and_load(make: Any, tmp_path: Path):
    backbone = make()
    model = adapted(copy.deepcopy(backbone))
    wanted = logits(model)
    assert not torch.equal(wanted, logits(backbone))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for low_cpu_mem_usage in (False, True):
        reloaded = PeftModel.from_pretrained(
            copy.deepcopy(backbone), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(reloaded), wanted)
        tensors = [*reloaded.parameters(), *reloaded.buffers()]
        assert {t.device.type for t in tensors} == {"cpu"} and not any(p.requires_grad for p in reloaded.parameters())
    trainable = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_file_holds_one_router_and_the_experts_of_each_linear(tmp_path: Path):
    model = adapted(tiny_llama(), r=3, num_experts=4)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    linears = set(switch_layers(model))
    assert set(state) == {
        *(f"{name}.loraswitch_{part}.weight" for name in linears for part in "AB"),
        "base_model.model.model.layers.0.self_attn.q_proj.loraswitch_router.weight",
    }
    prefix = "base_model.model.model.layers.1.mlp.down_proj.loraswitch_"
    assert state[prefix + "A.weight"].shape == (4, 3, 48) and state[prefix + "B.weight"].shape == (4, 32, 3)
    assert all(v.dtype == torch.float32 for v in state.values())


def test_config_round_trip(tmp_path: Path):
    config = LoRASwitchConfig(
        r=5,
        num_experts=7,
        top_k=3,
        normalize_gates=False,
        lora_alpha=11,
        use_rslora=True,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["x"],
        layers_to_transform=[0],
        layers_pattern=["layers"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 4},
        modules_to_save=["norm"],
        init_weights="gaussian",
        router_module="q_proj",
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.25,
        router_jitter=0.125,
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LoRASwitchConfig)
    assert loaded.to_dict() == config.to_dict()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORASWITCH"
    assert isinstance(LoRASwitchConfig.from_pretrained(tmp_path), LoRASwitchConfig)


@pytest.mark.parametrize("auto", [AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification])
def test_auto_classes(auto: Any, tmp_path: Path):
    causal = auto is AutoPeftModelForCausalLM
    (tiny_llama() if causal else tiny_llama_classifier()).save_pretrained(tmp_path / "base")
    backbone = auto._target_class.from_pretrained(tmp_path / "base")
    model = adapted(backbone, task_type="CAUSAL_LM" if causal else "SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    reloaded = auto.from_pretrained(tmp_path / "adapter")
    assert type(reloaded) is type(model)
    assert torch.equal(logits(reloaded), logits(model))


def test_subfolder_and_selected_adapters(tmp_path: Path):
    model = several()
    model.save_pretrained(tmp_path, selected_adapters=["wide"])
    assert not (tmp_path / "adapter_config.json").exists() and (tmp_path / "wide" / "adapter_config.json").exists()
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="wide").eval()
    assert torch.equal(logits(reloaded), alone("wide"))


# --------------------------------------------------------------------------------------------- several adapters


def test_each_adapter_is_what_it_is_alone():
    model = several()
    for name in model.peft_config:
        model.set_adapter(name)
        assert torch.equal(logits(model), alone(name)), name
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_two_active_adapters_add_up():
    """PEFT's tuner can activate several; each routes for itself, and their deltas add up."""
    model = adapted(tiny_llama(), target_modules=["q_proj", "o_proj"])
    model.add_adapter("b", switch_config(num_experts=2, target_modules=["o_proj"]))
    randomize_adapter(model, "b", seed=5).eval()
    model.base_model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default", "b"]
    calls = {}
    first, second = (
        switch_layers(model)[f"base_model.model.model.layers.0.self_attn.{n}"] for n in ("q_proj", "o_proj")
    )
    for layer in (first, second):
        layer.register_forward_hook(lambda module, args, out: calls.update({module: (args[0], out)}))
    logits(model)
    x, out = calls[second]
    wanted = oracle.base_output(second.base_layer, x)
    for name, router_layer in (("default", first), ("b", second)):
        decision = oracle.decide(calls[router_layer][0], router_layer.loraswitch_router[name].weight, 2, True)
        a, b = second.loraswitch_A[name].weight, second.loraswitch_B[name].weight
        wanted = wanted + oracle.delta(x, a, b, decision, second.scaling[name])
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    assert first.routing_state.frame is None


def test_adding_an_adapter_on_other_layers_moves_the_hooks():
    """The module that opens the frame must contain the layers of every adapter."""
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    first = logits(model)
    inner = model.get_base_model().model.layers[1]
    model.add_adapter("b", switch_config(target_modules=["o_proj"], layers_to_transform=[0]))
    randomize_adapter(model, "b")
    assert torch.equal(logits(model), first)
    model.set_adapter("b")
    assert not torch.equal(logits(model), first)
    assert not inner._forward_hooks and not inner._forward_pre_hooks


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_into_a_live_model(low_cpu_mem_usage: bool, tmp_path: Path):
    source = several()
    source.save_pretrained(tmp_path)
    model = adapted(tiny_llama())
    before = logits(model)
    for name in OTHERS:
        model.load_adapter(tmp_path / name, name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(model.eval()), before), "loading changes the active adapter"
        assert not any(p.requires_grad for n, p in model.named_parameters() if f".{name}." in n)
    for name in OTHERS:
        model.set_adapter(name)
        assert torch.equal(logits(model), alone(name))
    model.load_adapter(tmp_path / "wide", "again", is_trainable=True)
    model.set_adapter("again")
    assert any(p.requires_grad for n, p in model.named_parameters() if ".again." in n)


def test_training_one_adapter_leaves_the_others_alone():
    model = several()
    model.set_adapter("wide")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"wide"}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == changed


@pytest.mark.parametrize("name", ["default", *OTHERS])
def test_delete_adapter(name: str):
    model = several()
    model.set_adapter(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.delete_adapter(name)
    assert name not in model.peft_config and not any(f".{name}." in key for key in model.state_dict())
    left = model.active_adapters
    assert len(left) == 1 and left[0] in model.peft_config
    assert {str(w.message).rpartition("to ")[2] for w in caught if "Setting active adapter" in str(w.message)} == {
        left[0] + "."
    }
    assert torch.equal(logits(model), alone(left[0])), "the adapter that became active is active on every layer"
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter(name)


def test_delete_the_last_adapter_and_add_another():
    model = adapted(tiny_llama())
    model.delete_adapter("default")
    assert not any("loraswitch_" in name for name, _ in model.named_parameters())
    for without in (model, model.get_base_model()):
        assert torch.equal(logits(without), logits(tiny_llama()))
    model.add_adapter("new", switch_config(**OTHERS["wide"]))
    model.set_adapter("new")
    state = {k: v for k, v in several().state_dict().items() if ".wide." in k}
    model.load_state_dict({k.replace(".wide.", ".new."): v for k, v in state.items()}, strict=False)
    assert torch.equal(logits(model), alone("wide"))
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))


def test_another_peft_method_on_the_same_backbone():
    """Stock LoRA first, LoRA-Switch on other linears second, as two injections: both act, both can be taken off."""
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), tiny_llama())
    with_lora = logits(model)
    model = randomize_adapter(inject_adapter_in_model(switch_config(target_modules=["o_proj"]), model)).eval()
    assert not torch.equal(logits(model), with_lora)
    with pytest.raises(ValueError, match="q_proj' already carries another PEFT method"):
        inject_adapter_in_model(switch_config(target_modules=["q_proj"]), model, adapter_name="b")


# ------------------------------------------------------------------------------------------------- status, shape


def test_status():
    model = several()
    status = model.get_model_status()
    assert status.adapter_model_type == "LoRASwitchModel" and status.base_model_type == "LlamaForCausalLM"
    assert set(status.peft_types.values()) == {"LORASWITCH"}
    assert status.active_adapters == ["default"] and status.merged_adapters == [] and status.enabled
    assert sorted(status.available_adapters) == sorted(["default", *OTHERS])
    assert status.requires_grad == {"default": True, "small": False, "wide": False, "deep": False}
    assert status.num_adapter_layers == len(switch_layers(model)) == 14
    trainable, total = model.get_nb_trainable_parameters()
    in_layers = sum(p.numel() for n, p in model.named_parameters() if ".default." in n)
    assert trainable == status.trainable_params == in_layers and total == status.total_params
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert layers["model.model.layers.0.self_attn.q_proj"].module_type.endswith("LoRASwitchLinear")
    assert sorted(layers["model.model.layers.1.mlp.down_proj"].available_adapters) == ["deep", "default", "wide"]
    with model.disable_adapter():
        assert not model.get_model_status().enabled
    assert isinstance(model, PeftModel) and isinstance(model.base_model, LoRASwitchModel)
    assert isinstance(adapted(tiny_llama(), task_type="CAUSAL_LM"), PeftModelForCausalLM)
    assert "loraswitch" in repr(model)


def test_disable_adapter_is_undone_after_an_exception():
    model = adapted(tiny_llama())
    wanted = logits(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), wanted)


MERGES = {
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "safe": lambda m: m.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda m: m.merge_adapter(),
    "named": lambda m: m.merge_adapter(["default"]),
    "layer": lambda m: next(iter(switch_layers(m).values())).merge(),
}


@pytest.mark.parametrize("how", MERGES)
def test_merging_is_refused_and_says_what_to_do(how: str):
    model = adapted(tiny_llama())
    wanted = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged.*fuse_for_inference.*unload\(\).*disable_adapter\(\)"):
        MERGES[how](model)
    assert torch.equal(logits(model), wanted)


def test_a_weighted_sum_is_refused_and_says_what_to_do():
    model = adapted(tiny_llama())
    with pytest.raises(ValueError, match=r"weighted sum .*export_expert\(\).*from_loras\(\)"):
        model.add_weighted_adapter(["default"], [0.5], "both", "linear")
    assert list(model.peft_config) == ["default"]


def test_unload_and_a_second_adapter_on_the_same_backbone():
    backbone = tiny_llama()
    model = adapted(backbone)
    wanted = logits(model)
    unloaded = model.unload()
    assert unloaded is backbone and not switch_layers(unloaded)
    assert torch.equal(logits(unloaded), logits(tiny_llama()))
    for module in unloaded.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not isinstance(module, LoRASwitchLinear)
    assert not hasattr(unloaded, "peft_config")
    again = adapted(unloaded)
    assert torch.equal(logits(again), wanted)
    again.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert again.router_stats()["tokens"] == tokens().numel(), "an old hook would count twice"
