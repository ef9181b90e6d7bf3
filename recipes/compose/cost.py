"""How long a decode step and a prefill take, alone on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from recipes.compose import peft_routers
from recipes.compose.lab import Lab, free, say
from recipes.compose.routers import Ours

PREFILL = 2048
STEPS = 24


@torch.no_grad()
def times(lab: Lab, call: Callable[..., Any]) -> dict[str, float]:
    """Milliseconds of an eager decode step at batch 1 (median, behind 64 tokens), and of a prefill (the best of four)."""
    small = lab.settings.size == "smoke"
    ids = torch.randint(3, 200, (1, 64), device=lab.device)
    out = call(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache, decode = out.past_key_values, []
    for _ in range(3 if small else STEPS):
        token = out.logits[:, -1:].argmax(-1)
        begun = _now()
        out = call(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        decode.append(_now() - begun)
    ids = torch.randint(3, 200, (1, 64 if small else PREFILL), device=lab.device)
    prefill = []
    for _ in range(4):
        begun = _now()
        call(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill.append(_now() - begun)
    return {"decode_ms": 1e3 * statistics.median(decode[2:] or decode), "prefill_ms": 1e3 * min(prefill)}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def xlora_times(lab: Lab, model: Any) -> dict[str, float]:
    """Without a cache a decode step is a forward of the whole text: here of 64 + STEPS / 2 tokens."""
    small = lab.settings.size == "smoke"
    found = {}
    for metric, tokens in (("decode_ms", 64 + STEPS // 2), ("prefill_ms", 64 if small else PREFILL)):
        ids = torch.randint(3, 200, (1, tokens), device=lab.device)
        each = []
        for _ in range(4):
            begun = _now()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            each.append(_now() - begun)
        found[metric] = 1e3 * min(each)
    return found


def cost(lab: Lab) -> None:
    seed = lab.settings.seeds[0]
    lab.task = "cost"

    def keep(method: str, found: dict[str, float]) -> None:
        lab.rows(method, "cost", seed, {"all": found})
        say(f"{lab.worker}: {method}: { ({k: round(v, 2) for k, v in found.items()}) }")

    def lora() -> None:
        model = PeftModel.from_pretrained(lab.model(), lab.loras(seed)[0], autocast_adapter_dtype=False).eval()
        keep("one_lora_unmerged", times(lab, model.get_base_model()))

    def ours(decay: float) -> None:
        routed = Ours(lab, seed, decay)
        routed.router.to(lab.plain.dtype)  # as from_loras made it
        if torch.cuda.is_available():
            routed.peft.fuse_for_inference()
            keep(f"ours_decay_{decay:g}_fused", times(lab, routed.backbone))
            routed.peft.unfuse()
        keep(f"ours_decay_{decay:g}_unfused", times(lab, routed.backbone))

    parts: dict[str, Callable[[], None]] = {
        "base": lambda: keep("merged_or_base", times(lab, lab.plain)),
        "lora": lora,
        "ours, decay 0.98": lambda: ours(0.98),
        "ours, decay 0": lambda: ours(0.0),
        "arrow": lambda: keep("arrow_top1", times(lab, peft_routers.arrow_model(lab, seed, 1).get_base_model())),
        "xlora": lambda: keep("xlora", xlora_times(lab, peft_routers.xlora_model(lab, seed).eval())),
    }
    for name, part in parts.items():
        try:
            part()
        except Exception as error:  # one that does not run must not take the others with it
            lab.note("times_failed", {name: f"{type(error).__name__}: {error}"[:400]})
            say(f"{lab.worker}: times of {name}: {error}")
        free()
