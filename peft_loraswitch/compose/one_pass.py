"""Several experts trained in one pass: each sample says which expert it is for, and the backbone runs once for all of them
(the idea of mLoRA, arXiv 2312.02515).

`ExpertCollator` takes the samples' word into the batch, as `experts`; the model takes it from there, as `use_experts` does; and
`ExpertLoss` is the sum of the experts' own mean losses, so that each gets the gradient of a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..loading.layout import backbone_of
from ..training_logs import AddsToLogs
from .experts import adapted_linears, config_of
from .given_experts import expert_indices


class ExpertCollator:
    """A data collator that keeps the column which says, by name or index, which expert a sample is for.

    Args:
        collator: makes a batch (a dict) of the samples without that column.
        model: a model with LoRA-Switch adapters: it knows the experts.
        column: name of the column.
        adapter_name: which adapter; may be left out if there is only one.

    Raises:
        ValueError: no such adapter; in a call: a sample without the column (a trainer needs remove_unused_columns=False), or an
            unknown expert.

    docs/training.md shows it in a trainer.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        model: nn.Module,
        column: str = "expert",
        adapter_name: str | None = None,
    ) -> None:
        self.adapter, _ = config_of(model, adapter_name)
        self.configs: Any = backbone_of(model).peft_config  # not the model: collators go to other processes
        self.collator, self.column = collator, column

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Any:
        """The batch of the inner collator, and in it `experts`, int64 [samples]."""
        if any(self.column not in sample for sample in samples):
            raise ValueError(
                f"A sample has no column '{self.column}', which says which expert it is for. If the data has it, the trainer has "
                "removed it: pass remove_unused_columns=False in its arguments."
            )
        experts = [sample[self.column] for sample in samples]
        batch = self.collator([{k: v for k, v in sample.items() if k != self.column} for sample in samples])
        batch["experts"] = expert_indices(_there(self.configs, self.adapter), experts)
        return batch


class ExpertLoss(AddsToLogs):
    """The loss of a causal language model of which several experts train in one pass: the sum over experts of the mean over the
    expert's own tokens. Give it to a trainer as `compute_loss_func`; among its `callbacks` it also logs each expert's loss, as
    `expert_loss/<name or index>`, and clips.

    Each expert's gradient is then that of a run of its own. So is its update, if the batches hold samples of every expert (an
    optimizer moves an expert without samples by what it remembers, and by weight decay) and the adapter has no shared experts.
    A trainer's own `max_grad_norm` would couple the experts: set it to 0, and give `max_grad_norm` here.

    Where several batches make one step (gradient accumulation, several processes), a trainer says how many labels the step has,
    and each batch counts by its share of them. That is a run of its own if an expert has the same share of the labels in all of
    them.

    Args:
        model: a model with LoRA-Switch adapters.
        max_grad_norm: each expert's gradient is clipped to this norm before a step. None: none is.
        gradient_accumulation_steps: of a loop of one's own that passes no `num_items_in_batch`: there each micro-batch counts
            equally. Trainers pass it, so nothing has to be said here.
        adapter_name: which adapter; may be left out if there is only one.

    Attributes:
        losses: float32 [num_experts], of the last batch, detached; NaN for experts without tokens in it.

    Raises:
        ValueError: no such adapter; in a call: the batch said no experts, or has no labels.
    """

    def __init__(
        self,
        model: nn.Module,
        max_grad_norm: float | None = None,
        gradient_accumulation_steps: int = 1,
        adapter_name: str | None = None,
    ) -> None:
        adapter, _ = config_of(model, adapter_name)
        self.adapter = adapter
        self.configs: Any = backbone_of(model).peft_config
        self.layers = list(adapted_linears(backbone_of(model), adapter).values())
        self.max_grad_norm, self.steps = max_grad_norm, gradient_accumulation_steps
        self.losses: torch.Tensor | None = None
        self._logged: list[torch.Tensor] = []
        self._logged_of: Any = None  # the configuration that they go by

    def __call__(
        self, outputs: Any, labels: torch.Tensor | None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """outputs, with logits [samples, sequence, vocabulary] of the forward just done, labels [samples, sequence] (-100: none),
        and how many labels the whole step has -> scalar."""
        given = self.layers[0].routing_state.last_given.get(self.adapter)
        if given is None or given.of_samples() is None:
            raise ValueError("The batch has no 'experts': wrap the data collator in an ExpertCollator.")
        if labels is None:
            raise ValueError("The batch has no 'labels': the collator must make them.")
        config = _there(self.configs, self.adapter)
        if config is not self._logged_of:  # experts have come or gone
            self._logged.clear()
            self._logged_of = config
        losses, counts = expert_losses(outputs["logits"], labels, given.choices, config.routing_options().num_choices)
        with torch.no_grad():
            self.losses = losses.detach().where(counts > 0, torch.nan)
            if self.layers[0].training:
                self._logged.append(self.losses)
        return losses.sum() * self._share(counts.sum(), num_items_in_batch)

    def _share(self, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor | float:
        """What this batch counts in its step.

        The trainer's number is right where ours would be a guess: in the last step of an epoch, which has fewer micro-batches,
        and with several processes, whose labels it sums where it multiplies the loss by their number.
        """
        if num_items_in_batch is not None:
            return labels / torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
        return 1 / self.steps if self.layers[0].training else 1.0

    def entries(self, model: nn.Module | None) -> dict[str, float]:
        """The experts' mean losses."""
        if not self._logged:
            return {}
        means = torch.stack(self._logged).nanmean(0).tolist()
        self._logged.clear()
        names = self._logged_of.expert_names or range(self._logged_of.num_experts)
        return {f"expert_loss/{name}": mean for name, mean in zip(names, means, strict=False) if mean == mean}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clips."""
        if self.max_grad_norm is not None:
            self.clip(self.max_grad_norm)

    @torch.no_grad()
    def clip(self, max_grad_norm: float) -> torch.Tensor:
        """Clip each expert's gradient to this norm, in a loop of one's own before `optimizer.step()`.

        Returns:
            float32 [num_experts + num_shared_experts], the norms before. (Linears before the router have the shared ones only.)
        """
        experts = [each[self.adapter] for one in self.layers for each in (one.loraswitch_A, one.loraswitch_B)]
        stacked = max(len(one.weight) for one in experts)
        gradients = [(stacked - len(one.weight) + first, grad) for one in experts for first, grad in one.gradients()]
        squares = torch.zeros(stacked, device=experts[0].weight.device)
        for first, gradient in gradients:
            squares[first : first + len(gradient)] += gradient.float().flatten(1).square().sum(1).to(squares.device)
        norms = squares.sqrt()
        factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for first, gradient in gradients:
            own = factors[first : first + len(gradient)].to(gradient.device, gradient.dtype)
            gradient.mul_(own.view(-1, *[1] * (gradient.dim() - 1)))
        return norms


def _there(configs: Any, adapter: str) -> Any:
    if adapter not in configs:
        raise ValueError(
            f"The adapter '{adapter}' is not in the model any more: make a new one of these for another adapter."
        )
    return configs[adapter]


def expert_losses(
    logits: torch.Tensor, labels: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's mean loss of the next token over the labels of its own samples.

    Args:
        logits: [samples, sequence, vocabulary].
        labels: int64 [samples, sequence]; -100 is none.
        experts: int64 [samples].

    Returns:
        float32 [num_experts] each: the means (0 where there are no tokens), and the numbers of tokens.
    """
    wanted = labels[:, 1:].to(logits.device)
    experts = experts.to(logits.device)
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, reduction="none", ignore_index=-100)
    zeros = each.new_zeros(num_experts)
    counts = zeros.index_add(0, experts, (wanted != -100).sum(1).to(each.dtype))
    return zeros.index_add(0, experts, each.sum(1)) / counts.clamp(min=1), counts
