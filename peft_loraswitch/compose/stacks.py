"""How experts of different rank and scale share a stack, and how names and numbers become the fields of a configuration.

The experts of a linear have one rank and one scale: the rank is the largest, the smaller ones get rows of zeros in A and
columns of zeros in B, and the scale is that of most of them. The others' B is multiplied by what their scale is of it.

The zeros stay what they are: their gradients are zero as well, and a decoupled or coupled weight decay of zero is zero.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch


def common_scale(scales: Collection[float]) -> float:
    """That of most of them; of several such, the smallest."""
    counts = Counter(scales)
    return min(counts, key=lambda scale: (-counts[scale], scale))


def folded(b: torch.Tensor, ratio: float, dtype: torch.dtype) -> torch.Tensor:
    """`ratio * B` in `dtype`, rounded once; B itself, to the bit, if the ratio is 1 and `dtype` holds it."""
    return b.to(dtype) if ratio == 1 else (b.double() * ratio).to(dtype)


def used_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """bool [r]: which components of an expert A [r, in], B [out, r] are not zero in both. Of several, A [E, r, in] and
    B [E, out, r]: in any."""
    rows = (a != 0).any(-1) | (b != 0).any(-2)
    return rows if rows.dim() == 1 else rows.any(0)


def padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [..., r, in] and B [..., out, r] with `rank` components, the new ones zero."""
    new_a = a.new_zeros(*a.shape[:-2], rank, a.shape[-1])
    new_b = b.new_zeros(*b.shape[:-1], rank)
    new_a[..., : a.shape[-2], :] = a
    new_b[..., : b.shape[-1]] = b
    return new_a, new_b


# -------------------------------------------------------------------------------------------------- fields of a config


def rank_and_alpha(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """The fields r, lora_alpha, rank_pattern and alpha_pattern that give every linear its rank and its scale."""
    alphas = {name: _number(scales[name] * rank) for name, rank in ranks.items()}
    r, rank_pattern = _patterns(ranks)
    # what has the rank r comes first: software that reads no patterns then has the scale right where the ranks differ
    first = [alphas[name] for name, rank in ranks.items() if rank == r]
    lora_alpha, alpha_pattern = _patterns(alphas, Counter(first).most_common(1)[0][0])
    return {"r": r, "rank_pattern": rank_pattern, "lora_alpha": lora_alpha, "alpha_pattern": alpha_pattern}


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _patterns(values: Mapping[str, Any], default: Any = None) -> tuple[Any, dict[str, Any]]:
    """The most frequent value (or `default`), and as few patterns as possible for the names that have another."""
    if default is None:
        default = Counter(values.values()).most_common(1)[0][0]
    pattern = {}
    for value in sorted(set(values.values()) - {default}):
        endings, names = shortest({name for name, found in values.items() if found == value}, values)
        # a full name must not mean others that end like it
        pattern.update(dict.fromkeys([*map(re.escape, endings), *(f"^{re.escape(name)}" for name in names)], value))
    return default, pattern


def selection(chosen: Collection[str], every: Collection[str]) -> list[str] | str:
    """The target_modules that select `chosen`, and nothing else, among the names `every`: a list, or where the name of one is the
    ending of another's that is not chosen, a pattern of full names."""
    targets = sorted(itertools.chain(*shortest(chosen, every)))
    endings = tuple(f".{target}" for target in targets)
    if any(name not in chosen and f".{name}".endswith(endings) for name in every):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return targets


def shortest(chosen: Collection[str], every: Iterable[str]) -> tuple[list[str], list[str]]:
    """The last parts of names that only `chosen` ones of `every` end with, and the full names of the others of `chosen`."""
    by_ending: dict[str, set[str]] = {}
    for name in every:
        by_ending.setdefault(name.rpartition(".")[2], set()).add(name)
    endings = {ending for ending, names in by_ending.items() if names <= set(chosen)}
    return sorted(endings), sorted(name for name in chosen if name.rpartition(".")[2] not in endings)
