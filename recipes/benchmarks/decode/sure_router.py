"""A router that takes a given mean number of experts: `top_p`, and tokens for which it takes one or two.

With random weights a router is as unsure of one token as of another. So the loop gets tokens, and `top_p` lies between the
probabilities of their likeliest experts: the surest of many take one expert, the others two.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from recipes.benchmarks.decode.plan import Adapter

TRIED = 256  # tokens


def make_sure(model: Any, adapter: Adapter, steps: int, device: str) -> tuple[Any, float]:
    """Set `top_p` of a fused model.

    Args:
        model: with a router on the first adapted linear; top_k = 2.
        steps: of a run; of so many tokens the mean number of experts is adapter.mean_experts, as near as can be.

    Returns:
        (tokens int64 [steps, 1, 1], the mean number of experts that they are seen to get)

    Raises:
        ValueError: another top_k.
    """
    import torch

    from peft_loraswitch import LoRASwitchLinear, record_routing

    if adapter.top_k != 2 or adapter.mean_experts is None:
        raise ValueError(f"tokens with one or two experts need top_k=2, not {adapter}")
    layers = [module for module in model.modules() if isinstance(module, LoRASwitchLinear)]
    router_layer = layers[0].router_layer("default")
    seen: list[Any] = []
    handle = router_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tried = torch.randint(5, model.config.vocab_size, (TRIED, 1), device=device)
    model(input_ids=tried, use_cache=False)
    handle.remove()
    router = router_layer.loraswitch_router["default"]
    surest = router(seen[0]).softmax(-1).amax(-1).flatten()
    order = surest.argsort()
    two = round(steps * (adapter.mean_experts - 1))
    top_p = float(surest.median())
    for layer in layers:
        layer.routing_options["default"] = dataclasses.replace(layer.routing_options["default"], top_p=top_p)
    chosen = torch.cat([order[:two], order[two - steps :]])  # far from top_p, whatever the order of a sum
    chosen = chosen[torch.arange(steps, device=device) * 3 % steps] if steps % 3 else chosen  # not one after the other
    tokens = tried[chosen].unsqueeze(1)
    with record_routing(model) as recorded:
        model(input_ids=tokens[:, 0], use_cache=False)
    return tokens, recorded.summary("default")["mean_experts"]
