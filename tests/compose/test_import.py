"""`from_loras`: each expert alone computes what its LoRA computes, whatever the others are."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fresh import LIBRARIES, run_python
from helpers import switch_config, switch_layers, tiny_gpt2, tiny_llama, tokens
from loras import CONFIG, VARIANTS, WEIGHTS, alone, logits_of, lora_oracle, peft_logits, save_lora, save_variants
from oracle import Oracle
from peft_loraswitch import LoRASwitchConfig, add_expert, from_loras, remove_expert

pytestmark = pytest.mark.compat
NAMES = list(VARIANTS)
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}  # of float32, through a whole model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    return save_variants(tmp_path_factory.mktemp("loras"), tiny_llama())


@pytest.mark.parametrize("top_k", [1, 2, len(VARIANTS)])
def test_every_expert_alone_is_its_lora(folders, top_k):
    backbone = tiny_llama()
    without = logits_of(backbone, tokens())
    model = from_loras(tiny_llama(), folders, top_k=top_k)
    assert isinstance(model, PeftModel) and not model.training
    config = model.peft_config["default"]
    assert config.expert_names == NAMES and config.num_experts == len(NAMES) and config.task_type == "CAUSAL_LM"
    seen = []
    for expert, folder in enumerate(folders):
        wanted = peft_logits(folder, backbone, tokens())
        with alone(model, expert):
            got = logits_of(model, tokens())
        assert (wanted - without).abs().max() > 1e-2, "a LoRA that does nothing shows nothing"
        torch.testing.assert_close(got, wanted, **ROUNDING)
        exact = logits_of(lora_oracle(folder, backbone), tokens())
        torch.testing.assert_close(got.double(), exact.double(), **ROUNDING)
        seen.append(got)
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(seen) for b in seen[:i])
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens()), without)
    assert torch.equal(logits_of(model.unload(), tokens()), without)


def test_linear_by_linear_to_the_rounding_of_one_product(folders):
    """Random inputs of every adapted linear, in float32, against the files' numbers in float64."""
    model = from_loras(tiny_llama(), folders)
    for expert, folder in enumerate(folders):
        oracle = dict(lora_oracle(folder, tiny_llama()).named_modules())
        for name, layer in switch_layers(model).items():
            x = torch.randn(5, layer.in_features)
            a, b = layer.loraswitch_A["default"].weight[expert], layer.loraswitch_B["default"].weight[expert]
            got = layer.scaling["default"] * (x @ a.T @ b.T)
            module = oracle[name.removeprefix("base_model.model.")]
            if not hasattr(module, "a"):
                assert not a.any() and not b.any()
                continue
            products = module.scale * (x.double() @ module.a.T @ module.b.T)
            bound = abs(module.scale) * (x.double().abs() @ module.a.abs().T @ module.b.abs().T)
            assert ((got - products).abs() <= 1e-6 * bound).all()


def test_routed_as_the_oracle_says(folders):
    model = from_loras(tiny_llama(), folders, top_k=2)
    torch.testing.assert_close(logits_of(model, tokens()).double(), Oracle(model)(tokens()).logits, **ROUNDING)


def test_equal_scales_are_not_folded_and_dtypes_not_rounded(tmp_path):
    """With one scale for all, the experts are the files' numbers to the bit."""
    folders = [
        save_lora(tmp_path / "a", tiny_llama(), 1, r=4, lora_alpha=8),
        save_lora(tmp_path / "b", tiny_llama(), 2, r=8, lora_alpha=16, dtype=torch.bfloat16),
    ]
    model = from_loras(tiny_llama(), folders)
    for expert, folder in enumerate(folders):
        for key, tensor in load_file(Path(folder) / WEIGHTS).items():
            name, _, part = key.partition(".lora_")
            layer = model.get_submodule(name)
            weight = getattr(layer, f"loraswitch_{part[0]}")["default"].weight[expert]
            rank = 8 if expert else 4
            held, zeros = (weight[:rank], weight[rank:]) if part[0] == "A" else (weight[:, :rank], weight[:, rank:])
            assert torch.equal(held, tensor.float()) and not zeros.any() and layer.scaling["default"] == 2


def test_conv1d_and_any_task(tmp_path):
    """GPT-2's linears are stored the other way round, for which PEFT sets fan_in_fan_out; a LoRA does not depend on it."""
    gpt2 = tiny_gpt2()
    folders = [
        save_lora(tmp_path / "a", gpt2, 1, target_modules=["c_attn"], fan_in_fan_out=True, task_type=None),
        save_lora(tmp_path / "b", gpt2, 2, target_modules=["c_fc"], fan_in_fan_out=True, task_type=None),
    ]
    model = from_loras(tiny_gpt2(), folders)
    for expert, folder in enumerate(folders):
        with alone(model, expert):
            torch.testing.assert_close(logits_of(model, tokens()), peft_logits(folder, gpt2, tokens()), **ROUNDING)


def test_bf16_backbone(folders):
    """Experts stay float32, as PEFT keeps LoRAs on such a backbone."""
    backbone = tiny_llama().to(torch.bfloat16)
    model = from_loras(copy.deepcopy(backbone), folders)
    assert {p.dtype for n, p in model.named_parameters() if "loraswitch" in n} == {torch.float32}
    for expert, folder in enumerate(folders):
        with alone(model, expert):
            wanted = peft_logits(folder, backbone, tokens())
            torch.testing.assert_close(logits_of(model, tokens()), wanted, rtol=5e-2, atol=5e-2)
    narrow = from_loras(copy.deepcopy(backbone), folders, autocast_adapter_dtype=False)
    file = load_file(Path(folders[NAMES.index("bf16")]) / WEIGHTS)
    for key in (key for key in file if "lora_A" in key):
        held = narrow.get_submodule(key.partition(".lora_")[0]).loraswitch_A["default"].weight
        assert held.dtype == torch.bfloat16 and torch.equal(held[NAMES.index("bf16"), :4], file[key])


def test_beside_an_adapter_that_is_there(folders):
    model = from_loras(tiny_llama(), folders[:2], router_module="layers.0.self_attn.q_proj")
    before = logits_of(model, tokens())
    assert from_loras(model, folders[2:4], adapter_name="more", expert_names=["x", "y"]) is model
    assert torch.equal(logits_of(model, tokens()), before)
    model.set_adapter("more")
    with alone(model, 1, "more"):
        wanted = peft_logits(folders[3], tiny_llama(), tokens())
        torch.testing.assert_close(logits_of(model, tokens()), wanted, **ROUNDING)


@pytest.mark.slow
def test_compiled(folders):
    """Also when experts come and go afterwards."""
    model = from_loras(tiny_llama(), folders[:3])
    compiled = torch.compile(model, backend="eager")
    for change in (lambda: None, lambda: add_expert(model, folders[3]), lambda: remove_expert(model, "plain")):
        change()
        torch.testing.assert_close(logits_of(compiled, tokens()), logits_of(model, tokens()), **ROUNDING)


FRESH = """
import sys, torch
import peft_loraswitch
from peft import PeftModel
from helpers import tiny_llama, tokens
from safetensors.torch import save_file
model = PeftModel.from_pretrained(tiny_llama(), sys.argv[1])
assert model.peft_config["default"].expert_names == sys.argv[3].split()
with torch.no_grad():
    save_file({"logits": model(tokens()).logits}, sys.argv[2])
"""


@pytest.mark.slow
def test_saved_and_loaded_in_a_fresh_process(folders, tmp_path):
    model = from_loras(tiny_llama(), folders)
    model.save_pretrained(tmp_path / "adapter")
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "out.safetensors"), " ".join(NAMES)]
    run_python(FRESH, *arguments, libraries=LIBRARIES)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], logits_of(model, tokens()))
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert LoRASwitchConfig(**config).expert_names == NAMES
    assert "`plain`, `large`" in (tmp_path / "adapter" / "README.md").read_text()


def test_generates_and_trains(folders):
    model = from_loras(tiny_llama(), folders)
    padding = {name: layer.loraswitch_B["default"].weight.detach() == 0 for name, layer in switch_layers(model).items()}
    assert any(zeros.any() for zeros in padding.values())
    generated = [
        model.generate(tokens(), max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*generated)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any("loraswitch_router" in n for n in before)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    for name, layer in switch_layers(model).items():  # an expert keeps its rank
        weight = layer.loraswitch_B["default"].weight
        a = layer.loraswitch_A["default"].weight
        dead = padding[name].all(1)
        assert not weight.transpose(1, 2)[dead].any() and not a[dead].any()


def test_other_fields_are_passed_on(folders):
    model = from_loras(tiny_llama(), folders, router_aux_loss_coef=0.5, lora_dropout=0.1, normalize_gates=False)
    config = model.peft_config["default"]
    assert (config.router_aux_loss_coef, config.lora_dropout, config.normalize_gates) == (0.5, 0.1, False)
    assert switch_config().expert_names is None
