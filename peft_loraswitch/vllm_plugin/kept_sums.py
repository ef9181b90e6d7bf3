"""The sums of routers that see context (`router_decay`), kept like one more layer of vLLM's KV cache.

vLLM gives each token a slot of the KV cache, and finds earlier tokens of its request through a table of blocks. Here each slot
has a row: the decayed sum of the router's logits up to that token, and that of their weights (`routing/decayed_sums.py`). A
request's next token takes the row of the token before it, through the same table. So whatever vLLM does with blocks is right
without any bookkeeping of ours: who shares a block shares its sums, and who computes a block again writes its sums again.

A request may share blocks that another one computes in the very same forward, since vLLM counts on their keys being there before
anybody attends to them. Then its sums go on from those of the other.

`mean_logits` is written with PyTorch's operations, for CPUs and as the definition of what `context_kernel.py` does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from ..routing.decayed_sums import decayed_sums, mean_of, weighted


class Places(NamedTuple):
    """Where the tokens of a batch lie. On a GPU, tensors at addresses that stay: a captured CUDA graph reads them again.

    starts: int32 [at least requests + 1]: request r has the tokens from starts[r] to starts[r + 1]; behind the last request, the
        number of all tokens.
    positions: int64 [at least tokens], of each token in its request.
    slots: int64 [at least tokens], its slot of the KV cache; -1 for padding, and for runs without real tokens.
    blocks: int32 [at least requests, blocks]: the token at position p of request r has the slot
        blocks[r, p // block_size] * block_size + p % block_size.
    """

    starts: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    blocks: torch.Tensor
    block_size: int


def no_places() -> Places | None:
    """Before vLLM has a KV cache."""
    return None


class KeptSums:
    """The sums of a server.

    Attributes:
        number: int64 [1], in host memory: finds this object in a custom op (`find`), where a compiler would take anything else
            for a constant.
        sums: float32 [slots of the KV cache, max_choices + 1], or None until an adapter needs them. NaN where none was written.
        address: int64 [1]: where `sums` begin, or 0. CUDA graphs are captured before adapters come, so kernels look here.
        own: float32 [max_tokens, max_choices], for kernels: the logits of the tokens of a batch, before they are summed.
        places: tells where the tokens of the present forward are; None where vLLM runs the model without a KV cache.
        launched: the kernel has run once, so it is compiled.
    """

    def __init__(self, max_tokens: int, max_choices: int, device: torch.device | str) -> None:
        self.max_choices, self.device = max_choices, torch.device(device)
        self.sums: torch.Tensor | None = None
        self.address = torch.zeros(1, dtype=torch.int64, device=device)
        self.own = torch.zeros(0 if self.device.type == "cpu" else max_tokens, max_choices, device=device)
        self.places: Callable[[], Places | None] = no_places
        self.launched = False
        number = next(_numbers)
        self.number = torch.tensor([number])
        _all[number] = self

    def allocate(self, slots: int) -> int:
        """Make room for so many slots, if there is none yet. Returns its bytes, or 0 if it was there.

        Raises:
            RuntimeError: there is not enough memory.
        """
        if self.sums is not None:
            return 0
        self.sums = torch.full((slots, self.max_choices + 1), torch.nan, device=self.device)
        self.address.fill_(self.sums.data_ptr())
        return self.sums.nbytes


_numbers = count(1)
_all: WeakValueDictionary[int, KeptSums] = WeakValueDictionary()


def find(number: torch.Tensor) -> KeptSums | None:
    """Those with this `number`; None if it is 0."""
    return _all.get(int(number.item()))


def mean_logits(logits: torch.Tensor, decays: torch.Tensor, places: Places, sums: torch.Tensor) -> torch.Tensor:
    """What tokens are routed by, [tokens, choices]; writes the sums of those with a decay.

    Args:
        logits: [tokens, choices], each token's own.
        decays: float32 [tokens], those of a request alike; where it is 0, the logits stay.
        sums: as in `KeptSums`, with as many choices.
    """
    means = logits.clone()
    requests = []
    for request, (begin, behind) in enumerate(pairwise(places.starts.tolist())):
        end = min(behind, logits.shape[0])
        if begin < end and decays[begin] > 0 and places.slots[begin] >= 0:
            requests.append((int(places.positions[begin]), request, begin, end))
    for position, request, begin, end in sorted(requests):  # who shares what another one computes now begins behind it
        previous = None
        if position > 0:
            block, offset = divmod(position - 1, places.block_size)
            previous = sums[int(places.blocks[request, block]) * places.block_size + offset].unsqueeze(0)
        own = logits[begin:end].unsqueeze(0)
        new = decayed_sums(weighted(own, None), float(decays[begin]), previous=previous)
        sums[places.slots[begin:end]] = new[0]
        means[begin:end] = mean_of(new, own)[0]
    return means
