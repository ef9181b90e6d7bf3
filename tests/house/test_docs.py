"""The documentation agrees with the code: API page, import graph, versions, and every file and command that it names."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import ModuleType

import pytest
from packaging.version import Version

from paths import ROOT
from peft_loraswitch.vllm_plugin import versions

# Written for readers, so that a path in them is a promise. (docs/kernel_log.md tells of files that are gone.)
PAGES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "csrc/*.md", "recipes/*.md", "recipes/quality/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name not in ("kernel_log.md", "CHANGELOG.md")
]
PRE_COMMIT = (ROOT / ".pre-commit-config.yaml").read_text()


def script(name: str) -> ModuleType:
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_what_the_docstrings_say():
    api = script("api")
    assert api.PAGE.read_text() == api.page(), "run `python docs/api.py`"


def test_the_import_graph_is_read_and_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the extra `recipes` brings it")
    structure = script("structure")
    picture = tmp_path / "imports.png"
    monkeypatch.setattr(sys, "argv", ["structure.py", "--picture", str(picture)])
    assert structure.main() == 0
    printed = capsys.readouterr().out
    files = list((ROOT / "peft_loraswitch").rglob("*.py"))
    files = [
        path
        for path in files
        if path.name != "__init__.py" or path.parent == structure.PACKAGE or structure._code(path)
    ]
    names = [structure.module_name(path, structure.PACKAGE) for path in files]
    assert len(names) > 20 and all(re.search(rf"(?m)(^|  ){re.escape(name)}($|  )", printed) for name in names)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_package_has_no_circles():
    structure = script("structure")
    assert structure.circles(structure.read_imports()) == []


def test_the_import_graph_finds_circles_wherever_they_hide(tmp_path):
    """At the top of a file, inside a function, under TYPE_CHECKING, through a folder's __init__, by the package's own name."""
    structure = script("structure")
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    for name, text in {
        "__init__": "from .top import a",
        "top": "from .room import b",
        "room/__init__": "from .inner import c",
        "room/inner": "def f():\n    from package.low import d",
        "low": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .room.inner import f",
    }.items():
        (package / f"{name}.py").write_text(text)
    imports = structure.read_imports(package)
    assert imports["room"] == {"room.inner": True} and imports["room.inner"] == {"low": False}
    assert structure.circles(imports) == [["low", "room.inner"]]
    (package / "low.py").write_text("")
    assert structure.circles(structure.read_imports(package)) == []


def test_the_range_of_vllm_is_the_same_wherever_it_stands():
    oldest, newest = (Version(each) for each in (versions.OLDEST, versions.NEWEST))
    pip = f'"vllm>={oldest.major}.{oldest.minor},<{newest.major}.{newest.minor + 1}"'
    words = f"vLLM {oldest.major}.{oldest.minor} to {newest.major}.{newest.minor}"
    for name, expected in (("pyproject.toml", pip), ("recipes/serve.md", pip), ("README.md", words)):
        assert expected in (ROOT / name).read_text(), f"{name}: {expected}"


def test_pre_commit_runs_the_pinned_versions_on_files_that_exist():
    pinned = dict(re.findall(r"(?m)^([\w-]+)==(\S+)$", (ROOT / "requirements-dev.txt").read_text()))
    used = re.findall(r"additional_dependencies: \[([\w-]+)==([\w.]+)\]", PRE_COMMIT)
    assert [name for name, _ in used].count("ruff") == 2
    assert all(
        pinned[name] == version for name, version in used if name != "clang-format"
    )  # which pip need not install
    patterns = re.findall(r"(?m)^ +files: (\S+)$", PRE_COMMIT)
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()]
    assert patterns and all(any(re.search(pattern, file) for file in files) for pattern in patterns)
    mentioned = re.findall(r"\b(?:tests|docs|csrc|recipes)/[\w./]+\w", PRE_COMMIT)
    assert mentioned and all((ROOT / name).exists() for name in mentioned), mentioned


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    here = (ROOT / page).parent
    links = [target.partition("#")[0] for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)", text)]
    assert [target for target in links if not (here / target).exists()] == []
    paths = re.findall(r"(?:tests|docs|recipes|csrc|peft_loraswitch)/[\w./*-]*[\w*/]", text)
    made = {"recipes/results/", "peft_loraswitch/libloraswitch.so"}  # written by commands
    missing = [name for name in paths if name not in made and not list(ROOT.glob(name.rstrip("/")))]
    assert [name for name in missing if not ignored(name)] == []


def ignored(name: str) -> bool:
    """Whether git leaves this path out: something that a command makes."""
    return subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_exists(page):
    """`make` targets, Python files, modules and scripts in the blocks for a shell."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```$", (ROOT / page).read_text())
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    for line in "".join(blocks).splitlines():
        command = line.partition("#")[0]
        wanted = re.findall(r"(?:^|[;&] *)make ([\w-]+)", command)
        assert set(wanted) <= targets, f"{page}: {line}"
        for name in re.findall(r"(?:^|\s)((?:[\w.-]+/)*[\w-]+\.(?:py|sh|txt|yaml|md))\b", command):
            if not re.search(rf"(?:>|--\w+|-o) *{re.escape(name)}", command):
                assert (ROOT / name).exists(), f"{page}: {name}"
    if page == "README.md":
        assert blocks
    for name in re.findall(r"`make ([\w-]+)`", (ROOT / page).read_text()):
        assert name in targets, f"{page}: make {name}"
