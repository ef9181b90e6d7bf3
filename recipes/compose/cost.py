"""How long a decode step and a prefill take, alone on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from recipes.compose import peft_routers
from recipes.compose.lab import BEGUN, Lab, say
from recipes.compose.routers import Ours

PREFILL = 2048
STEPS = 12
TURNS = 6


class Decoding:
    """One method: an eager decode step at batch 1 behind 64 tokens, and a prefill."""

    def __init__(self, lab: Lab, model: Any) -> None:
        self.model = model
        self.call = model.get_base_model() if isinstance(model, PeftModel) else model
        self.small, self.device = lab.settings.size == "smoke", lab.device

    def decode(self) -> float:
        """Median of some steps, in milliseconds."""
        ids = torch.randint(3, 200, (1, 64), device=self.device)
        out = self.call(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache, each = out.past_key_values, []
        for _ in range(3 if self.small else STEPS):
            token = out.logits[:, -1:].argmax(-1)
            begun = _now()
            out = self.call(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            each.append(_now() - begun)
        return 1e3 * statistics.median(each)

    def prefill(self) -> float:
        ids = torch.randint(3, 200, (1, 64 if self.small else PREFILL), device=self.device)
        begun = _now()
        self.call(input_ids=ids, use_cache=True, logits_to_keep=1)
        return 1e3 * (_now() - begun)


class WithoutCache(Decoding):
    """Without a cache a decode step is a forward of the whole text: here of 64 + STEPS / 2 tokens."""

    def decode(self) -> float:
        return self._forward(64 + STEPS // 2)

    def prefill(self) -> float:
        return self._forward(64 if self.small else PREFILL)

    def _forward(self, tokens: int) -> float:
        ids = torch.randint(3, 200, (1, tokens), device=self.device)
        begun = _now()
        self.call(input_ids=ids, use_cache=False, logits_to_keep=1)
        return 1e3 * (_now() - begun)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def cost(lab: Lab, limit: float) -> None:
    """All methods take turns, and the best turn of each counts: a host that others use, too, is slow for a while, not always.

    limit: seconds after the run has begun by which the rows have to be written; turns that do not fit are left out.
    """
    lab.task = "cost"
    methods = _methods(lab)
    best: dict[str, dict[str, float]] = {}
    longest = 0.0
    for turn in range(TURNS + 1):  # the first is to warm up
        begun = time.time()
        if turn > 1 and begun - BEGUN + 1.5 * longest > limit:
            lab.note("times_turns", {"taken": turn - 1})
            break
        for name in list(methods) if turn % 2 else list(reversed(methods)):
            try:
                found = {"decode_ms": methods[name].decode(), "prefill_ms": methods[name].prefill()}
            except Exception as error:  # one that does not run must not take the others with it
                _failed(lab, name, error)
                del methods[name]
                continue
            if turn:
                old = best.get(name, found)
                best[name] = {metric: min(value, old[metric]) for metric, value in found.items()}
        longest = max(longest, time.time() - begun)
    for name, found in best.items():
        lab.rows(name, "cost", lab.settings.seeds[0], {"all": found})
        say(f"{lab.worker}: {name}: { ({k: round(v, 2) for k, v in found.items()}) }")


def _methods(lab: Lab) -> dict[str, Decoding]:
    seed = lab.settings.seeds[0]

    def lora() -> Any:
        return PeftModel.from_pretrained(lab.model(), lab.loras(seed)[0], autocast_adapter_dtype=False).eval()

    def ours(decay: float, fused: bool) -> Any:
        routed = Ours(lab, seed, decay)
        routed.router.to(lab.plain.dtype)  # as from_loras made it
        if fused:
            routed.peft.fuse_for_inference()
        return routed.peft

    makers: dict[str, Callable[[], Any]] = {"merged_or_base": lambda: lab.plain, "one_lora_unmerged": lora}
    for decay in (0.98, 0.0):
        if torch.cuda.is_available():
            makers[f"ours_decay_{decay:g}_fused"] = partial(ours, decay, True)
        makers[f"ours_decay_{decay:g}_unfused"] = partial(ours, decay, False)
    makers["arrow_top1"] = partial(peft_routers.arrow_model, lab, seed, 1)
    makers["xlora"] = lambda: peft_routers.xlora_model(lab, seed).eval()
    made: dict[str, Decoding] = {}
    for name, make in makers.items():
        try:
            made[name] = (WithoutCache if name == "xlora" else Decoding)(lab, make())
        except Exception as error:
            _failed(lab, name, error)
    return made


def _failed(lab: Lab, name: str, error: Exception) -> None:
    lab.note("times_failed", {name: f"{type(error).__name__}: {error}"[:400]})
    say(f"{lab.worker}: times of {name}: {error}")
