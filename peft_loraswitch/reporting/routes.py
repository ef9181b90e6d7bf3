"""What is known of the routing of a token, of a text, and of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedToken:
    """One token and the decision for it.

    Attributes:
        text: its part of the text, with the white space before it. Of a special token, its name; empty where one character
            is several tokens, for all but the first.
        token_id: its number in the vocabulary.
        experts: indices of the chosen experts in `RoutingReport.names`, the best first; with `top_p`, of those that were taken.
        gates: their gates.
        probabilities: the router's softmax over all names.
    """

    text: str
    token_id: int
    experts: tuple[int, ...]
    gates: tuple[float, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Totals:
    """Sums over tokens, as `router_stats` has them.

    Attributes:
        tokens: how many.
        shares: of the picks, for each name; their sum is 1.
        entropy: of the router's softmax, in nats, mean over the tokens.
        mean_experts: picks of a token, mean over the tokens; without those of the base expert.
    """

    tokens: int
    shares: tuple[float, ...]
    entropy: float
    mean_experts: float

    @classmethod
    def of(cls, tokens: Sequence[RoutedToken], choices: int, has_base: bool = False) -> Totals:
        """`choices`: names, the base expert's included, which is the last if there is one."""
        picks = [0] * choices
        for token in tokens:
            for expert in token.experts:
                picks[expert] += 1
        entropy = sum(-p * math.log(p) for token in tokens for p in token.probabilities if p != 0)
        number, experts = max(len(tokens), 1), sum(picks[: choices - has_base])
        shares = tuple(n / max(sum(picks), 1) for n in picks)
        return cls(len(tokens), shares, entropy / number, experts / number)


@dataclass(frozen=True)
class RoutedText:
    """One text: its tokens, special ones included, and the sums over them."""

    text: str
    tokens: tuple[RoutedToken, ...]
    totals: Totals


def summary_line(names: Sequence[str], totals: Totals) -> str:
    """Shares, from the largest, and the entropy, in words; how many experts a token had where that is not always the same."""
    order = sorted(range(len(names)), key=lambda index: -totals.shares[index])
    shares = ", ".join(f"{names[index]} {totals.shares[index]:.0%}" for index in order)
    mean = "" if totals.mean_experts.is_integer() else f"; {totals.mean_experts:.2f} experts a token"
    return f"{shares}; entropy {totals.entropy:.2f} of at most {math.log(len(names)):.2f}{mean}; {totals.tokens} tokens"


def choices_line(names: Sequence[str], token: RoutedToken) -> str:
    """All probabilities of a token, from the largest, then the gates."""
    order = sorted(range(len(names)), key=lambda index: -token.probabilities[index])
    probabilities = ", ".join(f"{names[index]} {token.probabilities[index]:.1%}" for index in order)
    gates = ", ".join(f"{names[e]} {gate:.3f}" for e, gate in zip(token.experts, token.gates, strict=True))
    return f"{probabilities}\ngates: {gates}"
