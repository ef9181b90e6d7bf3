"""Decoding with every kind of cache, and the full forward that each must agree with."""

from __future__ import annotations

from typing import Any

import torch

from helpers import switch_layers

NEW = 7


def generate(model: Any, prompt: torch.Tensor, **settings: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(input_ids=prompt, output_logits=True, return_dict_in_generate=True, **settings)


def full_forward(model: Any, sequences: torch.Tensor, start: int, **inputs: Any) -> torch.Tensor:
    """[batch, new tokens, vocab]: logits that predict the tokens from `start` on."""
    with torch.no_grad():
        return model(input_ids=sequences, **inputs).logits[:, start - 1 : -1]


def uncached_greedy(model: Any, prompt: torch.Tensor, new: int = NEW) -> torch.Tensor:
    sequences = prompt
    for _ in range(new):
        with torch.no_grad():
            following = model(input_ids=sequences, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        sequences = torch.cat([sequences, following], dim=1)
    return sequences


def check_logits(model: Any, out: Any, prompt: torch.Tensor) -> None:
    steps = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(steps, full_forward(model, out.sequences, prompt.shape[1]), rtol=1e-4, atol=1e-4)
    assert all(layer.routing_state.frame is None for layer in switch_layers(model).values())


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked_prefill": {"prefill_chunk_size": 2},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "no_cache": {"use_cache": False},
}
