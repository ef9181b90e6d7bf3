"""The texts of the quality experiment: general English for pretraining, and domains that the base never sees.

Full size: documentation, dictionaries, source code and data tables from Debian packages. `fetch` downloads and unpacks them
without root; nothing is installed and nothing of it is part of this repository. Smoke size: what every Python environment
with torch has (`corpora.py` of the recipes), so that a machine without a network runs the same code.

A `Source` is what one package contributes to one split. Documents are in an order that mixes directories and never changes
(a checksum of their name); documents with the same `group` stay on one side of the split.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from recipes import corpora
from recipes.corpora import Document
from recipes.quality.readers import (
    MissingTexts,
    Reader,
    cookies,
    dictionary,
    iso_codes,
    legal,
    manual_text,
    pages,
    plain,
    rows,
    scripture,
)

GENERAL = "general"


@dataclass
class Source:
    """What one package contributes: to the general text (`split` is "general") or to the domain named by `split`."""

    name: str
    split: str
    package: str
    version: str
    licence: str
    documents: list[Document] = field(repr=False)


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


_DOC, _HELP, _FORTUNES = "usr/share/doc", "usr/share/libreoffice/help", "usr/share/games/fortunes"
_INDEX = r"genindex|searchindex|py-modindex|/_static/|/_modules/|changelog|bookindex"
_RUSSIAN, _JAPANESE = "[а-яА-Я]", "[\u3040-\u30ff\u4e00-\u9fff]"


def _folder(name: str) -> str:
    return name.rsplit("/", 1)[0]


def _legal() -> Reader:
    licensee = "usr/share/rubygems-integration/all/gems/licensee-*/vendor/choosealicense.com/_licenses/*.txt"
    common = "usr/share/common-licenses/*"
    rules = (f"{_DOC}/debian-policy/policy.txt.gz", f"{_DOC}/debian-policy/fhs/*.html")
    project = (f"{_DOC}/debian/constitution*", f"{_DOC}/debian/social-contract*")
    return legal(f"{_DOC}/*/copyright", common, licensee, *rules, *project)


RECIPES: tuple[Recipe, ...] = (
    # General: English, from essays and definitions to manuals. Nothing of the domains' kinds: no code files, no licences.
    Recipe("anarchism", GENERAL, "GPL-2+", plain(f"{_DOC}/anarchism/markdown/*.md.gz"), 11_000_000),
    Recipe("dict-gcide", GENERAL, "GPL-2+", dictionary("usr/share/dictd/gcide.dict.dz"), 16_000_000),
    Recipe("dict-wn", GENERAL, "WordNet (permissive)", dictionary("usr/share/dictd/wn.dict.dz"), 6_000_000),
    Recipe("dict-foldoc", GENERAL, "GFDL-1.1+", dictionary("usr/share/dictd/foldoc.dict.dz"), 4_000_000),
    Recipe("dict-jargon", GENERAL, "public domain", dictionary("usr/share/dictd/jargon.dict.dz"), 2_000_000),
    Recipe("fortunes", GENERAL, "BSD (the collection)", cookies(f"{_FORTUNES}/*"), 3_000_000),
    Recipe("python3.11-doc", GENERAL, "PSF-2.0", pages(f"{_DOC}/python3.11/html/**/*.html", skip=_INDEX), 8_000_000),
    Recipe(
        "python-django-doc",
        GENERAL,
        "BSD-3-Clause",
        pages(f"{_DOC}/python-django-doc/html/**/*.html", skip=_INDEX),
        4_000_000,
    ),
    Recipe("postgresql-doc-15", GENERAL, "PostgreSQL", pages(f"{_DOC}/postgresql-doc-15/html/*.html"), 6_000_000),
    Recipe("sqlite3-doc", GENERAL, "public domain", pages(f"{_DOC}/sqlite3/**/*.html", skip=_INDEX), 5_000_000),
    Recipe("git-doc", GENERAL, "GPL-2", pages(f"{_DOC}/git/html/*.html"), 3_000_000),
    Recipe("perl-doc", GENERAL, "Artistic or GPL-1+", plain("usr/share/perl/**/*.pod"), 5_000_000),
    Recipe("vim-runtime", GENERAL, "OPL-1+", plain("usr/share/vim/vim*/doc/*.txt"), 3_000_000),
    Recipe("libreoffice-help-en-us", GENERAL, "MPL-2.0", pages(f"{_HELP}/en-US/text/**/*.html"), 4_000_000),
    Recipe(
        "manpages-dev",
        GENERAL,
        "GPL-2+ and other free licences",
        plain("usr/share/man/man[0-9]/*.gz", transform=manual_text),
        4_000_000,
        ("manpages",),
    ),
    Recipe("linux-doc-6.1", GENERAL, "GPL-2", plain(f"{_DOC}/linux-doc-6.1/Documentation/**/*.rst.gz"), 8_000_000),
    # Domains, which the general text has next to nothing of.
    Recipe(
        "golang-1.19-src",
        "go",
        "BSD-3-Clause",
        plain(
            "usr/share/go-1.19/src/**/*.go",
            skip=r"/testdata/|/vendor/",
            generated="DO NOT EDIT",
            smallest=1500,
            group=_folder,
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
    Recipe("libreoffice-help-de", "german", "MPL-2.0", pages(f"{_HELP}/de/text/**/*.html"), 4_500_000),
    Recipe("fortunes-de", "german", "GPL-2+ (the collection)", cookies(f"{_FORTUNES}/de/*"), 1_500_000),
    Recipe(
        "libreoffice-help-ru", "russian", "MPL-2.0", pages(f"{_HELP}/ru/text/**/*.html", script=_RUSSIAN), 4_500_000
    ),
    Recipe("fortunes-ru", "russian", "GPL-2 or GPL-2+ (the collection)", cookies(f"{_FORTUNES}/ru/*"), 1_500_000),
    Recipe(
        "manpages-ru",
        "russian",
        "GPL-3+ (translation), pages as each says",
        plain("usr/share/man/ru/man[0-9]/*.gz", transform=manual_text),
        1_500_000,
    ),
    Recipe(
        "libreoffice-help-ja", "japanese", "MPL-2.0", pages(f"{_HELP}/ja/text/**/*.html", script=_JAPANESE), 3_500_000
    ),
    Recipe(
        "debian-reference-ja",
        "japanese",
        "GPL-2+",
        pages("usr/share/debian-reference/ch*.ja.html", script=_JAPANESE, cut=6_000),
        1_500_000,
    ),
    Recipe(
        "manpages-ja",
        "japanese",
        "as each page says; free",
        plain("usr/share/man/ja/man[0-9]/*.gz", transform=manual_text),
        3_000_000,
    ),
    Recipe("pari-doc", "tex", "GPL-2+", plain("usr/share/pari/doc/*.tex", largest=3_000_000, cut=8_000), 4_000_000),
    Recipe(
        "texlive-latex-base",
        "tex",
        "LPPL-1.3c",
        plain(
            "usr/share/texlive/texmf-dist/tex/latex/**/*.tex",
            "usr/share/texlive/texmf-dist/tex/latex/**/*.sty",
            largest=2_000_000,
            cut=12_000,
        ),
        4_000_000,
    ),
    Recipe(
        "base-files",
        "legal",
        "as each text says; free to distribute",
        _legal(),
        6_000_000,
        (
            "debian-policy",
            "doc-debian",
            "ruby-licensee",
            "chromium-l10n",
            "krb5-doc",
            "libboost-system1.74.0",
            "libqt6core6",
            "nodejs-doc",
            "qtwebengine5-doc-html",
            "r-doc-html",
        ),
    ),
    Recipe("unicode-data", "tables", "Unicode", rows("usr/share/unicode/NamesList.txt"), 2_000_000),
    Recipe("ieee-data", "tables", "public domain", rows("usr/share/ieee-data/oui.csv"), 1_500_000),
    Recipe("pci.ids", "tables", "BSD-3-Clause or GPL-2+", rows("usr/share/misc/pci.ids"), 1_000_000),
    Recipe("usb.ids", "tables", "BSD-3-Clause or GPL-2+", rows("var/lib/usbutils/usb.ids"), 1_000_000),
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
        done = subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], capture_output=True, text=True)
        if done.returncode != 0:
            raise MissingTexts(f"dpkg-deb cannot unpack {deb}: delete it and fetch again\n{done.stderr.strip()}")


def _full(folder: Path, progress: bool) -> list[Source]:
    versions = _versions(folder)
    missing = [name for name in package_names() if name not in versions]
    if missing:
        raise MissingTexts(
            f"{folder} lacks the texts of the Debian packages {', '.join(missing)}. Get them with\n"
            f"    python -m recipes.quality.prepare --fetch --texts {folder}\nor by hand:\n    {fetch_command(folder)}"
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
    root = Path(str(files("torchgen"))) / "packaged" / "ATen" / "native"
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
