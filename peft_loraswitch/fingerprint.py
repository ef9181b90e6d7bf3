"""Whether what was made of weights is still right: the one way in which anything here finds out that it is old.

What `inference/` makes of a model's weights and keeps: a struct of their addresses, as the kernels take it (`eager_launch.py`),
experts in another dtype (`expert_casts.py`), weights with experts merged into them (`merged_weights.py`), scales of weights in 4
bits (`four_bit.py`), copies of lora_a beside joined weights (`joined_weights.py`). Meanwhile others move, replace and write to
the weights (`model.to(...)`, `load_state_dict`, optimizers, plain assignment), mostly without a word to us. So each of these has
a fingerprint of what it was made of, and looks before it is used whether that is still the same.

Training keeps how it computes a group of linears, and no tensors (`training/group_plans.py`): what that depends on has one, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Parameters = dict[str, Any]  # a module's `_parameters`: always holds the present ones


class Fingerprint:
    """Where tensors are, how often some were written to, and what goes with them.

    Args:
        weights: the "weight" of each: its address counts.
        biases: the "bias" of each: its address, or that there is none.
        written: the "weight" of each: how often it was written to, as far as that is counted (see `counted_writes.py`).
        scalings: the value of each for `adapter`.
        hooks: of modules: whether there are any.
        parts: fingerprints that belong to this one.
    """

    def __init__(
        self,
        weights: Sequence[Parameters] = (),
        biases: Sequence[Parameters] = (),
        written: Sequence[Parameters] = (),
        scalings: Sequence[dict[str, float]] = (),
        adapter: str = "",
        hooks: Sequence[dict[int, Any]] = (),
        parts: Sequence[Fingerprint] = (),
    ) -> None:
        # Lists: of all that a decode step does on the host, looking at these takes the most.
        self.weights, self.biases, self.written = list(weights), list(biases), list(written)
        self.scalings, self.adapter = list(scalings), adapter
        self.hooks, self.parts = list(hooks), list(parts)
        self.taken = self._take()

    def _take(self) -> list[Any]:
        adapter = self.adapter
        try:
            taken: list[Any] = [one["weight"].data_ptr() for one in self.weights]
            taken += [None if one["bias"] is None else one["bias"].data_ptr() for one in self.biases]
            taken += [scaling[adapter] for scaling in self.scalings]
            taken.append(any(self.hooks))
            for one in self.written:
                tensor = one["weight"]
                taken += (tensor._version, tensor.data_ptr())
        except (RuntimeError, KeyError):  # a tensor without an address or a counter; the adapter has been deleted
            return [object()]  # not like anything before
        return taken

    def is_current(self) -> bool:
        """Whether all is as it was when the fingerprint was taken."""
        if self._take() != self.taken:
            return False
        for part in self.parts:
            if not part.is_current():
                return False
        return True

    def invalidate(self) -> None:
        """What was written shows nowhere, but somebody knows of it: not current from now on."""
        self.taken = []

    def renew(self, fresh: Fingerprint) -> None:
        """Become `fresh`, for those whose part this one is."""
        self.__dict__.update(fresh.__dict__)
