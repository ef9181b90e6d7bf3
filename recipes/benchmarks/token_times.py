"""How long `generate` takes for each token, seen from within: the benchmarks' clock for modes that wait for the host."""

from __future__ import annotations

import time
from typing import Any


def token_times(model: Any, ids: Any, tokens: int, **options: Any) -> list[float]:
    """Seconds of each decode step of one greedy `generate`, from the logits of a token to those of the next.

    One `generate` holds a prefill and a set-up of its own, which the difference of two lengths takes out only where both cost
    the same twice. They do not on a host that others use, too: there single steps take half as long again, for a while.

    Args:
        model: with `generate`.
        ids: prompt [1, length], int64.
        tokens: to be generated, at least 3. The step after the prefill is not counted: it begins while the GPU is still at that.
        options: of `generate`.

    Returns:
        `tokens` - 2 times.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    seen: list[float] = []

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(time.perf_counter())
            return scores

    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, max_length=None, logits_processor=LogitsProcessorList([Clock()]), **options,
    )  # fmt: skip
    return [after - before for before, after in zip(seen[1:], seen[2:], strict=False)]
