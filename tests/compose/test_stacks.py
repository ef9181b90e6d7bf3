"""Names and numbers become fields of a configuration that mean the same; folding and padding."""

from __future__ import annotations

import random

import pytest
import torch

from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.compose.stacks import common_scale, folded, padded, rank_and_alpha, selection, used_rows
from peft_loraswitch.targets.selection import selects

# Endings that are also full names, endings of others, digits, and characters that mean something in a pattern.
NAMES = [
    f"{tower}{block}.{linear}"
    for tower in ("", "decoder.", "encoder.decoder.")
    for block in ("layers.0", "layers.1", "layers.10")
    for linear in ("q_proj", "xq_proj", "mlp.0", "mlp.1", "a+b")
] + ["q_proj", "head"]


@pytest.mark.parametrize("seed", range(60))
def test_fields_mean_what_they_were_made_of(seed):
    rng = random.Random(seed)
    chosen = rng.sample(NAMES, rng.randint(1, len(NAMES)))
    kinds = {name.rpartition(".")[2] for name in NAMES}
    rank_by_kind = {kind: rng.choice([2, 3]) for kind in kinds}
    ranks = {name: rng.choice([rank_by_kind[name.rpartition(".")[2]]] * (seed % 4) + [1, 4, 8]) for name in chosen}
    if seed % 2:
        ranks = {name: rank_by_kind[name.rpartition(".")[2]] for name in chosen}
    scale_by_kind = {kind: rng.choice([0.5, 2.0, 1.7]) for kind in kinds}
    scales = {name: scale_by_kind[name.rpartition(".")[2]] for name in chosen}
    targets = selection(chosen, NAMES)
    config = LoRASwitchConfig(num_experts=1, top_k=1, **rank_and_alpha(ranks, scales), target_modules=targets)
    for name in NAMES:
        assert bool(selects(config, name)) == (name in chosen), name
    for name in chosen:
        assert config.rank_of(name) == ranks[name]
        assert config.scale_of(name) == pytest.approx(scales[name], rel=1e-15)


def test_what_all_have_makes_no_patterns():
    fields = rank_and_alpha(dict.fromkeys(NAMES, 4), dict.fromkeys(NAMES, 2.0))
    assert fields == {"r": 4, "rank_pattern": {}, "lora_alpha": 8, "alpha_pattern": {}}
    kinds = {name: 16 if name.endswith("xq_proj") else 4 for name in NAMES}
    fields = rank_and_alpha(kinds, dict.fromkeys(NAMES, 2.0))
    assert fields == {"r": 4, "rank_pattern": {"xq_proj": 16}, "lora_alpha": 8, "alpha_pattern": {"xq_proj": 32}}


def test_common_scale():
    assert common_scale([2.0, 1.0, 2.0]) == 2.0
    assert common_scale([4.0, 0.5, 3.0]) == 0.5


def test_fold_rounds_once():
    b = torch.randn(5, 3)
    assert torch.equal(folded(b, 1.0, torch.float32), b) and torch.equal(folded(b, 4.0, torch.float32), 4 * b)
    assert torch.equal(folded(b.half(), 1.7, torch.float32), (b.half().double() * 1.7).float())


def test_padding_is_what_is_not_used():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 5, 3)
    wide_a, wide_b = padded(a, b, 6)
    assert wide_a.shape == (2, 6, 4) and wide_b.shape == (2, 5, 6)
    assert used_rows(wide_a, wide_b).tolist() == [True] * 3 + [False] * 3
    assert torch.equal(wide_b @ wide_a, b @ a)
    b[0, :, 1] = 0  # a fresh expert: A counts alone
    assert used_rows(a[0], b[0]).all()
