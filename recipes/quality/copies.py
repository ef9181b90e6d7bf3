"""Near-copies out, and the rest into training, validation and test text that have nothing in common."""

from __future__ import annotations

import hashlib
import re
import zlib

import numpy as np

from recipes.corpora import Document

NEAR_COPY = 0.5  # share of a document's runs of eight words that may have been seen before
NEAR_COPY_HELD_OUT = 0.2  # the same for held-out text, against training text
HELD_OUT_DOCUMENT = 12_000  # characters taken from one held-out document, so that many are seen
RUN = 8
# Scripts without spaces have no words to speak of: their characters count as such.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def hash_of(text: str) -> int:
    """A 64-bit checksum that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Seen:
    """Which runs of eight words were seen. One in eight is kept; its own hash decides, so that the same run always is."""

    def __init__(self) -> None:
        self._runs: set[int] = set()
        self._words: dict[str, int] = {}

    def _sample(self, text: str) -> set[int]:
        words = _WORD.findall(text.lower())
        for word in words:
            if word not in self._words:
                self._words[word] = zlib.crc32(word.encode()) * 0x9E3779B97F4A7C15 % 2**64
        hashes = np.array([self._words[word] for word in words], dtype=np.uint64)
        runs = np.zeros(max(0, len(hashes) - RUN + 1), dtype=np.uint64)
        for place in range(RUN):
            runs = runs * np.uint64(0xD6E8FEB86659FD93) + hashes[place : place + len(runs)]
        return set(runs[runs >> np.uint64(61) == 0].tolist())

    def share(self, text: str) -> float:
        """How much of the text was seen before; 0 for a text too short to tell."""
        sample = self._sample(text)
        return len(sample & self._runs) / len(sample) if len(sample) >= 4 else 0.0

    def add(self, text: str) -> None:
        self._runs |= self._sample(text)


def without_copies(documents: list[Document], seen: Seen) -> list[Document]:
    """Each long paragraph once, and no document half of which was seen before, here or in an earlier call with `seen`."""
    paragraphs: set[int] = set()
    kept = []
    for document in documents:
        parts = []
        for part in re.split(r"(\n\s*\n)", document.text):
            key = re.sub(r"\W+", " ", part).lower()
            if len(key) > 80:
                code = hash_of(key)
                if code in paragraphs:
                    continue
                paragraphs.add(code)
            parts.append(part)
        text = re.sub(r"\n{4,}", "\n\n\n", "".join(parts)).strip("\n") + "\n"
        if len(text) >= 200 and seen.share(text) < NEAR_COPY:
            seen.add(text)
            kept.append(Document(document.name, text, document.group))
    return kept


def split(documents: list[Document], wanted: dict[str, int]) -> dict[str, list[Document]]:
    """Whole groups to the held-out splits until they have the characters `wanted` (split -> number), the others to "train".

    Only the beginning of a held-out document is kept. One that repeats much of the training text is dropped.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.group or document.name, []).append(document)
    result: dict[str, list[Document]] = {"train": [], **{name: [] for name in wanted}}
    have = dict.fromkeys(wanted, 0)
    for group in sorted(groups, key=lambda name: (hash_of("split " + name), name)):
        place = next((place for place in wanted if have[place] < wanted[place]), "train")
        for document in groups[group]:
            if place != "train":
                document = Document(document.name, document.text[:HELD_OUT_DOCUMENT], document.group)
                have[place] += len(document.text)
            result[place].append(document)
    trained = Seen()
    for document in result["train"]:
        trained.add(document.text)
    for place in wanted:
        result[place] = [each for each in result[place] if trained.share(each.text) < NEAR_COPY_HELD_OUT]
    result["train"].sort(key=lambda document: hash_of(document.name))
    return result
