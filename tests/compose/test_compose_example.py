"""The README's way from LoRAs to one adapter runs as it stands, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from helpers import tiny_llama, tokens
from loras import save_lora

README = Path(__file__).resolve().parents[2] / "README.md"


def test_experts_that_you_have_already(tmp_path, monkeypatch):
    code = re.search(r"<!-- compose example -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base-model")
    for seed, name in enumerate(("maths-lora", "code-lora", "law-lora")):
        save_lora(tmp_path / name, tiny_llama(), seed, r=2 + seed)
    names: dict = {}
    exec(code, names)
    model = names["model"]
    assert model.peft_config["default"].expert_names == ["maths-lora", "law-lora"]
    assert (tmp_path / "law" / "adapter_model.safetensors").exists()
    with torch.no_grad():
        assert model.generate(tokens(), max_new_tokens=3).shape[1] > tokens().shape[1]
