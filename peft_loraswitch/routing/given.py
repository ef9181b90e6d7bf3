"""Routes that are given: within `use_experts` a token follows the expert that it is told to, and no router is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .decision import Routing, routing_of
from .options import RoutingOptions


@dataclass(frozen=True)
class GivenExperts:
    """The experts of a batch for one adapter.

    Attributes:
        choices: int64; [] one expert for all, [samples], or [samples, sequence] for single tokens. `num_experts` is the base
            expert.
        num_choices: of the adapter that they are of; None: not known.
    """

    choices: torch.Tensor
    num_choices: int | None = None

    def check_batch_size(self, samples: int) -> None:
        """Raise a ValueError unless the experts are those of a batch of so many samples."""
        if self.choices.dim() and self.choices.shape[0] != samples:
            raise ValueError(
                f"experts are given for {self.choices.shape[0]} samples, but the batch has {samples}: give one per sample."
            )

    def of_samples(self) -> torch.Tensor | None:
        """The experts [samples], or None if they are given otherwise."""
        return self.choices if self.choices.dim() == 1 else None

    def of_tokens(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        """Experts int64 [*token_shape] of the tokens x [*token_shape, in_features]. In training a sample is a row of x; else
        beams may follow each other, as in `generate`.

        Raises:
            ValueError: they are those of another batch.
        """
        shape, choices = x.shape[:-1], self.choices.to(x.device, non_blocking=True)
        if choices.dim() == 0:
            return choices.expand(shape)
        if choices.dim() == 2:
            if choices.numel() != shape.numel() or (len(shape) == 2 and choices.shape != shape):
                raise ValueError(
                    f"experts are given for tokens of shape {tuple(choices.shape)}, but the batch has {tuple(shape)}: give one "
                    "for each token (within generate, where tokens come one by one, one per sample)."
                )
            return choices.reshape(shape)
        samples, rows = choices.shape[0], shape[0] if len(shape) > 1 else shape.numel()
        if samples == 0 or rows % samples or (training and len(shape) > 1 and rows != samples):
            raise ValueError(f"experts are given for {samples} samples, but the batch has {rows}: give one per sample.")
        return choices.repeat_interleave(shape.numel() // samples, output_size=shape.numel()).view(shape)


def given_routing(choices: torch.Tensor, options: RoutingOptions) -> Routing:
    """The decision that is these choices, int64 [*token_shape], with gate exactly 1, and the shared experts. What is left of
    `top_k` is the index behind the stack, which adds nothing: to the kernels it is a decision like any other."""
    gates = torch.ones((*choices.shape, 1), dtype=torch.float32, device=choices.device)
    routing = routing_of(choices.unsqueeze(-1), gates, options)
    left = options.top_k - 1
    nothing = routing.experts.new_full((*choices.shape, left), options.num_stacked)
    given = Routing(
        experts=torch.cat([routing.experts[..., :1], nothing, routing.experts[..., 1:]], dim=-1),
        gates=torch.cat([gates, gates.new_zeros(nothing.shape), routing.gates[..., 1:]], dim=-1),
        dense_gates=routing.dense_gates,
        has_null_index=options.base_expert or left > 0,
        is_given=True,
    )
    given.chosen()  # as in `decision.route`
    return given
