"""The data of recipes/quality: disjoint splits, tasks whose every answer is right, a cache that is whole or not there."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fresh import run_module
from recipes.checkout import module_command, module_environment
from recipes.quality import copies, prepare, readers, tasks, texts
from recipes.quality.prepare import CacheError, Prepared, load, save
from recipes.quality.readers import Document, MissingTexts

SPLITS = ("train", "validation", "test")
ITEM = re.compile(r" ([a-z]+):(.*?=)(.*)")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality") / "data"


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Prepared:
    return prepare.prepare(folder, "smoke", progress=False)


def arrays(data: Prepared) -> dict[str, np.ndarray]:
    """Every array of it by name."""
    found = {"general": data.general, "general_held_out": data.general_held_out}
    for split in SPLITS:
        found |= {f"{split}/{name}": stream for name, stream in getattr(data, split).items()}
        for name, rows in data.tasks.items():
            part = getattr(rows, split)
            for kind in ("tokens", "answer_mask", "item_ids"):
                found[f"{split}/{name}/{kind}"] = getattr(part, kind)
    return found


# ------------------------------------------------------------------------------------------------------------------ texts


def test_shapes_and_sizes(prepared: Prepared) -> None:
    size = prepare.SIZES["smoke"]
    assert len(prepared.tokenizer) == size.vocabulary
    assert len(prepared.train) >= 5 and set(prepared.train) == set(prepared.validation) == set(prepared.test)
    for name, array in arrays(prepared).items():
        if "/" not in name or name.count("/") == 1:
            assert array.dtype == np.uint16 and array.ndim == 1, name
            assert array[0] == prepared.tokenizer.eos_token_id, name
            assert array.max() < size.vocabulary, name
            assert (array == prepared.tokenizer.pad_token_id).sum() == 0, name
    for name in prepared.train:
        assert size.train // 2 <= len(prepared.train[name]) <= size.train, name
        assert size.validation // 2 <= len(prepared.validation[name]) <= size.validation, name
        assert size.test // 2 <= len(prepared.test[name]) <= size.test, name
    assert len(prepared.general) == size.general and len(prepared.general_held_out) >= size.general_held_out // 2


def test_the_text_is_the_text(prepared: Prepared) -> None:
    """The streams decode to what the sources hold: nothing is lost or invented on the way."""
    original = {
        document.name: document.text for source in texts.collect("smoke", Path()) for document in source.documents
    }
    for name, stream in prepared.test.items():
        pieces = prepared.tokenizer.decode(stream).split(prepare.END)[1:]
        assert pieces
        joined = "\0".join(original.values())
        for piece in pieces[:3]:
            for paragraph in re.split(r"\n\s*\n", piece)[:-1][:5]:
                assert paragraph.strip("\n") in joined, name


def test_splits_share_no_text(prepared: Prepared) -> None:
    """Runs of 32 tokens of held-out text do not occur in training text, but for a few phrases."""

    def runs(stream: np.ndarray) -> set[bytes]:
        windows = np.lib.stride_tricks.sliding_window_view(stream, 32)
        return {window.tobytes() for window in windows}

    for name in prepared.train:
        train, validation, test = (runs(getattr(prepared, split)[name]) for split in SPLITS)
        assert len(test & train) < 0.05 * len(test), name
        assert len(validation & train) < 0.05 * len(validation), name
        assert len(test & validation) < 0.05 * len(test), name
        assert len(test & runs(prepared.general)) < 0.02 * len(test), name
    general = runs(prepared.general_held_out)
    assert len(general & runs(prepared.general)) < 0.05 * len(general)


def test_sources_add_up(prepared: Prepared) -> None:
    for split, streams in (("train", prepared.train), ("validation", prepared.validation), ("test", prepared.test)):
        for name, stream in streams.items():
            assert sum(s[f"{split}_tokens"] for s in prepared.sources if s["split"] == name) == len(stream)
    general = [source for source in prepared.sources if source["split"] == "general"]
    assert sum(source["tokens"] for source in general) == len(prepared.general) + len(prepared.general_held_out)
    for source in prepared.sources:
        assert all(source[key] for key in ("name", "package", "version", "licence", "files", "characters")), source
        assert str(source["version"]) in prepare.table(prepared)


def test_split_keeps_groups_together_and_drops_near_copies() -> None:
    generator = random.Random(0)

    def prose() -> str:
        return " ".join("".join(generator.choices("abcdefgh", k=5)) for _ in range(400)) + "\n"

    documents = [Document(f"d{place}", prose(), f"g{place // 3}") for place in range(90)]
    parts = copies.split(documents, {"test": 20_000, "validation": 8_000})
    groups = {name: {document.group for document in part} for name, part in parts.items()}
    assert sum(len(part) for part in parts.values()) == 90 and all(groups.values())
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"]
    assert not groups["test"] & groups["validation"]
    assert 20_000 <= sum(len(document.text) for document in parts["test"]) < 30_000

    # A text that is half a copy of a training document is not held out; the order of the input does not matter.
    copied = [Document(f"e{place}", documents[place].text[:1200] + prose()[:1200]) for place in range(90)]
    mixed = documents + copied
    again = copies.split(mixed, {"test": 60_000, "validation": 1})
    seen = copies.Seen()
    for document in again["train"]:
        seen.add(document.text)
    assert again["test"] and all(seen.share(document.text) < copies.NEAR_COPY_HELD_OUT for document in again["test"])
    backwards = copies.split(mixed[::-1], {"test": 60_000, "validation": 1})
    assert {d.name for d in backwards["test"]} == {d.name for d in again["test"]}


def test_near_copies_are_removed() -> None:
    generator = random.Random(1)
    paragraphs = [" ".join("".join(generator.choices("abcdefgh", k=6)) for _ in range(60)) for _ in range(12)]
    first = Document("first", "\n\n".join(paragraphs[:6]))
    rewrapped = Document("rewrapped", "\n\n".join(paragraphs[:6]).replace(" ", "\n", 40).upper())
    half = Document("half", "\n\n".join(paragraphs[4:12]))
    kept = copies.without_copies([first, rewrapped, half], copies.Seen())
    assert [document.name for document in kept] == ["first", "half"]
    assert paragraphs[4] not in kept[1].text and paragraphs[6] in kept[1].text


# ---------------------------------------------------------------------------------------------------------------- readers


def test_page_text() -> None:
    page = (
        "<html><head><title>no</title><script>no()</script></head><body><div class='navigation'><div>no</div></div>"
        "<nav>no</nav><h1>Head<a class='headerlink'>¶</a></h1><p>One  <b>two</b>\n three &amp; &lt;four&gt;.</p>"
        "<ul><li>x</li><li>y</li></ul><pre>def f():\n    return 1</pre><p>End<br>ing</p></body></html>"
    )
    expected = "Head\n\nOne two three & <four>.\n\nx\n\ny\n\ndef f():\n    return 1\n\nEnd\ning\n"
    assert readers.page_text(page) == expected


def test_untranslated_paragraphs_are_left_out(tmp_path: Path) -> None:
    long = "This whole paragraph was never translated at all."
    (tmp_path / "a.html").write_text(
        f"<p>{'Первый абзац. ' * 50}</p><p>{long}</p><p>SMTP</p><p>{'Второй: SMTP. ' * 50}</p>"
    )
    (document,) = readers.pages("*.html", script="[а-я]")(tmp_path)
    assert [part.split()[0] for part in document.text.split("\n\n")] == ["Первый", "SMTP", "Второй:"]
    (document,) = readers.pages("*.html")(tmp_path)
    assert long in document.text


def test_manual_text() -> None:
    source = '.\\" comment\n.TH LS 1\n.SH NAME\nls \\- list \\fIdirectory\\fP contents\n'
    source += ".SH OPTIONS\n.TP\n.B \\-a\ndo \\(aqnot\\(aq\n"
    assert readers.manual_text(source) == "NAME\nls - list directory contents\n\nOPTIONS\n\n-a\ndo 'not'\n"


def test_dictionary_cookies_and_rows(tmp_path: Path) -> None:
    entries = "".join(f"word{place}\n   means {place}\n" for place in range(1000))
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress(entries.encode()))
    documents = list(readers.dictionary("*.dict.dz")(tmp_path))
    assert len(documents) > 2 and all(document.text.startswith("word") for document in documents)
    assert sorted("".join(d.text for d in documents).splitlines()) == sorted(entries.splitlines())

    (tmp_path / "jokes").write_text("\n%\n".join(f"joke {place} " + "ha " * 40 for place in range(100)) + "\n%\n")
    (tmp_path / "jokes.dat").write_bytes(b"\0\1\2")
    jokes = "".join(document.text for document in readers.cookies("jokes*")(tmp_path))
    assert "%" not in jokes and all(f"joke {place} " in jokes for place in range(100))

    (tmp_path / "table.csv").write_text("# comment\n" + "".join(f"{place},value\n" for place in range(2000)) + "\n")
    lines = "".join(document.text for document in readers.rows("*.csv")(tmp_path)).splitlines()
    assert sorted(lines) == sorted(f"{place},value" for place in range(2000))


def test_legal_keeps_licences_and_leaves_out_lists_of_files(tmp_path: Path) -> None:
    (tmp_path / "copyright").write_text(
        "Format: https://x\n\nFiles: *\nCopyright: 2001 A\nLicense: X\n\nLicense: X\n Permission is granted "
        + "to anybody " * 60
        + "\n .\n The second paragraph "
        + "says more " * 10
        + "\n"
    )
    (document,) = readers.legal("copyright")(tmp_path)
    assert document.text.startswith("Permission is granted") and "\n\nThe second paragraph" in document.text
    assert "Files" not in document.text and "License" not in document.text


# ------------------------------------------------------------------------------------------------------------------ tasks


def right_answer(word: str, question: str) -> str:
    """The answer, worked out without the code under test."""
    if word in ("up", "down"):
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        asked = set(question.replace("=", "").split())
        letters = [letter for letter in (alphabet if word == "up" else alphabet[::-1]) if letter in asked]
        return "".join(" " + letter for letter in letters)
    if word == "copy":
        return question[:-2]
    if word == "reverse":
        return "".join(" " + question[place] for place in range(len(question) - 3, 0, -2))
    if word in ("ten", "eight"):
        base, carry, result = {"ten": 10, "eight": 8}[word], 0, ""
        first, second = question[:-1].split("+")
        for a, b in zip(first[::-1], second[::-1], strict=True):
            carry, digit = divmod(int(a) + int(b) + carry, base)
            result = str(digit) + result
        return (str(carry) + result if carry else result).lstrip("0") or "0"
    wanted = question[-2]
    found = [
        question[place + 3 : place + 5] for place in range(0, len(question) - 3, 5) if question[place + 1] == wanted
    ]
    return found[0] if word == "first" else found[-1]


def items_of(prepared: Prepared, tokens: np.ndarray) -> list[tuple[str, str, str]]:
    """(instruction, question, answer) of a row, from its decoded text alone."""
    items = []
    for piece in prepared.tokenizer.decode(tokens).split(prepare.END):
        if piece:
            match = ITEM.fullmatch(piece)
            assert match, piece
            word, question, answer = match.groups()
            if word in ("first", "last"):  # its question has several equals signs
                at = piece.rindex("=") + 1
                question, answer = piece[len(word) + 2 : at], piece[at:]
            items.append((word, question, answer))
    return items


def test_every_answer_is_right_and_marked(prepared: Prepared) -> None:
    end = prepared.tokenizer.eos_token_id
    assert len(prepared.tasks) == 8
    for name, task in prepared.tasks.items():
        own = name.split("-")[1]
        for split in SPLITS:
            part = getattr(task, split)
            assert part.tokens.dtype == np.uint16 and part.item_ids.dtype == np.int32 and part.answer_mask.dtype == bool
            assert part.tokens.shape == part.answer_mask.shape == part.item_ids.shape == (len(part.tokens), 256)
            assert ((part.item_ids >= 0) == part.answer_mask).all()
            for tokens, ids in zip(part.tokens, part.item_ids, strict=True):
                assert tokens[0] == end
                items = items_of(prepared, tokens)
                marked = [place for place in np.unique(ids) if place >= 0]
                counted = [place for place, item in enumerate(items) if split == "train" or item[0] == own]
                assert marked == counted
                for place, (word, question, answer) in enumerate(items):
                    assert answer == right_answer(word, question)
                    if place in marked:
                        (at,) = np.nonzero(ids == place)
                        assert (np.diff(at) == 1).all() and tokens[at[-1]] == end
                        assert prepared.tokenizer.decode(tokens[at]) == answer + prepare.END
                        assert prepared.tokenizer.decode(tokens[: at[0]]).endswith(f" {word}:{question}")


def test_rows_are_natural_text(prepared: Prepared) -> None:
    """A row's tokens are what the tokenizer makes of its text, and rows are well filled."""
    for task in prepared.tasks.values():
        for part in (task.train, task.validation, task.test):
            for tokens in part.tokens:
                text = prepared.tokenizer.decode(tokens)
                assert prepared.tokenizer(text, add_special_tokens=False)["input_ids"] == tokens.tolist()
        assert (task.train.tokens == prepared.tokenizer.eos_token_id).mean() < 0.25


def test_instructions_mix_and_ask_the_same(prepared: Prepared) -> None:
    """Each held-out question is asked under every instruction, with the same tokens; answers differ; never twice in a row."""
    pairs = {"up": "down", "copy": "reverse", "ten": "eight", "first": "last"}
    for name, task in prepared.tasks.items():
        own = name.split("-")[1]
        words = {own, pairs.get(own) or next(a for a, b in pairs.items() if b == own)}
        train = [items_of(prepared, tokens) for tokens in task.train.tokens]
        share = np.mean([word == own for row in train for word, *_ in row])
        assert {word for row in train for word, *_ in row} == words and 0.35 < share < 0.65
        assert np.mean([len({word for word, *_ in row}) == 2 for row in train]) > 0.8
        for part in (task.validation, task.test):
            asked: dict[str, dict[str, str]] = {}
            for tokens in part.tokens:
                items = items_of(prepared, tokens)
                assert len({question for _, question, _ in items}) == len(items)
                for word, question, answer in items:
                    assert word not in asked.setdefault(question, {})
                    asked[question][word] = answer
            assert all(set(answers) == words for answers in asked.values())
            assert np.mean([len(set(answers.values())) == 2 for answers in asked.values()]) > 0.99
            for question in list(asked)[:20]:
                ids = [prepared.tokenizer(f" {word}:{question}")["input_ids"] for word in sorted(words)]
                assert ids[0][1:] == ids[1][1:] and ids[0][0] != ids[1][0]
        size = prepare.SIZES["smoke"].amount
        assert len(task.train.tokens) == size.train_rows
        for part, count in ((task.validation, size.validation_items), (task.test, size.test_items)):
            assert sum(len(set(row[row >= 0])) for row in part.item_ids) == count


def test_held_out_questions_are_not_trained_on(prepared: Prepared) -> None:
    questions: dict[str, dict[str, set[str]]] = {}
    for name, task in prepared.tasks.items():
        for split in SPLITS:
            family = questions.setdefault(name.split("-")[0], {}).setdefault(split, set())
            family |= {q for tokens in getattr(task, split).tokens for _, q, _ in items_of(prepared, tokens)}
    assert len(questions) == 4
    for family, found in questions.items():
        assert all(found.values()), family
        assert not found["train"] & found["test"] and not found["train"] & found["validation"], family
        assert not found["validation"] & found["test"], family


def test_symbols_are_single_tokens(prepared: Prepared) -> None:
    ids = [prepared.tokenizer(symbol)["input_ids"] for symbol in tasks.SYMBOLS]
    assert all(len(found) == 1 for found in ids)
    assert len({found[0] for found in ids}) == len(tasks.SYMBOLS)


def test_difficulty_is_a_parameter(prepared: Prepared) -> None:
    amount = tasks.Amount(2, 4, 4)
    easy = tasks.make_tasks(
        prepared.tokenizer,
        amount,
        tasks.Difficulty(sort_letters=(4, 4), echo_letters=(5, 5), digits=(2, 2), pairs=(4, 4)),
    )
    (word, question, _), *_ = items_of(prepared, easy["sort-up"].test.tokens[0])
    assert word in ("up", "down") and len(question.split()) == 5  # four letters and the equals sign
    other = tasks.make_tasks(prepared.tokenizer, amount, seed=1)["echo-copy"].train.tokens
    same = tasks.make_tasks(prepared.tokenizer, amount, seed=1)["echo-copy"].train.tokens
    assert (other == same).all() and (
        other != tasks.make_tasks(prepared.tokenizer, amount)["echo-copy"].train.tokens
    ).any()
    with pytest.raises(ValueError, match=r"sort_letters is \(3, 30\), must be from 2 to 26"):
        tasks.Difficulty(sort_letters=(3, 30))
    with pytest.raises(ValueError, match="fewer than 60 different test questions: choose a higher difficulty"):
        tasks.make_tasks(prepared.tokenizer, tasks.Amount(1, 1, 60), tasks.Difficulty(digits=(1, 1)))
    with pytest.raises(ValueError, match="lookup: an item of .* does not fit a row"):
        tasks.make_tasks(prepared.tokenizer, tasks.Amount(1, 1, 1), tasks.Difficulty(pairs=(70, 70)))


def test_a_tokenizer_without_the_symbols_is_refused() -> None:
    tokenizer = prepare.train_tokenizer(iter(["some text " * 50]), 300, repeats=0)
    with pytest.raises(ValueError, match="tokens for ' up'; the tasks need one"):
        tasks.make_tasks(tokenizer, tasks.Amount(1, 1, 1))


# ------------------------------------------------------------------------------------------------------------------ cache


def test_another_process_makes_the_same(prepared: Prepared, folder: Path, tmp_path: Path) -> None:
    """The command, with another hash seed: the same bytes, and a table of the sources."""
    again = tmp_path / "again"
    environment = module_environment(PYTHONHASHSEED="7", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    command = module_command("recipes.quality.prepare", "--size", "smoke", "--folder", str(again))
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in (prepare.TOKENIZER, prepare.TOKENS, prepare.SOURCES):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    for source in prepared.sources:
        assert f"| {source['package']} {source['version']} |" in done.stdout


def test_cache_round_trip(prepared: Prepared, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_texts(*_: Any, **__: Any) -> Any:
        raise AssertionError("a cache that is there must not be made again")

    monkeypatch.setattr(prepare, "build", no_texts)
    for again in (load(folder), load(folder, "smoke"), prepare.prepare(folder, "smoke", progress=False)):
        expected, found = arrays(prepared), arrays(again)
        assert list(expected) == list(found)
        for name, array in expected.items():
            assert array.dtype == found[name].dtype and (array == found[name]).all(), name
        assert again.sources == prepared.sources
        text = "Höhe 123 日本 = 4\n"
        assert again.tokenizer(text)["input_ids"] == prepared.tokenizer(text)["input_ids"]
        assert again.tokenizer.eos_token_id == prepared.tokenizer.eos_token_id
        assert again.tokenizer.decode(again.tokenizer(text)["input_ids"]) == text
    assert not list(folder.glob(".*"))


def damage_tokens(folder: Path) -> None:
    path = folder / prepare.TOKENS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def cut_tokenizer(folder: Path) -> None:
    path = folder / prepare.TOKENIZER
    path.write_bytes(path.read_bytes()[:-100])


def older_format(folder: Path) -> None:
    path = folder / prepare.SOURCES
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": prepare.FORMAT - 1}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            damage_tokens,
            r"tokens\.npz is damaged .*make it anew with: python -m recipes\.quality\.prepare --size smoke",
        ),
        (cut_tokenizer, r"tokenizer\.json is damaged"),
        (older_format, rf"has format {prepare.FORMAT - 1}, this version reads format {prepare.FORMAT}"),
        (lambda folder: (folder / prepare.TOKENS).unlink(), r"tokens\.npz is not there"),
        (lambda folder: (folder / prepare.SOURCES).unlink(), r"holds no prepared texts"),
        (lambda folder: (folder / prepare.SOURCES).write_text("{"), r"sources\.json is damaged"),
        (lambda folder: (folder / prepare.SOURCES).write_text("[]"), r"sources\.json is damaged"),
    ],
)
def test_damaged_or_stale_cache_is_named_and_made_anew(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    harm: Any,
    message: str,
) -> None:
    save(prepared, tmp_path, "smoke")
    load(tmp_path, "smoke")
    harm(tmp_path)
    with pytest.raises(CacheError, match=message):
        load(tmp_path, "smoke")
    monkeypatch.setattr(prepare, "build", lambda size, folder, progress: prepared)
    prepare.prepare(tmp_path, "smoke")
    assert "preparing the texts" in capsys.readouterr().out
    assert (load(tmp_path, "smoke").general == prepared.general).all()


def test_a_cache_of_another_size_is_refused(folder: Path, prepared: Prepared) -> None:
    with pytest.raises(CacheError, match="has the size 'smoke', not 'full'"):
        load(folder, "full")
    with pytest.raises(ValueError, match="size is 'full' or 'smoke', not 'huge'"):
        prepare.prepare(folder, "huge", progress=False)


def test_a_crash_while_writing_leaves_no_cache(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(prepared, tmp_path, "smoke")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(prepared, tmp_path, "smoke")
    with pytest.raises(CacheError, match="holds no prepared texts"):
        load(tmp_path)
    assert not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------------------------------------------- packages


def test_missing_packages_are_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingTexts) as error:
        prepare.prepare(tmp_path / "data", "full", progress=False)
    message = str(error.value)
    for name in ("bible-kjv-text", "golang-1.19-src", "libreoffice-help-ja", "dict-gcide"):
        assert name in message
    assert f"--fetch --texts {tmp_path / 'texts'}" in message and "apt-get download" in message
    (tmp_path / "texts" / "deb").mkdir(parents=True)
    (tmp_path / "texts" / "deb" / "dict-gcide_1_all.deb").touch()
    with pytest.raises(MissingTexts) as error:
        prepare.prepare(tmp_path / "data", "full", progress=False)
    assert "dict-gcide," not in str(error.value).split("Get them")[0]

    done = run_module("recipes.quality.prepare", "--folder", tmp_path / "data")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_fetch_and_read_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of a Debian package, with stand-ins for apt-get and dpkg-deb: both only ever write below the folder."""
    tools, folder = tmp_path / "tools", tmp_path / "texts"
    tools.mkdir()
    (tools / "apt-get").write_text(
        '#!/bin/sh\nshift 2\nfor name in "$@"; do echo x > "${name}_1%3a2.0-3_all.deb"; done\n'
    )
    (tools / "dpkg-deb").write_text(
        '#!/bin/sh\nmkdir -p "$3/usr"\nyes "one two three" | head -200 > "$3/usr/words.txt"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    recipe = texts.Recipe("words", "general", "MIT", readers.plain("usr/*.txt"), 1_000_000, ("more-words",))
    monkeypatch.setattr(texts, "RECIPES", (recipe,))
    texts.fetch(folder)
    assert sorted(path.name for path in (folder / "deb").iterdir()) == [
        "more-words_1%3a2.0-3_all.deb",
        "words_1%3a2.0-3_all.deb",
    ]
    (source,) = texts.collect("full", folder, progress=False)
    assert source.version == "1:2.0-3, more-words 1:2.0-3" and source.documents[0].text.startswith("one two three\n")

    (folder / "usr" / "words.txt").unlink()
    with pytest.raises(MissingTexts, match="package words 1:2.0-3 .* has none of the files"):
        texts.collect("full", folder, progress=False)
    (tools / "dpkg-deb").write_text("#!/bin/sh\necho broken >&2\nexit 2\n")
    with pytest.raises(MissingTexts, match="(?s)cannot unpack .*broken"):
        texts.fetch(folder)
    (tools / "apt-get").write_text("#!/bin/sh\necho 'Unable to locate package words' >&2\nexit 100\n")
    for deb in (folder / "deb").iterdir():
        deb.unlink()
    with pytest.raises(MissingTexts, match="(?s)Debian 12.*Unable to locate package words"):
        texts.fetch(folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTexts, match="apt-get is not here: fetch the texts on Debian 12"):
        texts.fetch(folder)


def test_a_broken_bible_is_named(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/bible.data").write_bytes(b"header\x1f\x9d\x90junk")
    with pytest.raises(MissingTexts, match="bible-kjv-text 4.38 has 1189"):
        list(readers.scripture(tmp_path))
