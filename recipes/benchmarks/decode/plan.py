"""What the decode benchmark measures: models, methods, modes, in order of importance, with what each needs of memory and time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

NUM_EXPERTS, TOP_K = 8, 2
FUSED = ("fused", "joined", "imported")  # methods that go through fuse_for_inference(), and read chosen experts only
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT, CACHE, PREFILL = 16, 512, 2048
LARGE_BATCH, SHORT_CACHE = (
    32,
    64,
)  # batches beyond the first have caches of so many tokens, or those would fill the memory
BACKBONES = ("bf16", "nf4", "int8", "int4", "float8")  # nf4: bitsandbytes; the others: torchao, weights only


@dataclass(frozen=True)
class Adapter:
    """A routed adapter: its experts and how many of them a token gets.

    Attributes:
        mean_experts: with `top_p`, of top_k routed ones; None: without it.
        deep_router: an eighth of the blocks lie before the router, adapted by shared experts of rank experts * r alone.
    """

    experts: int = NUM_EXPERTS
    top_k: int = TOP_K
    shared: int = 0
    mean_experts: float | None = None
    deep_router: bool = False

    @property
    def stacked(self) -> int:
        return self.experts + self.shared

    def distinct(self, tokens: int) -> float:
        """Stacked experts that so many tokens use, if each chooses at random."""
        if self.experts == 0:
            return self.shared
        each = self.mean_experts or self.top_k
        return self.shared + self.experts * (1 - (1 - each / self.experts) ** tokens)

    def __str__(self) -> str:
        text = f" E={self.experts} k={self.top_k}"
        text += f" + {self.shared} shared" if self.shared else ""
        text += f" mean k={self.mean_experts}" if self.mean_experts else ""
        return text + (" deep router" if self.deep_router else "")


def usual_adapter(method: str) -> Adapter:
    """Of a method where a plan says nothing else."""
    if method == "imported":
        return Adapter(top_k=1)
    return Adapter() if method in ("fused", "joined", "merge", "torch") else Adapter(0, 0)


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

    def expert_elements(self, rank: int, experts: int = NUM_EXPERTS) -> int:
        """Elements of A and B of all experts on all linears."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths = 4 * self.hidden + 2 * attention + 2 * kv + 3 * (self.hidden + self.intermediate)
        return self.layers * experts * rank * widths

    def cache_elements(self, batch: int) -> int:
        """Elements of the static cache of a batch."""
        return 2 * self.layers * batch * cache_of(batch) * self.kv_heads * self.head_dim


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
    "tuned": "backbone, compiled with max-autotune",
    "lora": "PEFT LoRA",
    "torch": "routing in plain PyTorch",
    "merge": "merge (the paper's method)",
    "kernels": "our kernels, no adapter",
    "fused": "fused",
    "joined": "fused, join_weights=True",
    "imported": "fused, experts of LoRAs, router with context",
}
MODES = ("compiled", "static", "eager", "prefill", "graph")


class Entry(NamedTuple):
    """One process, with at most what compiles together. `compiled:8` is a batch of 8, `prefill:128` a prompt of 128 tokens."""

    method: str
    rank: int
    modes: tuple[str, ...]
    adapter: Adapter | None = None  # None: `usual_adapter`
    backbone: str = "bf16"


def entries(*rows: tuple[object, ...]) -> tuple[Entry, ...]:
    return tuple(Entry(*row) for row in rows)  # type: ignore[arg-type]


CORE = entries(
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
BASELINES = entries(
    ("torch", 8, ("compiled:1", "eager")),
    ("lora", 16, ("compiled:1", "eager")),
    ("kernels", 0, ("compiled:1", "prefill")),
)
# An adapter as `from_loras` makes it: LoRAs of ranks 4 and 8, a hard gate, a base expert, a router that sees context.
COMPOSED = entries(("imported", 8, ("compiled:1", "prefill")), ("imported", 8, ("static",)))
LINE = entries(
    ("backbone", 0, ("compiled:1", "prefill", "eager")),
    ("fused", 8, ("compiled:1", "prefill", "eager")),
)
FIRST = "llama-2-7b"

# What `--only` chooses from, each with the backbone that it is compared with.
MANY, MORE, RECOMMENDED = Adapter(32, 4), Adapter(64, 2), Adapter(7, 7, shared=1, deep_router=True)
FEWER = Adapter(mean_experts=1.3)
SERVING_ROWS = (("backbone", 0), ("fused", 8), ("joined", 8))
SERVING_MODES = ("compiled:64", "compiled:128", "compiled:256")
FEW_MODES = ("compiled:1", "compiled:8", "compiled:32")


def quantized(backbone: str, modes: tuple[str, ...], rank: int = 8) -> tuple[Entry, ...]:
    return entries(("backbone", 0, modes, None, backbone), ("fused", rank, modes, None, backbone))


SETS: dict[str, tuple[Entry, ...]] = {
    "core": CORE,
    "composed": COMPOSED,
    "baselines": BASELINES,
    "many-experts": entries(
        ("backbone", 0, ("compiled:8", "compiled:32")),
        ("fused", 8, ("compiled:8",), MANY),
        ("fused", 16, ("compiled:32",), MORE),
    ),
    # Each by itself: a process compiles one after the other, and as many wait for it as there are modes.
    "high-rank": entries(*((*row, (mode,)) for mode in FEW_MODES[:2] for row in (("backbone", 0), ("fused", 128)))),
    "serving": entries(*((*row, (mode,)) for mode in SERVING_MODES for row in SERVING_ROWS)),
    "prompts": entries(("backbone", 0, ("prefill:128", "prefill:512")), ("fused", 8, ("prefill:128", "prefill:512"))),
    # "graph" too: whether a library's own kernels can be compiled is up to it
    "nf4": quantized("nf4", ("graph", "graph:8", "compiled:1", "compiled:8")),
    "int4": quantized("int4", ("graph", "compiled:1")),
    "int8": quantized("int8", ("graph", "compiled:1")),
    "float8": quantized("float8", ("graph", "compiled:1")),
    "top-p": entries(
        ("backbone", 0, ("compiled:1",)), ("fused", 64, ("compiled:1",)), ("fused", 64, ("compiled:1",), FEWER)
    ),
    "recommended": entries(("backbone", 0, FEW_MODES), ("fused", 8, FEW_MODES, RECOMMENDED)),
    "max-autotune": entries(
        ("backbone", 0, FEW_MODES),
        ("tuned", 0, ("compiled:1",)),
        ("tuned", 0, ("compiled:8",)),
        ("tuned", 0, ("compiled:32",)),
        ("fused", 8, FEW_MODES),
    ),
    "ceilings": (),
}

# Seconds on one core that is not shared, read off runs on the host of an H200: imports and CUDA's start, and compiling one
# decoder layer. They decide what is still begun before the time limit; the run itself corrects them.
STARTUP_SECONDS = 15.0
COMPILE_SECONDS = {
    "backbone": 1.15,
    "tuned": 4.0,  # trying tiles for each shape of a product takes longer than all else
    "kernels": 1.4,
    "fused": 1.4,
    "joined": 1.4,
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
    given_adapter: Adapter | None = None
    backbone: str = "bf16"

    @property
    def adapter(self) -> Adapter:
        return self.given_adapter or usual_adapter(self.method)

    @property
    def name(self) -> str:
        """Of all but the modes, the same for no other job."""
        unusual = "" if self.adapter == usual_adapter(self.method) else str(self.adapter)
        kind = "" if self.backbone == "bf16" else f" on {self.backbone}"
        return f"{self.model} {self.method} r={self.rank}{unusual}{kind}"

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(self.modes)}]"

    def seconds(self) -> float:
        """Until it can be measured, on a core of its own."""
        compiles = sum(mode.startswith(("compiled", "static")) for mode in self.modes)
        return STARTUP_SECONDS + compiles * COMPILE_SECONDS[self.method] * self.shape.layers

    def gib(self, shared_weights: bool) -> float:
        """Device memory that it takes for itself, roughly. `shared_weights`: the backbone is another process's."""
        if self.method == "ceilings":
            return CONTEXT_GIB + 8.0  # two buffers of 2 GiB, eight layers with experts
        size = 0 if shared_weights else self.shape.elements()
        # A second copy; that of joined weights is the only one, but of weights that other processes share.
        size += self.shape.linear_elements() if self.method in ("merge", "joined") else 0
        size += self.shape.expert_elements(self.rank, self.adapter.stacked or 1)
        for mode in self.modes:
            prefill, tokens = kind_of(mode) == "prefill", tokens_of(mode)
            size += 0 if prefill else self.shape.cache_elements(tokens)
            size += tokens * (self.shape.vocabulary // 64 + 6 * self.shape.intermediate) if prefill else 0
        return size * 2 / 2**30 + CONTEXT_GIB

    def weights_gib(self) -> float:
        """Device memory of the model's weights."""
        return self.shape.elements() * 2 / 2**30


def kind_of(mode: str) -> str:
    return mode.partition(":")[0]


def batch_of(mode: str) -> int:
    return 1 if kind_of(mode) == "prefill" else tokens_of(mode)


def tokens_of(mode: str) -> int:
    """Of one forward."""
    return int(mode.partition(":")[2] or (PREFILL if kind_of(mode) == "prefill" else 1))


def cache_of(batch: int) -> int:
    """Tokens of a static cache."""
    return CACHE if batch <= LARGE_BATCH else SHORT_CACHE


def plan(
    models: list[str],
    methods: list[str],
    modes: list[str],
    device: str,
    layers: int | None = None,
    ceilings: bool = True,
    only: list[str] | None = None,
) -> list[Job]:
    """Jobs in the order in which they are worth their time: the first model whole, the one-line model, then the core of
    the others, then their baselines.

    Args:
        device: "cuda", or "cpu" for the tiny shapes.
        layers: depth of the models other than the first; None: their own.
        ceilings: also what memory and the linears alone can do, after the first model's jobs.
        only: names in SETS; None: the usual table, which is "core", "composed", "baselines" and "ceilings".
    """
    shapes = SHAPES if device == "cuda" else TINY_SHAPES
    result: list[Job] = []

    def add(model: str, table: tuple[Entry, ...]) -> None:
        shape = shapes[model]
        if layers is not None and model != FIRST:
            shape = dataclasses.replace(shape, layers=min(layers, shape.layers))
        for entry in table:
            job = Job(model, entry.method, entry.rank, (), shape, entry.adapter, entry.backbone)
            planned = {mode for other in result if other.name == job.name for mode in other.modes}
            chosen = tuple(mode for mode in entry.modes if kind_of(mode) in modes and mode not in planned)
            if entry.method in methods and chosen:
                result.append(dataclasses.replace(job, modes=chosen))

    def add_ceilings() -> None:
        linears = dict.fromkeys(shapes[model].linears for model in models if shapes[model].linears)
        parts = ("copy", *(f"linears:{name}" for name in linears))
        result.append(Job(models[0], "ceilings", 0, parts, shapes[models[0]]))

    if only is not None:
        for name in only:
            for model in models:
                add(model, SETS[name])
        if "ceilings" in only and ceilings:
            add_ceilings()
        return result
    others = [model for model in models if model not in (FIRST, "qwen3-0.6b")]
    if FIRST in models:
        add(FIRST, CORE + COMPOSED + BASELINES)
    if ceilings:
        add_ceilings()
    if "qwen3-0.6b" in models:
        add("qwen3-0.6b", LINE)
    for table in (CORE, BASELINES):
        for model in others:
            add(model, table)
    return result
