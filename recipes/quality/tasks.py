"""Tasks whose right answer depends on what was asked, not on the tokens of the question.

A family has two or more variants. The question is the same, token for token; only the instruction before it differs:

=======  =======================  ==================================================================
family   instructions             an item, and the answer under the other instruction
=======  =======================  ==================================================================
sort     up, down                 ` up: k b z = b k z`                   other: ` z k b`
echo     copy, reverse            ` copy: k b z = k b z`                 other: ` z b k`
sum      ten, eight (the base)    ` ten:352+471=823`                     other: `1043`
lookup   first, last              ` first: k=37 b=52 k=74 k=37`          other: `74`
=======  =======================  ==================================================================

Instructions are words that are frequent in the general text, so that the base has an embedding for them.

A router that sees only the token's embedding sends all tokens of a question to the same experts under either instruction.

Items are packed into rows of 256 tokens, the variants of a family mixed at random. Every item ends with end-of-text, which
is part of the answer: knowing where to stop counts. A question belongs to training, validation or test by a checksum of its
text, so no question of one is in another under any instruction. Validation and test ask each question under every
instruction, never twice in the same row.
"""

from __future__ import annotations

import random
import re
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipes.quality.settings import LENGTH

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Difficulty:
    """How long the questions are, from (shortest, longest): any length between, as often as another. Longer is harder, so that
    a method gets some of them right long before it gets all right.

    Attributes:
        sort_letters: distinct letters to sort, at most 26.
        echo_letters: letters to copy or reverse; they may repeat, so a letter does not say what follows it.
        digits: of each summand, all from 0 to 7 (so that they are numbers in both bases). There are few short
            questions and held-out ones are all different, so most of those have the greatest length.
        pairs: assignments to look up in; four keys share them, the one asked for has at least two different values.
    """

    sort_letters: tuple[int, int] = (3, 10)
    echo_letters: tuple[int, int] = (3, 14)
    digits: tuple[int, int] = (1, 3)
    pairs: tuple[int, int] = (4, 10)

    def __post_init__(self) -> None:
        for name, low, high in (("sort_letters", 2, 26), ("echo_letters", 2, 64), ("digits", 1, 16), ("pairs", 4, 100)):
            shortest, longest = getattr(self, name)
            if not low <= shortest <= longest <= high:
                raise ValueError(
                    f"{name} is {(shortest, longest)}, must be from {low} to {high}, the shorter one first"
                )


@dataclass(frozen=True)
class Family:
    """One kind of question, and what each instruction makes of it.

    Attributes:
        draw: the text of a random question; it begins after the instruction's colon and ends where the answer begins.
        answers: instruction -> the answer's text for a question's text.
    """

    name: str
    draw: Callable[[random.Random, Difficulty], str]
    answers: dict[str, Callable[[str], str]]


def _draw_sort(generator: random.Random, difficulty: Difficulty) -> str:
    letters = generator.sample(string.ascii_lowercase, generator.randint(*difficulty.sort_letters))
    return "".join(f" {letter}" for letter in letters) + " ="


def _draw_echo(generator: random.Random, difficulty: Difficulty) -> str:
    letters = generator.choices(string.ascii_lowercase, k=generator.randint(*difficulty.echo_letters))
    return "".join(f" {letter}" for letter in letters) + " ="


def _draw_sum(generator: random.Random, difficulty: Difficulty) -> str:
    """Summands whose sum differs between the bases: at least one column reaches eight."""
    digits = generator.randint(*difficulty.digits)
    while True:
        first, second = ("".join(generator.choices("01234567", k=digits)) for _ in range(2))
        if any(int(a) + int(b) >= 8 for a, b in zip(first, second, strict=True)):
            return f"{first}+{second}="


def _draw_lookup(generator: random.Random, difficulty: Difficulty) -> str:
    keys = generator.sample(string.ascii_lowercase, 4)
    count = generator.randint(*difficulty.pairs)
    while True:
        chosen = [generator.choice(keys) for _ in range(count)]
        repeated = sorted(key for key in keys if chosen.count(key) > 1)
        values = [f"{value:02d}" for value in generator.sample(range(100), count)]
        if repeated:
            pairs = "".join(f" {key}={value}" for key, value in zip(chosen, values, strict=True))
            return f"{pairs} {generator.choice(repeated)}="


def _letters(question: str) -> list[str]:
    return question.removesuffix(" =").split()


def _joined(letters: list[str]) -> str:
    return "".join(f" {letter}" for letter in letters)


def _total(question: str, base: int) -> str:
    first, second = question.removesuffix("=").split("+")
    total = int(first, base) + int(second, base)
    return str(total) if base == 10 else f"{total:o}"


def _values(question: str) -> list[str]:
    """The values of the key that is asked for, in their order."""
    *pairs, wanted = question.removesuffix("=").split()
    return [pair[2:] for pair in pairs if pair[0] == wanted]


FAMILIES: tuple[Family, ...] = (
    Family(
        "sort",
        _draw_sort,
        {
            "up": lambda question: _joined(sorted(_letters(question))),
            "down": lambda question: _joined(sorted(_letters(question), reverse=True)),
        },
    ),
    Family(
        "echo",
        _draw_echo,
        {
            "copy": lambda question: _joined(_letters(question)),
            "reverse": lambda question: _joined(_letters(question)[::-1]),
        },
    ),
    Family(
        "sum",
        _draw_sum,
        {"ten": lambda question: _total(question, 10), "eight": lambda question: _total(question, 8)},
    ),
    Family(
        "lookup",
        _draw_lookup,
        {"first": lambda question: _values(question)[0], "last": lambda question: _values(question)[-1]},
    ),
)
INSTRUCTIONS = tuple(word for family in FAMILIES for word in family.answers)
LETTERS = tuple(f" {letter}" for letter in string.ascii_lowercase)
# Every piece that an item is made of; the tokenizer must have each as one token.
SYMBOLS = (*(f" {word}" for word in INSTRUCTIONS), *LETTERS, *string.digits, ":", "+", "=", " =")
_PIECE = re.compile(r" ?[a-z]+| =|[0-9:+=]")


def task_name(family: Family, instruction: str) -> str:
    """The name of a variant in the scores, e.g. `sort-up`."""
    return f"{family.name}-{instruction}"


def split_of(question: str) -> str:
    """Which split a question belongs to: 1 in 16 to test, 1 in 16 to validation, by a checksum of its text."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(question.encode()) % 16, "train")


@dataclass
class TaskSplit:
    """Rows of packed items.

    Attributes:
        tokens: uint16 [rows, 256]: end-of-text, then items, then end-of-text up to the end.
        answer_mask: bool [rows, 256]: true at the tokens of the answers that count here, their end-of-text included.
        item_ids: int32 [rows, 256]: -1 outside of those answers, else the item's place in its row.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray
    item_ids: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, item_ids: np.ndarray) -> TaskSplit:
        return cls(tokens, item_ids >= 0, item_ids.astype(np.int32))


@dataclass
class TaskRows:
    """One instruction of one family.

    Rows mix the instructions of the family. In `train` every answer of a row counts, and no row is in the training set of two
    tasks. In `validation` and `test` only this task's answers count, and the tasks of a family share the rows.
    """

    train: TaskSplit
    validation: TaskSplit
    test: TaskSplit


@dataclass(frozen=True)
class Amount:
    """How much of everything: training rows, validation and test items, each per instruction."""

    train_rows: int
    validation_items: int
    test_items: int


class _Encoder:
    """Text of an item to token ids, piece by piece."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.ids: dict[str, int] = {}
        for symbol in SYMBOLS:
            found = tokenizer(symbol, add_special_tokens=False)["input_ids"]
            if len(found) != 1:
                raise ValueError(
                    f"the tokenizer has {len(found)} tokens for {symbol!r}; the tasks need one: prepare it anew"
                )
            self.ids[symbol] = found[0]
        self.end = tokenizer.eos_token_id

    def __call__(self, text: str) -> list[int]:
        return [self.ids[piece] for piece in _PIECE.findall(text)]


@dataclass(frozen=True)
class _Item:
    question: str
    instruction: str
    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def _item(family: Family, question: str, instruction: str, encode: _Encoder) -> _Item:
    answer = encode(family.answers[instruction](question)) + [encode.end]
    item = _Item(question, instruction, encode(f" {instruction}:{question}"), answer)
    if item.length > LENGTH - 1:
        raise ValueError(
            f"{family.name}: an item of {item.length} tokens does not fit a row: choose a lower difficulty"
        )
    return item


def _pack(items: list[_Item]) -> list[list[_Item]]:
    """Items to rows in their order, except that one whose question is in the row already waits for the next row."""
    rows = []
    waiting = items
    while waiting:
        row: list[_Item] = []
        later: list[_Item] = []
        free = LENGTH - 1
        for place, item in enumerate(waiting):
            if item.length > free:
                later += waiting[place:]
                break
            if any(item.question == other.question for other in row):
                later.append(item)
            else:
                row.append(item)
                free -= item.length
        rows.append(row)
        waiting = later
    return rows


def _arrays(rows: list[list[_Item]], end: int, instruction: str | None) -> TaskSplit:
    """The rows as arrays; only the answers to `instruction` count, or all if it is None."""
    tokens = np.full((len(rows), LENGTH), end, dtype=np.uint16)
    item_ids = np.full((len(rows), LENGTH), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        at = 1
        for place, item in enumerate(row):
            answer = at + len(item.prompt)
            following = answer + len(item.answer)
            tokens[index, at:following] = item.prompt + item.answer
            if instruction in (None, item.instruction):
                item_ids[index, answer:following] = place
            at = following
    return TaskSplit.of(tokens, item_ids)


def _held_out(
    family: Family, split: str, count: int, generator: random.Random, difficulty: Difficulty, encode: _Encoder
) -> dict[str, TaskSplit]:
    """`count` different questions under every instruction -> instruction -> rows."""
    questions: dict[str, None] = {}
    for _ in range(1000 * count):
        question = family.draw(generator, difficulty)
        if split_of(question) == split:
            questions[question] = None
        if len(questions) == count:
            break
    else:
        raise ValueError(f"{family.name}: fewer than {count} different {split} questions: choose a higher difficulty")
    items = [_item(family, question, word, encode) for question in questions for word in family.answers]
    generator.shuffle(items)
    rows = _pack(items)
    return {word: _arrays(rows, encode.end, word) for word in family.answers}


def _training(
    family: Family, count: int, generator: random.Random, difficulty: Difficulty, encode: _Encoder
) -> dict[str, TaskSplit]:
    """`count` rows for each instruction, each of them a mixture of all."""
    words = list(family.answers)
    rows: list[list[_Item]] = []
    free = 0
    while True:
        question = family.draw(generator, difficulty)
        if split_of(question) != "train":
            continue
        item = _item(family, question, generator.choice(words), encode)
        if item.length > free:
            if len(rows) == count * len(words):
                break
            rows.append([])
            free = LENGTH - 1
        rows[-1].append(item)
        free -= item.length
    return {word: _arrays(rows[place :: len(words)], encode.end, None) for place, word in enumerate(words)}


def make_tasks(
    tokenizer: PreTrainedTokenizerBase, amount: Amount, difficulty: Difficulty | None = None, seed: int = 0
) -> dict[str, TaskRows]:
    """Every instruction of every family: name (`sort-up`) -> rows. The same arguments give the same rows.

    Raises:
        ValueError: the tokenizer has not one token for every symbol, or `difficulty` makes items longer than a row, or
            there are fewer questions of that difficulty than are asked for.
    """
    difficulty = difficulty or Difficulty()
    encode = _Encoder(tokenizer)
    tasks = {}
    for family in FAMILIES:
        generator = random.Random(f"{seed} {family.name}")
        test = _held_out(family, "test", amount.test_items, generator, difficulty, encode)
        validation = _held_out(family, "validation", amount.validation_items, generator, difficulty, encode)
        train = _training(family, amount.train_rows, generator, difficulty, encode)
        for word in family.answers:
            tasks[task_name(family, word)] = TaskRows(train[word], validation[word], test[word])
    return tasks
