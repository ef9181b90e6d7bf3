"""Products over (token, expert) pairs (`training/pair_order.py`, `pair_products.py`, `pair_kernels.py`, `group_pairs.py`): the
sorted order, and the results and gradients of the float64 definition, in every setting; when they are taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fast_linear_checks
import pair_checks
import vllm_server
from fast_linear_checks import NO_LOSSES, on_both_devices, relative, step
from helpers import adapter_gradients, padded, randomize_adapter, switch_config, tiny_gpt2, tiny_llama
from oracle import Oracle
from peft_loraswitch import use_experts
from peft_loraswitch.training import (
    fast_linears,
    group_function,
    group_pairs,
    learned_groups,
    pair_kernels,
    pair_products,
)
from peft_loraswitch.training.gate_hidden import Columns
from peft_loraswitch.training.group_layout import Casts, Spec
from peft_loraswitch.training.pair_order import order_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EXPERTS = 5


# --------------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tokens", "experts", "slots"), pair_checks.ORDERS, ids=str)
def test_every_pair_stands_once_in_tiles_of_its_own_expert(tokens, experts, slots, seed):
    pair_checks.check_order(tokens, experts, slots, "cpu", seed)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "experts", "slots"), pair_checks.ORDERS, ids=str)
def test_sorting_does_not_wait_for_the_gpu(tokens, experts, slots):
    chosen = pair_checks.some_choices(tokens, experts, slots, 0).cuda()
    order_of(chosen, experts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        order_of(chosen, experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pair_checks.check_order(tokens, experts, slots, "cuda", 0)


# ---------------------------------------------------------------------------------------------------------- the function


def operands(dtype: torch.dtype, tokens: int, slots: int, bias: bool | str) -> tuple[Any, ...]:
    """(x, gates, experts of each token, a, b, weights, biases) of three linears, 6 features to 7, 1 and 4, ranks 2, 2 and 3."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    chosen = pair_checks.some_choices(tokens, EXPERTS, slots, 0)
    gates = random(tokens, EXPERTS + 1).abs().to(torch.promote_types(dtype, torch.float32))
    gates = (gates * torch.zeros_like(gates).scatter(1, chosen, 1.0))[:, :EXPERTS].contiguous()
    outs, ranks = (7, 1, 4), (2, 2, 3)
    a = [random(EXPERTS, r, 6) for r in ranks]
    b = [random(EXPERTS, out, r) for out, r in zip(outs, ranks, strict=True)]
    return (
        random(tokens, 6),
        gates,
        chosen,
        a,
        b,
        [random(o, 6) for o in outs],
        [None if not bias or bias == "all but one" and i == 1 else random(o) for i, o in enumerate(outs)],
    )


SCALINGS = (0.5, 0.5, 2.0)


def plainly(x, gates, chosen, a, b, weights, biases) -> list[Tensor]:
    """The definition, for each linear and expert by itself."""
    outputs = []
    for i, scaling in enumerate(SCALINGS):
        y = torch.nn.functional.linear(x, weights[i], biases[i])
        for e in range(EXPERTS):
            delta = scaling * gates[:, e : e + 1] * (x @ a[i][e].T @ b[i][e].T)
            y = y + delta.where((chosen == e).any(1, keepdim=True), 0.0)
        outputs.append(y)
    return outputs


def by_pairs(x, gates, chosen, a, b, weights, biases, given: str = "own") -> list[Tensor]:
    columns, start = [], 0
    for weight, scaling in zip(a, SCALINGS, strict=True):
        columns.append(Columns(start, EXPERTS, weight.shape[1], scaling))
        start = columns[-1].stop
    spec = Spec(x.dtype, tuple(columns), given != "own", in_place=(given == "in place",) * 3, slots=chosen.shape[1])
    mask = torch.zeros(len(x), EXPERTS + 1, dtype=torch.bool, device=x.device).scatter(1, chosen, True)[:, :EXPERTS]
    order = order_of(chosen, EXPERTS)
    if given == "own":
        return list(group_function.run(spec, x, gates, mask, a, b, weights, biases, order))
    results = [torch.nn.functional.linear(x, w, c).clone() for w, c in zip(weights, biases, strict=True)]
    if given == "other dtype":
        results = [each.to(torch.float32) for each in results]
    return list(group_function.run(spec, x, gates, mask, a, b, results, (), order))


@pytest.mark.parametrize("given", ["own", "given", "in place"])
@pytest.mark.parametrize("bias", [True, False, "all but one"])
@pytest.mark.parametrize(("tokens", "slots"), [(9, 2), (4, 1), (70, 5), (1, 3), (0, 2)], ids=str)
def test_outputs_and_gradients_equal_the_definition(tokens, slots, bias, given):
    values = operands(torch.float64, tokens, slots, bias)
    leaves = [each.requires_grad_() for each in (*values[:2], *values[3], *values[4])]
    expected, actual = plainly(*values), by_pairs(*values, given)
    directions = [torch.randn_like(y) for y in expected]
    for y, z in zip(actual, expected, strict=True):
        torch.testing.assert_close(y, z)
        assert not y._is_view()
    got, want = (torch.autograd.grad(each, leaves, directions) for each in (actual, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_launch_takes_up_to_three_linears():
    def found(linears: int, **others: Any) -> list[tuple[Any, ...]]:
        columns = tuple(
            Columns(i * 80, EXPERTS, 16, others.get("scalings", [1.0] * linears)[i]) for i in range(linears)
        )
        parts = group_pairs._alike(Spec(torch.float64, columns, False, slots=2), (None,) * linears)
        return [
            (part.linears.start, part.linears.stop, part.columns and (part.columns.start, part.columns.stop))
            for part in parts
        ]

    assert found(1) == [(0, 1, None)] and found(3) == [(0, 3, None)]
    assert found(7) == [(0, 3, (0, 48)), (3, 6, (48, 96)), (6, 7, (96, 112))]
    assert found(3, scalings=[1.0, 1.0, 2.0]) == [(0, 2, (0, 32)), (2, 3, (32, 48))]


def test_operands_of_a_launch_have_one_dtype(monkeypatch):
    """Biases, and the gradients of B, may be of several."""
    seen: list[list[Any]] = []
    monkeypatch.setattr(group_pairs, "from_rank", lambda small, ws, order, outs, biases, *_: seen.append(list(biases)))
    monkeypatch.setattr(group_pairs, "weight_gradient", lambda features, small, order, ws, *_: seen.append(list(ws)))
    tokens, rank, out = 6, 2, 4
    columns = tuple(Columns(i * EXPERTS * rank, EXPERTS, rank, 1.0) for i in range(4))
    spec = Spec(torch.float64, columns, False, slots=2)
    order = order_of(torch.rand(tokens, EXPERTS).topk(2).indices, EXPERTS)
    dtypes = [torch.float64, torch.float32, torch.float32, torch.float64]
    a = [torch.zeros(EXPERTS, rank, 3, dtype=torch.float64) for _ in dtypes]
    b = [torch.zeros(EXPERTS, out, rank, dtype=dtype) for dtype in dtypes]
    hidden, rows = torch.zeros(order.pairs, 4 * rank).double(), [torch.zeros(tokens, out).double() for _ in dtypes]
    gates = torch.zeros(tokens, EXPERTS)
    biases = [None if dtype == torch.float64 else torch.zeros(out, dtype=dtype) for dtype in dtypes[:3]]
    casts = Casts(a, b, spec)
    group_pairs.write_up(rows, hidden, gates, casts, spec, order, [*biases, torch.zeros(out).double()])
    group_pairs.d_b(rows, hidden, gates, b, [True] * 4, casts, spec, order)
    assert [len(each) for each in seen] == [1, 2, 1, 1, 2, 1]
    assert all(len({None if one is None else one.dtype for one in each}) == 1 for each in seen)


@pytest.mark.parametrize(("given", "slots"), [("own", 2), ("given", 1)])
def test_gradcheck(given, slots):
    x, gates, chosen, a, b, weights, biases = operands(torch.float64, 4, slots, True)
    leaves = [each.requires_grad_() for each in (x, gates, *a, *b)]

    def run(x, gates, *experts):
        return tuple(by_pairs(x, gates, chosen, experts[:3], experts[3:], weights, biases, given))

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("used", [(0,), (1, 2), (2,)], ids=str)
def test_outputs_that_are_not_used(used):
    values = operands(torch.float64, 9, 2, True)
    leaves = [each.requires_grad_() for each in (*values[:2], *values[3], *values[4])]
    got, want = (
        torch.autograd.grad([y[i].sum() for i in used], leaves, allow_unused=True, materialize_grads=True)
        for y in (by_pairs(*values), plainly(*values))
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["own", "other dtype"])
def test_dtypes(dtype, given):
    low = operands(dtype, 20, 2, True)
    exact = operands(torch.float64, 20, 2, True)
    for low_values, exact_values in zip(low, exact, strict=True):  # weights that both can hold
        pairs = (
            zip(low_values, exact_values, strict=True) if isinstance(low_values, list) else [(low_values, exact_values)]
        )
        for one, other in pairs:
            other.copy_(one)
    leaves = [[each.requires_grad_() for each in (*values[:2], *values[3], *values[4])] for values in (low, exact)]
    actual, expected = by_pairs(*low, given), plainly(*exact)
    bound = 20 * torch.finfo(dtype).eps
    wanted = torch.float32 if given == "other dtype" else dtype
    assert all(relative(y, z) < bound and y.dtype == wanted for y, z in zip(actual, expected, strict=True))
    directions = [torch.randn_like(y) for y in actual]
    got = torch.autograd.grad(actual, leaves[0], directions)
    want = torch.autograd.grad(expected, leaves[1], [d.double() for d in directions])
    assert all(
        relative(g, w) < bound and g.dtype == leaf.dtype for g, w, leaf in zip(got, want, leaves[0], strict=True)
    )


def test_inputs_that_are_not_contiguous():
    x, gates, *others = operands(torch.float64, 12, 2, True)
    plain = x.clone().requires_grad_()
    turned = x.t().contiguous().t().requires_grad_()
    actual = by_pairs(turned, gates.t().contiguous().t(), *others)
    expected = plainly(plain, gates, *others)
    gradient = torch.ones((), dtype=torch.float64).expand_as(actual[0])  # what sum().backward() hands over
    torch.testing.assert_close(actual[0], expected[0])
    got, want = torch.autograd.grad(actual[0], turned, gradient), torch.autograd.grad(expected[0], plain, gradient)
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------------------ whole models

SETTINGS: dict[str, Any] = {"num_experts": 6, **NO_LOSSES}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "hard-gate": {"top_k": 1, "normalize_gates": True},
    "all-experts": {"top_k": 6},
    "one-expert": {"num_experts": 1, "top_k": 1},
    "shared": {"num_shared_experts": 2},
    "base-expert": {"base_expert": True},
    "top-p": {"top_k": 3, "top_p": 0.4},
    "top-p-base-shared": {"top_k": 3, "top_p": 0.4, "base_expert": True, "num_shared_experts": 1},
    "deep-router": {"num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj"},
    "odd-ranks": {"r": 3, "rank_pattern": {"up_proj": 5, "k_proj": 1}, "alpha_pattern": {"v_proj": 7.0}},
    "router-only": {"trainable": "router"},
}


@pytest.fixture
def slots_seen(monkeypatch) -> list[int]:
    """Of each call of the autograd function."""
    seen: list[int] = []
    run = group_function.run
    monkeypatch.setattr(fast_linears, "run", lambda spec, *args: (seen.append(spec.slots), run(spec, *args))[1])
    return seen


def adapted(backbone: nn.Module | None = None, **config: Any) -> Any:
    return fast_linear_checks.adapted(backbone, **{**SETTINGS, **config})


@pytest.mark.parametrize("mode", ["no checkpointing", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_models_equal_the_float64_definition(config, mode, slots_seen):
    model = adapted(**config)
    reference = Oracle(model)
    if mode != "no checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    for seed in range(2):
        batch = padded([7, 4], seed=seed)
        with pair_products.forced(True):
            logits, gradients = step(model, batch)
        reference.backbone.zero_grad()
        expected = reference(**batch)
        expected.loss.backward()
        exact, real = reference.gradients(), batch["attention_mask"].bool()
        assert relative(logits[real], expected.logits[real]) < 2e-6
        for name, gradient in gradients.items():
            assert relative(gradient, exact[name]) < 2e-5, name
        assert gradients
    assert slots_seen and all(slots_seen)


def test_accumulation_adds_up():
    model = adapted()
    batches = [padded([7, 4], seed=seed) for seed in range(2)]
    with pair_products.forced(True):
        step(model, batches[0])
        each = [step(model, batch)[1] for batch in batches]
        model.zero_grad()
        for batch in batches:
            model(**batch).loss.backward()
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(gradient, each[0][name] + each[1][name])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_takes_the_course_of_all_experts_at_once(make, autocast):
    """Conv1D weights and biases; several steps, so that what is kept is used again."""
    model = adapted(make())
    twin = copy.deepcopy(model)
    losses: list[list[float]] = []
    for each, pairs in ((model, True), (twin, False)):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        with pair_products.forced(pairs):
            for seed in range(6):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = each(**padded([7, 4], seed=seed % 3)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if autocast else 1e-4)


def test_experts_that_train_alone(slots_seen):
    model = adapted(trainable=[1, 4])
    with pair_products.forced(True):
        _, gradients = step(model, padded([7, 4]))
    with fast_linears.plain():
        _, exact = step(model, padded([7, 4]))
    assert slots_seen and any(name.endswith("expert_4") for name in exact)
    assert all(relative(gradients[name], exact[name]) < 1e-5 for name in exact)


def test_two_adapters_at_once(slots_seen):
    model = adapted()
    model.add_adapter("other", switch_config(num_experts=3, top_k=1, r=2, target_modules=["q_proj", "v_proj"]))
    randomize_adapter(model, "other", seed=3)
    model.base_model.set_adapter(["default", "other"])
    for seed in range(2):
        batch = padded([7, 4], seed=seed)
        with pair_products.forced(True):
            _, gradients = step(model, batch)
        with fast_linears.plain():
            _, exact = step(model, batch)
        assert all(relative(gradients[name], exact[name]) < 1e-5 for name in exact)
        assert any("other" in name for name in exact)
    assert {1, 2} == set(slots_seen)


def test_pairs_are_sorted_once_a_forward(monkeypatch):
    """Also with checkpointing, whose second runs follow the same decision; but for the block that decides again."""
    calls: list[int] = []
    monkeypatch.setattr(learned_groups, "order_of", lambda *args: (calls.append(1), order_of(*args))[1])
    model = adapted(tiny_llama(num_hidden_layers=3))
    with pair_products.forced(True):
        step(model, padded([7, 4]))
        assert len(calls) == 1
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        calls.clear()
        step(model, padded([7, 4]))
    assert len(calls) == 2


def test_experts_by_label_need_no_pairs(slots_seen):
    model = adapted()
    with pair_products.forced(True), use_experts(model, [1, 4]):
        _, gradients = step(model, padded([7, 4]))
    assert not slots_seen and any("loraswitch_A" in name for name in gradients)


# ------------------------------------------------------------------------------------------------- when they are taken


def test_when_pairs_pay(monkeypatch):
    """By E * r, for the number of experts of a token, on a GPU whose kernels work, with enough tokens."""
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(pair_kernels, "usable", lambda device, dtype, rank: dtype == half and rank <= 128)
    for slots, least in pair_products.CROSSOVER.items():
        experts = least // 16
        assert pair_products.pays(gpu, half, 4096, slots, experts, [16])
        assert not pair_products.pays(gpu, half, 4096, slots, experts - 1, [16])
        assert pair_products.pays(gpu, half, 4096, slots, experts, [8, 24])  # on average
        assert not pair_products.pays(gpu, torch.float64, 4096, slots, experts, [16])
        assert not pair_products.pays(torch.device("cpu"), half, 4096, slots, experts, [16])
        assert not pair_products.pays(gpu, half, 4, slots, experts, [16])
    assert not pair_products.pays(gpu, half, 4096, 9, 1000, [16])
    assert not pair_products.pays(gpu, half, 4096, 2, 8, [256])
    assert not pair_products.pays(gpu, half, 4096, 2, 8, [64]) and pair_products.pays(gpu, half, 4096, 2, 24, [32])
    assert not pair_products.pays(gpu, half, 4096, 2, 20, [32])  # of 640 columns a token has a tenth
    with pair_products.forced(True):
        assert pair_products.pays(gpu, half, 4, 2, 4, [1]) and not pair_products.pays(gpu, torch.float64, 4, 2, 4, [1])
    with pair_products.forced(False):
        assert not pair_products.pays(gpu, half, 4096, 2, 256, [16])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_models_on_a_gpu_equal_float32_on_a_cpu(config, kind, checkpointed, slots_seen):
    """They stray from the exact gradients no further than the plain form does."""
    exact, gpu_step = on_both_devices(kind, checkpointed, **{**SETTINGS, **config})
    slots_seen.clear()
    with pair_products.forced(True):
        gpu_step()
        fast = gpu_step()
    assert slots_seen and all(slots_seen)
    with fast_linears.plain():
        slow = gpu_step()
    for name, gradient in exact.items():
        allowed = 1e-4 if kind == "float32" else 1.5 * relative(slow[name], gradient) + 0.02
        assert relative(fast[name], gradient) < allowed, name


# ------------------------------------------------------------------------------------------------------------- the kernels


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 3])
def test_the_same_bits_in_every_run(slots):
    values = operands(torch.bfloat16, 500, slots, True)
    on_gpu = [[e.cuda() for e in v] if isinstance(v, list) else v.cuda() for v in values]
    leaves = [each.requires_grad_() for each in (*on_gpu[:2], *on_gpu[3], *on_gpu[4])]
    runs = []
    for _ in range(3):
        outputs = by_pairs(*on_gpu)
        runs.append([*outputs, *torch.autograd.grad([y.float().square().sum() for y in outputs], leaves)])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.vllm
def test_kernels_in_the_interpreter():
    """In vllm's environment, which has Triton."""
    assert vllm_server.printed_by("pair_checks.py", TRITON_INTERPRET="1")[-2:] == ["checks", "passed"]


@pytest.mark.vllm
def test_kernels_compile_for_a_gpu_that_is_not_there():
    assert vllm_server.printed_by("pair_checks.py", "--compile", "90")[-2:] == ["kernels", "compiled"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", pair_checks.PRODUCTS, ids=str)
def test_kernels_equal_the_definition(case, dtype):
    pair_checks.check_products(*case, dtype=dtype, device="cuda")
