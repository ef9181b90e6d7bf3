"""Build the wheel, check its tag and size, install it into an empty environment, import it. `make wheel` calls this.

python csrc/check_wheel.py [--no-nvcc]      # --no-nvcc: as on a machine without a compiler, for the pure-Python wheel
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 5
BUILD = """
import sys
sys.path.insert(0, ".")
import setup
if not {compiled}:
    setup.find_nvcc = lambda: None
sys.argv = ["setup.py", "build", "--build-base", {scratch!r}, "bdist_wheel", "--dist-dir", {output!r}]
setup.main()
"""
PROBE = """
import ctypes, importlib.util
spec = importlib.util.find_spec("peft_loraswitch")
folder = spec.submodule_search_locations[0]
library = ctypes.CDLL(folder + "/libloraswitch.so") if {compiled} else None
if library is not None:
    library.ls_build_info.restype = ctypes.c_char_p
    print("library:", library.ls_build_info().decode())
"""


def run(*command: str, **kwargs: object) -> str:
    result = subprocess.run(command, check=False, text=True, capture_output=True, **kwargs)  # type: ignore[call-overload]
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")
    return str(result.stdout + result.stderr)


def check(wheel: Path, compiled: bool) -> None:
    """Exit with a message if the wheel's tag, size or contents are not what they should be."""
    names = zipfile.ZipFile(wheel).namelist()
    size = wheel.stat().st_size / 1e6
    tag = wheel.stem.split("-", 2)[2]
    wanted = r"py3-none-manylinux_2_\d+_x86_64" if compiled else r"py3-none-any"
    if not re.fullmatch(wanted, tag):
        sys.exit(f"tag {tag} does not match {wanted}")
    if compiled != ("peft_loraswitch/libloraswitch.so" in names):
        sys.exit(f"library in the wheel: {not compiled}, expected {compiled}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-nvcc", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    compiled = not args.no_nvcc
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        code = BUILD.format(compiled=compiled, scratch=scratch, output=str(args.output.resolve()))
        said = run(sys.executable, "-c", code, cwd=str(ROOT))
    if args.no_nvcc and "PURE-PYTHON" not in said:
        sys.exit("a wheel without kernels must say so")
    wheel = max(args.output.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    check(wheel, compiled)
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = str(Path(scratch, "bin", "python"))
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel))
        print(run(python, "-c", PROBE.format(compiled=compiled), cwd=scratch), end="")
    print("the wheel installs into an empty environment" + (" and its library loads there" if compiled else ""))


if __name__ == "__main__":
    main()
