"""Adapters that train embeddings of a model whose input and output embeddings are one weight, several of them on one model.

PEFT puts one wrapper around an embedding, for all adapters. It is of one kind, for modules trained in full (`modules_to_save`) or
for trained tokens (`trainable_token_indices`), and around the output embeddings it is tied to the input embeddings for all
adapters, or for none. What one adapter alone gets by that rule, another one may not: PEFT would then train, save and compute
something else than its configuration says. So an adapter is compared with the wrappers that are there, before any change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper, _get_input_embeddings_name
from torch import nn

from ..config import LoRASwitchConfig
from ..loading.layout import embeddings_of, plain_name, without_wrapper


def tied_names(model: Any) -> list[str]:
    """Names of the modules that have the weight of the input embeddings, these first; empty if none is tied. They are the names
    that the modules have without adapters, which PEFT does not find where `modules_to_save` has wrapped the input embeddings."""
    embeddings = without_wrapper(embeddings_of(model, "input"))
    weight = getattr(embeddings, "weight", None)
    if weight is None or not BaseTuner.get_model_config(model).get("tie_word_embeddings", False):
        return []
    first = [name for name, module in model.named_modules(remove_duplicate=False) if module is embeddings]
    holders = [n.rpartition(".")[0] for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    names = list(dict.fromkeys(plain_name(name) for name in (*first, *holders)))
    return names if len(names) > 1 else []


def tokens_by_ending(model: Any, config: LoRASwitchConfig) -> dict[str, list[int]]:
    """`trainable_token_indices` with the names of the embeddings, which may be left out."""
    tokens = config.trainable_token_indices or {}
    return tokens if isinstance(tokens, dict) else {str(_get_input_embeddings_name(model, "embed_tokens")): tokens}


def trains_tokens_apart(model: Any, config: LoRASwitchConfig) -> bool:
    """Whether the adapter's tokens of tied embeddings are those of the output alone, or other ones there: then PEFT does not tie
    what it trains."""
    names, tokens = tied_names(model), tokens_by_ending(model, config)
    used = [ending for ending in tokens if _ending_in(names, [ending])]
    of_input = any(names[0].endswith(ending) for ending in used)
    return bool(used) and not (of_input and all(tokens[ending] == tokens[used[0]] for ending in used))


def check_beside_others(model: Any, modules: dict[str, nn.Module], config: LoRASwitchConfig, adapter_name: str) -> None:
    """Compare what an adapter trains besides its experts with the wrappers that are in the model.

    Args:
        modules: all modules of the model, by name.

    Raises:
        ValueError: a wrapper of the other kind is there, or one that is (or is not) tied. Names adapters, fields and module.
    """
    tied = tied_names(model)
    tokens, full = tokens_by_ending(model, config), config.modules_to_save or ()
    apart = trains_tokens_apart(model, config)
    in_part, in_full = _ending_in(modules, tokens), _ending_in(modules, full)
    if tied and not apart and in_part.intersection(tied):
        in_part.update(tied)
    if tied and config.ensure_weight_tying and any(n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for n in full):
        in_full.update(tied)
    for name in sorted(in_part & in_full):
        raise ValueError(
            f"trainable_token_indices and modules_to_save of adapter '{adapter_name}' both train '{name}' (modules whose weights "
            "are tied count as one): leave it out of one of them."
        )
    for name in sorted(in_part | in_full):
        wrapper: Any = modules.get(name)
        if not isinstance(wrapper, AuxiliaryTrainingWrapper):
            continue
        others = ", ".join(repr(other) for other in sorted(wrapper._adapters))
        of_tokens = isinstance(wrapper, TrainableTokensWrapper)
        fields = ("trainable_token_indices", "modules_to_save")
        ours, theirs = fields if name in in_part else fields[::-1]
        advice = f"Call delete_adapter for {others} first, or load '{adapter_name}' on a model of its own."
        if of_tokens is not (name in in_part):
            raise ValueError(
                f"{ours}: adapter '{adapter_name}' trains '{name}', which {others} on this model has by {theirs}; PEFT can do "
                f"only one of the two with a module. {advice}"
            )
        if of_tokens and name in tied[1:] and apart is (wrapper.token_adapter.tied_adapter is not None):
            ways = (f"tied to those of '{tied[0]}'", "by themselves")
            our_way, their_way = ways[::-1] if apart else ways
            raise ValueError(
                f"trainable_token_indices: adapter '{adapter_name}' trains tokens of '{name}' {our_way}, but {others} on this "
                f"model trains them {their_way}; PEFT can do only one of the two, for all adapters of a model. {advice}"
            )


def _ending_in(names: Iterable[str], endings: Iterable[str]) -> set[str]:
    endings = tuple(endings)
    return {name for name in names if endings and name.endswith(endings)}
