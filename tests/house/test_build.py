"""Building the kernels with compilers that are missing, old, broken, killed, or two at once: never half a library or an old one.

The compiler is a script that writes what a test can recognise; tests/house/test_packaging.py builds with the real one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fresh import run_module
from paths import ROOT
from peft_loraswitch import kernels
from peft_loraswitch.kernels import library_file

NVCC = """#!{python}
import sys, time, hashlib, pathlib
if "--version" in sys.argv:
    print({version!r})
    sys.exit({version_status})
{before}
output = sys.argv[sys.argv.index("-o") + 1]
content = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv if name.endswith(".cu"))
with open(output, "wb") as file:
    file.write(b"\\x7fELF")
    for _ in range({chunks}):
        file.write(hashlib.sha256(content).digest() * 1000)
        file.flush()
        time.sleep({pause})
print("compiled", file=sys.stderr)
sys.exit({status})
"""
GOOD = "Cuda compilation tools, release 13.0, V13.0.88"


def write_nvcc(
    home: Path,
    version: str = GOOD,
    before: str = "",
    status: int = 0,
    version_status: int = 0,
    chunks: int = 3,
    pause: float = 0,
) -> Path:
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NVCC.format(python=sys.executable, **{k: v for k, v in locals().items() if k != "path"}))
    path.chmod(0o755)
    return path


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what a build reads, in a folder whose name has a space."""
    return copy_of_the_tree(tmp_path / "a tree")


def copy_of_the_tree(root: Path) -> Path:
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", ".gitignore"):
        shutil.copy2(ROOT / name, root / name)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copytree(
        ROOT / "peft_loraswitch",
        root / "peft_loraswitch",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", ".kernels*"),
    )
    return root


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "cuda home"


def environment(home: Path | None, **more: str) -> dict[str, str]:
    """Of this process, without any nvcc but that of `home`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "PEFT_LORASWITCH_KERNELS")}
    path = [p for p in kept["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists()]
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), *path])
    return {**kept, **({"CUDA_HOME": str(home)} if home else {}), **more}


def no_usual_place(tree: Path) -> None:
    """Where this machine has a compiler of its own, the test's setup.py does not look for it."""
    text = (tree / "setup.py").read_text()
    (tree / "setup.py").write_text(text.replace("/usr/local/cuda/bin/nvcc", "/nowhere/nvcc"))


def run(tree: Path, *arguments: str, home: Path | None = None, **more: str) -> subprocess.CompletedProcess:
    no_usual_place(tree)
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def wheel_of(tree: Path, **options: Any) -> tuple[zipfile.ZipFile, str]:
    """The wheel that a build makes, and what it said."""
    said = run(tree, "bdist_wheel", "--dist-dir", "made", **options)
    assert said.returncode == 0, said.stdout + said.stderr
    (wheel,) = (tree / "made").glob("*.whl")
    return zipfile.ZipFile(wheel), said.stdout + said.stderr


def library_in(wheel: zipfile.ZipFile) -> bytes | None:
    name = "peft_loraswitch/libloraswitch.so"
    return wheel.read(name) if name in wheel.namelist() else None


def assert_pure(wheel: zipfile.ZipFile, said: str) -> None:
    assert library_in(wheel) is None and wheel.filename.endswith("py3-none-any.whl")
    assert "PURE-PYTHON" in said
    assert not [name for name in wheel.namelist() if ".kernels" in name]


def built_from(tree: Path, library: Path) -> bool:
    """Whether `library` is whole and of the tree's present sources."""
    spec = importlib.util.spec_from_file_location("setup_of_the_tree", tree / "setup.py")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.is_current(library, None)


def edit(tree: Path) -> None:
    with open(tree / "csrc" / "router.cu", "a") as file:
        file.write(f"// {time.time_ns()}\n")


# ------------------------------------------------------------------------------------------------------ the compiler


def test_a_wheel_with_kernels(tree, home):
    write_nvcc(home)
    wheel, _ = wheel_of(tree, home=home)
    assert library_in(wheel) and "manylinux" in wheel.filename
    assert not [name for name in wheel.namelist() if ".kernels" in name]


BROKEN = {
    "none": None,
    "too old": {"version": "Cuda compilation tools, release 12.4, V12.4.131"},
    "garbage": {"version": "\x00\xff what?"},
    "says nothing": {"version": ""},
    "--version fails": {"version_status": 3},
    "fails": {"status": 1},
    "writes nothing": {"before": "sys.exit(0)"},
    "crashes": {"before": "import os; os.abort()"},
    "unsupported host compiler": {
        "before": "print('unsupported GNU version! gcc versions later than 14 are not supported', file=sys.stderr); sys.exit(1)"
    },
}


@pytest.mark.parametrize("case", BROKEN)
def test_without_a_compiler_that_works_the_wheel_is_pure_python_and_says_why(tree, home, case):
    if BROKEN[case] is not None:
        write_nvcc(home, **BROKEN[case])
    wheel, said = wheel_of(tree, home=home)
    assert_pure(wheel, said)
    reason = {"none": "no nvcc found", "too old": "12.4", "unsupported host compiler": "unsupported GNU version"}.get(
        case, "nvcc"
    )
    assert reason in said


@pytest.mark.parametrize("case", BROKEN)
def test_kernels_that_are_demanded_are_an_error(tree, home, case):
    if BROKEN[case] is not None:
        write_nvcc(home, **BROKEN[case])
    said = run(tree, "bdist_wheel", home=home, PEFT_LORASWITCH_KERNELS="1")
    assert said.returncode and "PEFT_LORASWITCH_KERNELS=1 demands them" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_compiler_that_cannot_be_run(tree, home):
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF no program")
    path.chmod(0o755)
    wheel, said = wheel_of(tree, home=home)
    assert_pure(wheel, said)
    assert "does not run" in said and "Traceback" not in said


def test_an_old_one_in_cuda_home_does_not_hide_a_newer_one_on_the_path(tree, home, tmp_path):
    write_nvcc(home, version="Cuda compilation tools, release 12.1, V12.1.0")
    newer = write_nvcc(tmp_path / "newer")
    path = os.pathsep.join([str(newer.parent), environment(None)["PATH"]])
    wheel, _ = wheel_of(tree, home=home, PATH=path)
    assert library_in(wheel)


def test_the_build_can_be_switched_off(tree, home):
    write_nvcc(home)
    wheel, said = wheel_of(tree, home=home, PEFT_LORASWITCH_KERNELS="0")
    assert_pure(wheel, said)
    assert "PEFT_LORASWITCH_KERNELS=0" in said


# ----------------------------------------------------------------------------------------------------- never an old one


@pytest.fixture(scope="module")
def built_before(tmp_path_factory) -> Path:
    """A tree with a library in place, and with what a build of a wheel leaves behind."""
    folder = tmp_path_factory.mktemp("built")
    built, home = copy_of_the_tree(folder / "a tree"), folder / "cuda home"
    write_nvcc(home)
    assert run(built, "build_kernels", home=home).returncode == 0
    assert library_in(wheel_of(built, home=home)[0])
    shutil.rmtree(built / "made")
    return built


@pytest.mark.parametrize("case", [case for case in BROKEN if case != "none"])
def test_sources_edited_and_then_no_compiler_that_works(built_before, tmp_path, home, case):
    """Neither the library of the build before, nor one built in place, gets into the wheel."""
    tree = tmp_path / "a tree"
    shutil.copytree(built_before, tree)
    assert (tree / "peft_loraswitch" / "libloraswitch.so").exists() and any((tree / "build").rglob("libloraswitch.so"))
    edit(tree)
    write_nvcc(home, **BROKEN[case])
    assert_pure(*wheel_of(tree, home=home))


def test_what_is_current_is_kept_and_needs_no_compiler(tree, home):
    write_nvcc(home)
    run(tree, "build_kernels", home=home)
    library = tree / "peft_loraswitch" / "libloraswitch.so"
    before = library.stat().st_mtime_ns
    said = run(tree, "build_kernels", home=home)
    assert "kept" in said.stdout and library.stat().st_mtime_ns == before
    os.utime(tree / "csrc" / "router.cu")  # times say nothing
    assert "kept" in run(tree, "build_kernels", home=home).stdout
    assert library_in(wheel_of(tree, home=None)[0]) == library.read_bytes()


@pytest.mark.parametrize("change", ["source", "header", "flags", "compiler"])
def test_what_is_not_is_built_again(tree, home, change):
    write_nvcc(home)
    run(tree, "build_kernels", home=home)
    library = tree / "peft_loraswitch" / "libloraswitch.so"
    before = library.read_bytes()
    if change == "source":
        edit(tree)
    elif change == "header":
        (tree / "csrc" / "loraswitch.h").write_text((tree / "csrc" / "loraswitch.h").read_text() + "\n")
    elif change == "flags":
        text = (tree / "setup.py").read_text()
        (tree / "setup.py").write_text(text.replace('"-O3"', '"-O2"'))
    else:
        write_nvcc(home, version="Cuda compilation tools, release 13.1, V13.1.1")
    os.utime(library, (time.time() + 1000,) * 2)  # newer than everything
    said = run(tree, "build_kernels", home=home)
    assert said.returncode == 0 and "kept" not in said.stdout and library.read_bytes() != before
    assert built_from(tree, library)


# -------------------------------------------------------------------------------------------------- never half a library


@pytest.mark.slow
def test_builds_killed_at_many_moments(tree, home):
    """SIGKILL for the whole group, compiler and all; then what is there is whole and of these sources, or is not there."""
    write_nvcc(home, chunks=20, pause=0.01)
    library = tree / "peft_loraswitch" / "libloraswitch.so"
    no_usual_place(tree)
    found = []
    for moment in range(12):
        if moment % 3 == 0:
            edit(tree)
        process = subprocess.Popen(
            [sys.executable, "setup.py", "build_kernels"], cwd=tree, env=environment(home), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(0.1 + 0.09 * moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if library.exists():
            library_file.read_seal(library)
        found.append(library.exists())
    said = run(tree, "build_kernels", home=home)
    assert said.returncode == 0, said.stderr
    assert built_from(tree, library)
    left = [p.name for p in library.parent.iterdir() if p.name.startswith(".kernels-")]
    assert not left, "what killed builds left behind goes with the next"
    assert False in found, "no build was killed while it had something to lose"


def test_two_builds_at_once(tree, home):
    write_nvcc(home, chunks=20, pause=0.02)
    no_usual_place(tree)
    builds = [
        subprocess.Popen(
            [sys.executable, "setup.py", "build_kernels"], cwd=tree, env=environment(home), stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]  # fmt: skip
    said = [build.communicate(timeout=120)[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0, 0]
    assert sum("kept" in each for each in said) == 2
    assert built_from(tree, tree / "peft_loraswitch" / "libloraswitch.so")


def test_a_tree_that_cannot_be_written(tree, home):
    write_nvcc(home)
    no_usual_place(tree)
    folder = tree / "peft_loraswitch"
    (folder / "libloraswitch.so").mkdir()  # root may write into read-only folders: something in the way stops everybody
    said = run(tree, "build_kernels", home=home)
    assert said.returncode and "cannot be written" in said.stderr and "Traceback" not in said.stderr
    (folder / "libloraswitch.so").rmdir()
    if os.getuid():
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        said = run(tree, "build_kernels", home=home)
        folder.chmod(0o755)
        assert said.returncode and "cannot be written" in said.stderr and "Traceback" not in said.stderr


# --------------------------------------------------------------------------------------------------------- loading


def sealed(path: Path, content: bytes = b"\x7fELF" + bytes(5000)) -> bytes:
    path.write_bytes(content)
    library_file.seal(path, {"sources": "-", "nvcc": "-"})
    return path.read_bytes()


@pytest.fixture
def loading(monkeypatch, tmp_path):
    """A place for the library, and what the loader says of it in a process that has loaded none."""
    path = tmp_path / "libloraswitch.so"
    monkeypatch.setattr(kernels.loader, "LIBRARY", path)

    def reason() -> str:
        kernels.loader._load.cache_clear()
        return kernels.loader._load()[1] or ""

    yield path, reason
    monkeypatch.undo()
    kernels.loader._load.cache_clear()
    kernels.why_not.cache_clear()


def test_a_library_cut_off_anywhere_is_not_loaded(loading):
    path, reason = loading
    whole = sealed(path)
    for length in [0, 1, 3, 4, 100, 5003, *range(len(whole) - 160, len(whole), 7)]:
        path.write_bytes(whole[:length])
        assert "truncated" in reason(), length


def test_a_library_with_a_hole_is_not_loaded(loading):
    path, reason = loading
    whole = sealed(path, b"\x7fELF" + b"1" * 5000)
    path.write_bytes(whole[:1000] + bytes(2000) + whole[3000:])
    assert "altered" in reason()


def test_what_is_no_library_of_ours(loading, tmp_path):
    path, reason = loading
    path.mkdir()
    assert "not a file" in reason()
    path.rmdir()
    os.mkfifo(path)
    assert "not a file" in reason()
    path.unlink()
    path.write_text("hello")
    assert "not built by this package" in reason()
    sealed(path)  # whole, and no library: another processor's, say
    assert "does not load" in reason() and "reinstall" in reason()


@pytest.mark.slow
def test_python_m_peft_loraswitch_says_what_is_wrong_with_a_broken_library(tree):
    (tree / "peft_loraswitch" / "libloraswitch.so").write_bytes(b"\x7fELF" + bytes(1000))
    said = run_module("peft_loraswitch", paths=(tree,), cwd=tree)
    assert said.returncode == 0, said.stderr
    assert "NOT available" in said.stdout and "truncated" in said.stdout


# ------------------------------------------------------------------------------------------------ source distribution


def test_the_source_distribution_is_the_whole_repository(tmp_path):
    """What a wheel is built from and what its tests need: everything that is in version control."""
    root = tmp_path / "repository"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no git checkout")
    files = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    said = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    missing = [name for name in files if not (folder / name).is_file() and not name.startswith(".github/")]
    assert not missing
