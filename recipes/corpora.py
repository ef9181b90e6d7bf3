"""Real text that is already on any machine that can run the recipes: nothing is downloaded, nothing is made up.

The base text is the standard library's Python source: every interpreter carries megabytes of it, written by many hands. The
domains for the adaptation look nothing like it, and the base model never sees them:

=========  =======================================================  ==================================================
domain     what                                                     where it comes from
=========  =======================================================  ==================================================
manual     the language reference in English, as `help()` shows it  `pydoc_data`, part of Python
cpp        hand-written C++ headers                                 `torch/include`, part of every torch wheel
licences   legal English, each paragraph once                       the licence files of the installed packages
unicode    a table: code point, category, name                      `unicodedata`, compiled into Python
fonts      tables of glyph widths, boxes and kerning pairs          Adobe font metrics, part of every matplotlib wheel
=========  =======================================================  ==================================================

The choice is deterministic: files are ordered by a checksum of their name, and held-out text comes from other files than
training text (other font families, other Unicode ranges). Other versions of Python, torch or matplotlib carry slightly other
text, so losses differ a little between environments.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sysconfig
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

# Code points whose names are a word and a number: thousands of lines with nothing to learn.
COMPUTED_NAMES = ("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")


@dataclass(frozen=True)
class Document:
    """One file, or one self-contained part of a larger one. `group` keeps near-copies on one side of the split."""

    name: str
    text: str
    group: str = ""


def checksum(name: str) -> int:
    """What files are ordered by: mixes folders, and is the same in every process."""
    return zlib.crc32(name.encode())


def _read(paths: list[Path], root: Path, smallest: int, largest: int) -> list[Document]:
    """The files of a useful size as documents, in an order that mixes directories but never changes."""
    documents = []
    for path in paths:
        if smallest <= path.stat().st_size <= largest:
            documents.append(Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace")))
    return sorted(documents, key=lambda document: (checksum(document.name), document.name))


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the corpora need the package {name!r}: pip install {name}")
    return Path(spec.origin).parent


def standard_library() -> list[Document]:
    """Python source of the standard library, without its tests and without generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
    paths = [path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts)]
    return _read(paths, root, smallest=3_000, largest=90_000)


def manual() -> list[Document]:
    """The topics of Python's own `help()`: English prose with short examples."""
    from pydoc_data.topics import topics

    return [Document(name, topics[name]) for name in sorted(topics, key=lambda name: (checksum(name), name))]


def cpp() -> list[Document]:
    """C++ headers that people wrote; `ATen/ops` and its like are generated and left out."""
    root = _package_folder("torch") / "include"
    paths = [path for part in ("c10", "ATen/core", "ATen/native", "torch/csrc") for path in (root / part).rglob("*.h")]
    return _read(paths, root, smallest=2_000, largest=60_000)


def licences() -> list[Document]:
    """Licence texts of the installed packages. Many are copies of each other, so each paragraph is kept only once."""
    paths: dict[str, Path] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or []:
            if ".dist-info" in file.parts[0] and re.match(r"(?i)(licen[sc]e|copying|notice)", file.name):
                paths.setdefault(file.as_posix(), Path(str(distribution.locate_file(file))))
    files = [(name, path) for name, path in paths.items() if path.is_file() and path.stat().st_size >= 400]
    seen: set[str] = set()
    documents = []
    for name, path in sorted(files, key=lambda file: (checksum(file[0]), file[0])):
        kept = []
        for paragraph in re.split(r"\n\s*\n", path.read_text("utf-8", errors="replace")):
            key = re.sub(r"\W+", " ", paragraph).strip().lower()
            if len(key) > 40 and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if sum(map(len, kept)) > 400:
            documents.append(Document(name, "\n\n".join(kept)))
    return documents


def unicode_table() -> list[Document]:
    """`U+00E9 Ll LATIN SMALL LETTER E WITH ACUTE`, one document per 128 code points, without computed names."""
    documents = []
    for start in range(0, 0x20000, 128):
        lines = []
        for code in range(start, start + 128):
            name = unicodedata.name(chr(code), "")
            if name and not name.startswith(COMPUTED_NAMES):
                lines.append(f"U+{code:04X} {unicodedata.category(chr(code))} {name}")
        if len(lines) > 32:
            documents.append(Document(f"U+{start:04X}", "\n".join(lines) + "\n"))
    return sorted(documents, key=lambda document: (checksum(document.name), document.name))


def fonts() -> list[Document]:
    """Adobe font metrics. Bold and oblique repeat numbers of their family, so a family stays on one side of the split."""
    root = _package_folder("matplotlib") / "mpl-data" / "fonts" / "afm"
    documents = _read(list(root.glob("*.afm")), root, smallest=4_000, largest=90_000)
    return [Document(document.name, document.text, group=document.name[:3]) for document in documents]


DOMAINS: dict[str, Callable[[], list[Document]]] = {
    "manual": manual,
    "cpp": cpp,
    "licences": licences,
    "unicode": unicode_table,
    "fonts": fonts,
}


def split(documents: list[Document], held_out: float = 0.2) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, at least one group each; whole groups go to one side.

    Args:
        documents: at least two different groups (a document without a group is one by itself).
        held_out: share of the text, counted in characters, that is kept away from training.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.group or document.name, []).append(document)
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} group of documents cannot be split into training and held-out text")
    wanted = held_out * sum(len(document.text) for document in documents)
    *rest, keep = sorted(groups, key=lambda name: (checksum("split " + name), name))  # one group always trains
    train, test = list(groups[keep]), []
    for name in rest:
        enough = sum(len(document.text) for document in test) >= wanted
        (train if enough else test).extend(groups[name])
    return train, test


def token_blocks(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int, per_document: int = 16
) -> list[list[int]]:
    """`count` blocks of exactly `length` token ids from the start of each document, at most `per_document` from one.

    Each document starts with the end-of-text token, so that the model knows where one begins. Blocks have no padding.

    Raises:
        ValueError: the documents do not hold that much text.
    """
    blocks: list[list[int]] = []
    for document in documents:
        # Only the text that can matter is tokenised: no token stands for more than a few dozen characters.
        text = document.text[: length * per_document * 8]
        ids = [tokenizer.eos_token_id] + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - length + 1, length)[:per_document]
        blocks.extend(ids[start : start + length] for start in starts)
        if len(blocks) >= count:
            return blocks[:count]
    raise ValueError(f"{len(documents)} documents hold {len(blocks)} blocks of {length} tokens, {count} are needed")
