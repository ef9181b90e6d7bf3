"""What the routing of a trained adapter depends on, in numbers.

Every figure is of test rows. With several routers (layer-wise MoE-LoRA) it is the mean over them. Of the domains together, in
nats:

mean_experts             how many experts a token chose
effective_experts        exp of the entropy of the mean load: how many experts, used evenly, would be as diverse
mi_domain                I(expert; domain) of the picks, each domain with the same weight
context_information      I(best expert; context | token): the expert is a function of token and context, so this is the
                         entropy of the best expert that is left when the token is known. Over tokens seen at least 20
                         times, each with the Miller-Madow correction for its number of occurrences. 0 for a router that
                         sees the token's embedding alone.
context_variance         share of the gates' variance that the token does not explain, within-token variances unbiased
mi_domain_given_token    I(best expert; domain | token): how differently the same token is routed in different domains

and of each family of tasks:

mi_instruction_given_token   I(best expert; instruction | token) over the tokens of the questions, which are the same under
                             every instruction: what the router knows of what is asked

The last two are less the value that comes out when the domains (instructions) of each token's occurrences are shuffled, so
that 0 means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_loraswitch.layer import LoRASwitchLayer
from peft_loraswitch.routing.decision import route
from recipes.quality.base import autocast
from recipes.quality.evaluate import Split
from recipes.quality.moe_lora import MoELoRALinear
from recipes.quality.pool import IGNORED, Rows

SEEN_OFTEN = 20  # occurrences of a token from which on its experts' entropy can be estimated


@contextmanager
def recorded_gates(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within it each forward appends every router's gates, float32 [batch, length, E], 0 where not chosen; by router.
    Shared experts, which nobody chooses, are left out."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LoRASwitchLayer) and "default" in module.loraswitch_router:
            options = module.routing_options["default"]
            gates_of: Any = lambda x, logits, o=options: route(logits, o).dense_gates[..., : o.num_experts]  # noqa: E731
            router = module.loraswitch_router["default"]
        elif isinstance(module, MoELoRALinear):
            gates_of = lambda x, result, linear=module: linear.gates(x)[2]  # noqa: E731
            router = module
        else:
            continue
        found[name] = []

        def hook(_: nn.Module, inputs: tuple, result: torch.Tensor, to: list = found[name], of: Any = gates_of) -> None:
            to.append(of(inputs[0], result))

        handles.append(router.register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def rows(model: nn.Module, split: Split, rows_at_once: int, vocabulary: int) -> list[dict[str, Any]]:
    """The results' rows; none for a model without a router."""
    with recorded_gates(model) as probe:
        if not probe:
            return []
    names = [name for rows in split.domains for name in rows.names]
    gates, tokens, domain = _collect(model, split.domains, rows_at_once)
    found = [_of_one_router(each, tokens, domain, len(names), vocabulary) for each in gates]
    result = [_row("domains", metric, _mean(stats[metric] for stats in found)) for metric in found[0]]
    if len(gates) == 1:  # an expert's number means nothing across routers
        for index, name in enumerate(names):
            load = _load(gates[0][domain == index]).tolist()
            result += [_row(name, f"load_{expert}", share) for expert, share in enumerate(load)]
    for family in split.families:
        gates, tokens, task = _collect(model, [family], rows_at_once)
        sizes = (gates[0].shape[-1], len(family.names), vocabulary)
        value = _mean(mi_given_token(each.argmax(-1), task, tokens, sizes) for each in gates)
        result.append(_row("+".join(family.names), "mi_instruction_given_token", value))
    return result


def _row(domain_or_task: str, metric: str, value: float) -> dict[str, Any]:
    return {"domain_or_task": domain_or_task, "metric": metric, "value": value}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _collect(
    model: nn.Module, sources: Sequence[Rows], rows_at_once: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(gates [N, E] of each router, tokens [N], index of the domain or task [N]) of all text, or of all questions."""
    model.eval()
    gates: dict[str, list[torch.Tensor]] = {}
    tokens, source = [], []
    for index, rows_of_source in enumerate(sources):
        for start in range(0, len(rows_of_source.tokens), rows_at_once):
            part = slice(start, start + rows_at_once)
            batch = rows_of_source.tokens[part]
            owner = torch.full_like(batch, index) if rows_of_source.owner is None else rows_of_source.owner[part]
            counted = owner >= 0
            if rows_of_source.items is not None:
                counted &= rows_of_source.labels[part] == IGNORED
            with recorded_gates(model) as found, autocast(batch.device):
                model(input_ids=batch, use_cache=False, logits_to_keep=1)
            for name, (gate,) in found.items():
                gates.setdefault(name, []).append(gate[counted])
            tokens.append(batch[counted])
            source.append(owner[counted])
    return [torch.cat(parts) for parts in gates.values()], torch.cat(tokens), torch.cat(source)


def _load(gates: torch.Tensor) -> torch.Tensor:
    """Share of the picks that each expert gets: [N, E] -> float64 [E], sum 1."""
    picks = (gates > 0).double().sum(0)
    return picks / picks.sum()


def entropy(p: torch.Tensor) -> torch.Tensor:
    """In nats, over the last dimension."""
    return torch.special.entr(p).sum(-1)


def _of_one_router(
    gates: torch.Tensor, tokens: torch.Tensor, source: torch.Tensor, sources: int, vocabulary: int
) -> dict[str, float]:
    loads = torch.stack([_load(gates[source == index]) for index in range(sources)])
    load = loads.mean(0)
    best = gates.argmax(-1)
    return {
        "mean_experts": float((gates > 0).sum(-1).double().mean()),
        "effective_experts": float(entropy(load).exp()),
        "mi_domain": float(entropy(load) - entropy(loads).mean()),
        "context_information": context_information(best, tokens, gates.shape[-1], vocabulary),
        "context_variance": context_variance(gates, tokens, vocabulary),
        "mi_domain_given_token": mi_given_token(best, source, tokens, (gates.shape[-1], sources, vocabulary)),
    }


def context_information(best: torch.Tensor, tokens: torch.Tensor, experts: int, vocabulary: int) -> float:
    """H(best expert | token) over tokens seen often: [N], [N] -> nats."""
    counts = torch.bincount(tokens * experts + best, minlength=vocabulary * experts).view(vocabulary, experts).double()
    seen = counts.sum(-1)
    often = seen >= SEEN_OFTEN
    if not bool(often.any()):
        return float("nan")
    counts, seen = counts[often], seen[often]
    corrected = entropy(counts / seen.unsqueeze(-1)) + ((counts > 0).sum(-1) - 1) / (2 * seen)
    return float((corrected * seen).sum() / seen.sum())


def context_variance(gates: torch.Tensor, tokens: torch.Tensor, vocabulary: int) -> float:
    """1 - the share of the gates' variance that the token explains, over tokens seen more than once: [N, E], [N] -> [0, 1]."""
    gates = gates.double()
    seen = torch.bincount(tokens, minlength=vocabulary).double()
    repeated = seen[tokens] > 1
    gates, tokens = gates[repeated], tokens[repeated]
    if not len(tokens):
        return float("nan")
    mean = torch.zeros(vocabulary, gates.shape[-1], dtype=torch.float64, device=gates.device)
    mean.index_add_(0, tokens, gates)
    mean /= seen.clamp(min=1).unsqueeze(-1)
    # n / (n - 1) makes each token's variance unbiased; then every occurrence counts the same
    unbiased = seen[tokens] / (seen[tokens] - 1)
    within = ((gates - mean[tokens]).square().sum(-1) * unbiased).mean()
    total = (gates - gates.mean(0)).square().sum(-1).mean()
    return float(within / total.clamp(min=1e-30))


def mi_given_token(
    best: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor, sizes: tuple[int, int, int]
) -> float:
    """I(best; source | token) less its mean over five shuffles of the sources within each token: [N] each -> nats."""
    generator = torch.Generator(tokens.device).manual_seed(0)
    by_token = torch.argsort(tokens, stable=True)
    shuffled = []
    for _ in range(5):
        order = torch.randperm(len(tokens), generator=generator, device=tokens.device)
        order = order[torch.argsort(tokens[order], stable=True)]  # sorted by token, in random order within each
        mixed = torch.empty_like(source)
        mixed[by_token] = source[order]
        shuffled.append(_plug_in(best, mixed, tokens, sizes))
    return _plug_in(best, source, tokens, sizes) - sum(shuffled) / len(shuffled)


def _plug_in(best: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor, sizes: tuple[int, int, int]) -> float:
    experts, sources, vocabulary = sizes
    index = (tokens * sources + source) * experts + best
    joint = torch.bincount(index, minlength=vocabulary * sources * experts).view(vocabulary, sources, experts).double()
    joint /= joint.sum()

    def h(p: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(p).sum()

    # I(E; S | T) = H(E, T) + H(S, T) - H(E, S, T) - H(T)
    return float(h(joint.sum(1)) + h(joint.sum(2)) - h(joint) - h(joint.sum((1, 2))))
