"""Build the wheel, check its tag and size, install it into an empty environment, import it. `make wheel` calls this.

    python csrc/check_wheel.py                            # the kernels for all architectures, in dist/
    python csrc/check_wheel.py --no-nvcc                  # as on a machine without a compiler: the pure-Python wheel
    python csrc/check_wheel.py --python python3.10        # installed and imported by another Python

The new environment holds the wheel and nothing else. What it needs (PyTorch, PEFT, ...) is borrowed from the environment that
runs this, by a path that comes after its own; with --python or --install it is installed from the package index.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 5
BUILD = """
import sys
sys.path.insert(0, ".")
import setup
if not {compiled}:
    setup.os.environ[setup.SWITCH] = "0"
sys.argv = ["setup.py", "build", "--build-base", {scratch!r}, "bdist_wheel", "--dist-dir", {output!r}]
setup.main()
"""
ARCHITECTURES = """
import sys
sys.path.insert(0, ".")
import setup
print(setup.architectures())
"""
# Runs in the empty environment. The package imports; so do PEFT and Transformers, which then know the method.
PROBE = """
import ctypes, sys
from pathlib import Path
import peft, peft_loraswitch
from peft_loraswitch import kernels
folder = Path(peft_loraswitch.__file__).parent
if not folder.is_relative_to(sys.prefix):
    sys.exit(f"imported {{folder}}, which is not the wheel's")
peft.PeftType("LORASWITCH")
print(f"imported peft_loraswitch {{peft_loraswitch.__version__}} on Python {{sys.version.split()[0]}}")
if {compiled}:
    info = kernels.build_info()
    print("library:", info)
    if not info.endswith({architectures!r}):
        sys.exit("the library is not built for " + {architectures!r})
    ctypes.CDLL(str(folder / "libloraswitch.so")).ls_device_count  # by plain ctypes, too
else:
    print("kernels:", kernels.why_not())
    if "no compiled kernels" not in str(kernels.why_not()):
        sys.exit("a wheel without kernels must say why there are none")
import runpy
runpy.run_module("peft_loraswitch", run_name="__main__")  # the same as python -m, without importing all that again
"""


def run(*command: str, cwd: str | None = None, errors: bool = False) -> str:
    """What a command prints; with `errors`, also to stderr. Ends the program, with all it said, if the command fails."""
    result = subprocess.run(command, check=False, text=True, capture_output=True, cwd=cwd)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout + (result.stderr if errors else "")


def check(wheel: Path, compiled: bool) -> None:
    """Exit with a message if the wheel's tag, size or contents are not what they should be."""
    names = zipfile.ZipFile(wheel).namelist()
    size = wheel.stat().st_size / 1e6
    tag = wheel.stem.split("-", 2)[2]
    wanted = r"py3-none-manylinux_2_\d+_x86_64" if compiled else r"py3-none-any"
    if not re.fullmatch(wanted, tag):
        sys.exit(f"tag {tag} does not match {wanted}")
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "peft_loraswitch").rglob("*.py")]
    if missing := sorted(set(sources) - set(names)):
        sys.exit(f"not in the wheel: {', '.join(missing)}: are all folders in pyproject.toml's `packages`?")
    if compiled != ("peft_loraswitch/libloraswitch.so" in names):
        sys.exit(f"library in the wheel: {not compiled}, expected {compiled}")
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    if "Requires-Python: >=3.10" not in zipfile.ZipFile(wheel).read(metadata).decode():
        sys.exit("the wheel does not say Requires-Python: >=3.10")
    if size > LIMIT_MB:
        sys.exit(f"{size:.1f} MB is more than {LIMIT_MB} MB")
    if compiled:
        library = zipfile.ZipFile(wheel).read("peft_loraswitch/libloraswitch.so")
        newest = max(tuple(map(int, v)) for v in re.findall(rb"GLIBC_(\d+)\.(\d+)", library))
        promised = tuple(map(int, re.findall(r"manylinux_(\d+)_(\d+)", tag)[0]))
        if newest > promised:
            sys.exit(f"the library needs glibc {newest}, the tag promises {promised}")
        for name in (b"libtorch", b"libcudart.so", b"libc10"):
            if name in library:
                sys.exit(f"the library links {name.decode()}")
    print(f"{wheel.name}: {size:.2f} MB")


def install(wheel: Path, folder: str, python: str, borrow: bool) -> str:
    """Make an empty environment in `folder`, install the wheel into it, and return its Python."""
    inside = str(Path(folder, "bin", "python"))
    if not borrow:
        run(python, "-m", "venv", folder)
        run(inside, "-m", "pip", "install", "-q", str(wheel))
    else:  # also the pip that installs: to put one into the environment takes longer than all the rest
        run(python, "-m", "venv", "--without-pip", folder)
        run(python, "-m", "pip", "--python", inside, "install", "-q", "--no-deps", "--no-index", str(wheel))
        site = run(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        Path(site, "borrowed.pth").write_text("\n".join(paths) + "\n")
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-nvcc", action="store_true", help="build the pure-Python wheel")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the wheel (default: dist)")
    parser.add_argument("--python", default=sys.executable, help="Python of the empty environment (default: this one)")
    parser.add_argument("--install", action="store_true", help="install what the wheel needs from the package index")
    args = parser.parse_args()
    compiled = not args.no_nvcc
    borrow = args.python == sys.executable and not args.install
    if borrow and not (find_spec("torch") and find_spec("peft")):
        sys.exit(f"{sys.executable} has no PyTorch or no PEFT to import the wheel with: install them, or use --install")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        code = BUILD.format(compiled=compiled, scratch=scratch, output=str(args.output.resolve()))
        said = run(sys.executable, "-c", code, cwd=str(ROOT), errors=True)
    if compiled and "PURE-PYTHON" in said:
        sys.exit("no nvcc (12.8 or newer) was found, so that the wheel has no kernels: set CUDA_HOME, or use --no-nvcc")
    if args.no_nvcc and "PURE-PYTHON" not in said:
        sys.exit("a wheel without kernels must say so")
    wheel = max(args.output.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    check(wheel, compiled)
    architectures = run(sys.executable, "-c", ARCHITECTURES, cwd=str(ROOT)).strip()
    with tempfile.TemporaryDirectory() as scratch:
        python = install(wheel, str(Path(scratch, "environment")), args.python, borrow)
        print(run(python, "-c", PROBE.format(compiled=compiled, architectures=architectures), cwd=scratch), end="")
    print("the wheel installs into an empty environment and imports" + (", and its library loads" if compiled else ""))


if __name__ == "__main__":
    main()
