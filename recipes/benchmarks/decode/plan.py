"""What the decode benchmark measures: models, methods, modes, in order of importance, with what each needs of memory and time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

NUM_EXPERTS, TOP_K = 8, 2
FUSED = ("fused", "imported")  # methods that go through fuse_for_inference(), and read chosen experts only
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT, CACHE, PREFILL = 16, 512, 2048


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind. `linears`: the name of its linears in linears.py."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    linears: str
    head_dim: int = 128
    tied: bool = False

    def linear_elements(self) -> int:
        """Elements of the seven linears of all layers."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def elements(self) -> int:
        """Elements of the whole model, norms left out."""
        return self.linear_elements() + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def expert_elements(self, rank: int) -> int:
        """Elements of A and B of all experts on all linears."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths = 4 * self.hidden + 2 * attention + 2 * kv + 3 * (self.hidden + self.intermediate)
        return self.layers * NUM_EXPERTS * rank * widths

    def cache_elements(self, batch: int) -> int:
        """Elements of a static cache of CACHE tokens."""
        return 2 * self.layers * batch * CACHE * self.kv_heads * self.head_dim


SHAPES = {
    "llama-2-7b": Shape(32000, 4096, 11008, 32, 32, 32, "llama-2-7b"),
    "mistral-7b": Shape(32000, 4096, 14336, 32, 32, 8, "mistral-7b"),
    "llama-3.1-8b": Shape(128256, 4096, 14336, 32, 32, 8, "mistral-7b"),
    "qwen3-0.6b": Shape(151936, 1024, 3072, 28, 16, 8, "qwen3-0.6b", tied=True),
}
# The same four at a size that a CPU runs in milliseconds: `--device cpu`, a rehearsal of everything but the numbers.
TINY_SHAPES = {
    name: Shape(96, 32, 48, 2, 4, 4 if shape.heads == shape.kv_heads else 2, "", 8, shape.tied)
    for name, shape in SHAPES.items()
}

METHODS = {
    "backbone": "backbone",
    "lora": "PEFT LoRA",
    "torch": "routing in plain PyTorch",
    "merge": "merge (the paper's method)",
    "kernels": "our kernels, no adapter",
    "fused": "fused",
    "imported": "fused, experts of LoRAs, router with context",
}
MODES = ("compiled", "static", "eager", "prefill", "graph")

# (method, rank, modes of one process). `compiled:8` is a batch of 8. At most what compiles together shares a process.
Entry = tuple[str, int, tuple[str, ...]]
CORE: tuple[Entry, ...] = (
    ("backbone", 0, ("compiled:1", "prefill", "graph", "eager")),
    ("fused", 8, ("compiled:1", "prefill", "eager")),
    ("backbone", 0, ("compiled:8", "compiled:32")),
    ("fused", 8, ("compiled:8", "compiled:32")),
    ("backbone", 0, ("static",)),
    ("fused", 8, ("static",)),
    ("fused", 64, ("compiled:1", "prefill")),
    ("fused", 16, ("compiled:1",)),
    ("merge", 8, ("graph",)),
)
BASELINES: tuple[Entry, ...] = (
    ("torch", 8, ("compiled:1", "eager")),
    ("lora", 16, ("compiled:1", "eager")),
    ("kernels", 0, ("compiled:1", "prefill")),
)
# An adapter as `from_loras` makes it: LoRAs of ranks 4 and 8, a hard gate, a base expert, a router that sees context.
COMPOSED: tuple[Entry, ...] = (("imported", 8, ("compiled:1", "prefill")), ("imported", 8, ("static",)))
LINE: tuple[Entry, ...] = (
    ("backbone", 0, ("compiled:1", "prefill", "eager")),
    ("fused", 8, ("compiled:1", "prefill", "eager")),
)
FIRST = "llama-2-7b"

# Seconds on one core that is not shared, read off runs on the host of an H200: imports and CUDA's start, and compiling one
# decoder layer. They decide what is still begun before the time limit; the run itself corrects them.
STARTUP_SECONDS = 15.0
COMPILE_SECONDS = {
    "backbone": 1.15,
    "kernels": 1.4,
    "fused": 1.4,
    "imported": 1.4,
    "merge": 0.0,
    "lora": 1.6,
    "torch": 2.2,
    "ceilings": 0.0,
}
CONTEXT_GIB = 1.2  # a process's CUDA context, library workspaces, compiled kernels


@dataclass(frozen=True)
class Job:
    """One process: a model with one method, measured in some modes."""

    model: str
    method: str  # a key of METHODS, or "ceilings" with the modes "copy" and "linears:<shape>"
    rank: int
    modes: tuple[str, ...]
    shape: Shape

    def __str__(self) -> str:
        return f"{self.model} {self.method}" + (f" r={self.rank}" if self.rank else "") + f" [{', '.join(self.modes)}]"

    def seconds(self) -> float:
        """Until it can be measured, on a core of its own."""
        compiles = sum(mode.startswith(("compiled", "static")) for mode in self.modes)
        return STARTUP_SECONDS + compiles * COMPILE_SECONDS[self.method] * self.shape.layers

    def gib(self, shared_weights: bool) -> float:
        """Device memory that it takes for itself, roughly. `shared_weights`: the backbone is another process's."""
        if self.method == "ceilings":
            return CONTEXT_GIB + 8.0  # two buffers of 2 GiB, eight layers with experts
        size = 0 if shared_weights else self.shape.elements()
        size += self.shape.linear_elements() if self.method == "merge" else 0
        size += self.shape.expert_elements(self.rank)
        for mode in self.modes:
            size += self.shape.cache_elements(batch_of(mode)) if mode != "prefill" else 0
            size += PREFILL * (self.shape.vocabulary // 64 + 6 * self.shape.intermediate) if mode == "prefill" else 0
        return size * 2 / 2**30 + CONTEXT_GIB

    def weights_gib(self) -> float:
        """Device memory of the model's weights."""
        return self.shape.elements() * 2 / 2**30


def top_k_of(method: str) -> int:
    return 1 if method == "imported" else TOP_K


def batch_of(mode: str) -> int:
    return int(mode.partition(":")[2] or 1)


def kind_of(mode: str) -> str:
    return mode.partition(":")[0]


def plan(
    models: list[str],
    methods: list[str],
    modes: list[str],
    device: str,
    layers: int | None = None,
    ceilings: bool = True,
) -> list[Job]:
    """Jobs in the order in which they are worth their time: the first model whole, the one-line model, then the core of
    the others, then their baselines.

    Args:
        device: "cuda", or "cpu" for the tiny shapes.
        layers: depth of the models other than the first; None: their own.
        ceilings: also what memory and the linears alone can do, after the first model's jobs.
    """
    shapes = SHAPES if device == "cuda" else TINY_SHAPES
    result: list[Job] = []

    def add(model: str, table: tuple[Entry, ...]) -> None:
        shape = shapes[model]
        if layers is not None and model != FIRST:
            shape = dataclasses.replace(shape, layers=min(layers, shape.layers))
        for method, rank, wanted in table:
            chosen = tuple(mode for mode in wanted if kind_of(mode) in modes)
            if method in methods and chosen:
                result.append(Job(model, method, rank, chosen, shape))

    others = [model for model in models if model not in (FIRST, "qwen3-0.6b")]
    if FIRST in models:
        add(FIRST, CORE + COMPOSED + BASELINES)
    if ceilings:
        linears = dict.fromkeys(shapes[model].linears for model in models if shapes[model].linears)
        parts = ("copy", *(f"linears:{name}" for name in linears))
        result.append(Job(models[0], "ceilings", 0, parts, shapes[models[0]]))
    if "qwen3-0.6b" in models:
        add("qwen3-0.6b", LINE)
    for table in (CORE, BASELINES):
        for model in others:
            add(model, table)
    return result
