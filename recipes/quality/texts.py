"""The texts of the quality experiment: general English for pretraining, and domains that the base never sees.

Full size: documentation, dictionaries, source code and data tables from Debian packages. `fetch` downloads and unpacks them
without root; nothing is installed and nothing of it is part of this repository. Smoke size: what every Python environment
with torch has (`corpora.py` of the recipes), so that a machine without a network runs the same code.

A `Source` is what one package contributes to one split. Documents are in an order that mixes directories and never changes
(a checksum of their name); documents with the same `group` stay on one side of the split.
"""

from __future__ import annotations

import bz2
import gzip
import html.parser
import json
import platform
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [path for path in [str(Path(__file__).resolve().parents[1])] if path not in sys.path]

import corpora  # noqa: E402
from corpora import Document  # noqa: E402

GENERAL = "general"
PACKAGES_FILE = "packages.json"


class MissingTexts(RuntimeError):
    """A package that the texts come from is not there; the message names it and the command that gets it."""


@dataclass
class Source:
    """What one package contributes: to the general text (`split` is "general") or to the domain named by `split`."""

    name: str
    split: str
    package: str
    version: str
    licence: str
    documents: list[Document] = field(repr=False)


# ---------------------------------------------------------------------------------------------------------------- reading


def _checksum(name: str) -> int:
    return zlib.crc32(name.encode())


def _decoded(path: Path) -> str:
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
    BLOCKS = {
        "p",
        "div",
        "li",
        "tr",
        "table",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "br",
        "section",
        "article",
        "blockquote",
        "pre",
    }
    HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # Generated menus and "permalink" marks differ between generators; roles and classes name them.
        named = " ".join(value or "" for name, value in attrs if name in ("class", "role", "id", "hidden"))
        if self.hidden:
            if tag == self.hidden[0]:
                self.hidden.append(tag)
        elif tag in self.HIDDEN or re.search(
            r"\b(headerlink|navigation|sphinxsidebar|related|navheader|navfooter)\b", named
        ):
            if tag not in ("meta", "link", "img", "input", "br", "hr"):
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


def _pieces(name: str, units: Iterable[str], size: int = 6000) -> list[Document]:
    """Consecutive units (entries, verses, lines) joined to documents of about `size` characters."""
    documents, held, length = [], [], 0
    for unit in units:
        held.append(unit)
        length += len(unit)
        if length >= size:
            documents.append(Document(f"{name}#{len(documents)}", "".join(held)))
            held, length = [], 0
    if length > size // 4:
        documents.append(Document(f"{name}#{len(documents)}", "".join(held)))
    return documents


def _files(root: Path, *patterns: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files that fit the patterns, each once, mixed but always in the same order."""
    found = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.glob(pattern)}
    for name in sorted(found, key=lambda name: (_checksum(name), name)):
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
) -> Reader:
    """A reader of files, one document each. `skip` is looked for in the name and in the first 600 characters."""

    def read(root: Path) -> Iterator[Document]:
        for name, path in _files(root, *patterns):
            if re.search(skip, name) or path.stat().st_size > 4 * largest:
                continue
            raw = _decoded(path)
            if re.search(skip, raw[:600]):
                continue
            text = transform(raw)
            if smallest <= len(text) <= largest:
                yield Document(name, text, group(name))

    return read


def pages(*patterns: str, skip: str = r"(?!)") -> Reader:
    return plain(*patterns, transform=page_text, skip=skip)


def dictionary(pattern: str) -> Reader:
    """A dictd dictionary: entries in alphabetical order, joined to documents."""

    def read(root: Path) -> Iterator[Document]:
        for name, path in _files(root, pattern):
            documents = _pieces(name, re.split(r"(?<=\n)(?=\S)", _decoded(path)))
            yield from sorted(documents, key=lambda document: (_checksum(document.name), document.name))

    return read


def cookies(pattern: str, skip: str = r"\.(dat|u8)$") -> Reader:
    """Fortune files: short texts between lines with a percent sign."""

    def read(root: Path) -> Iterator[Document]:
        for name, path in _files(root, pattern):
            if not re.search(skip, name):
                units = [unit.strip("\n") + "\n\n" for unit in re.split(r"\n%.*\n", _decoded(path))]
                yield from _pieces(name, units, 4000)

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
    for name in sorted(chapters, key=lambda name: (_checksum(name), name)):
        yield Document(name, name + "\n" + "".join(chapters[name]))


def rows(*patterns: str, size: int = 6000, skip: str = r"^(#|\s*$)") -> Reader:
    """Tables: the lines of a file without comments, joined to documents."""

    def read(root: Path) -> Iterator[Document]:
        documents = []
        for name, path in _files(root, *patterns):
            lines = [line for line in _decoded(path).splitlines(keepends=True) if not re.search(skip, line)]
            documents += _pieces(name, lines, size)
        yield from sorted(documents, key=lambda document: (_checksum(document.name), document.name))

    return read


def legal(root: Path) -> Iterator[Document]:
    """Licence texts without the tables of file names and holders around them."""
    patterns = ("usr/share/doc/*/copyright", "usr/share/common-licenses/*", "usr/share/doc/debian/*.txt*")
    licensee = "usr/share/rubygems-integration/all/gems/licensee-*/vendor/choosealicense.com/_licenses/*.txt"
    for name, path in _files(root, *patterns, licensee):
        text = _decoded(path)
        # In the copyright files a paragraph is indented by a space and separated by " .".
        text = re.sub(r"(?m)^ ?\.?$", "", re.sub(r"(?m)^ (?=\S)", "", text))
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            listing = re.match(
                r"\s*(Files|Copyright|Upstream|Source|Format|Comment|---|Author|title|spdx-id)\b", paragraph
            )
            if not listing and len(paragraph) > 40:
                kept.append(re.sub(r"^License:.*\n", "", paragraph).strip("\n"))
        if sum(map(len, kept)) > 300:
            yield Document(name, "\n\n".join(kept) + "\n")


def iso_codes(root: Path) -> Iterator[Document]:
    """Codes of languages and subdivisions as lines of a comma-separated table."""
    documents = []
    for name, path in _files(root, "usr/share/iso-codes/json/iso_*.json"):
        (entries,) = json.loads(_decoded(path)).values()
        lines = [",".join(str(value) for value in entry.values() if isinstance(value, str)) + "\n" for entry in entries]
        documents += _pieces(name, lines, 3000)
    yield from sorted(documents, key=lambda document: (_checksum(document.name), document.name))


# ---------------------------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Recipe:
    """How one Debian package becomes documents. `characters` is the most that is taken."""

    package: str
    split: str
    licence: str
    read: Reader
    characters: int
    also: tuple[str, ...] = ()  # further packages whose files the reader finds

    def packages(self) -> tuple[str, ...]:
        return (self.package, *self.also)


_INDEX = r"(genindex|searchindex|py-modindex|/_static/|/_sources/|changelog|bookindex|/toc)"
_MAN = "usr/share/man/man[0-9]/*.gz"


def _go_folder(name: str) -> str:
    return name.rsplit("/", 1)[0]


RECIPES: tuple[Recipe, ...] = (
    # General: English, most of it technical, and some code; prose and definitions make up about half.
    Recipe("anarchism", GENERAL, "GFDL-1.3+ or GPL-2+", plain("usr/share/doc/anarchism/markdown/*.md.gz"), 11_000_000),
    Recipe("dict-gcide", GENERAL, "GPL-3+", dictionary("usr/share/dictd/gcide.dict.dz"), 16_000_000),
    Recipe("dict-wn", GENERAL, "WordNet (permissive)", dictionary("usr/share/dictd/wn.dict.dz"), 6_000_000),
    Recipe("dict-foldoc", GENERAL, "GFDL-1.1+", dictionary("usr/share/dictd/foldoc.dict.dz"), 5_000_000),
    Recipe("dict-jargon", GENERAL, "public domain", dictionary("usr/share/dictd/jargon.dict.dz"), 2_000_000),
    Recipe("fortunes", GENERAL, "various, free to distribute", cookies("usr/share/games/fortunes/*"), 3_000_000),
    Recipe(
        "python3.11-doc", GENERAL, "PSF-2.0", pages("usr/share/doc/python3.11/html/**/*.html", skip=_INDEX), 9_000_000
    ),
    Recipe(
        "python-django-doc",
        GENERAL,
        "BSD-3-Clause",
        pages("usr/share/doc/python-django-doc/html/**/*.html", skip=_INDEX + "|_modules"),
        4_000_000,
    ),
    Recipe("postgresql-doc-15", GENERAL, "PostgreSQL", pages("usr/share/doc/postgresql-doc-15/html/*.html"), 6_000_000),
    Recipe("sqlite3-doc", GENERAL, "public domain", pages("usr/share/doc/sqlite3/**/*.html", skip=_INDEX), 6_000_000),
    Recipe("git-doc", GENERAL, "GPL-2", pages("usr/share/doc/git/html/*.html"), 3_000_000),
    Recipe("perl-doc", GENERAL, "Artistic or GPL-1+", plain("usr/share/perl/**/*.pod"), 8_000_000),
    Recipe("vim-runtime", GENERAL, "Vim", plain("usr/share/vim/vim*/doc/*.txt"), 6_000_000),
    Recipe(
        "libreoffice-help-en-us",
        GENERAL,
        "MPL-2.0",
        pages("usr/share/libreoffice/help/en-US/text/**/*.html"),
        4_000_000,
    ),
    Recipe(
        "manpages-dev",
        GENERAL,
        "various free (GPL-2+, BSD)",
        plain(_MAN, transform=manual_text),
        4_000_000,
        ("manpages",),
    ),
    Recipe(
        "linux-doc-6.1",
        GENERAL,
        "GPL-2",
        plain("usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz"),
        10_000_000,
    ),
    # Domains.
    Recipe(
        "golang-1.19-src",
        "go",
        "BSD-3-Clause",
        plain(
            "usr/share/go-1.19/src/**/*.go", skip=r"DO NOT EDIT|/testdata/|/vendor/", smallest=1500, group=_go_folder
        ),
        7_000_000,
    ),
    Recipe(
        "emacs-el",
        "lisp",
        "GPL-3+",
        plain("usr/share/emacs/*/lisp/**/*.el.gz", skip=r"loaddefs|/leim/", smallest=1500),
        7_000_000,
    ),
    Recipe("bible-kjv-text", "scripture", "public domain", scripture, 6_000_000),
    Recipe(
        "libreoffice-help-de", "german", "MPL-2.0", pages("usr/share/libreoffice/help/de/text/**/*.html"), 4_500_000
    ),
    Recipe("fortunes-de", "german", "GPL-2+ and public domain", cookies("usr/share/games/fortunes/de/*"), 1_500_000),
    Recipe(
        "libreoffice-help-ru", "russian", "MPL-2.0", pages("usr/share/libreoffice/help/ru/text/**/*.html"), 4_500_000
    ),
    Recipe(
        "fortunes-ru", "russian", "various, free to distribute", cookies("usr/share/games/fortunes/ru/*"), 1_500_000
    ),
    Recipe(
        "libreoffice-help-ja", "japanese", "MPL-2.0", pages("usr/share/libreoffice/help/ja/text/**/*.html"), 4_500_000
    ),
    Recipe("pari-doc", "tex", "GPL-2+", plain("usr/share/pari/doc/*.tex", largest=2_000_000), 4_000_000),
    Recipe(
        "texlive-latex-base",
        "tex",
        "LPPL-1.3c",
        plain("usr/share/texlive/texmf-dist/tex/latex/**/*.tex", "usr/share/texlive/texmf-dist/tex/latex/**/*.sty"),
        4_000_000,
    ),
    Recipe(
        "base-files",
        "legal",
        "as each licence text says; free to distribute",
        legal,
        6_000_000,
        (
            "ruby-licensee",
            "doc-debian",
            "debian-policy",
            "libboost-system1.74.0",
            "qtwebengine5-doc-html",
            "krb5-doc",
            "r-doc-html",
        ),
    ),
    Recipe(
        "unicode-data",
        "tables",
        "Unicode",
        rows("usr/share/unicode/NamesList.txt", "usr/share/unicode/allkeys.txt"),
        2_000_000,
    ),
    Recipe("ieee-data", "tables", "public data of the IEEE registry", rows("usr/share/ieee-data/oui.csv"), 1_500_000),
    Recipe("pci.ids", "tables", "BSD-3-Clause or GPL-2+", rows("usr/share/misc/pci.ids"), 1_000_000),
    Recipe("iso-codes", "tables", "LGPL-2.1+", iso_codes, 1_000_000),
)


def package_names() -> list[str]:
    """Every Debian package that the full size reads."""
    return sorted({name for recipe in RECIPES for name in recipe.packages()})


# ---------------------------------------------------------------------------------------------------------------- getting


def fetch_command(folder: Path) -> str:
    """The command line that gets the texts without this script; root is not needed."""
    names = " ".join(package_names())
    return (
        f"mkdir -p {folder}/deb && (cd {folder}/deb && apt-get download {names}) && "
        f'for deb in {folder}/deb/*.deb; do dpkg-deb -x "$deb" {folder}; done'
    )


def _versions(folder: Path) -> dict[str, str]:
    """Package to version, of the .deb files kept in `folder/deb`."""
    path = folder / PACKAGES_FILE
    if path.exists():
        return {str(name): str(value) for name, value in json.loads(path.read_text()).items()}
    versions = {}
    for deb in sorted((folder / "deb").glob("*.deb")):
        name, number, *_ = deb.stem.split("_")
        versions[name] = number.replace("%3a", ":")
    return versions


def fetch(folder: Path) -> None:
    """Download the Debian packages with apt-get and unpack them below `folder`. Nothing is installed.

    Raises:
        MissingTexts: there is no apt-get or dpkg-deb, or a package is not in this system's release of Debian.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingTexts(f"{tool} is not here: fetch the texts on Debian 12 (a container will do) with --fetch")
    downloads = folder / "deb"
    downloads.mkdir(parents=True, exist_ok=True)
    present = {deb.name.split("_")[0] for deb in downloads.glob("*.deb")}
    wanted = [name for name in package_names() if name not in present]
    if wanted:
        done = subprocess.run(["apt-get", "download", "-q", *wanted], cwd=downloads, capture_output=True, text=True)
        if done.returncode != 0:
            raise MissingTexts(
                f"apt-get download failed (is this Debian 12, and has `apt-get update` been run?):\n{done.stderr.strip()}"
            )
    for deb in sorted(downloads.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)


def _full(folder: Path, progress: bool) -> list[Source]:
    versions = _versions(folder)
    missing = [name for name in package_names() if name not in versions]
    if missing:
        raise MissingTexts(
            f"{folder} lacks the texts of the Debian packages {', '.join(missing)}. Get them with\n"
            f"    python recipes/quality/prepare.py --fetch --texts {folder}\nor by hand:\n    {fetch_command(folder)}"
        )
    sources = []
    for recipe in RECIPES:
        documents, length = [], 0
        for document in recipe.read(folder):
            documents.append(document)
            length += len(document.text)
            if length >= recipe.characters:
                break
        if not documents:
            raise MissingTexts(
                f"the Debian package {recipe.package} {versions[recipe.package]} in {folder} has none of the files that are "
                f"read from it: delete {folder}/deb/{recipe.package}_*.deb and fetch it again, or use Debian 12"
            )
        number = ", ".join(
            versions[name] if name == recipe.package else f"{name} {versions[name]}" for name in recipe.packages()
        )
        sources.append(Source(recipe.package, recipe.split, recipe.package, number, recipe.licence, documents))
        if progress:
            print(
                f"  {recipe.split:10} {recipe.package:24} {len(documents):6} documents {length / 1e6:7.2f} M characters",
                flush=True,
            )
    return sources


def _declarations() -> list[Document]:
    """YAML: the operators that torch declares, in pieces."""
    root = corpora._package_folder("torchgen") / "packaged" / "ATen" / "native"
    return list(rows("*.yaml", size=4000, skip=r"^#")(root))


def _smoke() -> list[Source]:
    python, torch = platform.python_version(), version("torch")
    about: dict[str, tuple[Callable[[], list[Document]], str, str, str]] = {
        "manual": (corpora.manual, "pydoc_data of Python", python, "PSF-2.0"),
        "cpp": (corpora.cpp, "torch", torch, "BSD-3-Clause"),
        "licences": (corpora.licences, "the installed Python packages", "as installed", "as each licence text says"),
        "unicode": (corpora.unicode_table, "unicodedata of Python", python, "Unicode"),
        "yaml": (_declarations, "torch", torch, "BSD-3-Clause"),
    }
    code = corpora.standard_library()[:160]
    sources = [Source("stdlib", GENERAL, "standard library of Python", python, "PSF-2.0", code)]
    for name, (read, package, number, licence) in about.items():
        sources.append(Source(name, name, package, number, licence, read()[:120]))
    return sources


def collect(size: str, folder: Path, progress: bool = True) -> list[Source]:
    """The documents of every source, not yet cleaned of near-copies.

    Args:
        size: "full" or "smoke".
        folder: where the Debian packages are unpacked; not read for the smoke size.

    Raises:
        ValueError: another size.
        MissingTexts: a package is not there.
    """
    if size == "full":
        return _full(folder, progress)
    if size == "smoke":
        return _smoke()
    raise ValueError(f"size is 'full' or 'smoke', not {size!r}")
