"""Texts and tasks as token ids, in a cache that can be carried to a machine that has none of the texts.

    python -m recipes.quality.prepare --fetch                     # once, on Debian 12: the texts (no root, nothing installed)
    python -m recipes.quality.prepare --size full                 # makes outputs/quality/data, prints its sources

The cache is `tokenizer.json`, `tokens.npz` and `sources.json`; the last is written last and holds the checksums of the others,
so half a cache is never taken for a whole one.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from recipes.corpora import Document
from recipes.quality import tasks as task_rows
from recipes.quality import texts
from recipes.quality.copies import Seen, split, without_copies
from recipes.quality.files import digest_of_file, write_atomically, write_json
from recipes.quality.tasks import Amount, TaskRows, TaskSplit
from recipes.quality.texts import GENERAL
from recipes.tiny_llama import END, PAD, train_bpe

FORMAT = 2  # raise it when the files or what is in them change
TOKENIZER, TOKENS, SOURCES = "tokenizer.json", "tokens.npz", "sources.json"
DEFAULT_FOLDER = Path("outputs/quality/data")


@dataclass(frozen=True)
class Size:
    """How much text is taken, in tokens, and how the tokenizer is trained."""

    vocabulary: int
    general: int
    general_held_out: int
    train: int  # per domain, as are the next two
    validation: int
    test: int
    general_sample: int  # characters that the tokenizer is trained on
    domain_sample: int  # per domain
    amount: Amount


SIZES = {
    "full": Size(
        vocabulary=16_384,
        general=20_000_000,
        general_held_out=100_000,
        train=1_200_000,
        validation=45_000,
        test=80_000,
        general_sample=24_000_000,
        domain_sample=1_500_000,
        amount=Amount(train_rows=1500, validation_items=384, test_items=1024),
    ),
    "smoke": Size(
        vocabulary=2_048,
        general=200_000,
        general_held_out=8_000,
        train=24_000,
        validation=4_000,
        test=8_000,
        general_sample=600_000,
        domain_sample=60_000,
        amount=Amount(train_rows=40, validation_items=24, test_items=48),
    ),
}
HELD_OUT_SHARE = {"validation": 0.07, "test": 0.12}  # of a domain's characters, at most


class CacheError(ValueError):
    """The cache is not there, of another size or format, or damaged; the message says which, and how to make it anew."""


@dataclass
class Prepared:
    """Everything that the experiment reads.

    Attributes:
        general, general_held_out: uint16 [n], documents one after the other, each begins with end-of-text.
        train, validation, test: domain -> uint16 [n], from different documents.
        tasks: name of the task -> its rows.
        sources: what was read: name, split, package, version, licence, files, characters, tokens (train, validation, test).
    """

    tokenizer: PreTrainedTokenizerFast
    general: np.ndarray
    general_held_out: np.ndarray
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    tasks: dict[str, TaskRows]
    sources: list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------- tokenizer


def _sample(documents: list[Document], characters: int) -> Iterator[str]:
    for document in documents:
        if characters <= 0:
            return
        yield document.text[:characters]
        characters -= len(document.text)


def train_tokenizer(samples: Iterator[str], vocabulary: int, repeats: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, in which every symbol of the tasks is one token.

    Args:
        repeats: how often the symbols are shown on top of the text. BPE merges what is frequent, so that a symbol shown more
            often than the rarest of the vocabulary's merges is sure to become one token.
    """

    def with_symbols() -> Iterator[str]:
        yield from samples
        for symbol in task_rows.SYMBOLS:
            yield symbol * repeats

    return _wrapped(train_bpe(with_symbols(), vocabulary, single_digits=True))


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)


def _stream(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, most: int, used: dict[str, tuple[int, int]]
) -> np.ndarray:
    """uint16 [n], n <= most. `used` gets the number of tokens and characters of each document."""
    pieces: list[np.ndarray] = []
    total = 0
    for first in range(0, len(documents), 64):
        batch = documents[first : first + 64]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([each.text for each in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encoded, strict=True):
            ids = np.array([tokenizer.eos_token_id, *encoding.ids][: most - total], dtype=np.uint16)
            pieces.append(ids)
            used[document.name] = len(ids), len(document.text)
            total += len(ids)
            if total >= most:
                return np.concatenate(pieces)
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)


# ----------------------------------------------------------------------------------------------------------------- making


def build(size: str, folder: Path, progress: bool = True) -> Prepared:
    """Read the texts (below `folder` for the full size) and make everything from them.

    Raises:
        texts.MissingTexts: a package is not there.
        ValueError: a domain has too little text.
    """
    if size not in SIZES:
        raise ValueError(f"size is 'full' or 'smoke', not {size!r}")
    want = SIZES[size]

    def say(text: str) -> None:
        if progress:
            print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    started = time.perf_counter()
    say(f"reading the texts ({size})")
    sources = texts.collect(size, folder, progress)
    domains = list(dict.fromkeys(source.split for source in sources if source.split != GENERAL))

    say("removing near-copies, splitting")
    seen = Seen()
    parts: dict[str, dict[str, list[Document]]] = {}
    for name in (GENERAL, *domains):
        documents: list[Document] = []
        for source in sources:
            if source.split == name:
                source.documents = [
                    Document(f"{source.name}/{each.name}", each.text, f"{source.name}/{each.group or each.name}")
                    for each in source.documents
                ]
                documents += source.documents
        documents = without_copies(documents, seen)
        characters = sum(len(document.text) for document in documents)
        test, validation = (want.general_held_out, 0) if name == GENERAL else (want.test, want.validation)
        wanted = {
            "test": min(int(5 * test), int(HELD_OUT_SHARE["test"] * characters)),
            "validation": min(int(5 * validation), int(HELD_OUT_SHARE["validation"] * characters)),
        }
        parts[name] = split(documents, wanted)
        lacking = [place for place in ("train", "test") if not parts[name][place]]
        if lacking or (name != GENERAL and not parts[name]["validation"]):
            raise ValueError(
                f"the texts of {name!r} are too few to split: {len(documents)} documents, {characters} characters"
            )

    say("training the tokenizer")

    def samples() -> Iterator[str]:
        yield from _sample(parts[GENERAL]["train"], want.general_sample)
        for name in domains:
            yield from _sample(parts[name]["train"], want.domain_sample)

    tokenizer = train_tokenizer(samples(), want.vocabulary, repeats=want.general_sample // 400)

    say("tokenising")
    used: dict[str, dict[str, tuple[int, int]]] = {"train": {}, "validation": {}, "test": {}}
    general = _stream(parts[GENERAL]["train"], tokenizer, want.general, used["train"])
    held_out = _stream(parts[GENERAL]["test"], tokenizer, want.general_held_out, used["test"])
    streams: dict[str, dict[str, np.ndarray]] = {}
    for place, most in (("train", want.train), ("validation", want.validation), ("test", want.test)):
        streams[place] = {name: _stream(parts[name][place], tokenizer, most, used[place]) for name in domains}

    say("making the tasks")
    made = task_rows.make_tasks(tokenizer, want.amount)
    listed = []
    for source in sources:
        names = {document.name for document in source.documents}
        counts = {place: [count for name, count in used[place].items() if name in names] for place in used}
        taken = {name for place in used for name in used[place]} & names
        listed.append(
            {
                "name": source.name,
                "split": source.split,
                "package": source.package,
                "version": source.version,
                "licence": source.licence,
                "files": len({re.sub(r"#\d+$", "", name) for name in taken}),
                "documents": len(taken),
                "characters": sum(characters for count in counts.values() for _, characters in count),
                "tokens": sum(tokens for count in counts.values() for tokens, _ in count),
                **{f"{place}_tokens": sum(tokens for tokens, _ in count) for place, count in counts.items()},
            }
        )
    say("done")
    return Prepared(
        tokenizer, general, held_out, streams["train"], streams["validation"], streams["test"], made, listed
    )


# ------------------------------------------------------------------------------------------------------------------ cache


def save(prepared: Prepared, folder: Path, size: str) -> None:
    """Write the cache; `sources.json` goes first and comes back last, so a crash leaves no cache that looks whole."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"general": prepared.general, "general_held_out": prepared.general_held_out}
    for place in task_rows.SPLITS:
        for name, stream in getattr(prepared, place).items():
            arrays[f"text/{place}/{name}"] = stream
        for name, rows in prepared.tasks.items():
            part: TaskSplit = getattr(rows, place)
            arrays[f"task/{place}/{name}/tokens"] = part.tokens
            arrays[f"task/{place}/{name}/item_ids"] = part.item_ids.astype(np.int8)  # at most 128 items fit a row

    def write_tokens(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    (folder / SOURCES).unlink(missing_ok=True)
    write_atomically(folder / TOKENIZER, lambda path: prepared.tokenizer.backend_tokenizer.save(str(path)))
    write_atomically(folder / TOKENS, write_tokens)
    checksums = {name: digest_of_file(folder / name) for name in (TOKENIZER, TOKENS)}
    write_json(folder / SOURCES, {"format": FORMAT, "size": size, "checksums": checksums, "sources": prepared.sources})


def load(folder: Path, size: str | None = None) -> Prepared:
    """Read a cache; no texts are needed.

    Args:
        size: the size that it must have; any if None.

    Raises:
        CacheError: it is not there, of another size or format, or damaged.
    """
    again = f"make it anew with: python -m recipes.quality.prepare --size {size or 'full'} --folder {folder}"
    try:
        about = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
        found, kind, checksums = about["format"], about["size"], about["checksums"]
        sources = about["sources"]
    except FileNotFoundError:
        raise CacheError(f"{folder} holds no prepared texts ({SOURCES} is not there); {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{folder / SOURCES} is damaged ({error}); {again}") from None
    if found != FORMAT:
        raise CacheError(f"{folder} has format {found}, this version reads format {FORMAT}; {again}")
    if size is not None and kind != size:
        raise CacheError(f"{folder} has the size {kind!r}, not {size!r}; {again}, or choose another folder")
    for name in (TOKENIZER, TOKENS):
        path = folder / name
        if not path.exists():
            raise CacheError(f"{path} is not there; {again}")
        if digest_of_file(path) != checksums.get(name):
            raise CacheError(f"{path} is damaged (its checksum is not the one in {SOURCES}); {again}")
    try:
        with np.load(io.BytesIO((folder / TOKENS).read_bytes())) as file:
            arrays = dict(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise CacheError(f"{folder / TOKENS} is damaged ({error}); {again}") from None
    text: dict[str, dict[str, np.ndarray]] = {place: {} for place in task_rows.SPLITS}
    parts: dict[str, dict[str, TaskSplit]] = {}
    for name, array in arrays.items():
        match name.split("/"):
            case ["text", place, domain]:
                text[place][domain] = array
            case ["task", place, task, "tokens"]:
                ids = arrays[f"task/{place}/{task}/item_ids"]
                parts.setdefault(task, {})[place] = TaskSplit.of(array, ids)
    return Prepared(
        _wrapped(Tokenizer.from_file(str(folder / TOKENIZER))),
        arrays["general"],
        arrays["general_held_out"],
        text["train"],
        text["validation"],
        text["test"],
        {name: TaskRows(**places) for name, places in parts.items()},
        sources,
    )


def prepare(folder: Path, size: str, progress: bool = True, texts_folder: Path | None = None) -> Prepared:
    """The cache in `folder`, made first if it is not there, or no longer fits, or is damaged.

    Args:
        size: "full" (from Debian packages, see `texts.py`) or "smoke" (from the Python environment).
        texts_folder: where the Debian packages are unpacked; `texts` beside `folder` if None.

    Raises:
        texts.MissingTexts: it has to be made, and a package is not there.
    """
    folder = Path(folder)
    try:
        return load(folder, size)
    except CacheError as error:
        if progress:
            reason = "nothing prepared yet" if not (folder / SOURCES).exists() else str(error).split(";")[0]
            print(f"{folder}: {reason}; preparing the texts", flush=True)
    prepared = build(size, texts_folder or folder.parent / "texts", progress)
    save(prepared, folder, size)
    return prepared


def table(prepared: Prepared) -> str:
    """The sources, one line each, as Markdown."""
    lines = ["| text | package and version | licence | files | M characters | train tokens | validation | test |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for each in prepared.sources:
        held_out = f"{each['validation_tokens']:,} | {each['test_tokens']:,}"
        lines.append(
            f"| {each['split']} | {each['package']} {each['version']} | {each['licence']} | {each['files']:,} | "
            f"{each['characters'] / 1e6:.2f} | {each['train_tokens']:,} | {held_out} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the cache is")
    parser.add_argument(
        "--texts", type=Path, help="where the Debian packages are unpacked (default: texts beside --folder)"
    )
    parser.add_argument("--fetch", action="store_true", help="get the Debian packages first (Debian 12, no root)")
    arguments = parser.parse_args()
    where = arguments.texts or arguments.folder.parent / "texts"
    try:
        if arguments.fetch:
            texts.fetch(where)
        prepared = prepare(arguments.folder, arguments.size, texts_folder=where)
    except texts.MissingTexts as error:
        raise SystemExit(f"error: {error}") from None
    print(table(prepared))
    for name, rows in prepared.tasks.items():
        counts = (len(rows.train.tokens), len(rows.validation.tokens), len(rows.test.tokens))
        print(f"{name:18} rows: train {counts[0]:,}, validation {counts[1]:,}, test {counts[2]:,}")
    total = sum((arguments.folder / name).stat().st_size for name in (TOKENIZER, TOKENS, SOURCES))
    print(f"{arguments.folder}: {total / 2**20:.1f} MiB, vocabulary {len(prepared.tokenizer):,}")


if __name__ == "__main__":
    main()
