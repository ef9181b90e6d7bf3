"""Writes docs/api.md, the page of every public name, from the docstrings.

python docs/api.py            # write it
python docs/api.py --check    # exit with 1 if it is not what the docstrings say
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_loraswitch
from peft_loraswitch import LoRASwitchConfig, LoRASwitchModel

PAGE = Path(__file__).resolve().parent / "api.md"
# What users call on the model that `get_peft_model` returns; PEFT passes these calls on to the tuner.
MODEL_METHODS = ("fuse_for_inference", "unfuse", "refresh_fused", "router_stats", "record_routing", "routing_report")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")


def docstring(thing: Any) -> str:
    """A docstring as Markdown: sections in bold, their entries as lists, code as it is."""
    text = inspect.getdoc(thing) or ""
    lines, section = [], ""
    for line in text.splitlines():
        heading = re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        if heading:
            section = heading[1]
            lines += ["", f"**{section}**", ""]
        elif line.startswith("    ") and section and section != "Example":
            entry = re.fullmatch(r"    (\w[\w*, ]*): (.*)", line)
            lines.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"  {line.strip()}")
        else:
            lines.append(line.removeprefix("    ") if section == "Example" else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def signature(function: Callable[..., Any], name: str) -> str:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    result = inspect.signature(function).return_annotation
    arrow = "" if result is inspect.Signature.empty else f" -> {result}"
    return f"{name}({', '.join(map(declaration, parameters))}){arrow}"


def declaration(parameter: inspect.Parameter) -> str:
    """As it stands in the code: annotations are text there (`from __future__ import annotations`), and need no quotes."""
    if not isinstance(parameter.annotation, str):
        return str(parameter)
    default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {parameter.annotation}{default}"


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    assert field.default_factory is not dataclasses.MISSING
    return f"`{field.default_factory()!r}`"


def config_fields() -> str:
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(LoRASwitchConfig):
        if "help" in field.metadata and field.name in LoRASwitchConfig.__annotations__:
            kind = str(field.type).replace("|", "\\|")
            meaning = field.metadata["help"].replace("|", "\\|")
            rows.append(f"| `{field.name}` | `{kind}` | {default_of(field)} | {meaning} |")
    return "\n".join(rows)


def page() -> str:
    parts = [
        "# API",
        f"Made from the docstrings of version {peft_loraswitch.__version__} by `python docs/api.py`; do not edit.",
        "## Methods of the model",
        "`get_peft_model` and `PeftModel.from_pretrained` return a `PeftModel`; with a LoRA-Switch adapter it also has:",
    ]
    for name in MODEL_METHODS:
        method = getattr(LoRASwitchModel, name)
        parts += [f"### `model.{signature(method, name)}`", docstring(method)]
    parts.append("## Names of the package")
    for name in peft_loraswitch.__all__:
        thing = getattr(peft_loraswitch, name)
        title = name if inspect.isclass(thing) else signature(thing, name)
        parts += [f"### `{title}`", docstring(thing)]
        if thing is LoRASwitchConfig:
            parts.append(config_fields())
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            print(f"{PAGE} is not what the docstrings say: run python docs/api.py")
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
