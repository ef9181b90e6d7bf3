"""Several LoRAs on one model with gates that are given: for each token, or one set for each linear.

What this computes, y = W x + sum_e g_e s B_e A_e x, is what the adapted linear of peft_loraswitch computes once its router has
decided; here somebody else decides. It serves decisions that a router at the first linear cannot take (one for a whole prompt,
those of a router further up, the right ones), and coefficients that are learned for each linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recipes.compose.stacked_lora import StackedLora
from recipes.compose.text_batches import Example


class _RoutedLinear(nn.Module):
    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, gates: Gates) -> None:
        """a [experts, r, in], b [experts, out, r], scale included."""
        super().__init__()
        self.base, self.gates = base, gates
        self.shape = a.shape[:2]
        self.a, self.b = a.flatten(0, 1), b.transpose(1, 2).flatten(0, 1)
        self.coefficients: torch.Tensor | None = None  # [candidates, experts], each for its share of the rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        hidden = F.linear(x, self.a).unflatten(-1, self.shape)  # [rows, tokens, experts, r]
        if self.coefficients is not None:
            of_candidates = hidden.unflatten(0, (len(self.coefficients), -1))
            hidden = (of_candidates * self.coefficients[:, None, None, :, None]).flatten(0, 1)
        else:
            assert self.gates.now is not None, "no gates are given"
            hidden = hidden * self.gates.now[..., None]
        return out + hidden.flatten(-2) @ self.b


class Gates:
    """The gates of the tokens in flight, [rows, tokens, experts] or what broadcasts to that."""

    def __init__(self) -> None:
        self.now: torch.Tensor | None = None


class RoutedLora:
    """Experts of one rank on a model, which is changed in place.

    Args:
        model: a plain causal language model.
        stack: knows the layout of `flat`, [experts, weights of one], as `StackedLora` has it.
    """

    def __init__(self, model: Any, stack: StackedLora, flat: torch.Tensor) -> None:
        model.requires_grad_(False)
        self.model, self.experts = model, len(flat)
        self.gates = Gates()
        self.linears: dict[str, _RoutedLinear] = {}
        for name, (a, b) in stack.views(flat.to(stack.dtype)).items():
            parent, _, leaf = name.rpartition(".")
            layer = _RoutedLinear(model.get_submodule(name), a, b * (stack.alpha / stack.rank), self.gates)
            setattr(model.get_submodule(parent), leaf, layer)
            self.linears[name] = layer
        self.device, self.dtype = stack.device, stack.dtype

    def use_coefficients(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """values [candidates, linears, experts]: gates of each linear, whatever the token. None: gates are given again.

        Returns:
            Their gradients, of the same shape and in the model's dtype, into which `backward` adds.
        """
        if values is None:
            for layer in self.linears.values():
                layer.coefficients = None
            return None
        used, gradients = values.to(self.dtype, copy=True), torch.zeros_like(values, dtype=self.dtype)
        for index, layer in enumerate(self.linears.values()):
            leaf = used[:, index].detach().requires_grad_()
            leaf.grad = gradients[:, index]
            layer.coefficients = leaf
        self._used = used
        return gradients

    def refresh(self, values: torch.Tensor, gradients: torch.Tensor) -> None:
        with torch.no_grad():
            self._used.copy_(values)
            gradients.zero_()


class GivenRoutes:
    """Feeds the gates of known prompts. Tokens behind a prompt follow what its last token follows.

    Args:
        table: by the tokens of a prompt, float [tokens of the prompt, experts].
    """

    def __init__(self, routed: RoutedLora, table: dict[tuple[int, ...], torch.Tensor]) -> None:
        self.routed, self.table = routed, table
        self._last: torch.Tensor | None = None

    def _of(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        return [self.table[tuple(prompt)] for prompt in prompts]

    def begin_answers(self, prompts: list[list[int]], length: int) -> None:
        """`prompts` follow, padded on the left to `length`."""
        found = self._of(prompts)
        gates = torch.zeros(len(prompts), length, self.routed.experts)
        for row, each in zip(gates, found, strict=True):
            row[length - len(each) :] = each
        self._set(gates)
        self._last = torch.stack([each[-1:] for each in found])

    def after_prompt(self) -> None:
        assert self._last is not None
        self._set(self._last)

    def begin_losses(self, chosen: list[Example], length: int) -> None:
        """Prompts and answers follow, padded on the right to `length`."""
        gates = torch.zeros(len(chosen), length, self.routed.experts)
        for row, each in zip(gates, self._of([example.prompt for example in chosen]), strict=True):
            row[: len(each)] = each
            row[len(each) :] = each[-1]
        self._set(gates)

    def _set(self, gates: torch.Tensor) -> None:
        self.routed.gates.now = gates.to(self.routed.device, self.routed.dtype)
