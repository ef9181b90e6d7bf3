"""A tiny random model, a tokenizer and made-up items of all nine domains: enough to run every part, too little to learn."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from recipes import tiny_llama
from recipes.compose import domains
from recipes.compose.base_model import KNOWN
from recipes.compose.domains import Item, prompt_of

SIZES = {"test": 4, "validation": 3, "mixed": 8, "train": 40}


def make(folder: Path) -> tuple[str, Path]:
    """(folder of the base, file of the items)."""
    data = {name: _items(name) for name in (*domains.EIGHT, domains.NINTH)}
    texts = [item["prompt"] + " " + item["answer"] for splits in data.values() for item in splits["train"]]
    tokenizer = tiny_llama.train_tokenizer([KNOWN] * 50 + texts, vocab_size=600)
    base = folder / "base"
    tiny_llama.save(tiny_llama.new_model(tokenizer, hidden=64, layers=2), tokenizer, base)
    path = folder / "data.json.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(data, file)
    return str(base), path


def _items(name: str) -> dict[str, list[Item]]:
    draw = random.Random(name)
    words = [f"{name[:3]}{i}" for i in range(20)]
    made = []
    for number in range(sum(SIZES.values())):
        question = f"{name} {number}: " + " ".join(draw.choices(words, k=4))
        made.append({"prompt": prompt_of(question), "answer": draw.choice(words)})
    found, begin = {}, 0
    for split, count in SIZES.items():
        found[split] = made[begin : begin + count]
        begin += count
    return found
