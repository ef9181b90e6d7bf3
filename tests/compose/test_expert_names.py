"""`expert_names`: checked, saved only where they are, and shown wherever experts are counted."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from helpers import adapted, switch_config, tiny_llama, tokens
from loaders import configure
from peft_loraswitch import add_expert
from unchanged import unchanged

NAMES = ["maths", "code", "law", "poems"]


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["a", "b", "c"], "3 names for num_experts=4"),
        (["a", "b", "c", "a"], "'a'.*once"),
        (["a", "b", "c", ""], "expert_names"),
        (["a", "b", "c", " "], "printable"),
        (["a", "b", "c", "d\n"], "printable"),
        (["a", "b", "c", "d" * 201], "200"),
        ("abcd", "expert_names='abcd' must be a list"),
        ({"a", "b", "c", "d"}, "order"),
        ([], "0 names"),
    ],
)
def test_what_is_no_list_of_names_is_refused(names, word):
    with pytest.raises(ValueError, match=word):
        switch_config(expert_names=names)


def test_no_expert_has_the_name_of_the_base_expert(tmp_path):
    names = ["base", "code", "law", "poems"]
    assert switch_config(expert_names=names).expert_names == names  # where there is none
    message = "holds 'base', which with base_expert=True is the name of the choice to add nothing: give that expert another name"
    with pytest.raises(ValueError, match=f"expert_names {message}"):
        switch_config(expert_names=names, base_expert=True)
    model = adapted(tiny_llama(), expert_names=NAMES, base_expert=True)
    with unchanged(model), pytest.raises(ValueError, match=f"^name {message}"):
        add_expert(model, name="base")
    model.save_pretrained(tmp_path)
    configure(expert_names=names)(tmp_path)  # by hand
    with pytest.raises(ValueError, match=f"expert_names {message}"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_they_are_saved_only_where_they_are(tmp_path):
    switch_config().save_pretrained(tmp_path)
    assert "expert_names" not in json.loads((tmp_path / "adapter_config.json").read_text())
    switch_config(expert_names=NAMES).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["expert_names"] == NAMES
    assert "`maths`, `code`, `law`, `poems`" in (tmp_path / "README.md").read_text()


def test_statistics_show_them(tmp_path):
    adapted(tiny_llama(), expert_names=NAMES).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with model.record_routing() as recorded, torch.no_grad():
        model(tokens())
    assert recorded.summary()["expert_names"] == NAMES == model.router_stats()["expert_names"]
    assert "expert_names" not in adapted(tiny_llama()).router_stats()


def test_weights_for_experts_of_other_names_are_refused(tmp_path):
    adapted(tiny_llama(), expert_names=NAMES, seed=5).save_pretrained(tmp_path)
    model = adapted(tiny_llama(), expert_names=NAMES)
    configure(expert_names=NAMES[::-1])(tmp_path)
    with unchanged(model), pytest.raises(ValueError, match=r"expert_names=\['poems'"):
        model.load_adapter(tmp_path, "default")
    configure(expert_names=NAMES)(tmp_path)
    model.load_adapter(tmp_path, "default")
