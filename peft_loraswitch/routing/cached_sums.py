"""The running sums of a router that sees context, kept with the KV cache: a layer of the cache for each adapter.

As a layer behind those of the model it goes wherever the cache goes: `reorder_cache` (beams), `crop` (assisted decoding),
`batch_repeat_interleave`, `batch_select_indices`, `reset`, `copy.deepcopy` and a prefix that is used again work as they do for
keys and values.

In a cache that grows the layer holds the sums of every token, because a crop may go back to any of them; in a static one, which
cannot be cropped, only those of the last token. Rows of a mixed batch that another adapter serves hold NaN: if this one went on
with them, it would show.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class Setting(NamedTuple):
    """By what the sums of an adapter are made: of another setting they are others.

    Attributes:
        width: columns; edition: see `RoutingOptions`.
    """

    decay: float
    width: int
    edition: int


class _Sums:
    """What both kinds share.

    Attributes:
        adapter, setting: whose sums they are, and by which setting of it.
        stale: the cache has gone on without this adapter, so they are not those of the last token.
        keys: the sums, float32 [batch, 1, tokens or 1, choices + 1]; values: nothing, of width 0.
    """

    adapter: str
    setting: Setting
    stale: bool
    keys: torch.Tensor | None
    is_initialized: bool
    supports_early_init = False  # its shape is not that of keys and values

    def last(self) -> torch.Tensor | None:
        """[batch, choices + 1], of the last token; None if there is none."""
        return None if not self.is_initialized or self.keys is None else self.keys[:, 0, -1]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.stale = False

    def offload(self) -> None:
        """It is small, and stays."""

    def prefetch(self) -> None:
        """It is where it is needed."""


class DynamicSums(_Sums, DynamicLayer):
    """Of a cache that grows."""

    def __init__(self, adapter: str, setting: Setting) -> None:
        DynamicLayer.__init__(self)
        self.adapter, self.setting, self.stale = adapter, setting, False

    def keep(self, sums: torch.Tensor) -> None:
        """sums [batch, tokens, choices + 1], of the tokens that follow."""
        sums = sums.unsqueeze(1)
        self.update(sums, sums[..., :0])

    def crop(self, tokens_to_remove: int) -> None:
        """A cache of which nothing is left begins anew, whoever has filled it."""
        super().crop(tokens_to_remove)
        if self.is_initialized and self.get_seq_length() == 0:
            self.reset()


class StaticSums(_Sums, StaticLayer):
    """Of a static cache: of the last token alone, at an address that stays."""

    def __init__(self, adapter: str, setting: Setting, max_cache_len: int) -> None:
        StaticLayer.__init__(self, max_cache_len)
        self.adapter, self.setting, self.stale = adapter, setting, False
        self.cumulative_length = torch.zeros((), dtype=torch.int64)

    def keep(self, sums: torch.Tensor) -> None:
        """sums [batch, tokens, choices + 1], of the tokens that follow."""
        if not self.is_initialized:
            self._begin(sums)
        assert self.keys is not None
        self.keys.copy_(sums[:, -1:].unsqueeze(1).detach())
        self.cumulative_length.add_(sums.shape[1])

    def _begin(self, sums: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = sums.dtype, sums.device, sums.shape[0]
        self.keys = sums.new_zeros((sums.shape[0], 1, 1, sums.shape[2]))
        self.values = self.keys[..., :0].clone()
        self.cumulative_length = self.cumulative_length.to(sums.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)  # what CUDA graphs ask of a tensor that is written in place
        self.is_initialized = True

    def get_seq_length(self) -> Any:
        """A scalar tensor, or 0 before the first token."""
        return self.cumulative_length if self.is_initialized else 0


def sums_in(cache: Any) -> list[DynamicSums | StaticSums]:
    """Those that `cache` holds, of any adapter."""
    return [layer for layer in cache.layers if isinstance(layer, (DynamicSums, StaticSums))]


def sums_of(cache: Any, adapter: str) -> DynamicSums | StaticSums | None:
    """Those of `adapter`, or None."""
    return next((layer for layer in sums_in(cache) if layer.adapter == adapter), None)


def keep_in(cache: Any, adapter: str, setting: Setting, sums: torch.Tensor) -> None:
    """`sums`, [batch, tokens, choices + 1], of the tokens that follow, into the layer of `adapter`; a new one if there is none.
    The model's own layers must be there already: a cache that is filled lazily counts them."""
    layer = sums_of(cache, adapter)
    if layer is None:
        static = [each for each in cache.layers if isinstance(each, StaticLayer)]
        if static:
            layer = StaticSums(adapter, setting, max(each.max_cache_len for each in static))
        else:
            layer = DynamicSums(adapter, setting)
        cache.layers.append(layer)
    layer.keep(sums)


def own_cache(past: Any) -> Any:
    """The cache of the tokens that are routed: of an `EncoderDecoderCache`, that of the decoder's self-attention."""
    return getattr(past, "self_attention_cache", past)


def cache_in(output: Any) -> Any:
    """The cache that a model returns in its output, or None."""
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    found = next((item for item in items if isinstance(own_cache(item), Cache)), None)
    return None if found is None else own_cache(found)
