"""`tests/tools/wgmma_registers.py`, by which compiled Triton kernels are looked through."""

from __future__ import annotations

import pytest

from wgmma_registers import overwritten

PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR20], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    "write",
    ["SEL R96, R156, RZ, !P6", "@!P3 MOV R99, RZ", "LDG.E.128 R96, desc[UR4][R2.64]", "IMAD.WIDE R98, R1, 0x2, R4"],
)
def test_what_is_written_before_the_wait_is_found(write):
    assert overwritten([PRODUCT, "NOP", write, WAIT]) == [f"{PRODUCT} <- {write}"]
    assert overwritten([PRODUCT, WAIT, write]) == []
    assert overwritten([PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", write, WAIT]), "one may still be on its way"


@pytest.mark.parametrize(
    "line",
    [
        "MOV R95, R96",
        "STG.E.64 desc[UR4][R96.64], R96",
        "LDG.E R100, desc[UR4][R96.64]",
        PRODUCT,
        "IADD3 R9, R96, 0x1, RZ",
    ],
)
def test_what_reads_or_writes_elsewhere_is_not(line):
    assert overwritten([PRODUCT, line, WAIT]) == []


def test_factors_in_shared_memory_are_not_meant():
    assert overwritten(["HGMMA.64x128x16.F32 R24, gdesc[UR8], R24", "MOV R24, RZ", WAIT]) == []
