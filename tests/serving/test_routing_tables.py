"""Routing for vLLM against `routing/decision.py`, the definition; needs no vLLM."""

from __future__ import annotations

import random

import pytest
import torch

from peft_loraswitch.routing.decision import route
from peft_loraswitch.routing.options import RoutingOptions
from peft_loraswitch.vllm_plugin import custom_ops
from peft_loraswitch.vllm_plugin.routing_site import RoutingSite
from peft_loraswitch.vllm_plugin.routing_tables import RoutingTables, decide
from peft_loraswitch.vllm_plugin.wide_lora import wide_a, wide_b, with_unrouted

MAX_RANK, MAX_CHOICES, TOKENS = 48, 9, 40
SOME, NONE = torch.tensor([False]), torch.tensor([True])  # is there no LoRA in the batch?


def some_options(seed: int) -> RoutingOptions:
    choose = random.Random(seed)
    experts = choose.randint(1, MAX_CHOICES - 1)
    return RoutingOptions(
        num_experts=experts,
        top_k=choose.randint(1, experts),
        normalize_gates=choose.random() < 0.5,
        num_shared_experts=choose.randint(0, 3),
        base_expert=choose.random() < 0.5,
        top_p=choose.choice([1.0, 0.3, 0.7]),
    )


def mask_of(tables: RoutingTables, logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    return decide(logits, tables.settings[slot], tables.mask.shape[1])


def expected(logits: torch.Tensor, options: RoutingOptions) -> torch.Tensor:
    """The definition's gates, on rank-major columns."""
    columns = torch.arange(MAX_RANK) % options.num_stacked
    return route(logits, options).dense_gates[:, columns]


@pytest.mark.parametrize("kind", ["random", "ties", "zeros of both signs", "-inf"])
@pytest.mark.parametrize("seed", range(12))
def test_the_mask_is_the_decision(seed, kind):
    slots = [some_options(100 * seed + slot) for slot in range(3)]
    tables = RoutingTables(slots=3, max_rank=MAX_RANK, max_choices=MAX_CHOICES, max_tokens=TOKENS)
    logits = torch.randn(TOKENS, MAX_CHOICES)
    if kind == "ties":
        logits = logits.round()
    elif kind == "zeros of both signs":
        logits = torch.where(logits > 0, 0.0, -0.0)
    elif kind == "-inf":
        logits[::3, 0] = -torch.inf
    for slot, options in enumerate(slots):
        tables.place(slot, options)
        if kind == "-inf" and options.num_choices == 1:
            continue  # a token with nothing but -inf has no decision
        mask = mask_of(tables, logits, torch.full((TOKENS,), slot))
        torch.testing.assert_close(mask, expected(logits[:, : options.num_choices], options), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_nan_shows(seed):
    options = some_options(seed)
    tables = RoutingTables(slots=1, max_rank=MAX_RANK, max_choices=MAX_CHOICES, max_tokens=TOKENS)
    tables.place(0, options)
    logits = torch.randn(TOKENS, MAX_CHOICES)
    logits[3, 0] = torch.nan
    mask = mask_of(tables, logits, torch.zeros(TOKENS, dtype=torch.long))
    assert mask[3].isnan().any() and not mask[:3].isnan().any() and not mask[4:].isnan().any()


def test_the_hard_gate_is_exactly_one():
    options = RoutingOptions(num_experts=3, top_k=1, normalize_gates=True)
    tables = RoutingTables(slots=1, max_rank=6, max_choices=4, max_tokens=TOKENS)
    tables.place(0, options)
    mask = mask_of(tables, torch.randn(TOKENS, 4) * 30, torch.zeros(TOKENS, dtype=torch.long))
    assert set(mask.unique().tolist()) == {0.0, 1.0} and (mask.sum(-1) == 2).all()


def test_sites_share_a_batch():
    """Slot 0 routes at the first linear, slot 1 at a later one, slot 2 is a plain LoRA, -1 the backbone."""
    options = [RoutingOptions(4, 2, True), RoutingOptions(3, 1, False, num_shared_experts=2)]
    tables = RoutingTables(slots=3, max_rank=MAX_RANK, max_choices=MAX_CHOICES, max_tokens=TOKENS)
    first, later = RoutingSite(tables, 8, first=True), RoutingSite(tables, 8, first=False)
    routers = [torch.randn(4, 8), torch.randn(3, 8)]
    for slot, site in enumerate((first, later)):
        tables.place(slot, options[slot])
        site.place(slot, routers[slot])
    slots = torch.randint(-1, 3, (TOKENS + 5,))
    x, deeper = torch.randn(2, TOKENS, 8)

    first.route(x, slots, SOME)
    slots = slots[:TOKENS]
    torch.testing.assert_close(tables.mask[slots == 0], expected(x @ routers[0].T, options[0])[slots == 0])
    assert (tables.mask[(slots == 1) | (slots == 2)] == 1).all() and (tables.mask[slots == -1] == 0).all()
    before = tables.mask.clone()

    later.route(deeper, slots, SOME)
    torch.testing.assert_close(tables.mask[slots == 1], expected(deeper @ routers[1].T, options[1])[slots == 1])
    assert torch.equal(tables.mask[slots != 1], before[slots != 1])


def test_a_slot_forgets_the_adapter_before():
    tables = RoutingTables(slots=1, max_rank=MAX_RANK, max_choices=MAX_CHOICES, max_tokens=TOKENS)
    site = RoutingSite(tables, 8, first=True)
    site.place(0, torch.randn(9, 8))
    tables.place(0, RoutingOptions(8, 8, False, base_expert=True))
    router, options = torch.randn(2, 8), RoutingOptions(2, 1, False)
    site.place(0, router)
    tables.place(0, options)
    x = torch.randn(TOKENS, 8)
    site.route(x, torch.zeros(TOKENS, dtype=torch.long), SOME)
    torch.testing.assert_close(tables.mask, expected(x @ router.T, options))
    site.place(0, None)
    site.route(x, torch.zeros(TOKENS, dtype=torch.long), SOME)
    assert (tables.mask == 1).all()


def test_a_batch_without_loras_costs_nothing():
    tables = RoutingTables(slots=1, max_rank=MAX_RANK, max_choices=MAX_CHOICES, max_tokens=TOKENS)
    site = RoutingSite(tables, 8, first=True)
    tables.mask.fill_(7)
    site.route(torch.randn(TOKENS, 8), torch.full((TOKENS,), -1), NONE)
    assert (tables.mask == 7).all()


@pytest.mark.slow
def test_the_op_is_what_compilers_expect(fresh_compiler):
    options = RoutingOptions(4, 2, True)
    tables = RoutingTables(slots=2, max_rank=MAX_RANK, max_choices=MAX_CHOICES, max_tokens=TOKENS)
    tables.place(0, options)
    site = RoutingSite(tables, 8, first=True)
    site.place(0, torch.randn(4, 8))
    slots = torch.randint(-1, 2, (TOKENS,))
    arguments = (
        torch.randn(5, 8),
        site.router,
        site.here,
        tables.settings,
        slots,
        SOME,
        True,
        tables.mask,
        tables.kept.number,
    )
    torch.library.opcheck(custom_ops.route.default, arguments)

    def masked_sum(x: torch.Tensor, no_lora: torch.Tensor) -> torch.Tensor:
        site.route(x, slots, no_lora)
        return tables.mask[: x.shape[0]].sum(-1) * x.shape[0]

    compiled = torch.compile(masked_sum, fullgraph=True, dynamic=True)
    for tokens in (3, 7):
        x = torch.randn(tokens, 8)
        expected = masked_sum(x, SOME)
        tables.mask.fill_(torch.nan)
        torch.testing.assert_close(compiled(x, SOME), expected)
        assert not tables.mask[:tokens].isnan().any() and tables.mask[tokens:].isnan().all()
        tables.mask.fill_(1)
        assert (compiled(x, NONE) == MAX_RANK * tokens).all()  # decided when it runs


def test_parts_of_a_sharded_input_add_up():
    options, router, x = RoutingOptions(4, 2, True), torch.randn(4, 8), torch.randn(TOKENS, 8)
    tables = RoutingTables(slots=1, max_rank=MAX_RANK, max_choices=MAX_CHOICES, max_tokens=TOKENS)
    tables.place(0, options)
    other = RoutingSite(tables, 4, first=True, begins=4)
    other.place(0, router)
    rest = x[:, 4:] @ other.router[0].T
    site = RoutingSite(tables, 4, first=True, begins=0, sum_shards=lambda logits: logits + rest)
    site.place(0, router)
    site.route(x[:, :4], torch.zeros(TOKENS, dtype=torch.long), SOME)
    torch.testing.assert_close(tables.mask, expected(x @ router.T, options))


@pytest.mark.parametrize(("shared", "rank"), [(0, 3), (2, 4)])
def test_a_wide_lora_with_its_mask_is_the_mixture(shared, rank):
    options = RoutingOptions(4, 2, True, num_shared_experts=shared)
    a, b = torch.randn(4 + shared, rank, 8), torch.randn(4 + shared, 6, rank)
    x, scale = torch.randn(TOKENS, 8), 1.5
    logits = torch.randn(TOKENS, 4)
    gates = route(logits, options).dense_gates
    mixture = scale * torch.einsum("te,eor,eri,ti->to", gates, b, a, x)
    mask = expected(logits, options)[:, : rank * (4 + shared)]
    torch.testing.assert_close((x @ wide_a(a).T * mask) @ wide_b(b, scale).T, mixture, rtol=1e-4, atol=1e-4)


def test_shared_experts_behind_the_router():
    stack = torch.randn(2, 3, 8)
    full = with_unrouted(stack, 4)
    assert full.shape == (6, 3, 8) and (full[:4] == 0).all() and torch.equal(full[4:], stack)
