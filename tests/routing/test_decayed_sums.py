"""Decayed running sums by doubling, against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from oracle import in_context
from peft_loraswitch.routing.decayed_sums import decayed_sums, mean_of, sequence_numbers, weighted

DECAYS = [1e-3, 0.3, 0.8, 0.999, 1.0]


def mean(values, decay, real=None, numbers=None, previous=None):
    return mean_of(decayed_sums(weighted(values, real), decay, numbers, previous, real), values)


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
    for mask in (real, None):
        masks = (None, None, None) if mask is None else (mask, mask[:, :split], mask[:, split:])
        whole = decayed_sums(weighted(values, masks[0]), decay, real=masks[0])
        first = decayed_sums(weighted(values[:, :split], masks[1]), decay, real=masks[1])
        rest = decayed_sums(weighted(values[:, split:], masks[2]), decay, previous=first[:, -1], real=masks[2])
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.5, 0.98, 1.0])
def test_padding_is_as_if_it_were_not_there(decay):
    """Wherever it is, and however long: the sums are those of the real tokens alone, and padding leaves them as they are."""
    gaps = [3, 0, 1, 400, 0, 0, 7, 0, 150, 2]  # padding before each token
    real = torch.cat([torch.arange(gap + 1) == gap for gap in gaps] + [torch.zeros(5, dtype=torch.bool)]).unsqueeze(0)
    values = torch.randn(1, real.shape[1], 3)
    found = decayed_sums(weighted(values, real), decay, real=real)
    alone = decayed_sums(weighted(values[real].unsqueeze(0), None), decay)
    last_real = real[0].cumsum(-1)  # 0 before the first
    kept = torch.cat([torch.zeros_like(alone[0, :1]), alone[0]])[last_real]
    torch.testing.assert_close(found[0], kept, rtol=1e-6, atol=1e-6)
    for previous in (alone[:, 4], torch.full_like(alone[:, 4], torch.nan)):  # one step, and several at once
        for tokens in (1, 6):
            nothing = torch.zeros(1, tokens, dtype=torch.bool)
            kept = decayed_sums(weighted(values[:, :tokens], nothing), decay, previous=previous, real=nothing)
            torch.testing.assert_close(kept, previous.expand(tokens, -1)[None], rtol=0, atol=0, equal_nan=True)


def test_a_mask_of_real_tokens_changes_nothing():
    values, real = torch.randn(2, 37, 3), torch.ones(2, 37, dtype=torch.bool)
    torch.testing.assert_close(mean(values, 0.9, real), mean(values, 0.9), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padded", [0, 2000])
def test_thousands_of_tokens_overflow_nothing(padded):
    values = torch.randn(1, 4000 + padded, 2, dtype=torch.float64)
    real = torch.ones(1, 4000 + padded, dtype=torch.bool)
    real[:, 1000 : 1000 + padded] = False
    expected, total, weight = torch.zeros(1, 4000 + padded, 2, dtype=torch.float64), torch.zeros(2), 0.0
    for t in range(4000 + padded):
        if real[0, t]:
            total, weight = 0.98 * total + values[0, t], 0.98 * weight + 1
        expected[0, t] = total / weight
    torch.testing.assert_close(mean(values.float(), 0.98, real).double(), expected, rtol=1e-5, atol=1e-5)


def test_packed_sequences_with_padding_within():
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
    values, real = torch.randn(1, 8, 3), torch.tensor([[True, False, False, True, False, True, True, True]])
    packed = mean(values, 0.7, real, numbers)
    for start, end in ((0, 4), (4, 7), (7, 8)):
        alone = in_context(values[:, start:end], 0.7, real[:, start:end])
        torch.testing.assert_close(packed[:, start:end].double(), alone, rtol=1e-5, atol=1e-6)


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
    positions = torch.tensor([[4, 5, 20, 21, 3, 4, 6, 7]])  # wherever they do not go on by one, as in transformers
    assert sequence_numbers(positions).tolist() == find_packed_sequence_indices(positions).tolist()
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
        sums = decayed_sums(both, 0.7, real=real)
        some = sums[..., -1:] > 0
        return (sums[..., :-1] / sums[..., -1:].where(some, 1.0)).where(some, v)

    assert torch.autograd.gradcheck(in_float64, (values,))
    single = values.detach().float().requires_grad_()
    mean(single, 0.7, real).square().sum().backward()
    in_context(values, 0.7, real).square().sum().backward()
    torch.testing.assert_close(single.grad.double(), values.grad, rtol=1e-4, atol=1e-5)


def test_far_tokens_end_in_nothing_and_not_in_nan():
    values = torch.randn(1, 5000, 2)
    gap = torch.zeros(1, 5000, dtype=torch.bool)
    gap[:, :3] = True
    for real in (None, gap, ~gap):
        values = values.detach().requires_grad_()
        found = mean(values, 0.5, real)
        assert torch.isfinite(found).all()
        found.sum().backward()
        assert torch.isfinite(values.grad).all()
