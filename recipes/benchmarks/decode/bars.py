"""What is asked of the rows of the decode benchmark: the most that a row may take of its backbone's time, and the like."""

from __future__ import annotations

from typing import NamedTuple

from recipes.benchmarks.decode.plan import FEWER, MANY, MORE, PREFILL, Adapter


class Bar(NamedTuple):
    """The row's `field` is at most `bar`. Of several modes the best of the method's over the best of the backbone's. "ratio" is
    that over the faster of the backbones that were compiled, where two were."""

    what: str
    method: str
    rank: int
    modes: tuple[str, ...]
    batch: int
    bar: float
    field: str = "ratio"
    adapter: Adapter | None = None
    backbone: str = "bf16"
    tokens: int = PREFILL


COMPILED, BEST = ("compiled",), ("compiled", "graph")

BARS = (
    Bar("compiled, batch 1, r = 8", "fused", 8, COMPILED, 1, 1.00),
    Bar("compiled, batch 1, r = 16", "fused", 16, COMPILED, 1, 1.00),
    Bar("compiled, batch 1, r = 8, experts of LoRAs and context", "imported", 8, COMPILED, 1, 0.95),
    Bar("compiled, batch 1, r = 64", "fused", 64, COMPILED, 1, 1.06),
    Bar("generate, static cache, r = 8", "fused", 8, ("static",), 1, 1.00),
    Bar("generate, eager, r = 8", "fused", 8, ("eager",), 1, 1.10),
    Bar("compiled, batch 8, r = 8", "fused", 8, COMPILED, 8, 1.05),
    Bar("compiled, batch 32, r = 8", "fused", 8, COMPILED, 32, 1.05),
    Bar("prefill of 2,048 tokens, r = 8", "fused", 8, ("prefill",), 1, 1.08),
    Bar("prefill of 2,048 tokens, r = 64", "fused", 64, ("prefill",), 1, 1.25),
    Bar("merge over its floor, r = 8", "merge", 8, ("graph",), 1, 1.10, "over_floor"),
    Bar("peak memory over backbone and adapter, r = 8", "fused", 8, COMPILED, 1, 1.03, "peak_over_parts"),
    Bar("peak memory over backbone and adapter, r = 64", "fused", 64, COMPILED, 1, 1.03, "peak_over_parts"),
    Bar("seconds of fuse_for_inference(), r = 8", "fused", 8, COMPILED, 1, 2.0, "fuse_seconds"),
    Bar("compiled, batch 8, E = 32, k = 4, r = 8", "fused", 8, COMPILED, 8, 1.05, adapter=MANY),
    Bar("compiled, batch 32, E = 64, k = 2, r = 16", "fused", 16, COMPILED, 32, 1.25, adapter=MORE),
    Bar("compiled, batch 1, r = 128", "fused", 128, COMPILED, 1, 1.06),
    Bar("compiled, batch 8, r = 128", "fused", 128, COMPILED, 8, 1.32),
    *(Bar(f"compiled, batch {batch}, r = 8", "fused", 8, COMPILED, batch, 1.06) for batch in (64, 128, 256)),
    *(Bar(f"compiled, batch {n}, r = 8, joined weights", "joined", 8, COMPILED, n, 1.06) for n in (64, 128, 256)),
    *(Bar(f"prefill of {n} tokens, r = 8", "fused", 8, ("prefill",), 1, 1.10, tokens=n) for n in (128, 512)),
    Bar("NF4, batch 1, r = 8, best mode of each", "fused", 8, BEST, 1, 1.05, backbone="nf4"),
    Bar("NF4, batch 8, r = 8, best mode of each", "fused", 8, BEST, 8, 1.05, backbone="nf4"),
    Bar("int4, batch 1, r = 8, best mode of each", "fused", 8, BEST, 1, 1.05, backbone="int4"),
)
# At least so much, of the same row with another adapter: see report.saved_by_fewer().
BYTES_SAVED = Bar(
    "time saved by top_p, mean k = 1.3, of the bytes' share", "fused", 64, COMPILED, 1, 0.60, adapter=FEWER
)
LINEAR_BARS = (
    ("linears alone over pure reading, r = 8", "over_read", 1.20),
    ("linears alone over cuBLAS, r = 8", "over_cublas", 0.85),
)
