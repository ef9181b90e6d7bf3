"""The README's way from LoRAs to one adapter runs as it stands, on tiny models."""

from __future__ import annotations

import copy
import re
from pathlib import Path

from loras import save_lora
from peft_loraswitch import add_expert, export_expert, remove_expert
from recipes.tiny_llama import new_model, save, train_tokenizer

README = Path(__file__).resolve().parents[2] / "README.md"


def test_from_loras_to_generated_text(tmp_path, monkeypatch, capsys):
    code = re.search(r"<!-- compose example -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b", "Solve 3x + 4 = 10 for x."] * 20, vocab_size=300)
    base = new_model(tokenizer)
    save(base, tokenizer, Path("base-model"))
    for seed, name in enumerate(("maths-lora", "code-lora", "law-lora")):
        save_lora(tmp_path / name, copy.deepcopy(base), seed, r=2 + seed)
    names: dict = {}
    exec(code, names)
    model = names["routed"]
    assert (tmp_path / "routed" / "adapter_model.safetensors").exists()
    assert capsys.readouterr().out.strip()
    # what the page says of later
    add_expert(model, "law-lora")
    export_expert(model, "law-lora", "law")
    remove_expert(model, "code-lora")
    assert model.peft_config["default"].expert_names == ["maths-lora", "law-lora"]
    assert (tmp_path / "law" / "adapter_model.safetensors").exists()
