"""The Python that the documentation shows runs, in the order in which a reader meets it.

README.md is one session: what a block defines, the next ones use. Three things are other than a reader has them, and nothing
else: a tiny model takes the place of the one that is named, a few rows that of the data set, and where the text speaks of a Hub
repository there is a folder. `push_to_hub` has a Hub in tests/hub/test_hub.py; here it is only looked up. `fuse_for_inference`
runs without kernels where there is no GPU, as it does for a reader.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

from helpers import adapted, padded, switch_layers, tiny_llama
from paths import ROOT
from peft_loraswitch import LoRASwitchConfig, record_routing

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


def test_there_are_snippets():
    assert sum(snippet.page == "README.md" for snippet in SNIPPETS) >= 7
    assert sum(snippet.page == "docs/api.md" for snippet in SNIPPETS) >= 2
    assert sum(snippet.text.startswith("LoRASwitchConfig(") for snippet in SNIPPETS) >= 2


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


def tiny(folder: Path) -> Any:
    """A backbone in a folder, with a tokenizer beside it. Returns the tokenizer."""
    from trainer_tools import tokenizer

    made = tokenizer()
    tiny_llama().save_pretrained(folder)
    made.save_pretrained(folder)
    return made


def test_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    trl = pytest.importorskip("trl", reason="TRL is an optional dependency")
    import datasets

    from trainer_tools import sentence

    monkeypatch.chdir(tmp_path)
    tokenizer = tiny(tmp_path / "base")
    rows = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": sentence(n, 4)}, {"role": "assistant", "content": sentence(n + 9, 4)}]}
         for n in range(2)]
    )  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 1,
        "logging_steps": 1,
    }
    make = trl.SFTConfig
    monkeypatch.setattr(trl, "SFTConfig", lambda **given: make(**settings, **given))
    batch = {name: value for name, value in padded([5, 4, 5]).items() if name != "labels"}
    batch |= {"max_new_tokens": 2, "pad_token_id": 0}
    names: dict[str, Any] = {"tokenizer": tokenizer, "batch": batch, "LoRASwitchConfig": LoRASwitchConfig}

    ran = []
    for snippet in SNIPPETS:
        if snippet.page != "README.md":
            continue
        text = snippet.text.replace("meta-llama/Llama-3.1-8B", "base")
        if "push_to_hub" in text:
            (call,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            assert callable(getattr(PeftModel, call.func.attr)) and len(call.args) == 1  # type: ignore[attr-defined]
            continue
        if "model.save_pretrained" in text:
            names["model"] = names["trainer"].model
            names["model"].train()(**{"input_ids": batch["input_ids"]})  # so that there are statistics
        if "another-adapter" in text:
            adapted(tiny_llama(), num_experts=3, r=2, top_k=1).save_pretrained(tmp_path / "another-adapter")
        if "fuse_for_inference" in text:
            names["model"] = AutoPeftModelForCausalLM.from_pretrained("adapter")
        snippet._replace(text=text).run(names)
        ran.append(snippet)
    assert len(ran) >= 6
    state = names["trainer"].state.log_history
    assert any("router/entropy" in entry for entry in state), "the callback logs what the comment says"
    assert len(eval(capsys.readouterr().out.strip().splitlines()[-1])) == 8, "the load of eight experts is printed last"
    assert not any("loraswitch" in name for name, _ in names["backbone"].named_parameters())


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.text.startswith("LoRASwitchConfig(")], ids=str)
def test_configurations_alone_fit_a_model(snippet):
    """As a block they are only validated; here they adapt a model with as many blocks as they speak of."""
    config = eval(snippet.text, {"LoRASwitchConfig": LoRASwitchConfig})
    config.target_modules = config.target_modules or "all-linear"
    model = get_peft_model(tiny_llama(num_hidden_layers=6), config)
    assert torch.isfinite(model(**padded([5, 3])).loss)
    ranks = {layer.loraswitch_A["default"].weight.shape[1] for layer in switch_layers(model).values()}
    assert ranks == {config.r, *config.rank_pattern.values()}, "the patterns name linears that are there"


@pytest.mark.parametrize("snippet", [each for each in SNIPPETS if each.page != "README.md"], ids=str)
def test_examples_of_the_other_pages_run(snippet, capsys):
    """Each by itself, as its docstring is read: with a model, a batch, and the package's names."""
    model: Any = adapted(tiny_llama()) if "get_peft_model" not in snippet.text else tiny_llama()
    batch = {"input_ids": padded([5, 4])["input_ids"], "max_new_tokens": 2, "pad_token_id": 0}
    names = {"model": model, "batch": batch, "record_routing": record_routing}
    snippet.run(names)
    if "print" in snippet.text:
        assert capsys.readouterr().out.strip()
    else:
        assert isinstance(names["model"], PeftModel)
