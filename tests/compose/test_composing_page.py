"""The code of docs/composing.md runs, block after block, on a tiny model and tiny LoRAs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from helpers import router_layer
from loras import save_lora
from paths import ROOT
from recipes.tiny_llama import new_model, save, train_tokenizer


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "composing.md").read_text(encoding="utf-8")
    from_texts, from_weights, report = re.findall(r"(?ms)^```python\n(.*?)^```$", page)
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer([page] * 3, vocab_size=300)
    backbone = new_model(tokenizer)
    save(backbone, tokenizer, Path("base-model"))
    for seed, name in enumerate(("maths-lora", "code-lora")):
        save_lora(tmp_path / name, backbone, seed, base_model_name_or_path="base-model")
    names: dict = {}
    exec(from_texts, names)
    by_texts = router_layer(names["model"]).loraswitch_router["default"].weight.detach().clone()
    exec(from_weights, names)
    assert not torch.equal(router_layer(names["model"]).loraswitch_router["default"].weight, by_texts)
    exec(report, names)
    assert "maths-lora" in capsys.readouterr().out
    assert (tmp_path / "routes.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
