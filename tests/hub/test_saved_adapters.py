"""Adapters saved by earlier versions load, and compute what they computed then.

The folders `saved_by_<version>` hold adapters as that version wrote them, and the logits that it computed. They are never
written again: a new version adds a folder of its own (`python tests/hub/test_saved_adapters.py FOLDER`, from the root of
a clone).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_loraswitch import LoRASwitchConfig

pytestmark = pytest.mark.compat
HERE = Path(__file__).resolve().parent
FOLDERS = sorted(HERE.glob("saved_by_*"))
TOKENS = torch.tensor([[5, 9, 2, 33, 17, 41, 8], [3, 3, 60, 11, 29, 4, 50]])
ADAPTERS = {
    "paper": {"r": 3, "num_experts": 4, "top_k": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "top_1": {"r": 2, "num_experts": 3, "top_k": 1, "target_modules": ["q_proj", "v_proj"]},
    "deep_router": {
        "r": 2, "num_experts": 3, "top_k": 2, "num_shared_experts": 1, "use_rslora": True, "target_modules": "all-linear",
        "router_module": "layers.1.self_attn.q_proj", "rank_pattern": {r"layers\.0\..*": 4}, "alpha_pattern": {"down_proj": 3},
    },
    "with_head": {"r": 2, "num_experts": 2, "top_k": 2, "target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


def fill(parameters, step: float) -> None:
    """Weights that depend on no random generator, whose stream a version of PyTorch may change."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(parameters)):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((torch.sin(numbers * step + i) * 0.3).view(parameter.shape))


def backbone() -> tf.LlamaForCausalLM:
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    fill(model.named_parameters(), 1.7)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def save(folder: Path) -> None:
    results = {}
    for name, settings in ADAPTERS.items():
        model = get_peft_model(backbone(), LoRASwitchConfig(**settings)).eval()
        fill([(n, p) for n, p in model.named_parameters() if "loraswitch_" in n or "modules_to_save" in n], 2.3)
        model.save_pretrained(str(folder / name))
        (folder / name / "README.md").unlink()
        results[name] = logits(model)
    save_file(results, str(folder / "logits.safetensors"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ADAPTERS)
def test_computes_what_it_did(folder, name):
    expected = load_file(str(folder / "logits.safetensors"))[name]
    model = PeftModel.from_pretrained(backbone(), str(folder / name))
    assert not torch.allclose(logits(backbone()), expected, atol=1e-2), "the adapter does nothing"
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ADAPTERS)
def test_saves_what_it_loaded(folder, name, tmp_path):
    """The same tensors under the same keys: adapters saved today load in the version that wrote the folder."""
    PeftModel.from_pretrained(backbone(), str(folder / name)).save_pretrained(str(tmp_path))
    old, new = (load_file(str(each / "adapter_model.safetensors")) for each in (folder / name, tmp_path))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_there_is_a_folder():
    assert FOLDERS


if __name__ == "__main__":
    save(Path(sys.argv[1]))
