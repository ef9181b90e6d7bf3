"""recipes/quality: what is measured is what the tables say."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quality_tools import VOCABULARY, copy_items, task_split, tiny
from recipes.quality import evaluate, methods, pool, routing_statistics
from recipes.quality.settings import LENGTH


def test_exact_match_is_what_greedy_decoding_gets() -> None:
    """Some items right and some wrong, the same ones as with `generate`, each from its own prompt."""
    split = task_split(copy_items(3, np.random.default_rng(0)))
    rows = pool.of_tasks({"copy": split})[0]
    model = tiny().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(28):
        model(input_ids=rows.tokens, labels=rows.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    right = []
    for tokens, items in zip(rows.tokens, rows.items, strict=True):
        for item in range(int(items.max()) + 1):
            where = (items == item).nonzero().flatten()
            first, last = int(where[0]), int(where[-1])
            prompt = tokens[:first].unsqueeze(0)
            found = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=last + 1 - first,
                min_new_tokens=last + 1 - first,
                pad_token_id=0,
            )
            right.append(torch.equal(found[0, first:], tokens[first : last + 1]))
    assert 0 < sum(right) < len(right)
    assert evaluate.score(model, rows, 2)["copy"].exact_match == pytest.approx(sum(right) / len(right))


def test_scores_of_a_family_are_those_of_each_task_alone() -> None:
    """Two tasks that share their rows: each is scored on its own answers only."""
    generator = np.random.default_rng(1)
    split = task_split(copy_items(4, generator))
    odd = (split.item_ids >= 0) & (split.item_ids % 2 == 1)
    even = (split.item_ids >= 0) & (split.item_ids % 2 == 0)
    parts = {
        name: SimpleNamespace(tokens=split.tokens, answer_mask=mask, item_ids=np.where(mask, split.item_ids, -1))
        for name, mask in (("even", even), ("odd", odd))
    }
    (family,) = pool.of_tasks(parts)
    assert family.names == ("even", "odd")
    model = tiny()
    together = evaluate.score(model, family, 3)
    for name, part in parts.items():
        (alone,) = pool.of_tasks({name: part})
        logits = model(input_ids=alone.tokens).logits
        expected = model.loss_function(logits, alone.labels, VOCABULARY).item()
        assert together[name].loss == pytest.approx(expected, rel=1e-5)
    # a question belongs to the item that it asks for: the tokens from one answer's end to the next one's
    owner, items = family.owner, family.items
    assert owner is not None and items is not None
    assert owner[0, 0] == 0 and owner[0, -1] == -1
    for row in range(len(items)):
        for position in range(LENGTH - 1):
            if items[row, position] < 0 and items[row, position + 1] >= 0:
                assert owner[row, position] == items[row, position + 1] % 2
                assert (owner[row, position - 5 : position + 1] == owner[row, position]).all()


def test_loss_of_a_domain_is_the_models_own() -> None:
    stream = np.random.default_rng(0).integers(0, VOCABULARY, 5 * LENGTH + 9).astype(np.uint16)
    rows = pool.of_text("noise", stream)
    assert rows.tokens.shape == (5, LENGTH)
    model = tiny()
    expected = model(input_ids=rows.tokens, labels=rows.labels).loss.item()
    assert evaluate.score(model, rows, 2)["noise"].loss == pytest.approx(expected, rel=1e-5)
    assert evaluate.score(model, rows, 2)["noise"].exact_match is None


def test_statistics_of_made_up_routing() -> None:
    """Experts chosen by the token, by the domain, by chance: each figure sees its own dependence and no other."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 10, (40_000,), generator=generator)
    source = torch.randint(0, 2, (40_000,), generator=generator)
    chance = torch.randint(0, 4, (40_000,), generator=generator)
    by = {"token": tokens % 4, "source": source, "chance": chance, "both": (tokens + 2 * source) % 4}
    expected = {  # mi_domain, context_information, context_variance, mi_domain_given_token
        "token": (0, 0, 0, 0),
        "source": (math.log(2), math.log(2), 1, math.log(2)),
        "chance": (0, math.log(4), 1, 0),
        "both": (0, math.log(2), 2 / 3, math.log(2)),
    }
    for name, best in by.items():
        gates = torch.nn.functional.one_hot(best, 4).float()
        found = routing_statistics._of_one_router(gates, tokens, source, 2, VOCABULARY)
        names = ("mi_domain", "context_information", "context_variance", "mi_domain_given_token")
        assert [found[each] for each in names] == pytest.approx(expected[name], abs=0.06), name
    assert routing_statistics._of_one_router(
        torch.nn.functional.one_hot(chance, 4).float(), tokens, source, 2, VOCABULARY
    )["effective_experts"] == pytest.approx(4, abs=0.01)
    # Few occurrences of each token: without the corrections chance looks like information.
    rare = torch.arange(4000) % 1000
    best, source = chance[:4000], source[:4000]
    assert routing_statistics._plug_in(best, source, rare, (4, 2, 1000)) > 0.2
    assert abs(routing_statistics.mi_given_token(best, source, rare, (4, 2, 1000))) < 0.03
    gates = torch.nn.functional.one_hot(best, 4).float()
    assert routing_statistics.context_variance(gates, rare, 1000) == pytest.approx(1, abs=0.05)


def test_gates_are_recorded_as_they_act() -> None:
    """For a tuner with a shared expert, and for layer-wise routing; the paper's router is blind to context, exactly."""
    stream = np.random.default_rng(0).integers(0, 20, 8 * LENGTH).astype(np.uint16)
    split = evaluate.Split([pool.of_text("a", stream), pool.of_text("b", stream[::-1].copy())], [])
    for name, routers_found in (("switch", 1), ("shared", 1), ("moe-lora", 28), ("deep-quarter", 1)):
        model = methods.BY_NAME[name].build(tiny()).eval()
        with routing_statistics.recorded_gates(model) as found:
            model(input_ids=split.domains[0].tokens)
        assert len(found) == routers_found
        for (gates,) in found.values():
            k = 2
            assert gates.shape[:2] == (8, LENGTH)
            assert ((gates > 0).sum(-1) == k).all() and torch.allclose(gates.sum(-1), torch.ones(8, LENGTH))
        rows = {
            (row["domain_or_task"], row["metric"]): row["value"]
            for row in routing_statistics.rows(model, split, 3, VOCABULARY)
        }
        blind = name in ("switch", "shared")
        assert (rows["domains", "context_variance"] < 1e-9) == blind, name
        assert (rows["domains", "context_information"] < 1e-9) == blind, name
        if routers_found == 1:
            assert sum(value for (where, metric), value in rows.items() if where == "a") == pytest.approx(1)
