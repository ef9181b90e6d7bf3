"""`export_expert`: a plain LoRA that PEFT loads by itself, and that computes what the expert computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fresh import LIBRARIES, run_python
from helpers import adapted, switch_config, switch_layers, tiny_gpt2, tiny_llama, tokens
from loras import CONFIG, VARIANTS, WEIGHTS, alone, logits_of, lora_oracle, peft_logits, save_lora, save_variants
from peft_loraswitch import export_expert, from_loras
from unchanged import unchanged

pytestmark = pytest.mark.compat
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}

# Neither the package nor the tests' helpers, which import it.
PEFT_ALONE = """
import sys, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
for folder in sys.argv[3:]:
    lora = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]), folder).eval()
    with torch.no_grad():
        save_file({"logits": lora(load_file(sys.argv[2])["ids"]).logits}, folder + "/logits")
assert not any(name.split(".")[0] == "peft_loraswitch" for name in sys.modules)
"""


@pytest.mark.slow
def test_peft_alone_computes_the_same(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    save_file({"ids": tokens()}, tmp_path / "ids")
    model = from_loras(tiny_llama(), save_variants(tmp_path / "loras", tiny_llama()))
    folders = [str(tmp_path / name) for name in VARIANTS]
    with unchanged(model):
        for name, folder in zip(VARIANTS, folders, strict=True):
            export_expert(model, name, folder)
    arguments = [str(tmp_path / "base"), str(tmp_path / "ids"), *folders]
    run_python(PEFT_ALONE, *arguments, paths=(), cwd=tmp_path, libraries=LIBRARIES)
    for expert, folder in enumerate(folders):
        with alone(model, expert):
            mine = logits_of(model, tokens())
        torch.testing.assert_close(load_file(Path(folder) / "logits")["logits"], mine, **ROUNDING)
        exact = logits_of(lora_oracle(str(tmp_path / "loras" / Path(folder).name), tiny_llama()), tokens())
        torch.testing.assert_close(mine.double(), exact.double(), **ROUNDING)


def ranks_of(folder: Path | str) -> dict[str, int]:
    return {key: t.shape[0] for key, t in load_file(Path(folder) / WEIGHTS).items() if "lora_A" in key}


def test_there_and_back(tmp_path):
    """The original ranks and linears; the numbers to the bit where the scales agree, else B times the ratio."""
    folders = save_variants(tmp_path / "loras", tiny_llama())
    model = from_loras(tiny_llama(), folders)
    for expert, folder in enumerate(folders):
        back = tmp_path / f"back{expert}"
        export_expert(model, expert, back)
        assert ranks_of(back) == ranks_of(folder)
        before, after = load_file(Path(folder) / WEIGHTS), load_file(back / WEIGHTS)
        assert all(torch.equal(after[key], t.float()) for key, t in before.items() if "lora_A" in key)
        torch.testing.assert_close(
            peft_logits(str(back), tiny_llama(), tokens()), peft_logits(folder, tiny_llama(), tokens()), **ROUNDING
        )


def test_there_and_back_to_the_bit(tmp_path):
    folders = [
        save_lora(tmp_path / "a", tiny_llama(), 1, r=3, lora_alpha=6),
        save_lora(tmp_path / "b", tiny_llama(), 2, r=8, lora_alpha=16, target_modules=["q_proj", "o_proj"]),
    ]
    model = from_loras(tiny_llama(), folders)
    model.save_pretrained(tmp_path / "routed")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "routed")
    for name, folder in zip("ab", folders, strict=True):
        export_expert(model, name, tmp_path / "back")  # the second replaces the first
        before, after = load_file(Path(folder) / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        old, new = (json.loads((Path(f) / CONFIG).read_text()) for f in (folder, tmp_path / "back"))
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "task_type", "peft_type"):
            assert old[field] == new[field], field
        assert sorted(old["target_modules"]) == new["target_modules"]
    again = from_loras(tiny_llama(), [tmp_path / "back", folders[0]])
    assert again.peft_config["default"].expert_names == ["back", "a"]
    assert not any(entry.name.startswith(".") for entry in (tmp_path / "back").iterdir())


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("router", [None, "layers.1.self_attn.q_proj"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_any_adapter(tmp_path, shared, router, top_k):
    """Also with shared experts, which are in the file with their gate, and linears before the router."""
    model = adapted(
        tiny_llama(), num_shared_experts=shared, router_module=router, top_k=top_k, alpha_pattern={"up_proj": 5}
    )
    for expert in (0, 3):
        export_expert(model, expert, tmp_path)
        with alone(model, expert):
            wanted = logits_of(model, tokens())
        torch.testing.assert_close(peft_logits(str(tmp_path), tiny_llama(), tokens()), wanted, **ROUNDING)


def test_conv1d(tmp_path):
    model = adapted(tiny_gpt2())
    export_expert(model, 1, tmp_path)
    with alone(model, 1):
        wanted = logits_of(model, tokens())
    torch.testing.assert_close(peft_logits(str(tmp_path), tiny_gpt2(), tokens()), wanted, **ROUNDING)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"] is True


def test_a_fused_model_and_one_of_several_adapters(tmp_path):
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    model.add_adapter("other", switch_config(target_modules=["v_proj"], init_weights=False, expert_names=list("abcd")))
    with pytest.raises(ValueError, match="adapter_name must be one of default, other"):
        export_expert(model, 0, tmp_path)
    with pytest.raises(ValueError, match="adapter_name='x' is unknown"):
        export_expert(model, 0, tmp_path, adapter_name="x")
    model.fuse_for_inference(strategy="fused")
    export_expert(model, "c", tmp_path, adapter_name="other")
    a = switch_layers(model)["base_model.model.model.layers.1.self_attn.v_proj"].loraswitch_A["other"].weight
    assert torch.equal(
        load_file(tmp_path / WEIGHTS)["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"], a[2]
    )


def test_refused(tmp_path):
    model = adapted(tiny_llama())
    names = adapted(tiny_llama(), expert_names=["a", "b", "c", "d"])
    for one, expert, word in (
        (model, 4, "indices 0 to 3"),
        (model, -1, "expert -1 is unknown"),
        (model, True, "expert True is unknown"),
        (model, "a", "no names, but indices"),
        (names, "e", "the names a, b, c, d"),
        (tiny_llama(), 0, "no LoRA-Switch adapter"),
    ):
        with pytest.raises(ValueError, match=word):
            export_expert(one, expert, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "routed")
    before = {path: path.read_bytes() for path in (tmp_path / "routed").iterdir()}
    with pytest.raises(ValueError, match="routed' holds an adapter that is no plain LoRA"):
        export_expert(model, 0, tmp_path / "routed")
    assert {path: path.read_bytes() for path in (tmp_path / "routed").iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export_expert(model, 0, tmp_path / "file")
    with torch.no_grad():
        for layer in switch_layers(model).values():
            layer.loraswitch_A["default"].weight[1] = 0
            layer.loraswitch_B["default"].weight[1] = 0
            layer.loraswitch_B["default"].weight[2] = float("nan")
    with pytest.raises(ValueError, match="expert 1 is zero on every linear"):
        export_expert(model, 1, tmp_path / "new")
    with pytest.raises(ValueError, match="expert 2: .*NaN"):
        export_expert(model, 2, tmp_path / "new")
