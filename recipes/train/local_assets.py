"""A tiny model and small datasets made from local text, so that the training scripts can be run end to end anywhere."""

from __future__ import annotations

import json
import random
from pathlib import Path

from accelerate import PartialState

from recipes import corpora, tiny_llama


def make_model(folder: Path, steps: int = 30) -> None:
    """A Llama of 0.5 M parameters that has seen a little Python source, saved with its tokenizer in `folder`."""
    documents = corpora.standard_library()[:60]
    tokenizer = tiny_llama.train_tokenizer([document.text for document in documents])
    model = tiny_llama.new_model(tokenizer, layers=2)
    tiny_llama.pretrain(model, corpora.token_blocks(documents, tokenizer, 64, steps * 8), steps)
    tiny_llama.save(model, tokenizer, folder)


def _pairs(documents: list[corpora.Document]) -> list[tuple[str, str]]:
    """(beginning, continuation) of consecutive paragraphs, short enough for a CPU."""
    pairs = []
    for document in documents:
        words = document.text.split(" ")
        for start in range(0, min(len(words), 300) - 40, 40):
            pairs.append((" ".join(words[start : start + 16]), " " + " ".join(words[start + 16 : start + 40])))
    return pairs


def make_dataset(folder: Path, preference: bool) -> None:
    """`train.jsonl` and `test.jsonl`, as `load_dataset(folder)` expects them.

    Rows are `prompt` and `completion`; with `preference`, `prompt`, `chosen` (what the text says) and `rejected` (the same
    words in random order).
    """
    folder.mkdir(parents=True, exist_ok=True)
    shuffler = random.Random(0)
    for name, documents in zip(("train", "test"), corpora.split(corpora.manual()), strict=True):
        rows = []
        for prompt, completion in _pairs(documents)[: 160 if name == "train" else 16]:
            if preference:
                words = completion.split(" ")
                shuffler.shuffle(words)
                rows.append({"prompt": prompt, "chosen": completion, "rejected": " " + " ".join(words)})
            else:
                rows.append({"prompt": prompt, "completion": completion})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(model: str | None, dataset: str | None, preference: bool) -> None:
    """Make what is not there yet; one process makes, the others wait.

    Raises:
        ValueError: the configuration does not say where to put model and dataset.
    """
    if not model or not dataset:
        raise ValueError("local_assets needs model_name_or_path and dataset_name: the folders to make them in")
    with PartialState().local_main_process_first():
        if not (Path(model) / "config.json").exists():
            make_model(Path(model))
        if not (Path(dataset) / "test.jsonl").exists():
            make_dataset(Path(dataset), preference)
