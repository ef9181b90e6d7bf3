"""Builds the kernels into the wheel when there is an nvcc, and a pure-Python wheel that says so when there is none.

Never imports torch, never downloads. `python setup.py build_kernels` builds the library in place, in a source checkout.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIBRARY = "libloraswitch.so"
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
    "expand.cu",
    "widen.cu",
    "merge.cu",
]
# 90a: 9.0 with the instructions that it alone has. No other GPU takes either, so there is no plain 90 beside it.
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
# PTX of 9.0, not older: it is what newer chips translate, and only it has the dependent-launch instructions they use.
PTX = "90"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH, of the usual place, or of the PyPI packages nvidia-cuda-nvcc and friends."""
    candidates = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]):
        if folder:
            candidates += sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return next((str(path) for path in candidates if path.is_file() and os.access(path, os.X_OK)), None)


def build_kernels(target: Path) -> bool:
    """Compile csrc/ into `target`; False, with one line that says so, if there is nothing to compile with."""
    nvcc = find_nvcc()
    if platform.system() != "Linux" or nvcc is None:
        print(
            "peft_loraswitch: no nvcc found: building a PURE-PYTHON wheel, without the CUDA kernels.", file=sys.stderr
        )
        return False
    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if version is None or tuple(map(int, version.groups())) < (12, 8):
        print(
            f"peft_loraswitch: {nvcc} is older than 12.8, which the newest GPUs need: building a PURE-PYTHON wheel, "
            "without the CUDA kernels.",
            file=sys.stderr,
        )
        return False
    architectures = "+".join(f"sm_{a}" for a in ARCHITECTURES) + f"+compute_{PTX}"
    target.parent.mkdir(parents=True, exist_ok=True)
    in_place = ROOT / "peft_loraswitch" / LIBRARY
    if is_current(in_place, architectures):
        print(f"peft_loraswitch: {in_place} is newer than its sources and has all architectures: kept.")
        if target != in_place:
            shutil.copy2(in_place, target)
        return True
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-cudart", "static", "--threads", "0", "--compress-mode=size"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--exclude-libs,ALL", "-Xlinker", "-s"]
    command += [f'-DLS_ARCHITECTURES="{architectures}"']
    for a in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{a},code=sm_{a}"]
    command += ["-gencode", f"arch=compute_{PTX},code=compute_{PTX}"]
    toolkit = Path(nvcc).parent.parent
    for folder in ("lib", "lib64"):  # the PyPI toolkit keeps its static runtime in lib/, which its nvcc does not search
        if (toolkit / folder / "libcudart_static.a").exists():
            command += ["-L", str(toolkit / folder)]
    command += [str(ROOT / "csrc" / name) for name in SOURCES] + ["-o", str(target)]
    print(" ".join(command))
    subprocess.run(command, check=True)
    return True


def is_current(library: Path, architectures: str) -> bool:
    """Whether `library` is newer than what it is built from, and built for all architectures."""
    inputs = [ROOT / "setup.py", *(ROOT / "csrc").glob("*.cu*"), *(ROOT / "csrc").glob("*.h")]
    if not library.exists() or library.stat().st_mtime <= max(path.stat().st_mtime for path in inputs):
        return False
    return architectures.encode() in library.read_bytes()


def platform_tag(library: Path) -> str:
    """manylinux tag of the newest glibc symbol the library asks for; the plain platform tag elsewhere."""
    versions = {tuple(map(int, v)) for v in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    major, minor = max(versions | {(2, 17)})
    return f"manylinux_{major}_{minor}_{platform.machine()}"


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            build_kernels(Path(self.build_lib) / "peft_loraswitch" / LIBRARY)
            return
        try:  # `pip install -e .`: next to the sources, where the package then looks for it
            build_kernels(ROOT / "peft_loraswitch" / LIBRARY)
        except subprocess.CalledProcessError as error:
            print(
                f"peft_loraswitch: nvcc failed ({error.returncode}): no CUDA kernels in this install.", file=sys.stderr
            )


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
        if not build_kernels(ROOT / "peft_loraswitch" / LIBRARY):
            raise SystemExit(1)


def main() -> None:
    setup(
        cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel, "build_kernels": BuildKernels},
        distclass=Distribution,
        package_data={"peft_loraswitch": ["py.typed"]},  # not the library of an in-place build: a wheel builds its own
    )


if __name__ == "__main__":
    main()
