"""The weights of all experts of one linear, stacked; all of them train, or some alone.

Experts that train alone (`LoRASwitchConfig.trainable` names them) are parameters of their own, in the memory of their slice of
the stack, which itself is frozen. So no optimizer knows the other experts: neither weight decay nor what it remembers moves them.
What is saved, loaded and fused stays the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .ordinary import OrdinaryParameters
from .tensor_parallel import Split

ALONE = "expert_"  # and the index: name of the parameter of an expert that trains alone


class Experts(OrdinaryParameters):
    """The weights of all experts of one linear, stacked.

    Attributes:
        replaced: called when `weight` has become another parameter; a fused layer, which keeps hold of it, wants to know.
        alone: indices of the experts that train alone, in parameters `expert_<index>`; None: the whole stack is one parameter.
    """

    replaced: Callable[[], None] | None = None
    alone: tuple[int, ...] | None = None
    weight: nn.Parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:  # `layer.weight = ...` calls this, too
        super().register_parameter(name, param)
        if name != "weight":
            return
        if self.alone is not None and param is not None:
            self._make_alone(tuple(index for index in self.alone if index < len(param)), self._asks())
        if self.replaced is not None:
            self.replaced()

    def train_alone(self, indices: Sequence[int] | None) -> None:
        """From now on these experts alone ask for gradients, if any did; None: all of them are one parameter."""
        if indices is None:
            if self.alone is not None:
                asks, self.alone = self._asks(), None
                self._drop()
                self.weight.requires_grad_(asks)
            return
        asks, wanted = self._asks(), tuple(indices)
        if wanted != self.alone:
            self._make_alone(wanted, asks)
        self.weight.requires_grad_(False)

    def _asks(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def _make_alone(self, indices: tuple[int, ...], asks: bool) -> None:
        self._drop()
        self.alone = indices
        self.weight.requires_grad_(False)
        with torch.inference_mode(False):
            for index in indices:  # detach(): writes to it count as writes to the stack
                self.register_parameter(f"{ALONE}{index}", nn.Parameter(self.weight.detach()[index], asks))

    def _drop(self) -> None:
        for name in [name for name in self._parameters if name.startswith(ALONE)]:
            del self._parameters[name]

    def own(self) -> list[tuple[int, nn.Parameter]]:
        """(index, parameter) of the experts that train alone."""
        return [(index, getattr(self, f"{ALONE}{index}")) for index in self.alone or ()]

    def tie_to_stack(self) -> None:
        """Have them lie in the stack again, after something has moved or cast every parameter for itself."""
        for index, parameter in self.own():
            there = self.weight.detach()[index]
            if parameter.data_ptr() != there.data_ptr() or parameter.dtype != there.dtype:
                parameter.data = there

    def whole(self) -> torch.Tensor:
        """The stack [num_experts, ...], with a graph to what trains.

        Raises:
            RuntimeError: experts that train alone lie no longer in the stack.
        """
        own = self.own()
        if not torch.is_grad_enabled() or not any(parameter.requires_grad for _, parameter in own):
            return self.weight
        if not torch.compiler.is_compiling():
            for index, parameter in own:
                if parameter.data_ptr() != self.weight[index].data_ptr():
                    raise RuntimeError(
                        f"Expert {index} trains alone, and its memory is no longer a part of the stack's: something gave its "
                        "parameters other memory. After a cast of single parameters (param.data = param.data.to(...), "
                        "cast_mixed_precision_params) call model.to(dtype), which puts it back; under FSDP or DeepSpeed ZeRO-3 "
                        "train with trainable='all'."
                    )
        each = list(self.weight.detach().unbind(0))
        for index, parameter in own:
            each[index] = parameter
        return torch.stack(each)

    def gradients(self) -> list[tuple[int, torch.Tensor]]:
        """(index of the first, gradient [experts, ...]) of what trains and has one."""
        found = [(0, self.weight.grad)] if self.weight.grad is not None else []
        return found + [(index, one.grad.unsqueeze(0)) for index, one in self.own() if one.grad is not None]

    # what is saved and loaded is the stack alone

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for index, _ in self.own():
            destination.pop(f"{prefix}{ALONE}{index}", None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        for index, _ in self.own():
            key = f"{prefix}{ALONE}{index}"
            if key in missing:
                missing.remove(key)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self.tie_to_stack()
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:  # copy.deepcopy and pickle copy every parameter for itself
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.tie_to_stack()


class ExpertsA(Experts):
    """Down-projections of all experts. `weight` [num_experts, r, in_features]."""

    def __init__(self, num_experts: int, r: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, r, in_features))

    def forward(self, x: torch.Tensor, split: Split | None = None) -> torch.Tensor:
        """x [..., in_features] -> hidden [..., num_experts, r]; with `split`, x may be a part of the features."""
        num_experts, r, _ = self.weight.shape
        weight = self.whole() if split is None else split.weight_a(self.whole())
        hidden: torch.Tensor = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (num_experts, r))
        return hidden if split is None else split.hidden(hidden)


class ExpertsB(Experts):
    """Up-projections of all experts. `weight` [num_experts, out_features, r]."""

    def __init__(self, num_experts: int, out_features: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, r))

    def forward(
        self, hidden: torch.Tensor, result: torch.Tensor | None = None, split: Split | None = None
    ) -> torch.Tensor:
        """hidden [..., num_experts, r] -> sum over experts of B[e] hidden[e]: [..., out_features] (with `split`, perhaps a part
        of those); with `result`, of that shape, their sum in the dtype of `result`."""
        weight = self.whole()
        if split is not None:
            hidden, weight = split.gated(hidden), split.weight_b(weight)
        hidden, wide = hidden.flatten(-2), weight.transpose(1, 2).flatten(0, 1)  # [..., E * r] and [E * r, out]
        if result is None:
            return hidden @ wide
        # Float32 experts on a bf16 backbone; or a compiler for a GPU, which joins a sum with what comes next, but copies `result`
        # before a product that starts from it.
        if result.dtype != hidden.dtype or result.is_cuda and torch.compiler.is_compiling():
            return result + (hidden @ wide).to(result.dtype)
        # A product that starts from `result` saves a pass over it, a third of the adapter's time on a CPU. Out of place:
        # a quantised base layer may return a view.
        return torch.addmm(result.reshape(-1, wide.shape[1]), hidden.reshape(-1, wide.shape[0]), wide).view(
            result.shape
        )
