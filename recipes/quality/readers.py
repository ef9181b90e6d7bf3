"""Files of many kinds to documents of plain text: pages, manual pages, dictionaries, tables, licence texts."""

from __future__ import annotations

import bz2
import gzip
import html.parser
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from recipes.corpora import Document, checksum


class MissingTexts(RuntimeError):
    """A package that the texts come from is not there; the message names it and the command that gets it."""


def decoded(path: Path) -> str:
    """The text of a plain, gzip, dictzip or bzip2 file; UTF-8, or Latin-1 where it is not."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    elif path.suffix == ".bz2":
        data = bz2.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class _Text(html.parser.HTMLParser):
    """The readable text of a page: one line per block, white space kept inside of <pre>, nothing of menus and scripts."""

    HIDDEN = {"script", "style", "nav", "header", "footer", "aside", "form", "button", "noscript", "title", "select"}
    BLOCKS = set("p div li tr table ul ol dl dt dd br section article blockquote pre".split())
    HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
    EMPTY = {"meta", "link", "img", "input", "br", "hr", "col", "wbr"}  # never closed, so they hide nothing
    MENU = re.compile(r"\b(headerlink|navigation|sphinxsidebar|related|navheader|navfooter|MAC)\b")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # Generated menus and links to headings differ between generators; roles and classes name them.
        named = " ".join(value or "" for name, value in attrs if name in ("class", "role"))
        if self.hidden:
            if tag == self.hidden[0]:
                self.hidden.append(tag)
        elif tag in self.HIDDEN or self.MENU.search(named):
            if tag not in self.EMPTY:
                self.hidden.append(tag)
        elif tag in self.HEADINGS or tag in ("p", "pre"):
            self.parts.append("\n\n")
        elif tag in self.BLOCKS:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        if tag == "pre" and not self.hidden:
            self.verbatim += 1

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            if tag == self.hidden[0]:
                self.hidden.pop()
            return
        if tag == "pre":
            self.verbatim = max(0, self.verbatim - 1)
        if tag in self.HEADINGS or tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def page_text(page: str) -> str:
    """The text of an HTML page.

    >>> page_text("<nav>menu</nav><h1>Title</h1><p>One  <b>two</b>.</p><pre>a\\n  b</pre>")
    'Title\\n\\nOne two.\\n\\na\\n  b\\n'
    """
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.parts).replace("¶", "").splitlines()]
    text = "\n".join(line[1:] if line[:1] == " " and line[:2] != "  " else line for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def manual_text(source: str) -> str:
    """The text of a manual page: roff requests and font changes removed, headings and paragraphs kept.

    >>> manual_text('.TH X 1\\n.SH NAME\\nx \\\\- an \\\\fBexample\\\\fP\\n.\\\\" comment\\n.B bold\\n')
    'NAME\\nx - an example\\nbold\\n'
    """
    lines = []
    for line in source.splitlines():
        if line.startswith(("'\\\"", '.\\"', ".TH", ".so", ".de", ".ds", ".if", ".ie", ".el", ".nr", "..", ".\\}")):
            continue
        if re.match(r"\.(SH|SS|PP|P|LP|IP|TP|HP|Sh|Ss|Pp|It|sp)\b", line):
            lines.append("")
        if line.startswith((".", "'")):
            words = line.split(None, 1)
            line = (
                words[1].replace('"', "")
                if len(words) == 2 and not re.match(r"\.(sp|ft|RS|in|ta|hy|ad|PD|ne|TS)", line)
                else ""
            )
            if not line:
                continue
        line = re.sub(r"\\f(?:\(..|\[[^]]*\]|.)|\\s[-+]?\d|\\&|\\/|\\,|\\:|\\c$", "", line)
        line = re.sub(r"\\(?:\((?:aq|cq|oq)|\[(?:aq|cq|oq)\])", "'", line)
        line = re.sub(r"\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]", '"', line)
        line = re.sub(r"\\\((?:en|em|mi|hy)|\\\[(?:en|em|mi|hy)\]", "-", line)
        line = (
            line.replace("\\(bu", "*").replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\~", " ")
        )
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def pieces(name: str, units: Iterable[str], size: int = 6000) -> list[Document]:
    """Consecutive units (entries, verses, lines) joined to documents of about `size` characters, nothing lost."""
    parts: list[str] = []
    held: list[str] = []
    length = 0
    for unit in units:
        held.append(unit)
        length += len(unit)
        if length >= size:
            parts.append("".join(held))
            held, length = [], 0
    if parts and length < size // 4:
        parts[-1] += "".join(held)
    elif held:
        parts.append("".join(held))
    return [Document(f"{name}#{place}", part) for place, part in enumerate(parts)]


def paragraphs(text: str) -> list[str]:
    """The text cut at its blank lines, nothing lost."""
    return re.split(r"(?<=\n\n)(?=[^\n])", text)


def files_of(root: Path, *patterns: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files that fit the patterns, each once, mixed but always in the same order."""
    found = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.glob(pattern)}
    for name in sorted(found, key=lambda name: (checksum(name), name)):
        if found[name].is_file() and not found[name].is_symlink():
            yield name, found[name]


Reader = Callable[[Path], Iterator[Document]]


def plain(
    *patterns: str,
    transform: Callable[[str], str] = lambda text: text,
    skip: str = r"(?!)",
    smallest: int = 600,
    largest: int = 400_000,
    group: Callable[[str], str] = lambda name: name,
    generated: str = r"(?!)",
    cut: int | None = None,
) -> Reader:
    """A reader of files, one document each.

    Args:
        skip, generated: files are left out whose name, or the first 600 characters of whose text, has these in it.
        cut: makes documents of about so many characters, which need not stay together; for a few long files.
    """

    def read(root: Path) -> Iterator[Document]:
        for name, path in files_of(root, *patterns):
            if re.search(skip, name) or path.stat().st_size > 4 * largest:
                continue
            raw = decoded(path)
            if re.search(generated, raw[:600]):
                continue
            text = transform(raw)
            if smallest <= len(text) <= largest:
                if cut is None:
                    yield Document(name, text, group(name))
                else:
                    yield from pieces(name, paragraphs(text), cut)

    return read


def pages(*patterns: str, skip: str = r"(?!)", cut: int | None = None, script: str = "") -> Reader:
    """A reader of HTML. `script`: long paragraphs without any of these characters were left untranslated and are left out."""

    def transform(page: str) -> str:
        return in_script(page_text(page), script)

    return plain(*patterns, transform=transform, skip=skip, largest=1_000_000, cut=cut)


def in_script(text: str, script: str) -> str:
    """The text without its long paragraphs that have none of the characters that the regular expression finds.

    >>> in_script("Да, это так.\\n\\nThis paragraph has been forgotten by translators.\\n\\nOK\\n", "[а-я]")
    'Да, это так.\\n\\nOK\\n'
    """
    return "".join(part for part in paragraphs(text) if len(part) <= 40 or re.search(script, part))


def dictionary(pattern: str) -> Reader:
    """A dictd dictionary: entries in alphabetical order, joined to documents."""

    def read(root: Path) -> Iterator[Document]:
        for name, path in files_of(root, pattern):
            documents = pieces(name, re.split(r"(?<=\n)(?=\S)", decoded(path)))
            yield from sorted(documents, key=lambda document: (checksum(document.name), document.name))

    return read


def cookies(pattern: str, skip: str = r"\.(dat|u8)$") -> Reader:
    """Fortune files: short texts between lines with a percent sign."""

    def read(root: Path) -> Iterator[Document]:
        for name, path in files_of(root, pattern):
            if not re.search(skip, name):
                units = [unit.strip("\n") + "\n\n" for unit in re.split(r"(?m)^%.*\n", decoded(path))]
                yield from pieces(name, units, 4000)

    return read


def scripture(root: Path) -> Iterator[Document]:
    """The King James Version by chapters. The package keeps it as one stream of compress(1), which gzip(1) can read."""
    path = root / "usr/lib/bible.data"
    data = path.read_bytes()
    stream = data[data.index(b"\x1f\x9d") :]
    done = subprocess.run(["gzip", "-dc"], input=stream, capture_output=True)
    text = done.stdout.decode("latin-1")
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+?)(\d+):(\d+) (.*)", line):
            chapters.setdefault(f"{match[1]} {match[2]}", []).append(f"{match[3]} {match[4]}\n")
    if len(chapters) < 1000:
        raise MissingTexts(f"{path} holds {len(chapters)} chapters; the package bible-kjv-text 4.38 has 1189")
    for name in sorted(chapters, key=lambda name: (checksum(name), name)):
        yield Document(name, name + "\n" + "".join(chapters[name]))


def rows(*patterns: str, size: int = 6000, skip: str = r"^(#|\s*$)") -> Reader:
    """Tables: the lines of a file without comments, joined to documents."""

    def read(root: Path) -> Iterator[Document]:
        documents: list[Document] = []
        for name, path in files_of(root, *patterns):
            lines = [line for line in decoded(path).splitlines(keepends=True) if not re.search(skip, line)]
            documents += pieces(name, lines, size)
        yield from sorted(documents, key=lambda document: (checksum(document.name), document.name))

    return read


def legal(*patterns: str) -> Reader:
    """Licence texts and rules, without the tables of file names and holders around them."""
    listing = re.compile(r"\s*(Files|Copyright|Upstream-|Source|Format|Comment|---|Author|title|spdx-id)\b")

    def read(root: Path) -> Iterator[Document]:
        for name, path in files_of(root, *patterns):
            text = page_text(decoded(path)) if path.suffix == ".html" else decoded(path)
            if path.name == "copyright":  # a paragraph is indented by a space there, and followed by " ."
                text = re.sub(r"(?m)^ ?\.?$", "", re.sub(r"(?m)^ (?=\S)", "", text))
            kept = []
            for paragraph in re.split(r"\n\s*\n", text):
                paragraph = re.sub(r"^License:.*\n", "", paragraph).strip("\n")
                if len(paragraph) > 40 and not listing.match(paragraph):
                    kept.append(paragraph + "\n\n")
            if sum(map(len, kept)) > 300:
                yield from pieces(name, kept, 12_000)

    return read


def iso_codes(root: Path) -> Iterator[Document]:
    """Codes of languages and subdivisions as lines of a comma-separated table."""
    documents: list[Document] = []
    for name, path in files_of(root, "usr/share/iso-codes/json/iso_*.json"):
        (entries,) = json.loads(decoded(path)).values()
        lines = [",".join(str(value) for value in entry.values() if isinstance(value, str)) + "\n" for entry in entries]
        documents += pieces(name, lines, 3000)
    yield from sorted(documents, key=lambda document: (checksum(document.name), document.name))
