"""Whether two builds of the library hold the same machine code, whatever their kernels are called.

python csrc/compare_machine_code.py OLD.so NEW.so    # exit status 0: the same; needs cuobjdump of the CUDA toolkit
                                                      # (or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import re
import subprocess


def kernels(library: str, architecture: str) -> collections.Counter[str]:
    """How often each kernel body occurs in the code for one architecture. A body is its instructions without names."""
    text = subprocess.run(
        ["cuobjdump", "-sass", "-arch", architecture, library], capture_output=True, text=True, check=True
    ).stdout
    bodies: collections.Counter[str] = collections.Counter()
    for function in text.split("Function : ")[1:]:
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?;)\s+/\* (0x[0-9a-f]+) \*/", function)
        encoded = re.sub(r"_Z\w+|\$_\w+", "", "\n".join(map(" ".join, instructions)))
        bodies[hashlib.sha256(encoded.encode()).hexdigest()] += 1
    return bodies


def architectures(library: str) -> list[str]:
    text = subprocess.run(["cuobjdump", "-lelf", library], capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"\.(sm_\d+a?)\.", text)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    arguments = parser.parse_args()
    wanted, found = architectures(arguments.old), architectures(arguments.new)
    differs = wanted != found
    if differs:
        print(f"architectures differ: {wanted} and {found}")
    for architecture in sorted({*wanted} & {*found}):
        old, new = kernels(arguments.old, architecture), kernels(arguments.new, architecture)
        gone, come = (old - new).total(), (new - old).total()
        print(f"{architecture}: {(old & new).total()} kernels the same, {gone} only in the old, {come} only in the new")
        differs |= bool(gone or come)
    return int(differs)


if __name__ == "__main__":
    raise SystemExit(main())
