"""A ninth domain comes, or an expert goes: what that does to scores, to general text, and how long it takes."""

from __future__ import annotations

import time
from typing import Any

import torch

from peft_loraswitch import add_expert, remove_expert
from recipes import corpora
from recipes.compose import domains
from recipes.compose.baselines import one_lora_best, one_lora_flat
from recipes.compose.lab import Lab, free
from recipes.compose.routers import Ours
from recipes.compose.scoring import Sets

NINE = (*domains.EIGHT, domains.NINTH)
BLOCK = 256
DECAY = 0.98


def text_blocks(lab: Lab) -> list[list[int]]:
    """General English text that comes with Python (the topics of `help()`), in blocks."""
    blocks: list[list[int]] = []
    begin = [] if lab.tokenizer.bos_token_id is None else [lab.tokenizer.bos_token_id]
    for document in corpora.manual():
        ids = lab.tokenizer(document.text, add_special_tokens=False).input_ids
        blocks += [begin + ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK, BLOCK)]
        if len(blocks) >= lab.settings.text_blocks:
            break
    return blocks[: lab.settings.text_blocks]


@torch.no_grad()
def general_loss(lab: Lab, model: Any) -> float:
    total, count = 0.0, 0
    blocks = text_blocks(lab)
    for begin in range(0, len(blocks), 8):
        ids = torch.tensor(blocks[begin : begin + 8], device=lab.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses), count + ids[:, 1:].numel()
    return total / count


def _general(lab: Lab, method: str, kind: str, seed: int, model: Any, seconds: float | None = None) -> None:
    scores = {"general_text": {"loss": general_loss(lab, model)}}
    if seconds is not None:
        scores["all"] = {"seconds": seconds}
    lab.rows(method, kind, seed, scores)


class _Clock:
    def __enter__(self) -> _Clock:
        _wait()
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        _wait()
        self.seconds = time.perf_counter() - self.begun


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _nine(lab: Lab) -> Sets:
    return lab.test(NINE)


def routed(lab: Lab, seed: int) -> None:
    """Ours, from texts and trained on labels: before, with a ninth expert, and without one of the eight."""
    ours = Ours(lab, seed, DECAY)
    ours.from_texts()
    lab.measure("texts_before", "growth", seed, ours.backbone, ours.parameters, sets=_nine(lab))
    _general(lab, "texts_before", "growth", seed, ours.backbone)
    with _Clock() as clock:
        grow(ours)
        ours.from_texts()
    lab.measure("texts_after", "growth", seed, ours.backbone, ours.parameters, sets=_nine(lab))
    _general(lab, "texts_after", "growth", seed, ours.backbone, clock.seconds)
    with _Clock() as clock:
        ours.set_rows(ours.labelled((lab.label_rate(),))[0])
    lab.measure("labels_after", "growth", seed, ours.backbone, ours.parameters, sets=_nine(lab))
    _general(lab, "labels_after", "growth", seed, ours.backbone, clock.seconds)
    remove(ours, domains.EIGHT[4])
    left = {name: items for name, items in _nine(lab).items() if name != domains.EIGHT[4]}
    lab.measure("labels_removed", "growth", seed, ours.backbone, ours.parameters, sets=left)


def trained(lab: Lab, seed: int) -> None:
    """The trained router gets a row for the ninth domain, small and random, and all rows go on training on nine domains."""
    ours = Ours(lab, seed, DECAY)
    weight = torch.load(lab.out / "routers" / f"trained_decay_{DECAY:g}_seed{seed}.pt")
    ours.set_rows(weight)
    best = lab.chosen(f"trained_decay_{DECAY:g}") or 0
    with _Clock() as clock:
        grow(ours)
        steps = lab.mixed_batches(seed, NINE)
        ours.go_on(lab.settings.router_rates[best], steps)
    lab.measure("trained_after", "growth", seed, ours.backbone, ours.parameters, sets=_nine(lab))
    _general(lab, "trained_after", "growth", seed, ours.backbone, clock.seconds)


def grow(ours: Ours) -> None:
    lab = ours.lab
    add_expert(ours.peft, lab.lora(domains.NINTH, ours.seed), name=domains.NINTH)
    ours.names = (*ours.names, domains.NINTH)
    ours.float_router()


def remove(ours: Ours, name: str) -> None:
    remove_expert(ours.peft, name)
    ours.names = tuple(each for each in ours.names if each != name)
    ours.float_router()


def one_lora(lab: Lab, seed: int) -> None:
    """(a), as it is and trained anew with nine domains."""
    stack = lab.stack(lab.settings.rank * len(domains.EIGHT))
    stack.use(stack.load([lab.out / "one_lora" / f"seed{seed}"]))
    lab.measure(
        "one_lora_before", "growth", seed, stack.model, stack.size, sets={domains.NINTH: _nine(lab)[domains.NINTH]}
    )
    _general(lab, "one_lora_before", "growth", seed, stack.model)
    rate = lab.settings.lora_rates[one_lora_best(lab)]
    free()
    stack = lab.stack(lab.settings.rank * len(NINE))
    with _Clock() as clock:
        flat = one_lora_flat(lab, stack, seed, rate, NINE)
    stack.use(flat)
    lab.measure("one_lora_after", "growth", seed, stack.model, stack.size, sets=_nine(lab))
    _general(lab, "one_lora_after", "growth", seed, stack.model, clock.seconds)


def base(lab: Lab) -> None:
    _general(lab, "base", "growth", 0, lab.model())
