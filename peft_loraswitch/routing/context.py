"""Routing by context: with `router_decay`, the logits of a token are a weighted mean of those of the tokens up to it.

    logits_t = sum_i w_i z_i / sum_i w_i,    w_i = router_decay^(number of real tokens behind i, up to t)

over the real tokens i <= t of t's sequence: padding, wherever it is, is as if it were not there. z are the router's own logits.
The router is linear, so this is the router on the decayed mean of its inputs. It still runs where it ran, so every block can be
adapted, and every token has one decision. A forward that goes on with a cache takes the sums up to there from the cache, and
leaves its own when it has come to its end (`cached_sums.py`).

`ForwardInputs` is what the owner hooks have seen of a forward; `Context` is one adapter's use of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cached_sums import DynamicSums, Setting, StaticSums, cache_in, keep_in, sums_in, sums_of
from .decayed_sums import decayed_sums, mean_of, sequence_numbers, weighted
from .masks import attended_keys, numbers_of_blocks, one_of
from .options import RoutingOptions


@dataclass
class ForwardInputs:
    """What a router that sees context has to know of a forward.

    Attributes:
        mask: the model's attention mask, in any form that models take, or None.
        position_ids: as they were passed, or None; batch: number of sequences (beams counted), or None if it was not seen.
        cache: of this forward, or None; if it is not a `Cache`, it is refused when somebody decides.
        cached: how many tokens it held when the forward began: a number, or a tensor for a static cache.
        previous: by adapter, the sums [batch, choices + 1] up to the forward's first token (for a block that runs again).
        decided: adapters that have taken their decision in this forward.
        waiting: by adapter, (setting, sums) that the cache gets when the model has filled it. If the forward fails before, the
            same tokens can be offered again.
    """

    mask: Any = None
    position_ids: torch.Tensor | None = None
    batch: int | None = None
    cache: Any = None
    cached: Any = 0
    previous: dict[str, torch.Tensor] = field(default_factory=dict)
    decided: set[str] = field(default_factory=set)
    waiting: dict[str, tuple[Setting, torch.Tensor]] = field(default_factory=dict)

    def see_cache(self, past: Any, adapters: set[str]) -> None:
        """The forward has been called with `past` (None: without one); `adapters` are those that see context."""
        self.cache, self.cached = past, 0
        if not isinstance(past, Cache):
            return
        if not past.layers:
            return
        try:
            length: Any = past.get_seq_length()
        except ValueError:  # a cache of states without lengths (Mamba), until sums are in it, whose length counts
            length = None if past.has_previous_state() else 0
        if isinstance(length, torch.Tensor):  # it is written in place as soon as the first block has run
            known = {layer.adapter for layer in sums_in(past)}
            length = None if adapters <= known else length.clone()
        self.cached = length

    def for_second_run(self) -> ForwardInputs:
        """The same for a checkpointed block that runs again: the cache has gone on since, but not for it."""
        positions = self.position_ids if self.cache is None else None  # with a cache they tell nothing
        return ForwardInputs(self.mask, positions, self.batch, previous=self.previous)

    def end(self, output: Any) -> None:
        """At the end of the model's forward: leave the sums in the cache, which now has the model's layers. Adapters that have
        not decided have missed these tokens."""
        cache = self.cache
        if cache is None and self.waiting:
            cache = cache_in(output)
        if isinstance(cache, Cache):
            for adapter, (setting, sums) in self.waiting.items():
                keep_in(cache, adapter, setting, sums)
            for layer in sums_in(cache):
                if layer.adapter not in self.decided and not layer.stale:
                    layer.stale = True
        self.waiting.clear()


class Context:
    """The tokens of a forward as sequences, for one adapter.

    Args:
        inputs: of the forward.
        shape: of the tokens that are routed, [batch, ..., tokens] or flattened.
        served: of a mixed batch, (number of tokens in all, indices of those that are routed), else None.
        options: of the adapter. The sums have one column more than it has choices.

    Attributes:
        previous: the sums [batch, width] up to here, or None.
        real: bool [batch, tokens], or None if all are.
        length: tokens of each sequence.

    Raises:
        ValueError: the cache holds tokens that this adapter has not seen, or is of a kind that cannot hold sums; the mask is of
            no known kind; flattened tokens that cannot be told apart. Says what to do.
    """

    def __init__(
        self, inputs: ForwardInputs, adapter: str, options: RoutingOptions, shape: torch.Size,
        served: tuple[int, torch.Tensor] | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.inputs, self.adapter, self.shape = inputs, adapter, shape
        self.decay, self.setting = options.decay, Setting(options.decay, options.num_choices + 1, options.edition)
        total = shape.numel() if served is None else served[0]
        batch = inputs.batch if len(shape) == 1 else shape[0]
        if not total:
            raise ValueError("router_decay: the batch holds no tokens.")
        if not batch or total % batch:
            raise ValueError(
                f"router_decay: {total} flattened tokens reach the router of adapter '{adapter}', and the model's inputs do not "
                "say of which sequences they are: pass input_ids or inputs_embeds by name, [batch, tokens]."
            )
        self.batch, self.length = batch, total // batch
        self.rows = None if served is None else served[1][:: self.length] // self.length
        self.layer = self._layer()
        past: Any = 0 if self.layer is None else self.layer.get_seq_length()
        self.previous = self._previous(device)
        self.mask = one_of(inputs.mask)
        begins = inputs.cache is None and not inputs.previous
        real = _real(self.mask, self.batch, self.length, past, begins, device)
        self.real = real if real is None or self.rows is None else real[self.rows]
        self.numbers = self._numbers(device)

    def _layer(self) -> DynamicSums | StaticSums | None:
        cache, adapter = self.inputs.cache, self.adapter
        if cache is None:
            return None
        if not isinstance(cache, Cache):
            raise ValueError(
                f"The adapter '{adapter}' has router_decay, and cannot go on with past tokens in a {type(cache).__name__}: it "
                "keeps its sums in a transformers Cache. Pass past_key_values=DynamicCache(config=model.config), or "
                "use_cache=False."
            )
        if getattr(cache, "offloading", False):
            raise ValueError(
                f"The adapter '{adapter}' has router_decay, which an offloaded cache cannot keep the sums of: use "
                "cache_implementation='dynamic' or 'static'."
            )
        layer, cached = sums_of(cache, adapter), self.inputs.cached
        if cached is None and layer is None:
            raise ValueError(
                f"The adapter '{adapter}' has router_decay, and this {type(cache).__name__} does not say how many tokens it "
                "holds: pass a new cache, or use_cache=False."
            )
        if layer is None:
            if isinstance(cached, int) and cached == 0:
                return None
            if torch.compiler.is_compiling() or int(cached) > 0:
                raise ValueError(_unseen(adapter))
            return None
        other = isinstance(layer, DynamicSums) and isinstance(cached, int) and layer.get_seq_length() != cached
        if layer.stale or other or layer.setting != self.setting:
            raise ValueError(_unseen(adapter))
        return layer

    def _previous(self, device: torch.device) -> torch.Tensor | None:
        if self.layer is None:
            return self.inputs.previous.get(self.adapter)
        previous = self.layer.last()
        if previous is None:
            return None
        if previous.device != device:
            previous = previous.to(device)
        if previous.shape[0] != self.batch:
            raise ValueError(
                f"The cache holds {previous.shape[0]} sequences, and the forward {self.batch}: pass the cache of this batch."
            )
        if self.rows is not None:
            previous = previous[self.rows]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if isinstance(self.layer, StaticSums):  # it is written in place, before the backward
                previous = previous.clone()
            self.inputs.previous[self.adapter] = previous.detach()
        return previous

    def _numbers(self, device: torch.device) -> torch.Tensor | None:
        """Packing is told by an attention's own mask, whose blocks do not see each other; or by positions alone, as in
        transformers: with a mask [batch, tokens], or a cache, a row is one sequence."""
        mask, positions = self.mask, self.inputs.position_ids
        if self.length == 1 or self.inputs.cache is not None:
            return None
        if isinstance(mask, torch.Tensor) and mask.dim() > 2 and mask.shape[-2] == mask.shape[-1] == self.length:
            numbers = numbers_of_blocks(mask).to(device).expand(self.batch, -1)
            return numbers if self.rows is None else numbers[self.rows]
        if positions is None or mask is not None:
            return None
        if positions.dim() == 3:  # several axes; the first of four is that of text
            if positions.shape[0] != 4:
                return None
            positions = positions[0]
        if positions.dim() != 2 or positions.shape[1] != self.length or positions.shape[0] not in (1, self.batch):
            return None
        numbers = sequence_numbers(positions.to(device)).expand(self.batch, -1)
        return numbers if self.rows is None else numbers[self.rows]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """float32, the decayed mean of values [*shape, n] over the tokens of this forward and those cached as zeros."""
        return self._mean(values, None)[0]

    def logits(self, own: torch.Tensor) -> torch.Tensor:
        """The logits by context, [*shape, choices], of the router's own. Leaves the sums for the cache: call it once."""
        mean, sums = self._mean(own, self.previous)
        self.keep(sums)
        return mean

    def _mean(self, values: torch.Tensor, previous: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        grid = values.reshape(-1, self.length, values.shape[-1])
        sums = decayed_sums(weighted(grid, self.real), self.decay, self.numbers, previous, self.real)
        return mean_of(sums, grid).view(values.shape), sums

    def keep(self, sums: torch.Tensor) -> None:
        """sums [batch, tokens, width] are for the cache, when the model has filled it."""
        self.inputs.decided.add(self.adapter)
        if self.rows is not None:
            others = sums.new_full((self.batch, *sums.shape[1:]), float("nan"))
            sums = others.index_copy(0, self.rows, sums)
        self.inputs.waiting[self.adapter] = (self.setting, sums)

    def broken_past(self) -> str | None:
        """Why the logits cannot be finite, if it is the cache."""
        if self.previous is None or torch.isfinite(self.previous).all():
            return None
        return _unseen(self.adapter)


def _unseen(adapter: str) -> str:
    return (
        f"The cache (past_key_values) holds tokens that the adapter '{adapter}' has not seen: it was off, or another adapter, "
        "another setting of it or another model computed them. With router_decay its router needs all of them. Pass a new "
        "cache and the whole text, or go on with what filled the cache."
    )


def _real(
    mask: Any, batch: int, length: int, past: Any, begins: bool, device: torch.device
) -> torch.Tensor | None:  # fmt: skip
    """bool [batch, length]: which of the forward's tokens are real, after `past` cached ones; None: all. `begins`: there are no
    tokens before these."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 3, 4) or mask.shape[0] not in (1, batch):
        what = f"of shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"router_decay: the attention mask is {what}, which does not say which of the {batch} x {length} tokens are "
            "padding: pass one of shape [batch, tokens]."
        )
    if mask.dim() == 2:
        keys = mask != 0
        first: Any = keys.shape[1] - length
    else:
        keys = attended_keys(mask)
        # of a static cache all places are there, of a sliding window those at the end
        first = keys.shape[1] - length
        if isinstance(past, torch.Tensor):
            first = past.clamp(max=first)
        else:
            first = min(past, first)
    if not isinstance(first, torch.Tensor) and (first < 0 or mask.dim() == 2 and begins and first > 0):
        raise ValueError(
            f"router_decay: the attention mask covers {keys.shape[1]} tokens, and the forward has {length}: pass one of "
            "shape [batch, tokens], past ones included, or none."
        )
    if isinstance(first, torch.Tensor):
        columns = torch.arange(length, device=first.device) + first
        keys = keys.to(first.device).index_select(1, columns)
    else:
        keys = keys[:, first : first + length]
    return keys.to(device).expand(batch, -1)
