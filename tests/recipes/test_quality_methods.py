"""recipes/quality: methods are equal in size, begin as the base, learn and repeat themselves."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from quality_tools import CPU, VOCABULARY, copy_items, task_split, tiny
from recipes.quality import base, methods, pool, routers, train
from recipes.quality.moe_lora import MoELoRALinear, MoELoRAModel
from recipes.quality.settings import FULL, LENGTH, SMOKE


@pytest.mark.slow
def test_equal_parameters() -> None:
    """Methods that are compared as equals train the same number of parameters to one percent, at the published size."""
    with torch.device("meta"):
        budget = methods.budget(base.new_model(16_384, FULL))
    for method in methods.EVERY.values():
        with torch.device("meta"):
            model = method.build(base.new_model(16_384, FULL).requires_grad_(False))
        assert method.family in (methods.ASIDE_FAMILIES if method in methods.ASIDE else methods.FAMILIES)
        if method.equal:
            assert methods.count(model) / budget == pytest.approx(1, abs=0.01), method.name
            assert methods.count(model) <= budget, method.name
    assert methods.count(base.new_model(16_384, SMOKE).requires_grad_(False)) == 0


@pytest.mark.parametrize(
    ("name", "rank"),
    [("base", 0), ("lora-r16", 16), ("lora-r64", 64), ("moe-lora", 15), ("switch-k4", 32), ("deep-quarter-shared", 34)],
)
def test_active_rank(name: str, rank: int) -> None:
    with torch.device("meta"):
        model = methods.BY_NAME[name].build(base.new_model(16_384, FULL).requires_grad_(False))
    assert methods.active_rank(model) == pytest.approx(rank, abs=0.5)


@pytest.mark.parametrize("method", list(methods.EVERY.values())[1:], ids=lambda method: method.name)
def test_a_new_adapter_changes_nothing_and_all_of_it_trains(method: methods.Method) -> None:
    rows = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = tiny()(input_ids=rows).logits
    model = method.build(tiny())
    methods.reset(model, 3)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=rows).logits, expected, atol=1e-6)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("_B" in name or "experts_b" in name):
                parameter.normal_(std=0.02)
    model.train()
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in methods.trainable(model))
    # the same seed gives the same start, in place
    before = [id(parameter) for parameter in methods.trainable(model)]
    methods.reset(model, 3)
    first = [parameter.clone() for parameter in methods.trainable(model)]
    methods.reset(model, 4)
    methods.reset(model, 3)
    assert [id(parameter) for parameter in methods.trainable(model)] == before
    assert all(torch.equal(a, b) for a, b in zip(first, methods.trainable(model), strict=True))


def test_layer_wise_reference_against_a_loop_in_float64() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7).requires_grad_(False)
    layer = MoELoRALinear(linear, num_experts=5, rank=3, top_k=2, scale=1.5, losses=[])
    nn.init.normal_(layer.experts_b)
    x = torch.randn(2, 4, 12)
    found = layer(x)
    for b in range(2):
        for t in range(4):
            token = x[b, t].double()
            probabilities = (layer.router.weight.double() @ token).softmax(0)
            chosen = probabilities.argsort(descending=True)[:2]
            expected = linear.weight.double() @ token + linear.bias.double()
            for e in chosen:
                delta = layer.experts_b[e].double() @ (layer.experts_a[e].double() @ token)
                expected += 1.5 * probabilities[e] / probabilities[chosen].sum() * delta
            assert torch.allclose(found[b, t].double(), expected, atol=1e-5)


def test_layer_wise_losses_join_the_loss() -> None:
    model = methods.BY_NAME["moe-lora"].build(tiny())
    assert isinstance(model, MoELoRAModel)
    rows = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    model.eval()
    plain = model(input_ids=rows, labels=rows).loss
    model.train()
    with_losses = model(input_ids=rows, labels=rows).loss
    # an even load gives a balance loss of k = 2; the z-loss of small logits is about log(8)^2
    assert with_losses.item() - plain.item() == pytest.approx(0.01 * 2 + 0.001 * math.log(8) ** 2, rel=0.15)
    assert model.losses == []


def test_sigmoid_router_gates_and_balance() -> None:
    from peft_loraswitch.routing.decision import route
    from peft_loraswitch.routing.options import RoutingOptions

    torch.manual_seed(0)
    router = routers.SigmoidRouter(16, 6, 2, speed=0.02)
    router.bias.copy_(torch.linspace(-0.2, 0.2, 6))
    x = torch.randn(3, 50, 16)
    routing = route(router(x), RoutingOptions(num_experts=6, top_k=2, normalize_gates=True))
    sigmoid = (x @ router.weight.T).sigmoid()
    chosen = (sigmoid + router.bias).topk(2).indices
    assert torch.equal(routing.experts.sort(-1).values, chosen.sort(-1).values)
    gates = sigmoid.gather(-1, routing.experts)
    assert torch.allclose(routing.gates, gates / gates.sum(-1, keepdim=True), atol=1e-6)
    # One expert wins everywhere; the bias brings the load back to even.
    router.reset_parameters()
    with torch.no_grad():
        x = x + 1
        router.weight[0] += 1
    shares = []
    for _ in range(150):
        router(x)
        shares.append(float(router.load.max() / router.load.sum()))
        router.after_step()
    assert shares[0] > 0.45 and np.mean(shares[-10:]) < 0.25
    router.eval()
    router(x)
    assert not router.load.any()


def test_context_router_is_causal_and_decodes_from_a_state() -> None:
    torch.manual_seed(0)
    router = routers.ContextRouter(8, 4, 2)
    x = torch.randn(2, 30, 8)
    logits = router(x)
    assert torch.allclose(router(x.reshape(-1, 8)), logits.reshape(-1, 4))  # as the tuner's losses call it
    changed = x.clone()
    changed[:, 20:] += 1
    assert torch.allclose(router(changed)[:, :20], logits[:, :20], atol=1e-6)
    assert not torch.allclose(router(changed)[:, 25], router(x)[:, 25] + router(changed - x)[:, 25], atol=1e-2)
    # token by token, with nothing but the two sums of each mean
    decays = router.decay.sigmoid()
    sums, counts = torch.zeros(2, 2, 8), torch.zeros(2)
    for t in range(30):
        sums = decays[:, None, None] * sums + x[:, t]
        counts = decays * counts + 1
        means = [torch.nn.functional.rms_norm(mean, (8,)) for mean in sums / counts[:, None, None]]
        step = x[:, t] @ router.weight.T + torch.cat(means, -1) @ router.context_weight.T
        assert torch.allclose(step, logits[:, t], atol=1e-5)


# -------------------------------------------------------------------------------------------------- the training


def a_pool() -> pool.Pool:
    generator = np.random.default_rng(0)
    streams = {
        name: generator.integers(0, VOCABULARY, size * LENGTH).astype(np.uint16) for name, size in (("a", 9), ("b", 4))
    }
    tasks = {name: SimpleNamespace(train=task_split(copy_items(6, generator))) for name in ("copy", "again")}
    return pool.training_pool(SimpleNamespace(train=streams, tasks=tasks), CPU)


def test_every_method_sees_the_same_rows_in_equal_shares() -> None:
    rows = a_pool()
    settings = SMOKE.with_changes(steps=40)
    plan = pool.plan(rows, settings, seed=1)
    assert plan.shape == (40, settings.rows)
    assert torch.equal(plan, pool.plan(rows, settings, seed=1)) and not torch.equal(
        plan, pool.plan(rows, settings, seed=2)
    )
    assert torch.equal(plan[:10], pool.plan(rows, settings, seed=1)[:10])
    task_rows = round(settings.rows * settings.task_share)
    for groups, picked in (
        (rows.domains, plan[:, task_rows * 0 : settings.rows - task_rows]),
        (rows.tasks, plan[:, -task_rows:]),
    ):
        shares = []
        for first, size in groups.values():
            mine = picked[(picked >= first) & (picked < first + size)]
            shares.append(len(mine))
            times = torch.bincount(mine - first, minlength=size)
            assert times.max() - times.min() <= 1  # each row once before any row twice
        assert sum(shares) == picked.numel() and max(shares) - min(shares) <= 1
    first, size = rows.tasks["copy"]
    scored = rows.labels[first : first + size] != pool.IGNORED
    assert scored.sum() == size * 12 * 5
    first, size = rows.domains["b"]
    assert torch.equal(rows.labels[first : first + size], rows.tokens[first : first + size])


@pytest.mark.slow
def test_a_run_learns_and_repeats_itself() -> None:
    settings = SMOKE.with_changes(steps=12, rows=4)
    losses = []
    for _ in range(2):
        trainer = train.Trainer(methods.BY_NAME["switch"].build(tiny()), a_pool(), settings, CPU, compiled=False)
        losses.append((trainer.run(1e-2, seed=0), trainer.run(1e-5, seed=0), trainer.run(1e-2, seed=0)))
    learned, idle, again = losses[0]
    assert learned < idle - 0.05 and again == learned and losses[0] == losses[1]


@pytest.mark.parametrize("name", ["switch", *(m.name for m in methods.ASIDE if m.family == "optimizers")])
def test_every_optimizer_learns_repeats_itself_and_keeps_the_schedule(name: str) -> None:
    """The weights that it is to move move, and no others: LoRA-FA leaves A where it is."""
    if name == "switch-lorarite":
        pytest.importorskip("pytorch_optimizer")
    method, settings = methods.EVERY[name], SMOKE.with_changes(steps=12, rows=4)
    rates: list[list[float]] = []

    def watched(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        optimizer = method.optimizer(model, rate)
        groups = [group for group in optimizer.param_groups if group["params"]]
        model.zero_grad = lambda: (rates.append([each["lr"] for each in groups]), nn.Module.zero_grad(model))  # type: ignore
        return optimizer

    model = method.build(tiny())
    trainer = train.Trainer(model, a_pool(), settings, CPU, False, watched)
    losses = [trainer.run(rate, seed=0) for rate in (4e-3, 4e-3, 1e-9)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] < losses[2]
    methods.reset(model, 0)
    begun = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.run(4e-3, seed=0)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, begun[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("loraswitch_A" in each for each in moved) == (name != "switch-lorafa")
    assert any("router" in each for each in moved)
    factors = [train.schedule(step, settings) for step in range(12)]
    first = [rate / factors[0] for rate in rates[0]]
    assert min(first) == pytest.approx(4e-3)
    assert max(first) == pytest.approx(4e-3 * (16 if name == "switch-loraplus" else 1))
    for factor, found in zip(factors, rates, strict=False):
        assert found == pytest.approx([rate * factor for rate in first])


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    settings = FULL.with_changes(steps=100)
    factors = [train.schedule(step, settings) for step in range(100)]
    assert factors[0] == 0.2 and factors[4] == factors[5] == 1 and factors[-1] < 0.001
    assert all(a >= b for a, b in zip(factors[4:], factors[5:], strict=False))


@pytest.mark.parametrize("best", range(7))
def test_search_finds_the_bottom_of_a_valley(best: int) -> None:
    grid = [2.0**exponent for exponent in range(7)]
    asked: list[float] = []

    def score(value: float) -> float:
        asked.append(value)
        return math.nan if value == 64 and best != 6 else abs(math.log2(value) - best)

    found, scores = train.search(grid, score)
    assert found == 2.0**best and len(asked) == len(set(asked)) == len(scores) <= 5
    neighbours = [2.0**e for e in (best - 1, best + 1) if 0 <= e < 7]
    assert set(neighbours) <= set(scores)
