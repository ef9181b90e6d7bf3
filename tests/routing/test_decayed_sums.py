"""Decayed running sums by doubling, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from oracle import in_context
from peft_loraswitch.routing.decayed_sums import decayed_sums, mean_of, sequence_numbers, weighted

DECAYS = [1e-3, 0.3, 0.8, 0.999, 1.0]


def mean(values, decay, real=None, numbers=None, previous=None):
    return mean_of(decayed_sums(weighted(values, real), decay, numbers, previous), values)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 33])
def test_equals_the_definition(decay, tokens):
    values = torch.randn(3, tokens, 5)
    real = torch.rand(3, tokens) < 0.6
    expected = in_context(values, decay, real)
    torch.testing.assert_close(mean(values, decay, real).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean(values, decay).double(), in_context(values, decay), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("split", [1, 4, 12])
def test_goes_on_from_previous_sums(decay, split):
    values, real = torch.randn(2, 13, 4), torch.rand(2, 13) < 0.7
    whole = decayed_sums(weighted(values, real), decay)
    first = decayed_sums(weighted(values[:, :split], real[:, :split]), decay)
    rest = decayed_sums(weighted(values[:, split:], real[:, split:]), decay, previous=first[:, -1])
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-5, atol=1e-5)


def test_what_padding_holds_is_not_seen():
    values, real = torch.randn(1, 6, 3), torch.tensor([[False, True, False, True, True, False]])
    expected = mean(values, 0.9, real)
    for broken in (float("nan"), float("inf"), 1e30):
        spoilt = values.where(real.unsqueeze(-1), broken)
        torch.testing.assert_close(mean(spoilt, 0.9, real)[real], expected[real], rtol=0, atol=0)


def test_a_token_without_real_ones_gets_its_own():
    values, real = torch.randn(1, 4, 3), torch.tensor([[False, False, True, True]])
    torch.testing.assert_close(mean(values, 0.9, real)[:, :2], values[:, :2], rtol=0, atol=0)


def test_packed_sequences_are_separate():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
    numbers = sequence_numbers(positions)
    assert numbers.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0] * 8]
    values = torch.randn(2, 8, 3)
    packed = mean(values, 0.9, numbers=numbers)
    for row, start, end in ((0, 0, 3), (0, 3, 5), (0, 5, 6), (0, 6, 8), (1, 0, 8)):
        alone = mean(values[row : row + 1, start:end], 0.9)
        torch.testing.assert_close(packed[row : row + 1, start:end], alone, rtol=1e-5, atol=1e-6)


def test_gradients():
    values = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[True] * 5, [False, True, True, False, True]])

    def in_float64(v):
        both = torch.cat([v, torch.ones_like(v[..., :1])], -1).where(real.unsqueeze(-1), 0.0)
        sums = decayed_sums(both, 0.7)
        some = sums[..., -1:] > 0
        return (sums[..., :-1] / sums[..., -1:].where(some, 1.0)).where(some, v)

    assert torch.autograd.gradcheck(in_float64, (values,))
    single = values.detach().float().requires_grad_()
    mean(single, 0.7, real).square().sum().backward()
    in_context(values, 0.7, real).square().sum().backward()
    torch.testing.assert_close(single.grad.double(), values.grad, rtol=1e-4, atol=1e-5)


def test_far_tokens_end_in_nothing_and_not_in_nan():
    values = torch.randn(1, 5000, 2)
    real = torch.zeros(1, 5000, dtype=torch.bool)
    real[:, :3] = True
    found = mean(values.requires_grad_(), 0.5, real)
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(values.grad).all()
