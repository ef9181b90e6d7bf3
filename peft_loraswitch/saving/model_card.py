"""The model card (README.md) of a saved adapter: a section on routing and loading, and the Hub's metadata.

PEFT writes the card before weights and configuration, and three others write it again afterwards: `push_to_hub`
replaces it by the repository's card, `Trainer` and TRL's trainers by their own. So everything here is made from the
files in the folder alone and may run at any time and any number of times: the section between two markers is
replaced, the rest of the text is left as it is, metadata is added to what is there.
"""

from __future__ import annotations

import json
import keyword
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from ..peft_names import NAME, PREFIX

TAGS = ("loraswitch", "lora-switch", "mixture-of-lora-experts")
BEGIN = "<!-- loraswitch:begin: rewritten by peft_loraswitch at every save, put your own text outside -->"
END = "<!-- loraswitch:end -->"
_SECTION = re.compile(r"<!-- loraswitch:begin\b[^\n]*?-->.*?<!-- loraswitch:end -->", re.DOTALL)
_STRAY_MARKER = re.compile(r"<!-- loraswitch:(?:begin|end)\b[^\n]*?-->\r?\n?")

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}


def update_model_card(save_directory: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Write or renew the card for the adapter whose configuration has just been saved in `save_directory`.

    PEFT saves an adapter named other than "default" in a sub-folder of the repository; such an adapter is described in
    the repository's card, one folder up, because the Hub shows no other. A folder with a README.md of its own (for
    example a Trainer checkpoint) is never taken for such a sub-folder.

    Args:
        save_directory: folder that `config.save_pretrained` wrote to.
        config: the fields of the adapter's configuration, used where `adapter_config.json` is not there.
    Raises:
        OSError: the card cannot be written; the previous one is then still complete.
    """
    folder = Path(save_directory)
    root = folder
    if not (folder / "README.md").exists() and _is_peft_card(folder.resolve().parent / "README.md"):
        root = folder.resolve().parent
    adapters = dict(_adapters_in(root))
    subfolder = "" if root == folder else folder.name
    if subfolder not in adapters:
        adapters[subfolder] = json.loads(json.dumps(config, default=_jsonable))
    _write_card(root, adapters)


def refresh_model_card(folder: str | os.PathLike[str], repo_id: str | None = None, revision: str | None = None) -> None:
    """Renew the card of a folder that holds LoRA-Switch adapters; do nothing to any other folder.

    Args:
        folder: with `adapter_config.json`, or sub-folders that have one.
        repo_id, revision: where the folder is uploaded to; the load snippet then names it instead of the folder.
    Raises:
        OSError: the card cannot be written; the previous one is then still complete.
    """
    adapters = dict(_adapters_in(Path(folder)))
    if adapters:
        # A pull request's ref is gone once it is merged, so it is no revision to load from.
        lasting = revision if revision and not revision.startswith("refs/") else None
        _write_card(Path(folder), adapters, repo_id, lasting)


# `push_to_hub` of transformers 5 saves the model and then overwrites its card with the repository's (or an empty one that says
# "transformers"), and TRL's trainers write theirs just before they upload: neither has a hook. So our section is renewed after
# `ModelCard.save`, which writes them all, and before the two ways to upload a folder, which know the repository's name.


def card_saved(original: Callable[..., Any], card: Any, filepath: str | Path, *args: Any, **kwargs: Any) -> Any:
    """In place of `ModelCard.save`, which writes in place, so that a full disk would lose the card of before: the card of one of
    our adapters is written beside it, and then replaces it."""
    path = Path(filepath)
    if path.name != "README.md":
        return original(card, filepath, *args, **kwargs)
    if path.is_file() and any(_adapters_in(path.parent)):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".card-") as folder:
            result = original(card, Path(folder) / path.name, *args, **kwargs)
            os.replace(Path(folder) / path.name, path)
    else:
        result = original(card, filepath, *args, **kwargs)
    _refresh_or_warn(path.parent)
    return result


def model_pushed(
    original: Callable[..., Any],
    model: Any,
    working_dir: str,
    repo_id: str,
    *args: Any,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """In place of the upload within `push_to_hub` of Transformers' and PEFT's models."""
    _refresh_or_warn(working_dir, repo_id, revision)
    return original(model, working_dir, repo_id, *args, revision=revision, **kwargs)


def folder_uploaded(original: Callable[..., Any], api: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `HfApi.upload_folder`, by which trainers upload."""
    if kwargs.get("path_in_repo") in (None, "", ".", "./") and {"repo_id", "folder_path"} <= set(kwargs):
        _refresh_or_warn(kwargs["folder_path"], kwargs["repo_id"], kwargs.get("revision"))
    return original(api, *args, **kwargs)


def _refresh_or_warn(folder: str | os.PathLike[str], repo_id: str | None = None, revision: str | None = None) -> None:
    # A card must never be the reason why trained weights are not saved or uploaded.
    try:
        refresh_model_card(folder, repo_id, revision)
    except Exception as error:
        warnings.warn(f"The LoRA-Switch section of {Path(folder) / 'README.md'} was not renewed: {error}", stacklevel=3)


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _is_peft_card(path: Path) -> bool:
    try:
        return path.is_file() and ModelCard.load(path).data.get("library_name") == "peft"
    except (ValueError, yaml.YAMLError, OSError):
        return False


def _adapters_in(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sub-folder ("" for the folder itself) and configuration of each LoRA-Switch adapter of a repository folder."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for folder in [root, *folders]:
        if folder != root and ((folder / "README.md").exists() or folder.name.startswith(("checkpoint-", "."))):
            continue  # a repository of its own, or the remains of a save that was killed
        path = folder / "adapter_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe would block
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and config.get("peft_type") == NAME:
            yield ("" if folder == root else folder.name), config


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape of the weights beside a configuration, from the file's header; empty if there are none."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError):
        return {}


def _hub_id(name: Any) -> str | None:
    """`name` if it can be a Hub repository; a local folder must not get into metadata, the Hub refuses such a card."""
    # (its check lets a line break at the end pass)
    if not isinstance(name, str) or not name or name != _printable(name) or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _write_card(
    root: Path, adapters: dict[str, dict[str, Any]], repo_id: str | None = None, revision: str | None = None
) -> None:
    path = root / "README.md"
    content = ""
    if path.exists():
        with path.open(encoding="utf-8-sig", newline="") as file:  # newline="": keep the file's own line ends
            content = file.read()
    section = _section(root, adapters, repo_id, revision)
    metadata_ok = True
    if content:
        try:
            card = ModelCard(content) if re.match(r"\s*---\r?\n", content) else ModelCard(f"---\n{{}}\n---\n{content}")
        except (ValueError, yaml.YAMLError) as error:
            warnings.warn(f"The metadata of {path} cannot be read and is left as it is: {error}", stacklevel=4)
            metadata_ok = False
    else:
        card = ModelCard("---\n{}\n---\n\n# LoRA-Switch adapter\n")
    if metadata_ok:
        _update_metadata(card.data, adapters)
        card.text = _insert(card.text, section)
        content = card.content
    else:
        content = _insert(content, section)
    _replace_file(path, content)


def _replace_file(path: Path, content: str) -> None:
    """Write beside and rename: a full disk leaves the old card whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".README.", suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(content)
        # mkstemp makes the file private; a card is as readable as what lies beside it.
        beside = next((file for file in (path, path.with_name("adapter_config.json")) if file.exists()), None)
        os.chmod(name, beside.stat().st_mode & 0o777 if beside else 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _insert(text: str, section: str) -> str:
    """Put the section where one was, else before the first second-level heading, else at the end."""
    newline = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", newline)
    found = _SECTION.search(text)
    if found:
        tail = _STRAY_MARKER.sub("", _SECTION.sub("", text[found.end() :]))
        return text[: found.start()] + section + tail
    text = _STRAY_MARKER.sub("", text)
    fenced, position = False, 0
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif line.startswith("## ") and not fenced:
            return text[:position] + section + newline * 2 + text[position:]
        position += len(line)
    return text.rstrip() + newline * 2 + section + newline


def _update_metadata(data: Any, adapters: dict[str, dict[str, Any]]) -> None:
    bases = list(dict.fromkeys(_text_or_none(c.get("base_model_name_or_path")) for c in adapters.values()))
    hub_bases = [base for base in bases if _hub_id(base)]
    data.library_name = "peft"
    known = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    known = [base for base in known if _hub_id(base)] or hub_bases
    data.base_model = (known[0] if len(known) == 1 else known) or None
    tags = [*(data.tags or []), *TAGS, *(f"base_model:adapter:{base}" for base in hub_bases)]
    prefix = "base_model:adapter:"
    tags = [tag for tag in tags if not tag.startswith(prefix) or _hub_id(tag.removeprefix(prefix))]
    data.tags = list(dict.fromkeys(tags))
    if not data.pipeline_tag:
        data.pipeline_tag = next((_PIPELINES.get(str(c.get("task_type"))) for c in adapters.values()), None)


def _section(root: Path, adapters: dict[str, dict[str, Any]], repo_id: str | None, revision: str | None) -> str:
    lines = [
        BEGIN,
        "## LoRA-Switch adapter",
        "",
        "One router picks a few LoRA experts for every token, once, and every adapted linear layer uses that choice. "
        "Loading needs the `peft_loraswitch` package beside PEFT: without `import peft_loraswitch`, PEFT does not know "
        f"the method and stops with `KeyError: '{NAME}'`.",
    ]
    for subfolder, config in adapters.items():
        if len(adapters) > 1 or subfolder:
            where = f"sub-folder {_code(subfolder)}" if subfolder else "main folder"
            lines += ["", f"### Adapter {_code(subfolder or 'default')} ({where})"]
        lines += ["", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in _settings(config, _shapes(root / subfolder))]
    for snippet in _snippets(root, adapters, repo_id, revision):
        lines += ["", "```python", snippet, "```"]
    return "\n".join([*lines, END])


def _printable(value: Any) -> str:
    """`value` as text of one line: whatever a configuration holds, it must not become a line, a heading or a tag of the
    card. Line breaks and other control characters are written as escapes, and long texts shortened."""
    text = str(value)
    if len(text) > 2000:
        text = f"{text[:1500]} ... {text[-200:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _code(value: Any) -> str:
    """A value, or a list of them, in a Markdown table cell or heading."""
    items = value if isinstance(value, (list, tuple)) else [value]
    escaped = (_printable(item).replace("|", "\\|").replace("`", "'").replace("<!--", "<! --") for item in items)
    return ", ".join(f"`{item}`" for item in escaped)


def _number(value: Any) -> str:
    return str(value) if isinstance(value, (int, float)) else _code(value)


def _literal(text: Any) -> str:
    """A string in the Python code of the card; without a character that could end the code or this section."""
    return json.dumps(text).replace("<", "\\u003c").replace("`", "\\u0060")


def _settings(config: dict[str, Any], shapes: dict[str, list[int]]) -> Iterator[tuple[str, str]]:
    base = config.get("base_model_name_or_path")
    link = f"[{base}](https://huggingface.co/{base})" if _hub_id(base) else f"{_code(base)} (a local folder)"
    yield "base model", link if base else "not recorded"
    yield "experts", f"{_number(config.get('num_experts'))}, of rank {_number(config.get('r'))}"
    if config.get("expert_names"):
        yield "names of the experts", _code(config["expert_names"])
    shared = config.get("num_shared_experts")
    if shared:
        alone = "; the adapted modules before the routing layer have these alone" if config.get("router_module") else ""
        yield "shared experts", f"{_number(shared)} more, used by every token{alone}"
    if config.get("base_expert"):
        yield "base expert", "a token may choose to be left as the base model has it"
    normalize = config.get("normalize_gates")
    if normalize is None:
        normalize = config.get("top_k") != 1
    gates = f"gates {'' if normalize else 'not '}renormalised to sum 1"
    if normalize and config.get("top_k") == 1:
        gates = "with gate 1"
    share = config.get("top_p", 1.0)
    fewer = f", or the first whose probabilities sum to {_number(share)} (top-p)" if share != 1 else ""
    yield "experts per token (top-k)", f"{_number(config.get('top_k'))}{fewer}, {gates}"
    scale = "lora_alpha / sqrt(r)" if config.get("use_rslora") else "lora_alpha / r"
    yield "lora_alpha", f"{_number(config.get('lora_alpha'))} (scaled by {scale})"
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            yield name, _code(json.dumps(config[name], sort_keys=True))
    targets = config.get("target_modules")
    if isinstance(targets, list):
        # "all-linear" is saved as the full name of every layer: one line per kind of layer is enough to read.
        targets = [_printable(name) for name in targets]
        targets = sorted(targets if len(targets) <= 12 else {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in targets})
    yield "adapted modules", _code(targets)
    routers = [name.split(".loraswitch_router.")[0] for name in shapes if ".loraswitch_router." in name]
    if routers:
        yield "routing layer", _code([name.removeprefix(PREFIX) for name in sorted(routers)])
    else:
        chosen = config.get("router_module")
        yield "routing layer", _code(chosen) if chosen else "the first adapted linear that runs"
    if config.get("router_decay"):
        yield "context of the router", f"the tokens so far, each weighted by {_number(config['router_decay'])}^distance"
    adapted = sum(".loraswitch_A." in name for name in shapes)
    if adapted:
        size = sum(math.prod(shape) for shape in shapes.values())
        yield "size", f"{size:,} parameters, {adapted} adapted layers"
    if config.get("modules_to_save"):
        yield "trained in full", _code(config["modules_to_save"])


def _model_class(config: dict[str, Any]) -> tuple[str, str] | None:
    """Module and name of the class that loads the base model; None if it is not one that transformers knows."""
    task = config.get("task_type")
    if isinstance(task, str) and task in _AUTO_CLASSES:
        return "transformers", _AUTO_CLASSES[task]
    mapping = config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    if str(mapping.get("parent_library", "transformers")).split(".")[0] != "transformers":
        return None
    # Without task type and mapping (transformers' own `add_adapter` records neither) most adapters are language models.
    name = str(mapping.get("base_model_class", "AutoModelForCausalLM"))
    return ("transformers", name) if name.isidentifier() and not keyword.iskeyword(name) else None


def _num_labels(config: dict[str, Any], shapes: dict[str, list[int]]) -> int | None:
    """Rows of the saved classification head: the base model must be loaded with as many labels."""
    if config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [shape for name, shape in shapes.items() if re.search(r"\b(score|classifier|out_proj)\.weight$", name)]
    heads = [shape for shape in heads if len(shape) == 2]
    return heads[-1][0] if heads else None


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 4096 else None


def _snippets(
    root: Path, adapters: dict[str, dict[str, Any]], repo_id: str | None, revision: str | None
) -> Iterator[str]:
    """One piece of code per base model; it runs as it stands, in the adapter's folder if no repository is known."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for subfolder, config in adapters.items():
        labels = _num_labels(config, _shapes(root / subfolder))
        base, base_revision = (_text_or_none(config.get(name)) for name in ("base_model_name_or_path", "revision"))
        key = (base, base_revision, _model_class(config), labels)
        groups.setdefault(key, {})[subfolder] = config
    where = f"adapter = {_literal(repo_id)}"
    if repo_id is None:
        where = 'adapter = "."  # this folder; from elsewhere its path, or the name of its Hub repository'
    at_revision = f", revision={_literal(revision)}" if repo_id and revision else ""
    for (base, base_revision, model_class, labels), members in groups.items():
        load_base = "base = ...  # build the base model as it was built for training"
        lines = ["import peft_loraswitch  # registers the method with PEFT", "from peft import PeftModel"]
        if base and model_class:
            lines.append(f"from {model_class[0]} import {model_class[1]}")
            options = f", revision={_literal(base_revision)}" if base_revision else ""
            options += f", num_labels={labels}" if labels else ""
            load_base = f"base = {model_class[1]}.from_pretrained({_literal(base)}{options})"
        lines += ["", where, load_base]
        for index, subfolder in enumerate(members):
            name = _literal(subfolder or "default")
            options = at_revision + (f", subfolder={_literal(subfolder)}" if subfolder else "")
            if index == 0:
                named = f", adapter_name={name}" if subfolder else ""
                lines.append(f"model = PeftModel.from_pretrained(base, adapter{named}{options})")
            else:
                lines.append(f"model.load_adapter(adapter, adapter_name={name}{options})")
        if len(members) > 1:
            lines.append(f"model.set_adapter({_literal(list(members)[0] or 'default')})  # or another of them")
        yield "\n".join(lines)
