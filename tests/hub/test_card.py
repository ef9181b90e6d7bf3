"""The model card: what it says, that it leaves other people's text alone, and that it survives those who overwrite it.

The load snippet is executed, in a fresh process, by test_hub.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.integrations import install_card_patches
from peft_loraswitch.saving.model_card import BEGIN, END, TAGS, refresh_model_card, update_model_card

pytestmark = pytest.mark.compat


def config(**options) -> LoRASwitchConfig:
    options = {
        "base_model_name_or_path": "someone/base",
        "task_type": "CAUSAL_LM",
        "target_modules": ["v_proj", "q_proj"],
        **options,
    }
    return LoRASwitchConfig(**options)


def card_in(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def section_of(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("loraswitch:begin") == text.count("loraswitch:end") == 1
    return text[text.index(BEGIN) : text.index(END)]


def settings_of(section: str) -> dict[str, str]:
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", section, re.MULTILINE)
    return dict(rows[1:])


def snippets_of(section: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for code in found:
        compile(code, "README.md", "exec")
    return found


def save_weights(folder: Path, **shapes: tuple[int, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def test_new_card_has_metadata_settings_and_snippet(tmp_path):
    layer = "base_model.model.model.layers.0.self_attn.q_proj.loraswitch_"
    save_weights(tmp_path, **{
        f"{layer}A.weight": (4, 2, 6), f"{layer}B.weight": (4, 5, 2), f"{layer}router.weight": (4, 6),
    })  # fmt: skip
    config(r=2, num_experts=4, top_k=1, lora_alpha=16, rank_pattern={"v_proj": 4}).save_pretrained(tmp_path)
    data = card_in(tmp_path).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "someone/base", "text-generation")
    assert data.tags == [*TAGS, "base_model:adapter:someone/base"]
    section = section_of(tmp_path)
    assert settings_of(section) == {
        "base model": "[someone/base](https://huggingface.co/someone/base)",
        "experts": "4, of rank 2",
        "experts per token (top-k)": "1, gates not renormalised to sum 1",
        "lora_alpha": "16 (scaled by lora_alpha / r)",
        "rank_pattern": '`{"v_proj": 4}`',
        "adapted modules": "`q_proj`, `v_proj`",
        "routing layer": "`model.layers.0.self_attn.q_proj`",
        "size": "112 parameters, 1 adapted layers",
    }
    (snippet,) = snippets_of(section)
    assert snippet.startswith("import peft_loraswitch ")
    assert 'AutoModelForCausalLM.from_pretrained("someone/base")' in snippet


def test_card_without_weights_names_the_routing_layer_of_the_config(tmp_path):
    config(use_rslora=True).save_pretrained(tmp_path)
    assert settings_of(section_of(tmp_path))["routing layer"] == "the first adapted linear that runs"
    assert "sqrt(r)" in settings_of(section_of(tmp_path))["lora_alpha"]
    config(router_module="layers.3.self_attn.q_proj").save_pretrained(tmp_path)
    assert settings_of(section_of(tmp_path))["routing layer"] == "`layers.3.self_attn.q_proj`"


def test_saving_again_changes_nothing_and_a_new_config_replaces_the_section(tmp_path):
    config().save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_bytes()
    config().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first
    config(num_experts=3).save_pretrained(tmp_path)
    assert settings_of(section_of(tmp_path))["experts"] == "3, of rank 8"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_own_text_and_metadata_are_kept(tmp_path, newline):
    own = "---\nlicense: mit\ntags:\n- mine\nbase_model: other/base\n---\n"
    own += "\n# My adapter\n\nFirst.\n\n```\n## code\n```\n\n## Use\n\nEnd.\n"
    own = own.replace("\n", newline)
    (tmp_path / "README.md").write_bytes(own.encode())
    for num_experts in (4, 5):
        config(num_experts=num_experts).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_bytes().decode()
    assert set(re.findall("\r?\n|\r", text)) == {newline}
    card = ModelCard(text)
    assert (card.data.license, card.data.base_model) == ("mit", "other/base")
    assert card.data.tags == ["mine", *TAGS, "base_model:adapter:someone/base"]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    # The section stands before the first heading that is not in a code block; nothing else has moved.
    body = own.split("---" + newline)[-1]
    head, tail = body.split("## Use")
    assert before.endswith(head) and after.strip() == ("## Use" + tail).strip()


def test_text_without_metadata_or_headings(tmp_path):
    (tmp_path / "README.md").write_text("Just a note.\n")
    config().save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert card.data.library_name == "peft" and card.text.lstrip().startswith("Just a note.\n\n" + BEGIN)


def test_broken_metadata_is_left_alone_and_reported(tmp_path):
    own = "---\ntags: [unclosed\n---\n# Title\n\n## Part\n"
    (tmp_path / "README.md").write_text(own)
    with pytest.warns(UserWarning, match="metadata of .*README.md cannot be read"):
        config().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\ntags: [unclosed\n---\n# Title\n") and text.endswith("## Part\n")
    assert settings_of(section_of(tmp_path))["experts"] == "8, of rank 8"


@pytest.mark.parametrize("damage", ["no end", "no begin", "twice"])
def test_damaged_markers(tmp_path, damage):
    config(num_experts=3).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    damaged = {"no end": text.replace(END, ""), "no begin": text.replace(BEGIN, ""), "twice": text + "\nMine.\n" + text}
    (tmp_path / "README.md").write_text(damaged[damage] + "\nLast words.\n")
    config(num_experts=5).save_pretrained(tmp_path)
    assert settings_of(section_of(tmp_path))["experts"] == "5, of rank 8"
    assert "Last words." in card_in(tmp_path).text
    assert damage != "twice" or "Mine." in card_in(tmp_path).text


def peft_card(folder: Path) -> None:
    """What PEFT leaves in a folder before it saves the first adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card for Model ID\n")


def test_named_adapters_are_described_in_the_card_of_the_main_folder(tmp_path):
    peft_card(tmp_path)
    config(num_experts=4).save_pretrained(tmp_path)
    for name, experts in (("math", 5), ("code", 6)):
        config(num_experts=experts).save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "README.md").exists()
    config(num_experts=5, base_model_name_or_path="someone/other").save_pretrained(tmp_path / "far")
    section = section_of(tmp_path)
    parts = re.split(r"^### Adapter `(\w+)`.*$", section, flags=re.MULTILINE)
    experts = {name: settings_of(part)["experts"] for name, part in zip(parts[1::2], parts[2::2], strict=True)}
    assert experts == {
        "default": "4, of rank 8", "code": "6, of rank 8", "far": "5, of rank 8", "math": "5, of rank 8",
    }  # fmt: skip
    together, alone = snippets_of(section)
    assert "PeftModel.from_pretrained(base, adapter)" in together
    assert 'load_adapter(adapter, adapter_name="math", subfolder="math")' in together
    assert 'from_pretrained(base, adapter, adapter_name="far", subfolder="far")' in alone
    assert {"base_model:adapter:someone/base", "base_model:adapter:someone/other"} <= set(card_in(tmp_path).data.tags)


def test_folder_with_a_card_of_its_own_is_no_named_adapter(tmp_path):
    peft_card(tmp_path)
    config(num_experts=4).save_pretrained(tmp_path)
    for name in ("checkpoint-10", "run"):
        peft_card(tmp_path / name)
        config(num_experts=5).save_pretrained(tmp_path / name)
        assert "5, of rank 8" in section_of(tmp_path / name)
    config(num_experts=4).save_pretrained(tmp_path)
    assert "5, of rank 8" not in section_of(tmp_path)


def test_card_one_folder_up_that_is_not_of_peft_is_not_touched(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    config().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert BEGIN in (tmp_path / "adapter" / "README.md").read_text()


def test_local_base_model_stays_out_of_the_metadata(tmp_path):
    # PEFT writes the path as base_model and as a tag; the Hub refuses a card with such a base_model.
    base = tmp_path / "base"
    base.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n---\n")
    config(base_model_name_or_path=str(base)).save_pretrained(out)
    data = card_in(out).data
    assert data.base_model is None and data.tags == list(TAGS)
    section = section_of(out)
    assert settings_of(section)["base model"] == f"`{base}` (a local folder)"
    assert f"from_pretrained({json.dumps(str(base))})" in snippets_of(section)[0]


def test_unknown_base_model(tmp_path):
    config(base_model_name_or_path=None).save_pretrained(tmp_path)
    assert settings_of(section_of(tmp_path))["base model"] == "not recorded"
    assert "base = ...  # build the base model" in snippets_of(section_of(tmp_path))[0]


@pytest.mark.parametrize(
    ("options", "mapping", "line"),
    [
        (
            {"task_type": "TOKEN_CLS"},
            None,
            'AutoModelForTokenClassification.from_pretrained("someone/base", num_labels=7)',
        ),
        ({"task_type": "CAUSAL_LM", "revision": "v3"}, None, 'CausalLM.from_pretrained("someone/base", revision="v3")'),
        (
            {"task_type": None},
            {"base_model_class": "BertModel", "parent_library": "transformers.models.bert.modeling_bert"},
            'base = BertModel.from_pretrained("someone/base")',
        ),
        ({"task_type": None}, {"base_model_class": "Mine", "parent_library": "__main__"}, "base = ...  # build"),
        ({"task_type": None}, None, 'AutoModelForCausalLM.from_pretrained("someone/base")'),
    ],
)
def test_snippet_loads_the_class_that_was_trained(tmp_path, options, mapping, line):
    save_weights(tmp_path, **{"base_model.model.classifier.weight": (7, 4), "base_model.model.classifier.bias": (7,)})
    config(**options).save_pretrained(tmp_path, auto_mapping_dict=mapping)
    (snippet,) = snippets_of(section_of(tmp_path))
    assert line in snippet


def test_target_modules_in_a_table_cell(tmp_path):
    config(target_modules=r".*\.(q_proj|v_proj)").save_pretrained(tmp_path)
    assert settings_of(section_of(tmp_path))["adapted modules"] == r"`.*\.(q_proj\|v_proj)`"
    many = [f"model.layers.{i}.mlp.{name}" for i in range(32) for name in ("up_proj", "down_proj")]
    config(target_modules=many).save_pretrained(tmp_path)
    shown = settings_of(section_of(tmp_path))["adapted modules"]
    assert shown == "`model.layers.*.mlp.down_proj`, `model.layers.*.mlp.up_proj`"


def test_full_disk_leaves_the_old_card(tmp_path, monkeypatch):
    config(num_experts=3).save_pretrained(tmp_path)
    before, names = (tmp_path / "README.md").read_bytes(), sorted(os.listdir(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        update_model_card(tmp_path, config(num_experts=5).to_dict())
    assert (tmp_path / "README.md").read_bytes() == before and sorted(os.listdir(tmp_path)) == names


def test_permissions_of_the_card(tmp_path):
    def mode(name):
        return (tmp_path / name).stat().st_mode & 0o777

    config().save_pretrained(tmp_path)
    assert mode("README.md") == mode("adapter_config.json")
    (tmp_path / "README.md").chmod(0o664)
    config(num_experts=3).save_pretrained(tmp_path)
    assert mode("README.md") == 0o664


def test_somebody_elses_card_gets_the_section_again(tmp_path):
    install_card_patches()  # as injecting an adapter does
    config(num_experts=3).save_pretrained(tmp_path)
    ModelCard("---\nlibrary_name: transformers\ntags:\n- trl\n---\n# By a trainer\n").save(tmp_path / "README.md")
    card = card_in(tmp_path)
    assert "# By a trainer" in card.text and settings_of(section_of(tmp_path))["experts"] == "3, of rank 8"
    assert card.data.library_name == "peft" and set(card.data.tags) >= {"trl", *TAGS}


def test_cards_of_other_methods_and_other_files_are_not_touched(tmp_path):
    install_card_patches()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    content = "---\nlibrary_name: peft\n---\n# LoRA\n"
    ModelCard(content).save(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == content
    refresh_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == content
    other = tmp_path / "ours"
    config().save_pretrained(other)
    ModelCard(content).save(other / "NOTES.md")
    assert (other / "NOTES.md").read_text() == content


def test_installing_twice_wraps_once(tmp_path):
    install_card_patches()
    save = ModelCard.save
    install_card_patches()
    assert ModelCard.save is save


def test_a_card_that_cannot_be_renewed_is_reported_and_stops_nothing(tmp_path, monkeypatch):
    install_card_patches()  # as injecting an adapter does
    config().save_pretrained(tmp_path)
    monkeypatch.setattr(
        "peft_loraswitch.saving.model_card._replace_file", lambda *_: (_ for _ in ()).throw(OSError("read-only"))
    )
    with pytest.warns(UserWarning, match="was not renewed: read-only"):
        ModelCard("---\n{}\n---\n# New\n").save(tmp_path / "README.md")
    assert "# New" in (tmp_path / "README.md").read_text()


def test_a_broken_config_elsewhere_in_the_folder_does_no_harm(tmp_path):
    peft_card(tmp_path)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "adapter_config.json").write_text("{truncated")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "adapter_config.json").write_text("[]")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config().save_pretrained(tmp_path)
    assert settings_of(section_of(tmp_path))["routing layer"] == "the first adapted linear that runs"


def test_card_can_be_written_before_the_config(tmp_path):
    update_model_card(tmp_path, config(num_experts=3).to_dict())
    assert settings_of(section_of(tmp_path))["experts"] == "3, of rank 8"
    assert settings_of(section_of(tmp_path))["adapted modules"] == "`q_proj`, `v_proj`"


@pytest.mark.parametrize(("revision", "loaded"), [(None, ""), ("exp/1", ', revision="exp/1"'), ("refs/pr/1", "")])
def test_snippet_names_repository_and_branch(tmp_path, revision, loaded):
    config().save_pretrained(tmp_path)
    assert 'adapter = "."' in snippets_of(section_of(tmp_path))[0]
    refresh_model_card(tmp_path, "someone/adapter", revision)
    (snippet,) = snippets_of(section_of(tmp_path))
    assert 'adapter = "someone/adapter"\n' in snippet
    assert snippet.rstrip().endswith(f"PeftModel.from_pretrained(base, adapter{loaded})")


# ---------------------------------------------------------------------------------------- text that is not what it seems


EVIL = [
    "x\n\n# Heading\n",
    "x\r## Heading",
    "x\u2028# Heading\u2029\x85\x0b\x0c",
    "x`|`y` <script>alert(1)</script> [link](http://evil) ![](http://evil/x.png)",
    "```\n```python\nimport os",
    f"x {END}\n# After {BEGIN}",
    "---\nlicense: evil\n---",
    '"); import os; os.system("evil") #',
    "\x00\x1b[31m\u202eevil",
    "someone/base\n",
    "| a | b |\n|---|---|",
    "|" * 50 + "\\" * 5,
    "y" * 100_000,
]
STRINGS = {
    "base_model_name_or_path": lambda text: text,
    "revision": lambda text: text,
    "router_module": lambda text: text,
    "target_modules": lambda text: [text, "q_proj"],
    "exclude_modules": lambda text: [text],
    "modules_to_save": lambda text: [text],
    "rank_pattern": lambda text: {text: 4},
    "alpha_pattern": lambda text: {text: 4},
    "r": lambda text: text,
    "num_experts": lambda text: text,
    "num_shared_experts": lambda text: text,
    "top_k": lambda text: text,
    "top_p": lambda text: text,
    "lora_alpha": lambda text: text,
    "task_type": lambda text: text,
    "auto_mapping": lambda text: {"base_model_class": text, "parent_library": "transformers.models"},
    "normalize_gates": lambda text: text,
    "trainable": lambda text: text,
    "base_expert": lambda text: text,
    "peft_version": lambda text: text,
}


def bare_text(section: str) -> str:
    """What is left of a section without its code: what Markdown would read as headings, links, tags, table cells."""
    section = re.sub(r"```python\n.*?\n```", "```code```", section, flags=re.DOTALL)
    return re.sub(r"(?<!`)`[^`\n]*`(?!`)", "`code`", section)


@pytest.mark.parametrize("where", ["", "sub"])
@pytest.mark.parametrize("field", STRINGS)
def test_no_string_of_a_configuration_becomes_markdown(field, where, tmp_path):
    """The structure of the card is that of a harmless string's; its code is one snippet that compiles and calls nothing else."""
    peft_card(tmp_path)
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    config().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    structures = set()
    for text in ["harm less", *EVIL]:
        if field == "revision" and len(text) > 4096:  # as none: the same base model as that of the main folder
            continue
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**settings, "auto_mapping": None, field: STRINGS[field](text)}))
        refresh_model_card(tmp_path)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert text.count(BEGIN) == text.count(END) == 1
        section = text[text.index(BEGIN) : text.index(END)]
        assert len(section) < 20_000
        assert all(c.isprintable() or c == "\n" for c in section)
        for code in snippets_of(section):
            kinds = [type(node).__name__ for node in ast.walk(ast.parse(code))]
            assert kinds.count("Import") == 1 and kinds.count("ImportFrom") <= 2 and kinds.count("Call") <= 4
        bare = bare_text(section)
        assert "Heading" not in bare and "script" not in bare and "evil" not in bare
        structures.add(bare)
        data = card_in(tmp_path).data
        assert data.license is None and all("evil" not in str(value) for value in data.to_dict().values())
        assert section.count("```python") == len(snippets_of(section))
    assert len(structures) == 1


@pytest.mark.parametrize("name", ["a`b", "a|b", "a\n# b", "a<!-- loraswitch:end -->b"])
def test_names_of_sub_folders(name, tmp_path):
    peft_card(tmp_path)
    config().save_pretrained(tmp_path)
    config(num_experts=5).save_pretrained(tmp_path / name)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    section = text[text.index(BEGIN) : text.index(END)]
    assert "5, of rank 8" in section and "\n# b" not in section
    assert len(re.findall("^### Adapter", section, re.MULTILINE)) == 2
    assert f"subfolder={json.dumps(name)}".replace("<", "\\u003c").replace("`", "\\u0060") in section


@pytest.mark.parametrize("content", ["[" * 100_000, "{" + '"a":{' * 50_000, "fifo", "folder"])
def test_what_is_no_configuration_does_not_stop_a_save(content, tmp_path):
    peft_card(tmp_path)
    (tmp_path / "junk").mkdir()
    path = tmp_path / "junk" / "adapter_config.json"
    if content == "fifo":
        os.mkfifo(path)
        os.mkfifo(tmp_path / "adapter_model.safetensors")
    elif content == "folder":
        path.mkdir()
    else:
        path.write_text(content)
    config().save_pretrained(tmp_path)
    assert "8, of rank 8" in section_of(tmp_path)


def test_the_card_says_how_much_context_the_router_sees(tmp_path):
    for decay, said in ((0.9, "the tokens so far, each weighted by 0.9^distance"), (0.0, None)):
        config(router_decay=decay).save_pretrained(tmp_path / str(decay))
        save_weights(tmp_path / str(decay), **{})
        update_model_card(str(tmp_path / str(decay)), config(router_decay=decay).to_dict())
        assert settings_of(section_of(tmp_path / str(decay))).get("context of the router") == said
