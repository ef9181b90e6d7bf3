"""A folder that holds a backbone's files and an adapter's: what `transformers serve` needs (`recipes/serve.md`)."""

from __future__ import annotations

import shutil

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, LlamaForCausalLM

from helpers import tiny_llama
from peft_loraswitch import LoRASwitchConfig


def test_the_adapter_is_loaded_with_the_backbone(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = LoRASwitchConfig(r=4, num_experts=4, target_modules="all-linear", init_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, tmp_path / "both")

    ids = torch.tensor([[5, 6, 7, 8]])
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    backbone = base(ids).logits
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert AutoConfig.from_pretrained(tmp_path / "both").architectures == ["LlamaForCausalLM"]
    served = LlamaForCausalLM.from_pretrained(tmp_path / "both").eval()(ids).logits
    torch.testing.assert_close(served, expected)
    assert not torch.allclose(served, backbone, atol=1e-3)
