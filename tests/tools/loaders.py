"""Everything that loads an adapter from a folder, and ways to spoil such a folder. Nothing here asserts anything."""

from __future__ import annotations

import itertools
import json
import resource
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import adapted, switch_config, tiny_llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_other() -> torch.nn.Module:
    model = tiny_llama()
    model.add_adapter(switch_config(init_weights=False, target_modules=["q_proj", "up_proj"]), "first")
    return model.eval()


def live() -> torch.nn.Module:
    return adapted(tiny_llama(), target_modules=["q_proj", "up_proj"])


def same_shape() -> torch.nn.Module:
    return adapted(tiny_llama(), num_experts=3, seed=9)


LOADERS = {
    "PeftModel.from_pretrained": (tiny_llama, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "from_pretrained, meta": (
        tiny_llama,
        lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
    ),
    "from_pretrained, trainable": (
        tiny_llama,
        lambda model, folder: PeftModel.from_pretrained(model, folder, is_trainable=True),
    ),
    "PeftModel.load_adapter": (live, lambda model, folder: model.load_adapter(folder, "new")),
    "into an adapter that exists": (same_shape, lambda model, folder: model.load_adapter(folder, "default")),
    "model.load_adapter": (tiny_llama, lambda model, folder: model.load_adapter(folder)),
    "second model.load_adapter": (with_other, lambda model, folder: model.load_adapter(folder, adapter_name="new")),
    "AutoPeftModel": (tiny_llama, lambda model, folder: AutoPeftModelForCausalLM.from_pretrained(folder)),
    "AutoModel": (tiny_llama, lambda model, folder: AutoModelForCausalLM.from_pretrained(folder)),
}


def through_loaders(
    problems: Iterable[str], everywhere: Sequence[str], loaders: Iterable[str] | None = None
) -> list[tuple[str, str]]:
    """(loader, problem): each problem through the first loader and through one of the others, in turn; those `everywhere`
    through all of them.

    All loaders read and check files by the same code (`loading.py`); what differs from one to the next is how it is reached and
    what is undone, and that does not depend on what is wrong with the file. So a few problems of each kind meet every loader.
    """
    loaders = list(LOADERS if loaders is None else loaders)
    first, *others = loaders
    pairs = [(first, problem) for problem in problems]
    pairs += [(others[i % len(others)], problem) for i, problem in enumerate(problems)]
    return list(dict.fromkeys([*pairs, *itertools.product(loaders, everywhere)]))


def save_adapter(folder: Path) -> Path:
    """A good adapter in `folder / "adapter"`, whose configuration names a backbone that is on disk. Returns its folder."""
    tiny_llama().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted(model, task_type="CAUSAL_LM", num_experts=3, seed=5).save_pretrained(folder / "adapter")
    return folder / "adapter"


class OutOfBoundsError(AssertionError):
    """Not one that a load could end in by itself."""


@contextmanager
def bounded(seconds: int, megabytes: int) -> Iterator[None]:
    """What happens within takes no more processor time and no more memory (beyond the peak so far), and does not wait for good.
    Main thread only."""

    def stop(*args: Any) -> None:
        raise OutOfBoundsError(f"longer than {seconds} s")

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(12 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024
    if grown > megabytes:
        raise OutOfBoundsError(f"{grown} MB more")


def rewrite(change):
    """A corruption of the tensors: `change` is called with all of them, by key, and edits."""

    def corrupt(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return corrupt


def configure(**fields):
    def corrupt(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **fields}))

    return corrupt


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


K = "base_model.model.model.layers.1.self_attn.k_proj.loraswitch_"
ROUTER = "base_model.model.model.layers.0.self_attn.q_proj.loraswitch_router.weight"
