"""Ways to run forwards and backwards with gradient checkpointing, and the comparison with a model that keeps everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
import transformers as tf
from torch import nn

from helpers import (
    adapter_gradients,
    padded,
)


def lm_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    return padded([7, 5], seed=seed)


def checkpointed(model: nn.Module, reentrant: bool, **kwargs: Any) -> nn.Module:
    # transformers 5.23 says "activation" where older versions say "gradient"
    name = "activation" if hasattr(tf.PreTrainedModel, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant}, **kwargs)
    model.enable_input_require_grads()  # what transformers' Trainer and PEFT do for reentrant checkpointing
    return model


def assert_same_gradients(expected: nn.Module, actual: nn.Module) -> None:
    """All adapter gradients agree, and the comparison means something: the router has one."""
    expected_gradients, actual_gradients = adapter_gradients(expected), adapter_gradients(actual)
    assert expected_gradients.keys() == actual_gradients.keys()
    assert any("loraswitch_router" in name and gradient.norm() > 1e-4 for name, gradient in expected_gradients.items())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            actual_gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def plain_step(model: nn.Module) -> None:
    model(**lm_batch()).loss.backward()


def forward_between(model: nn.Module) -> None:
    """A second batch's forward, never used, before the first one's backward."""
    loss = model(**lm_batch()).loss
    model(**lm_batch(seed=1))
    loss.backward()


def eval_between(model: nn.Module) -> None:
    loss = model(**lm_batch()).loss
    model.eval()
    with torch.no_grad():
        model(**lm_batch(seed=1))
    model.train()
    loss.backward()


def reference_between(model: nn.Module) -> None:
    """As DPO: the reference is the model with its adapter disabled."""
    loss = model(**lm_batch()).loss
    with torch.no_grad(), model.disable_adapter():
        model(**lm_batch())
    loss.backward()


def two_in_order(model: nn.Module) -> None:
    losses = [model(**lm_batch(seed=seed)).loss for seed in (0, 1)]
    for loss in losses:
        loss.backward()


def two_in_reverse(model: nn.Module) -> None:
    losses = [model(**lm_batch(seed=seed)).loss for seed in (0, 1)]
    for loss in reversed(losses):
        loss.backward()


def two_summed(model: nn.Module) -> None:
    sum(model(**lm_batch(seed=seed)).loss for seed in (0, 1)).backward()


def backward_twice(model: nn.Module) -> None:
    loss = model(**lm_batch()).loss
    loss.backward(retain_graph=True)
    loss.backward()


def from_logits(model: nn.Module) -> None:
    """The trainer computes the loss: the auxiliary losses hang on the logits."""
    batch = lm_batch()
    del batch["labels"]
    model(**batch).logits.square().mean().backward()


STEPS = [
    plain_step,
    forward_between,
    eval_between,
    reference_between,
    two_in_order,
    two_in_reverse,
    two_summed,
    backward_twice,
    from_logits,
]


def compare(make: Callable[[], nn.Module], step: Callable[[nn.Module], None], reentrant: bool, **kwargs: Any) -> None:
    plain = make()
    recomputing = checkpointed(copy.deepcopy(plain), reentrant, **kwargs).train()
    plain.train()
    for model in (plain, recomputing):
        torch.manual_seed(3)
        step(model)
    assert_same_gradients(plain, recomputing)
