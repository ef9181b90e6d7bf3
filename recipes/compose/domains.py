"""The domains: question sets and generated tasks, as prompts and short answers.

    python -m recipes.compose.domains --data FOLDER       # into outputs/compose/data.json.gz; needs reasoning-gym

Every prompt ends alike, and none names its domain. The question sets (ARC, BoolQ, OpenBookQA, GSM8K) come from a folder, as
AGI-Edgerunners/LLM-Adapters and openai/grade-school-math lay them out, or from the Hub through `datasets`. The generated tasks
come from reasoning-gym (Apache-2.0), whose seeds make them the same everywhere.

Splits hold different items: `train` for the experts, `mixed` for what puts them together, `validation` for learning rates, and
`test`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

from recipes.checkout import ROOT

DEFAULT = ROOT / "outputs" / "compose" / "data.json.gz"
SPLITS = {"test": 250, "validation": 100, "mixed": 500, "train": 5000}
LONGEST = 420  # characters of a prompt: long ones would pad all the others
QUESTION_SETS = ("arc", "boolq", "openbookqa", "gsm8k")
GENERATED: dict[str, dict[str, Any]] = {
    "word_sorting": {"min_words": 3, "max_words": 5},
    "family_relationships": {},
    "color_cube_rotation": {},
    "word_sequence_reversal": {"min_words": 3, "max_words": 6},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "number_filtering": {"min_numbers": 3, "max_numbers": 5},
    "complex_arithmetic": {},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "number_format": {},
}
# What routing is measured on, and the domain that comes later. Chosen by the LoRAs' own scores: none is useless. Two have lists
# of words (sorted, reversed) and two have numbers, which tokens alone hardly tell apart.
EIGHT = (*QUESTION_SETS, "word_sorting", "word_sequence_reversal", "chain_sum", "number_filtering")
NINTH = "letter_counting"
Item = dict[str, str]  # prompt, answer


def prompt_of(question: str) -> str:
    return f"{question.strip()}\nAnswer:"


# ---------------------------------------------------------------------------------------------------- question sets


def _choice(row: dict[str, str]) -> Item:
    """The options are shown; the answer is the text of one. (Letters say nothing to a model of this size.)"""
    question, rest = row["instruction"].split("\n\nAnswer1:", 1)
    question = question.removeprefix("Please choose the correct answer to the question:").strip()
    listed = ("Answer1:" + rest).split("\n\nAnswer format:")[0]
    options = [option.strip() for option in re.split(r"Answer\d:", listed)[1:]]
    right = options[int(row["answer"].removeprefix("answer")) - 1]
    return {"prompt": prompt_of(question + "".join(f"\n- {option}" for option in options)), "answer": right}


def _yes_or_no(row: dict[str, str]) -> Item:
    question = row["instruction"].split("question:", 1)[1].split("\n\nAnswer format")[0]
    return {"prompt": prompt_of(question), "answer": row["answer"]}


def _calculation(row: dict[str, str]) -> Item:
    """The calculations of the written solution alone, then the number: `48/2=24; 48+24=72; 72`."""
    steps = re.findall(r"<<([^>]*)>>", row["answer"])
    result = row["answer"].split("####")[1].strip().replace(",", "")
    return {"prompt": prompt_of(row["question"]), "answer": "; ".join([*steps, result])}


READERS = {"arc": _choice, "boolq": _yes_or_no, "openbookqa": _choice, "gsm8k": _calculation}
FILES = {
    "arc": ("ARC-Challenge.{}.json.gz", "ARC-Easy.{}.json.gz"),
    "boolq": ("boolq.{}.json.gz",),
    "openbookqa": ("openbookqa.{}.json.gz",),
    "gsm8k": ("gsm8k.{}.jsonl.gz",),
}


def _rows(folder: Path, name: str, part: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for pattern in FILES[name]:
        with gzip.open(folder / pattern.format(part), "rt", encoding="utf-8") as file:
            text = file.read()
        rows += json.loads(text) if ".jsonl" not in pattern else [json.loads(line) for line in text.splitlines()]
    return rows


def question_set(folder: Path, name: str) -> dict[str, list[Item]]:
    """Splits of one question set. `test` is from its test part, the others are from its training part."""
    parts = {}
    for part in ("test", "train"):
        items = [READERS[name](row) for row in _rows(folder, name, part)]
        items = [item for item in _distinct(items) if len(item["prompt"]) <= LONGEST and len(item["answer"]) <= 120]
        random.Random(0).shuffle(items)
        parts[part] = items
    taken = {item["prompt"] for item in parts["test"]}
    rest = [item for item in parts["train"] if item["prompt"] not in taken]
    return {"test": parts["test"][: SPLITS["test"]], **_cut(rest, ("validation", "mixed", "train"))}


# ---------------------------------------------------------------------------------------------------------- generated


def generated(name: str) -> dict[str, list[Item]]:
    """Splits of one generator's items."""
    import reasoning_gym  # needed here alone

    wanted = sum(SPLITS.values())
    rows = reasoning_gym.create_dataset(name, size=2 * wanted, seed=11, **GENERATED[name])
    items = _distinct([{"prompt": prompt_of(row["question"]), "answer": str(row["answer"]).strip()} for row in rows])
    items = [item for item in items if len(item["prompt"]) <= LONGEST and len(item["answer"]) <= 120]
    return _cut(items[:wanted], ("test", "validation", "mixed", "train"))


def _distinct(items: list[Item]) -> list[Item]:
    return list({item["prompt"]: item for item in items}.values())


def _cut(items: list[Item], names: tuple[str, ...]) -> dict[str, list[Item]]:
    """Consecutive pieces of the sizes in SPLITS. The last takes what is left."""
    pieces, begin = {}, 0
    for name in names:
        pieces[name] = items[begin : begin + SPLITS[name]]
        begin += SPLITS[name]
    return pieces


def prepare(folder: Path, out: Path) -> dict[str, dict[str, list[Item]]]:
    data = {name: question_set(folder, name) for name in QUESTION_SETS}
    data |= {name: generated(name) for name in GENERATED}
    out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(out, "wt", encoding="utf-8") as file:
        json.dump(data, file)
    return data


def load(path: Path = DEFAULT) -> dict[str, dict[str, list[Item]]]:
    """Domain -> split -> items, as `prepare` wrote them."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the domains' items.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the question sets")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    arguments = parser.parse_args()
    for name, splits in prepare(arguments.data, arguments.out).items():
        sizes = ", ".join(f"{split} {len(items)}" for split, items in splits.items())
        print(f"{name}: {sizes}; {splits['train'][0]}")


if __name__ == "__main__":
    main()
