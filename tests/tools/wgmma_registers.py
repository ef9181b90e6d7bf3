"""Machine code for Hopper that writes to registers which a product may still read.

`wgmma` runs beside the instructions behind it. Its left factor may be in registers, which are its own until a wait says that it
is done. ptxas before 13.3 forgets this in loops with several products on their way (triton-lang/triton#9433): wrong results, now
and then. Which ptxas a Triton brings, only its machine code shows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")  # the others have both factors in shared memory
FACTOR = 4  # registers of a thread
WRITES = re.compile(r"(?:@!?U?P\w+ )?(\S+) R(\d+)\b(?:\.\w+)?,")
READS_ONLY = ("ST", "RED", "BAR", "HGMMA", "WARPGROUP")


def overwritten(lines: list[str]) -> list[str]:
    """Of instructions, one after the other: "PRODUCT <- WRITE" for each product whose left factor is written to before all
    products are waited for."""
    found = []
    for place, line in enumerate(lines):
        product = PRODUCT.search(line)
        if product is None:
            continue
        factor = range(int(product[1]), int(product[1]) + FACTOR)
        for later in lines[place + 1 :]:
            if "WARPGROUP.DEPBAR" in later and "0x0" in later:
                break
            write = WRITES.match(later)
            if write is None or write[1].startswith(READS_ONLY):
                continue
            first = int(write[2])
            if any(register in factor for register in range(first, first + _width(write[1]))):
                found.append(f"{line} <- {later}")
                break
    return found


def _width(name: str) -> int:
    """Registers that an instruction writes."""
    if ".128" in name or name.startswith("LDSM") and name.endswith(".4"):
        return 4
    return 2 if ".64" in name or "WIDE" in name else 1


def instructions_of(cubin: bytes, nvdisasm: str) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    matches = (re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line) for line in text.splitlines())
    return [match[1] for match in matches if match is not None]
