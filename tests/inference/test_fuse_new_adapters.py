"""Adapters that come to a fused model: they get the linears that they would get if it were not fused, and those are fused."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import LAYERS, adapted, randomize_adapter, switch_config, switch_layers, tiny_llama, tokens
from peft_loraswitch import LoRASwitchLinear
from peft_loraswitch.inference import fused_layer
from peft_loraswitch.inference.fuse import adapted_layers, fuse, is_fused
from peft_loraswitch.inference.fused_layer import FusedLinear

pytestmark = pytest.mark.compat
STRATEGIES = {"fused": ("fused", False), "merge": ("merge", False), "in place": ("merge", True)}
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def kinds_of(model: nn.Module) -> dict[str, tuple[type, set[str]]]:
    return {name: (type(module), set(vars(module))) for name, module in model.named_modules()}


@torch.no_grad()
def logits(model: nn.Module, *shape: int) -> torch.Tensor:
    return model(input_ids=tokens(*(shape or (1, 1)))).logits


def test_every_fused_class_has_the_name_of_an_adapted_linear():
    """PEFT's "all-linear" goes by "Linear" in the name of a layer's class, its status of layers by the whole name."""
    kinds = FusedLinear.__subclasses__()
    kinds += [kind for each in kinds for kind in each.__subclasses__()]
    assert {kind.__name__ for kind in kinds} == {"LoRASwitchLinear"} and len(kinds) == 3
    assert all(getattr(fused_layer, kind.__qualname__) is kind for kind in kinds), "pickle finds it"


@strategies
@pytest.mark.parametrize("first", [["q_proj", "v_proj"], "all-linear"])
def test_all_linear_means_the_same_linears(strategy, first):
    found = []
    for fuses in (True, False):
        model = adapted(tiny_llama(), target_modules=first)
        if fuses:
            model.fuse_for_inference(*STRATEGIES[strategy])
        torch.manual_seed(3)
        model.add_adapter("b", switch_config(r=2))
        randomize_adapter(model, "b").set_adapter("b")
        layers = switch_layers(model)
        assert len(layers) == 7 * LAYERS and all(isinstance(layer, FusedLinear) == fuses for layer in layers.values())
        found.append((model, [name for name, layer in layers.items() if "b" in layer.loraswitch_A]))
    (model, names), (reference, expected) = found
    assert names == expected and model.peft_config["b"].target_modules == reference.peft_config["b"].target_modules
    for adapter in ("b", "default", "b"):
        for each in (model, reference):
            each.set_adapter(adapter)
        for shape in ((1, 1), (1, 5), (1, 1)):
            torch.testing.assert_close(logits(model, *shape), logits(reference, *shape), rtol=1e-4, atol=1e-4)
    model.unfuse()
    assert all(type(layer) is LoRASwitchLinear for layer in adapted_layers(model))


def test_linears_of_the_new_adapter_share_launches():
    model = adapted(tiny_llama(), target_modules=["k_proj", "v_proj", "o_proj"])
    model.fuse_for_inference("fused")
    model.add_adapter("b", switch_config())  # q_proj, which is new, runs before k_proj, which led
    attention = model.base_model.model.model.layers[1].self_attn
    assert [len(attention.q_proj.fused_groups[name].live) for name in attention.q_proj.fused_groups] == [3]
    assert len(model.base_model.model.model.layers[0].mlp.gate_proj.fused_groups["b"].live) == 2


def test_through_transformers():
    model, reference = tiny_llama(), tiny_llama()
    for each in (model, reference):
        torch.manual_seed(1)
        each.add_adapter(switch_config(target_modules=["q_proj", "v_proj"]), adapter_name="a")
        randomize_adapter(each)
    fuse(model, "fused")
    for each in (model, reference):
        torch.manual_seed(2)
        each.add_adapter(switch_config(r=2), adapter_name="b")
        randomize_adapter(each, "b")
    assert list(switch_layers(model)) == list(switch_layers(reference)) and len(switch_layers(model)) == 7 * LAYERS
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)


@strategies
def test_a_load_that_fails_leaves_a_fused_model_as_it_was(strategy, tmp_path):
    adapted(tiny_llama(), seed=5).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    part = {name: value for name, value in values.items() if "layers.1.mlp.down_proj" not in name}
    save_file(part, file, {"format": "pt"})
    model = adapted(tiny_llama(), target_modules=["k_proj", "v_proj"])
    model.fuse_for_inference(*STRATEGIES[strategy])
    expected = [logits(model), logits(model, 2, 3)]
    before = kinds_of(model)
    with pytest.raises(ValueError, match="missing"):
        model.load_adapter(tmp_path, "b")
    assert kinds_of(model) == before and is_fused(model)
    for value, shape in zip(expected, ((1, 1), (2, 3)), strict=True):
        torch.testing.assert_close(logits(model, *shape), value, rtol=1e-4, atol=1e-4)
    save_file(values, file, {"format": "pt"})
    model.load_adapter(tmp_path, "b")
    model.set_adapter("b")
    reference = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    assert len([layer for layer in adapted_layers(model) if isinstance(layer, FusedLinear)]) == 7 * LAYERS


def test_a_fused_model_prints_and_reports_as_an_unfused_one():
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"])
    printed, status = repr(model), (model.get_model_status(), model.get_layer_status())
    with model.fuse_for_inference("fused"):
        assert repr(model) == printed and (model.get_model_status(), model.get_layer_status()) == status


def test_the_search_for_groups_is_not_recorded():
    model = adapted(tiny_llama())
    with model.record_routing() as recorded:
        model.fuse_for_inference("fused")
        logits(model, 1, 3)
    assert recorded.summary()["tokens"] == 3


def test_a_backbone_merged_in_place_is_unloaded_saved_copied_and_read_without_experts(tmp_path):
    import copy
    import pickle

    model = adapted(tiny_llama())
    pristine = {name: value.clone() for name, value in model.state_dict().items()}
    base = {name: value.clone() for name, value in tiny_llama().state_dict().items()}
    model.fuse_for_inference("merge", in_place=True)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    expected = logits(model)
    assert not torch.equal(weight, base["model.layers.0.self_attn.q_proj.weight"])
    assert all(torch.equal(value, pristine[name]) for name, value in model.state_dict().items())
    for twin in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        logits(model)
        other = twin(model)
        assert all(torch.equal(value, pristine[name]) for name, value in other.named_parameters())
        for _ in range(2):
            torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        other.unfuse()
        assert all(torch.equal(value, pristine[name]) for name, value in other.named_parameters())
    logits(model)
    unloaded = model.unload()
    assert all(torch.equal(value, base[name]) for name, value in unloaded.state_dict().items())


def test_merging_follows_the_adapter(caplog):
    """What is switched to is merged as well, after a prompt or without one."""
    model = adapted(tiny_llama())
    model.add_adapter("b", switch_config(num_experts=3, top_k=1, target_modules=["q_proj", "up_proj"]))
    randomize_adapter(model, "b").eval()
    model.fuse_for_inference("merge")
    logits(model)
    merging = adapted_layers(model)[0].fusing.merging
    for adapter, shape in (("b", (1, 1)), ("default", (1, 5)), ("b", (2, 1)), ("default", (1, 1))):
        model.set_adapter(adapter)
        logits(model, *shape)
        merged = logits(model)
        assert merging.adapter == adapter
        with model.disable_adapter():
            assert not torch.allclose(logits(model), merged)
    assert "something has changed" not in caplog.text
