"""Python that the documentation shows: every block compiles, and what it imports and sets exists. README.md and the pages that go
on from it are run from top to bottom by test_readme.py.
"""

from __future__ import annotations

import ast
import re
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers import adapted, padded, switch_layers, tiny_llama
from paths import ROOT
from peft_loraswitch import LoRASwitchConfig, record_routing
from trainer_tools import tokenizer

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


class Snippet(NamedTuple):
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def run(self, names: dict[str, Any]) -> None:
        """With the file and line of the page in a traceback."""
        exec(compile("\n" * self.line + self.text, str(ROOT / self.page), "exec"), names)


def snippets() -> list[Snippet]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"(?ms)^```py(?:thon)?\n(.*?)^```$", text):
            line = text.count("\n", 0, block.start()) + 1
            found.append(Snippet(page.relative_to(ROOT).as_posix(), line, block[1]))
    return found


SNIPPETS = snippets()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_what_it_imports_and_sets_exists(snippet):
    """Of every snippet, wherever it is and whatever it needs: it compiles, its imports are found, and the fields that it sets of
    a configuration are accepted."""
    for node in ast.walk(ast.parse(snippet.text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if "trl" in ast.unparse(node) or "datasets" in ast.unparse(node):
                pytest.importorskip("trl", reason="TRL is an optional dependency")
            exec(ast.unparse(node), {})
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "LoRASwitchConfig" and node.keywords:
            eval(ast.unparse(node), {"LoRASwitchConfig": LoRASwitchConfig})


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.text.startswith("LoRASwitchConfig(")], ids=str)
def test_configurations_alone_fit_a_model(snippet):
    """As a block they are only validated; here they adapt a model with as many blocks as they speak of."""
    config = eval(snippet.text, {"LoRASwitchConfig": LoRASwitchConfig})
    config.target_modules = config.target_modules or "all-linear"
    model = get_peft_model(tiny_llama(num_hidden_layers=6), config)
    assert torch.isfinite(model(**padded([5, 3])).loss)
    ranks = {layer.loraswitch_A["default"].weight.shape[1] for layer in switch_layers(model).values()}
    assert ranks == {config.r, *config.rank_pattern.values()}, "the patterns name linears that are there"


@pytest.mark.parametrize(
    "snippet", [each for each in SNIPPETS if each.page == "docs/api.md" and "you/" not in each.text], ids=str
)
def test_examples_of_the_api_page_run(snippet, capsys, tmp_path, monkeypatch):
    """Each by itself (but for one that names repositories of the Hub), as its docstring is
    read: with a model, a batch, and the package's names."""
    model: Any = adapted(tiny_llama()) if "get_peft_model" not in snippet.text else tiny_llama()
    batch = {"input_ids": padded([5, 4])["input_ids"], "max_new_tokens": 2, "pad_token_id": 0}
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "batch": batch, "record_routing": record_routing, "tokenizer": tokenizer()}
    snippet.run(names)
    if "print" in snippet.text:
        assert capsys.readouterr().out.strip()
    else:
        assert isinstance(names["model"], PeftModel)
