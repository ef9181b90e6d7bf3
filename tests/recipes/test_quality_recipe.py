"""recipes/quality: what is measured is what the tables say, methods are equal in size, a stopped command goes on."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fresh import run_module
from recipes.quality import aside, base, evaluate, files, methods, pool, results, routers, routing_statistics, train
from recipes.quality import run as command
from recipes.quality.moe_lora import MoELoRALinear, MoELoRAModel
from recipes.quality.settings import FULL, LENGTH, SMOKE

CPU = torch.device("cpu")
VOCABULARY = 128


def tiny(**changes: Any) -> Any:
    settings = SMOKE.with_changes(hidden=32, intermediate=48, layers=4, heads=2, key_value_heads=1, **changes)
    return base.new_model(VOCABULARY, settings).requires_grad_(False)


def task_split(items: list[list[tuple[list[int], list[int]]]]) -> SimpleNamespace:
    """Rows of (prompt, answer) items -> arrays as prepare.py makes them."""
    tokens = np.zeros((len(items), LENGTH), dtype=np.uint16)
    item_ids = np.full((len(items), LENGTH), -1, dtype=np.int32)
    for row, packed in enumerate(items):
        at = 1
        for place, (prompt, answer) in enumerate(packed):
            for ids, where in ((prompt, -1), (answer, place)):
                tokens[row, at : at + len(ids)] = ids
                item_ids[row, at : at + len(ids)] = where
                at += len(ids)
    return SimpleNamespace(tokens=tokens, answer_mask=item_ids >= 0, item_ids=item_ids)


def copy_items(rows: int, generator: np.random.Generator, each: int = 12) -> list:
    made = []
    for _ in range(rows):
        questions = [generator.integers(10, 18, 4).tolist() for _ in range(each)]
        made.append([([5, *question, 6], [*question, 7]) for question in questions])
    return made


# --------------------------------------------------------------------------------------------- what is measured


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


# --------------------------------------------------------------------------------------------------- the methods


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


# ------------------------------------------------------------------------------------------------ base and files


def streams(length: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    made = (np.cumsum(np.random.default_rng(0).integers(1, 3, length)) % VOCABULARY).astype(np.uint16)
    return made, made[: 3 * LENGTH]


def test_base_is_kept_and_made_again_when_it_must_be(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = SMOKE.with_changes(hidden=32, intermediate=48, heads=2, key_value_heads=1, pretrain_steps=12)
    general, held_out = streams()
    wanted = base.fingerprint(general, VOCABULARY, settings)
    assert base.cached(tmp_path, wanted) is None and capsys.readouterr().out == ""
    info = base.make(tmp_path, general, held_out, VOCABULARY, settings, CPU)
    assert info["held_out_loss"] < math.log(VOCABULARY) - 0.1
    assert base.cached(tmp_path, wanted) == info == files.read_json(tmp_path / "base.json")
    model = base.load(tmp_path, VOCABULARY, settings, CPU)
    assert base.held_out_loss(model, held_out, settings, CPU) == pytest.approx(info["held_out_loss"], abs=0.01)  # bf16
    assert not any(parameter.requires_grad for parameter in model.parameters())

    # other text, other settings of the base; settings of the adaptation do not matter
    assert base.fingerprint(held_out, VOCABULARY, settings) != wanted
    assert base.fingerprint(general, VOCABULARY, settings.with_changes(pretrain_steps=13)) != wanted
    assert base.fingerprint(general, VOCABULARY, settings.with_changes(steps=99, seeds=(5,))) == wanted
    assert base.cached(tmp_path, "another") is None and "other text or settings" in capsys.readouterr().out
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert base.cached(tmp_path, wanted) is None and "damaged" in capsys.readouterr().out
    weights.write_bytes(whole)
    assert base.cached(tmp_path, wanted) == info
    (tmp_path / "base.json").write_text("{")
    assert base.cached(tmp_path, wanted) is None and "incomplete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="general_held_out holds 10 tokens"):
        base.make(tmp_path, general, held_out[:10], VOCABULARY, settings, CPU)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, [1])

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*value.json: No space left"):
        files.write_atomically(path, fails)
    assert files.read_json(path) == [1] and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------- the command


class Forks:
    """In place of the module `subprocess` of the command: what it starts is a fork with the libraries imported, one at a time."""

    one_at_a_time = threading.Lock()

    class Popen:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert command[:2] == [sys.executable, "-m"]
            with Forks.one_at_a_time:
                done = run_module(*command[2:], environment=env, cwd=Path.cwd())
            print(done.stdout, end="")
            print(done.stderr, end="", file=sys.stderr)
            self.returncode = done.returncode

        def poll(self) -> int:
            return self.returncode


@pytest.mark.slow
def test_the_command_runs_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Once in this process, once with a process for each method, with the same results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(command, "subprocess", Forks)
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("PYTHONWARNINGS", "ignore")):  # of the methods' processes
        monkeypatch.setenv(name, value)
    words = ("--size", "smoke", "--steps", "2", "--methods", "base", "lora-r64", "moe-lora")
    assert command.main(command.parse(words[:-1])) == 0
    assert "base: pretraining" in capfd.readouterr().out
    out = tmp_path / "outputs" / "quality" / "smoke"
    first = results.read(out / "results.csv")
    assert {row["method"] for row in first["rows"]} == {"base", "lora-r64"}
    # one run is lost, one method is new: these are trained, and nothing else
    (out / "runs" / "lora-r64-0.json").unlink()
    both = [word for word in words if word != "base"]
    assert command.main(command.parse([*both, "--parallel", "2", "--results", "copy.csv"])) == 0
    printed = capfd.readouterr().out
    assert "pretraining" not in printed
    assert printed.count("lora-r64: seed 0") == 1 and "lora-r64: learning rate" not in printed
    found = results.read(tmp_path / "copy.csv")
    assert found == results.read(out / "results.csv")
    assert {row["method"] for row in found["rows"]} == {"base", "lora-r64", "moe-lora"}
    assert [r for r in found["rows"] if r["method"] == "base"] == [r for r in first["rows"] if r["method"] == "base"]
    again, before = (
        {(row["domain_or_task"], row["metric"]): row["value"] for row in each["rows"] if row["method"] == "lora-r64"}
        for each in (found, first)
    )
    assert again == pytest.approx(before)
    header = found["header"]
    assert {"gpu", "torch", "transformers", "peft", "commit", "settings", "base", "sources"} <= set(header)
    assert header["sources"] and header["base"]["parameters"] > 0
    for row in found["rows"]:
        assert list(row) == list(results.COLUMNS)
    # a limit that is over at once: nothing new, no failure
    kept = (out / "runs" / "moe-lora-0.json").read_text()
    (out / "runs" / "moe-lora-0.json").unlink()
    assert command.main(command.parse([*words, "--limit", "0"])) == 0
    assert "2 runs" in capfd.readouterr().out
    # and without one: what is finished is not begun again
    (out / "runs" / "moe-lora-0.json").write_text(kept)
    assert command.main(command.parse(words)) == 0
    printed = capfd.readouterr().out
    assert all(f"{name}: finished before" in printed for name in ("base", "lora-r64", "moe-lora"))


@pytest.mark.slow
def test_results_of_a_file_of_their_own_are_kept_beside_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder of the runs is new, as long as the base is the same one; and are a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["--size", "smoke", "--steps", "2", "--results", "aside.csv", "--learning-rate", "0.004", "--out"]
    assert command.main(command.parse([*words, "one", "--methods", "switch-lorafa", "switch-k2-p50"])) == 0
    first = results.read(Path("aside.csv"))
    shutil.copytree("one/base", "two/base")
    assert command.main(command.parse([*words, "two", "--methods", "switch-k2-p50", "switch"])) == 0
    both = results.read(Path("aside.csv"))
    assert [run["method"] for run in both["runs"]] == ["switch", "switch-lorafa", "switch-k2-p50"]
    kept = [row for row in both["rows"] if row["method"] == "switch-lorafa"]
    assert kept == [row for row in first["rows"] if row["method"] == "switch-lorafa"]
    assert {row["method"] for row in results.read(Path("two/results.csv"))["rows"]} == {"switch", "switch-k2-p50"}
    table = "\n".join(aside.lines(Path("aside.csv")))
    assert table.count("\n| `switch") == 3 and "| 0.004 |" in table and "| 2.00 |" in table
    with pytest.raises(ValueError, match="different settings"):
        command.main(command.parse(["--size", "smoke", "--steps", "3", *words[4:], "two", "--methods", "base"]))
    assert results.read(Path("aside.csv")) == both


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lora-r46"], "unknown method lora-r46: choose from base,"),
        (["--family", "papers"], "unknown family papers: choose from baselines,"),
        ([], "no GPU is visible"),
        (["--size", "smoke", "--devices", "0"], "no GPU is visible"),
    ],
)
def test_what_cannot_run_is_said(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        command.main(command.parse(words))


def test_a_file_of_results_that_could_not_be_written_is_said_before_the_work(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--results", "results.json"])
    assert "--results results.json: must end in .csv" in capsys.readouterr().err


def test_methods_run_wherever_there_is_room(monkeypatch) -> None:
    """The next method goes to the first device that is free; none waits for a device that is slow."""
    chosen = list(methods.METHODS[:6])
    jobs, places = command.Jobs(None), {}

    def one(method, device):
        places[method.name] = device
        time.sleep(0.6 if device == "cuda:0" else 0.01)
        return 0

    monkeypatch.setattr(jobs, "_one", one)
    jobs.run(chosen, {"cuda:0": 1, "cuda:1": 1})
    assert set(places) == {method.name for method in chosen} and jobs.finished == 6 and not jobs.failed
    assert list(places.values()).count("cuda:0") == 1
