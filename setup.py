"""Builds the kernels into the wheel when there is an nvcc, and a pure-Python wheel that says so when there is none.

Never imports torch, never downloads. `python setup.py build_kernels` builds the library in place, in a source checkout.
PEFT_LORASWITCH_KERNELS=0 in the environment: build no kernels. =1: fail if they cannot be built, instead of going on without.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
LIBRARY = "libloraswitch.so"
LOCK = ".kernels.lock"
SOURCES = [
    "api.cu",
    "workspace.cu",
    "pdl.cu",
    "router.cu",
    "shrink.cu",
    "linear_registers.cu",
    "linear_persistent.cu",
    "linear_streaming.cu",
    "linear_generic.cu",
    "tma.cu",
    "shrink_sm90.cu",
    "linear_sm90.cu",
    "linear_split_k_sm90.cu",
    "expand.cu",
    "widen.cu",
    "merge.cu",
]
# 90a: 9.0 with the instructions that it alone has. No other GPU takes either, so there is no plain 90 beside it.
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
# PTX of 9.0, not older: it is what newer chips translate, and only it has the dependent-launch instructions they use.
PTX = "90"


OLDEST_NVCC = (12, 8)  # knows the newest of them
SWITCH = "PEFT_LORASWITCH_KERNELS"


def _load_library_file():
    """peft_loraswitch/kernels/library_file.py, without importing the package."""
    path = ROOT / "peft_loraswitch" / "kernels" / "library_file.py"
    spec = importlib.util.spec_from_file_location("library_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


library_file = _load_library_file()


class NoKernels(Exception):
    """The kernels cannot be built here; the message says why."""


# ------------------------------------------------------------------------------------------------------ the compiler


def candidates() -> list[Path]:
    """Where an nvcc may be: CUDA_HOME, CUDA_PATH, the PATH, the usual place, the PyPI package nvidia-cuda-nvcc."""
    found = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]):
        if folder:
            found += sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return list(dict.fromkeys(path for path in found if path.is_file() and os.access(path, os.X_OK)))


def version_of(nvcc: Path) -> str:
    """ "13.0.88". Raises NoKernels: it does not run, says something else, or is too old."""
    try:
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{nvcc} does not run ({error})") from error
    found = re.search(r"release (\d+)\.(\d+), V([\d.]+)", said.stdout) or re.search(
        r"release (\d+)\.(\d+)", said.stdout
    )
    if said.returncode or found is None:
        raise NoKernels(f"{nvcc} --version says nothing that can be understood")
    if (int(found[1]), int(found[2])) < OLDEST_NVCC:
        raise NoKernels(f"{nvcc} is {found[1]}.{found[2]}, older than {'.'.join(map(str, OLDEST_NVCC))}")
    return found[found.lastindex] if found.lastindex == 3 else f"{found[1]}.{found[2]}"


def find_nvcc() -> tuple[Path, str]:
    """The first nvcc that is new enough, and its version.

    Raises:
        NoKernels: there is none, with what is wrong with each that was found.
    """
    if platform.system() != "Linux":
        raise NoKernels(f"the kernels are for Linux, this is {platform.system()}")
    problems = []
    for nvcc in candidates():
        try:
            return nvcc, version_of(nvcc)
        except NoKernels as problem:
            problems.append(str(problem))
    raise NoKernels("; ".join(problems) or "no nvcc found")


# ------------------------------------------------------------------------------------------------------- the library


def architectures() -> str:
    return "+".join(f"sm_{a}" for a in ARCHITECTURES) + f"+compute_{PTX}"


def flags() -> list[str]:
    """All of nvcc's arguments but paths."""
    arguments = ["-std=c++17", "-O3", "-shared", "-cudart", "static", "--threads", "0", "--compress-mode=size"]
    arguments += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--exclude-libs,ALL", "-Xlinker", "-s"]
    arguments += [f'-DLS_ARCHITECTURES="{architectures()}"']
    for a in ARCHITECTURES:
        arguments += ["-gencode", f"arch=compute_{a},code=sm_{a}"]
    return [*arguments, "-gencode", f"arch=compute_{PTX},code=compute_{PTX}"]


def sources_hash() -> str:
    """Of everything that decides on the machine code, but for the compiler."""
    digest = hashlib.sha256(repr(flags()).encode())
    for path in sorted((ROOT / "csrc").glob("*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def is_current(library: Path, nvcc_version: str | None) -> bool:
    """Whether `library` is whole and what a build would make now (by any compiler, if there is none)."""
    try:
        facts = library_file.read_seal(library)
    except library_file.BrokenLibrary:
        return False
    return facts.get("sources") == sources_hash() and nvcc_version in (None, facts.get("nvcc"))


@contextlib.contextmanager
def locked(folder: Path):
    """One build at a time in a folder; another one waits, and then finds the library there."""
    with open(folder / LOCK, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # not Linux: nothing is built
            pass
        yield


def compile_into(target: Path, nvcc: Path, nvcc_version: str) -> None:
    """Link to a file beside `target`, seal it, and move it into place: `target` is never half written."""
    for left in target.parent.glob(".kernels-*"):  # by a build that was killed; nobody else builds here now
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".kernels-", dir=target.parent))
    try:
        linked = folder / LIBRARY
        command = [str(nvcc), *flags()]
        toolkit = nvcc.parent.parent
        for name in (
            "lib",
            "lib64",
        ):  # the PyPI toolkit keeps its static runtime in lib/, which its nvcc does not search
            if (toolkit / name / "libcudart_static.a").exists():
                command += ["-L", str(toolkit / name)]
        command += [os.path.join("csrc", name) for name in SOURCES] + ["-o", str(linked)]
        print(" ".join(command), flush=True)
        try:
            environment = {**os.environ, "TMPDIR": str(folder)}  # so that nvcc's files go with it, too
            result = subprocess.run(
                command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
            )
        except OSError as error:
            raise NoKernels(f"{nvcc} does not run ({error})") from error
        if result.returncode or not linked.is_file():
            sys.stderr.write(result.stderr)
            last = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no word why")
            raise NoKernels(f"nvcc failed with exit status {result.returncode}: {last.strip()}")
        library_file.seal(linked, {"sources": sources_hash(), "nvcc": nvcc_version})
        os.replace(linked, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_kernels(target: Path) -> None:
    """Make `target` the library that csrc/ says; what was there is kept only if it is that.

    Raises:
        NoKernels: it cannot be built; `target` does not exist then.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent):
            if os.environ.get(SWITCH) == "0":
                target.unlink(missing_ok=True)
                raise NoKernels(f"turned off by {SWITCH}=0")
            in_place = ROOT / "peft_loraswitch" / LIBRARY
            try:
                nvcc, version = find_nvcc()
            except NoKernels:
                version = None
                if not is_current(in_place, version) and not is_current(target, version):
                    target.unlink(missing_ok=True)  # of other sources: worse than none
                    raise
            if is_current(target, version):
                print(f"peft_loraswitch: {target} is what csrc/ says: kept.")
            elif is_current(in_place, version):
                print(f"peft_loraswitch: {in_place} is what csrc/ says: copied.")
                scratch = target.with_name(f".{LIBRARY}.{os.getpid()}")
                shutil.copy2(in_place, scratch)
                os.replace(scratch, target)
            else:
                target.unlink(missing_ok=True)
                compile_into(target, nvcc, version)
    except OSError as error:  # a read-only tree, a full disk
        raise NoKernels(f"{target} cannot be written ({error})") from error


def try_to_build(target: Path, what: str) -> bool:
    """`build_kernels`, and without kernels go on, loudly, unless they are demanded."""
    try:
        build_kernels(target)
        return True
    except NoKernels as reason:
        if os.environ.get(SWITCH) == "1":
            raise SystemExit(
                f"peft_loraswitch: the kernels cannot be built, and {SWITCH}=1 demands them: {reason}"
            ) from reason
        print(f"peft_loraswitch: {reason}: {what}, without the CUDA kernels.", file=sys.stderr)
        return False


def platform_tag(library: Path) -> str:
    """manylinux tag of the newest glibc symbol the library asks for; the plain platform tag elsewhere."""
    versions = {tuple(map(int, v)) for v in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    major, minor = max(versions | {(2, 17)})
    return f"manylinux_{major}_{minor}_{platform.machine()}"


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # `pip install -e .`: next to the sources, where the package then looks for it
            try_to_build(ROOT / "peft_loraswitch" / LIBRARY, "a PURE-PYTHON install")
        else:
            try_to_build(Path(self.build_lib) / "peft_loraswitch" / LIBRARY, "a PURE-PYTHON wheel")
            (Path(self.build_lib) / "peft_loraswitch" / LOCK).unlink(missing_ok=True)


class Wheel(bdist_wheel):
    """py3-none-<platform>: the library is plain C behind ctypes, so any Python 3 and any torch will do."""

    def get_tag(self) -> tuple[str, str, str]:
        library = ROOT / self.get_finalized_command("build_py").build_lib / "peft_loraswitch" / LIBRARY
        return ("py3", "none", platform_tag(library) if library.exists() else "any")

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = True  # everything goes to purelib, library included; the tag says the rest


class BuildKernels(Command):
    description = "compile the CUDA kernels next to the sources"
    user_options: list = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        try:
            build_kernels(ROOT / "peft_loraswitch" / LIBRARY)
        except NoKernels as reason:
            raise SystemExit(f"peft_loraswitch: the kernels cannot be built: {reason}") from reason


def main() -> None:
    setup(
        cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel, "build_kernels": BuildKernels},
        distclass=Distribution,
        package_data={"peft_loraswitch": ["py.typed"]},  # not the library of an in-place build: a wheel builds its own
    )


if __name__ == "__main__":
    main()
