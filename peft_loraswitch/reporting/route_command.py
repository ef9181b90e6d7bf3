"""`python -m peft_loraswitch route ADAPTER --text ...`: an adapter from a folder or the Hub, and where it sends texts."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..loading.weights_file import find_file, read_config_file
from ..patterns import shown
from ..peft_names import NAME
from .report import routing_report

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub name of a LoRA-Switch adapter")
    parser.add_argument("--text", action="append", default=[], help="a text to route; may be given several times")
    parser.add_argument("--file", action="append", default=[], help="a file that holds one text; also several times")
    parser.add_argument("--html", metavar="FILE", help="also write a web page")
    parser.add_argument("--base-model", metavar="NAME", help="folder or Hub name; default: what the adapter names")
    parser.add_argument("--device", help="such as cpu or cuda:0; default: cuda if there is one")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text that are read; default: all")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 2, and one line on the standard error, where something does not fit."""
    try:
        texts = _texts(arguments)
        model, tokenizer = load(arguments.adapter, arguments.base_model, arguments.device)
        report = routing_report(model, texts, tokenizer, max_length=arguments.max_length)
        print(report)
        if arguments.html:
            report.save(arguments.html)
            print(f"written: {arguments.html}", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _texts(arguments: argparse.Namespace) -> list[str]:
    texts = list(arguments.text)
    for name in arguments.file:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--file {name} is not UTF-8: {error}") from error
        if not text:
            raise ValueError(f"--file {name} is empty.")
        texts.append(text)
    if not texts:
        raise ValueError("there is nothing to route: give --text or --file.")
    if "" in texts:
        raise ValueError("--text is empty.")
    return texts


def load(adapter: str, base_model: str | None, device: str | None) -> tuple[PeftModel, Any]:
    """The adapter on its backbone, in evaluation mode, and the tokenizer: the adapter's own, or else the backbone's.

    Raises:
        ValueError: what is missing or does not fit, with the file, field or argument.
        OSError: the backbone cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:  # the second: torch was built without it
            raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    path = find_file(adapter, CONFIG_NAME)
    if path is None:
        raise ValueError(f"{adapter} is no adapter: there is no {CONFIG_NAME}, neither in a folder nor on the Hub.")
    fields = read_config_file(path)
    if fields.get("peft_type") != NAME:
        raise ValueError(f"{path}: peft_type={shown(fields.get('peft_type'))} is not {NAME}: only its adapters route.")
    base = base_model or fields.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path}: base_model_name_or_path is empty: give --base-model.")
    revision = fields.get("revision") if base_model is None else None
    revision = {} if revision is None else {"revision": revision}
    try:
        config = AutoConfig.from_pretrained(base, **revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base model {shown(base)} cannot be loaded; --base-model names another place. {error}"
        ) from error
    backbone = _class_for(fields, config).from_pretrained(base, dtype="auto", **revision)
    backbone.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = PeftModel.from_pretrained(backbone, adapter).eval()
    own = _has_tokenizer(adapter)
    try:
        return model, AutoTokenizer.from_pretrained(adapter if own else base, **({} if own else revision))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"There is no tokenizer at {adapter if own else base}: save one there. {error}") from error


def _has_tokenizer(adapter: str) -> bool:
    try:
        return find_file(adapter, "tokenizer_config.json") is not None
    except LocalEntryNotFoundError:  # without a network, what is in the cache is all there is
        return False


def _class_for(fields: dict[str, Any], config: Any) -> Any:
    """The class of the backbone: by the adapter's task; without one, the class that it was made on, or the base model's own."""
    import transformers

    task = fields.get("task_type")
    if task in AUTO_CLASSES:
        return getattr(transformers, AUTO_CLASSES[task])
    made_on = fields.get("auto_mapping") or {}
    library, name = str(made_on.get("parent_library")), str(made_on.get("base_model_class"))
    if library.split(".")[0] == "transformers":
        found = getattr(importlib.import_module(library), name, None)
        if found is not None:
            return found
    name = (config.architectures or ["AutoModel"])[0]
    return getattr(transformers, name, transformers.AutoModel)
