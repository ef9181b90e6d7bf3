"""The Python code in README.md and the pages of docs/ runs, block after block, as a reader would paste it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from loras import save_lora
from recipes.checkout import ROOT
from recipes.tiny_llama import new_model, save, train_tokenizer


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
def test_the_code_in_the_documents_runs(tmp_path, monkeypatch):
    for package in ("trl", "datasets"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b", "The cat sat on the mat."] * 20, vocab_size=300)
    save(new_model(tokenizer), tokenizer, Path("base"))
    names: dict = {"__name__": "readme"}

    def run(code: str) -> None:
        exec(compile(code, "documents", "exec"), names)

    train, *others = blocks("README.md")
    assert train.count('"Qwen/Qwen3-0.6B"') == 1 and len(others) == 6
    save(base := new_model(tokenizer), tokenizer, Path("base-model"))
    for seed, name in enumerate(("maths-lora", "code-lora")):
        save_lora(tmp_path / name, base, seed)
    run(train.replace("Qwen/Qwen3-0.6B", "base"))
    for code in others:
        run(code)

    statistics, *configurations = blocks("docs/training.md")
    run(statistics)
    for code in configurations:
        run(code)

    fused, joined, mixed = blocks("docs/inference.md")
    run(fused)
    run(joined + "\nmodel.unfuse()\n")
    shutil.copytree("adapter", "another-adapter")
    save_and_push, load, several = blocks("docs/adapter_files.md")
    saved, pushed = save_and_push.splitlines()
    assert pushed.startswith("model.push_to_hub(")
    run(saved)
    run(load)
    run(
        several.replace(
            "backbone = ", "batch = tokenizer(['a', 'b', 'c'], return_tensors='pt')\n" + mixed + "backbone = "
        )
    )
    assert not any("loraswitch" in name for name, _ in names["backbone"].named_parameters())
