"""The one way in which fused layers find out that what they keep is old."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_loraswitch.fingerprint import Fingerprint


class Watched:
    """Two linears and a scaling, and a fingerprint of all that one can look at."""

    def __init__(self) -> None:
        self.read, self.copied = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
        self.scaling = {"a": 2.0, "b": 1.0}
        self.part = Fingerprint(written=[self.copied._parameters])
        self.whole = Fingerprint(
            weights=[self.read._parameters],
            biases=[self.read._parameters, self.copied._parameters],
            scalings=[self.scaling],
            adapter="a",
            hooks=[self.read._forward_hooks],
            parts=[self.part],
        )


def test_nothing_has_changed():
    watched = Watched()
    with torch.no_grad():
        watched.read.weight.mul_(2)  # it is read where it is
    watched.scaling["b"] = 5.0
    assert watched.whole.is_current() and watched.whole.is_current()


def new_memory(watched: Watched) -> None:
    watched.read.weight.data = watched.read.weight.data.clone()


def new_parameter(watched: Watched) -> None:
    watched.read.weight = nn.Parameter(watched.read.weight.detach().clone())


def first_bias(watched: Watched) -> None:
    watched.copied.bias = nn.Parameter(torch.zeros(2))


def bias_taken_away(watched: Watched) -> None:
    watched.read.bias = None


def other_scaling(watched: Watched) -> None:
    watched.scaling["a"] = 3.0


def adapter_deleted(watched: Watched) -> None:
    del watched.scaling["a"]


def hook(watched: Watched) -> None:
    watched.read.register_forward_hook(lambda *_: None)


def written(watched: Watched) -> None:
    with torch.no_grad():
        watched.copied.weight.mul_(2)


def uncounted(watched: Watched) -> None:
    with torch.inference_mode():
        watched.copied._parameters["weight"] = torch.ones(2, 3)


def told(watched: Watched) -> None:
    watched.whole.invalidate()


def part_told(watched: Watched) -> None:
    watched.part.invalidate()


@pytest.mark.parametrize(
    "change",
    [
        new_memory, new_parameter, first_bias, bias_taken_away, other_scaling, adapter_deleted, hook, written, uncounted, told,
        part_told,
    ],
)  # fmt: skip
def test_what_changes_is_seen(change: Callable[[Watched], None]):
    watched = Watched()
    before = {
        id(tensor): tensor for tensor in (watched.read.weight, watched.read.weight.data)
    }  # no address comes twice
    change(watched)
    assert not watched.whole.is_current() and not watched.whole.is_current() and before


def test_a_part_that_is_renewed_makes_the_whole_current_again():
    watched = Watched()
    written(watched)
    fresh = Fingerprint(written=[watched.copied._parameters])
    assert not watched.whole.is_current()
    watched.part.renew(fresh)
    assert watched.whole.is_current()
    written(watched)
    assert not watched.whole.is_current()


def test_a_copy_is_not_current():
    """Its tensors are elsewhere, and what was made of the original's is not theirs."""
    watched = Watched()
    twin = copy.deepcopy(watched)
    assert watched.whole.is_current() and not twin.whole.is_current() and not twin.part.is_current()
