"""Commands and paths in the documents name what is there, and what is there runs as modules from the root of a clone."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from recipes.checkout import ROOT, git, module_command

ENDINGS = ("md", "py", "yaml", "yml", "toml", "ipynb", "cu", "cuh", "h", "sh")
DOCUMENTS = sorted(
    {ROOT / "Makefile", ROOT / ".ci" / "run", *(path for end in ENDINGS for path in ROOT.glob(f"*.{end}"))}
    | {ROOT / ".pre-commit-config.yaml"}
    | {
        path
        for folder in ("recipes", "docs", "csrc", "peft_loraswitch", "tests", ".github")
        for end in ENDINGS
        for path in (ROOT / folder).rglob(f"*.{end}")
        if "saved_by" not in path.as_posix()
    }
)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "recipes").rglob("*.py")
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_modules_and_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"-m (recipes[\w.]*\w)", text):
        assert importlib.util.find_spec(module) is not None, module
    for name in re.findall(r"(?<![\w/.-])(recipes/[\w./-]*[\w/])(?![\w<*{])", text):
        assert (ROOT / name).exists(), name
    if path.suffix == ".md":
        for name in re.findall(r"\]\(([^)\s:#]+)[^):]*\)", text):  # links to files; those elsewhere have a colon
            assert (path.parent / name).exists(), name


def test_nothing_changes_the_search_path() -> None:
    files = [*(ROOT / "recipes").rglob("*.py"), *(ROOT / "tests").rglob("test_bench*.py")]
    files += [*(ROOT / "tests").rglob("test_quality*.py"), *(ROOT / "tests").rglob("test_recipes.py")]
    changing = [
        file.name for file in files if re.search(r"sys\.path|syspath_prepend", file.read_text(encoding="utf-8"))
    ]
    assert len(files) > 50 and not changing


@pytest.mark.parametrize("module", [name for name in MODULES if "lm_eval_tasks" not in name])
def test_every_module_can_be_imported(module: str) -> None:
    for package in ("trl", "datasets", "matplotlib", "yaml", "PIL"):
        pytest.importorskip(package, reason="the recipes need the extra `recipes`")
    importlib.import_module(module)


def test_a_clone_needs_nothing_but_its_root_as_working_directory() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = module_command("recipes.benchmarks.decode.report", "--check")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_git_of_what_is_no_clone_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("recipes.checkout.ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git("rev-parse", "HEAD") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git("rev-parse", "HEAD") == ""
