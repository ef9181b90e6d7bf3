"""The fused training path (`training/fast_linears.py`, `group_function.py`, `gate_hidden.py`): the results and gradients of the
layer's own form and of the float64 definition, in every setting. Where it does not apply: `test_plain_form_elsewhere.py`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantized
from compiling import checkpointing
from fast_linear_checks import CONFIGS, NO_LOSSES, adapted, counted_calls, course, relative, step
from helpers import (
    adapter_gradients,
    padded,
    randomize_adapter,
    switch_config,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
)
from oracle import Oracle
from peft_loraswitch.training import fast_linears, group_function
from peft_loraswitch.training.gate_hidden import Columns
from peft_loraswitch.training.group_layout import Spec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    return counted_calls(monkeypatch)


# ---------------------------------------------------------------------------------------------------- the function alone


def operands(
    dtype: torch.dtype = torch.float64, tokens: tuple[int, ...] = (2, 3), bias: bool = True, masked: bool = True
):
    """(x, gates, chosen, a, b, weights, biases) of three linears, 5 features to 7, 1 and 4; 3 experts of rank 2, 2 and 3."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    chosen = torch.rand(*tokens, 3, generator=generator) < 0.6 if masked else None
    gates = random(*tokens, 3).abs().to(torch.promote_types(dtype, torch.float32))
    if chosen is not None:
        gates = gates.where(chosen, 0.0)
    outs, ranks = (7, 1, 4), (2, 2, 3)
    a, b = [random(3, r, 5) for r in ranks], [random(3, out, r) for out, r in zip(outs, ranks, strict=True)]
    biases = [random(out) if bias else None for out in outs]
    return random(*tokens, 5), gates, chosen, a, b, [random(out, 5) for out in outs], biases


def columns(a: list[torch.Tensor]) -> tuple[Columns, ...]:
    found, start = [], 0
    for weight, scaling in zip(a, (0.5, 0.5, 2.0), strict=False):
        found.append(Columns(start, weight.shape[0], weight.shape[1], scaling))
        start = found[-1].stop
    return tuple(found)


def plainly(x, gates, chosen, a, b, weights, biases) -> list[torch.Tensor]:
    """The definition, for each token, linear and expert by itself."""
    outputs = []
    for i, c in enumerate(columns(a)):
        y = torch.nn.functional.linear(x, weights[i], biases[i])
        for e in range(c.experts):
            delta = c.scaling * gates[..., e : e + 1] * (x @ a[i][e].T @ b[i][e].T)
            y = y + (delta if chosen is None else delta.where(chosen[..., e : e + 1], 0.0))
        outputs.append(y)
    return outputs


def fused(x, gates, chosen, a, b, weights, biases, given: bool = False, in_place: bool = False) -> list[torch.Tensor]:
    spec = Spec(x.dtype, columns(a), given, in_place=(in_place,) * len(a))
    if not given:
        return list(group_function.run(spec, x, gates, chosen, a, b, weights, biases))
    results = [torch.nn.functional.linear(x, w, c).clone() for w, c in zip(weights, biases, strict=True)]
    return list(group_function.run(spec, x, gates, chosen, a, b, results))


@pytest.mark.parametrize("given", ["own", "given", "in place"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tokens", [(2, 3), (4,), (1, 1), (0, 3)], ids=str)
def test_outputs_and_gradients_equal_the_definition(tokens, masked, given):
    x, gates, chosen, a, b, weights, biases = operands(tokens=tokens, masked=masked)
    leaves = [each.requires_grad_() for each in (x, gates, *a, *b)]
    expected = plainly(x, gates, chosen, a, b, weights, biases)
    actual = fused(x, gates, chosen, a, b, weights, biases, given != "own", given == "in place")
    directions = [torch.randn_like(y) for y in expected]
    for y, z in zip(actual, expected, strict=True):
        torch.testing.assert_close(y, z)
        assert not y._is_view()  # a model may write to it
    for g, h in zip(
        torch.autograd.grad(actual, leaves, directions), torch.autograd.grad(expected, leaves, directions), strict=True
    ):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize(("tokens", "given"), [((3,), False), ((3,), True), ((1, 2), False), ((1, 2), True)])
def test_gradcheck(tokens, given):
    x, gates, chosen, a, b, weights, biases = operands(tokens=tokens)
    leaves = [each.requires_grad_() for each in (x, gates, *a, *b)]

    def run(x, gates, *experts):
        return tuple(fused(x, gates, chosen, experts[:3], experts[3:], weights, biases, given))

    # gates that were not chosen have no gradient, in the definition neither
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("used", [(0,), (1, 2), (2,)], ids=str)
def test_outputs_that_are_not_used(used):
    values = operands()
    leaves = [each.requires_grad_() for each in (values[0], values[1], *values[3], *values[4])]
    got, want = (
        torch.autograd.grad([y[i].sum() for i in used], leaves, allow_unused=True, materialize_grads=True)
        for y in (fused(*values), plainly(*values))
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    low = operands(dtype, tokens=(3, 5))
    exact = [
        None
        if v is None
        else [w.double() for w in v]
        if isinstance(v, list)
        else v
        if v.dtype == torch.bool
        else v.double()
        for v in low
    ]
    leaves = [each.requires_grad_() for each in (low[0], low[1], *low[3], *low[4])]
    exact_leaves = [each.requires_grad_() for each in (exact[0], exact[1], *exact[3], *exact[4])]
    actual, expected = fused(*low), plainly(*exact)
    bound = 20 * torch.finfo(dtype).eps
    assert all(relative(y, z) < bound and y.dtype == dtype for y, z in zip(actual, expected, strict=True))
    directions = [torch.randn_like(y) for y in actual]
    got = torch.autograd.grad(actual, leaves, directions)
    want = torch.autograd.grad(expected, exact_leaves, [d.double() for d in directions])
    assert all(relative(g, w) < bound for g, w in zip(got, want, strict=True))
    assert got[1].dtype == torch.float32


def test_inputs_that_are_not_contiguous():
    x, *others = operands(tokens=(4, 3))
    expected = fused(x, *others)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    actual = fused(turned, *others)
    assert not turned.is_contiguous() and all(torch.equal(y, z) for y, z in zip(actual, expected, strict=True))
    gradient = torch.ones(1, dtype=torch.float64).expand_as(actual[0])  # what sum().backward() hands over
    (d_x,) = torch.autograd.grad(actual[0], turned, gradient)
    plain = x.clone().requires_grad_()
    torch.testing.assert_close(d_x, torch.autograd.grad(plainly(plain, *others)[0].sum(), plain)[0])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_experts_that_are_not_contiguous(autocast, counted):
    model = adapted()
    _, expected = step(model, padded([7, 4]), autocast)
    for name, parameter in model.named_parameters():
        if "loraswitch_A" in name or "loraswitch_B" in name:
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
            assert not parameter.is_contiguous()
    _, actual = step(model, padded([7, 4]), autocast)
    assert counted
    for name, exact in expected.items():
        assert relative(actual[name], exact) < (1e-5 if autocast is None else 0.02), name


def test_what_a_transform_has_left_behind_is_an_ordinary_input():
    values = operands()
    left: list[torch.Tensor] = []

    def remember(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        left.extend((x * 1, gates * 1))
        return x.sum() + gates.sum()

    torch.func.grad(remember, argnums=(0, 1))(values[0], values[1])
    assert all(torch._C._functorch.is_gradtrackingtensor(each) for each in left)
    leaves = [each.requires_grad_() for each in (*values[3], *values[4])]
    expected, actual = fused(*values), fused(*left, *values[2:])
    for y, z in zip(actual, expected, strict=True):
        assert torch.equal(y, z)
    got, want = (torch.autograd.grad([y.sum() for y in outputs], leaves) for outputs in (actual, expected))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gradients_of_a_are_taken_without_a_copy():
    """Those of a group lie in one piece of memory: its `.grad` are parts of it, in the parameters' own layout."""
    values = operands(torch.bfloat16)
    a = [nn.Parameter(each.float()) for each in values[3]]
    b = [nn.Parameter(each.float()) for each in values[4]]
    x, gates, chosen, _, _, weights, _ = values
    spec = Spec(torch.bfloat16, columns(a), False)
    outputs = group_function.run(spec, x, gates, chosen, a, b, weights, (None,) * len(a))
    sum(y.float().sum() for y in outputs).backward()
    assert len({each.grad.untyped_storage().data_ptr() for each in a}) == 1
    assert all(each.grad.is_contiguous() and each.grad.dtype == torch.float32 for each in (*a, *b))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_was_not_chosen_reaches_nothing(value, monkeypatch):
    values = operands()
    leaves = [each.requires_grad_() for each in (values[0], *values[3], *values[4])]

    def results() -> list[torch.Tensor]:
        outputs = fused(*values)
        return [*outputs, *torch.autograd.grad([y.sum() for y in outputs], leaves)]

    expected, hidden_of, back = results(), group_function._hidden, group_function._d_gated
    unchosen = torch.cat(
        [~values[2].reshape(-1, 3).repeat_interleave(c.rank, dim=1) for c in columns(values[3])], dim=1
    )
    assert unchosen.any()
    monkeypatch.setattr(group_function, "_hidden", lambda *args: hidden_of(*args).masked_fill_(unchosen, value))
    monkeypatch.setattr(group_function, "_d_gated", lambda *args: back(*args).masked_fill(unchosen, value))
    assert all(torch.equal(y, z) and y.isfinite().all() for y, z in zip(results(), expected, strict=True))


def test_frozen_experts_have_no_gradient_and_keep_no_input():
    x, gates, *others = operands()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = fused(x.requires_grad_(), gates.requires_grad_(), *others)
    assert all(t.data_ptr() != x.data_ptr() for t in kept)
    expected = torch.autograd.grad([y.sum() for y in plainly(x, gates, *others)], [x, gates])
    for g, w in zip(torch.autograd.grad([y.sum() for y in outputs], [x, gates]), expected, strict=True):
        torch.testing.assert_close(g, w)


# ------------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.compat
@pytest.mark.parametrize("mode", ["no checkpointing", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_models_equal_the_float64_definition(config, mode, counted):
    model = adapted(**NO_LOSSES, **config)
    reference = Oracle(model)
    if mode != "no checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    for seed in range(2):  # goes by names, then by what the first forward has shown
        counted.clear()
        batch = padded([7, 4], seed=seed)
        logits, gradients = step(model, batch)
        reference.backbone.zero_grad()
        expected = reference(**batch)
        expected.loss.backward()
        exact = reference.gradients()
        real = batch["attention_mask"].bool()
        assert relative(logits[real], expected.logits[real]) < 2e-6
        for name, gradient in gradients.items():
            assert relative(gradient, exact[name]) < 2e-5, name
        assert any("router" in name for name in gradients)
        runs = 1 if mode == "no checkpointing" else 2
        assert sum(counted) == runs * 14 and max(counted) == 3


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_equals_the_plain_form(master, checkpointed, counted):
    model = adapted(dtype=torch.bfloat16)  # PEFT keeps the adapter in float32
    model.to(master)
    if checkpointed:
        checkpointing(model)
    for seed in range(2):
        batch = padded([7, 4], seed=seed)
        logits, gradients = step(model, batch, torch.bfloat16)
        with fast_linears.plain():
            expected, exact = step(model, batch, torch.bfloat16)
        real = batch["attention_mask"].bool()
        assert relative(logits[real], expected[real]) < 0.03
        assert all(relative(gradients[name], exact[name]) < 0.08 for name in exact)
    assert max(counted) == 3


@pytest.mark.parametrize("backbone", [tiny_gpt2, tiny_opt], ids=["gpt2", "opt"])
def test_other_backbones_equal_the_plain_form(backbone, counted):
    model = adapted(backbone())
    for seed in range(2):
        batch = padded([7, 4], seed=seed)
        _, gradients = step(model, batch)
        with fast_linears.plain():
            _, exact = step(model, batch)
        assert all(relative(gradients[name], exact[name]) < 1e-5 for name in exact)
    assert counted


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(("make", "own"), [(quantized.bitsandbytes_4bit, True), (quantized.bitsandbytes_8bit, False)])
def test_quantised_base_layers(make, own, tmp_path, monkeypatch):
    """In 4 bits their products are the function's own (`test_four_bit_training.py`); in 8 they run by themselves."""
    pytest.importorskip("bitsandbytes")
    specs: list[Spec] = []
    run = group_function.run
    monkeypatch.setattr(fast_linears, "run", lambda spec, *args: (specs.append(spec), run(spec, *args))[1])
    model = adapted(make(tmp_path))
    for seed in range(2):
        batch = padded([7, 4], seed=seed)
        _, gradients = step(model, batch)
        with fast_linears.plain():
            _, exact = step(model, batch)
        assert all(relative(gradients[name], exact[name]) < 1e-5 for name in exact)
    assert max(spec.size for spec in specs) == 3
    assert all(spec.packed == own and spec.given != own and all(spec.in_place) for spec in specs)


def test_several_adapters_at_once(counted):
    model = adapted()
    model.add_adapter("other", switch_config(num_experts=3, top_k=1, r=2, target_modules=["q_proj", "v_proj"]))
    randomize_adapter(model, "other", seed=3)
    model.base_model.set_adapter(["default", "other"])
    for seed in range(2):
        batch = padded([7, 4], seed=seed)
        _, gradients = step(model, batch)
        with fast_linears.plain():
            _, exact = step(model, batch)
        assert all(relative(gradients[name], exact[name]) < 1e-5 for name in exact)
        assert any("other" in name for name in exact)
    assert counted


class Products(TorchDispatchMode):
    """Counts products by the shape of their right factor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.counts[tuple(args[-1].shape)] += 1
        return func(*args, **(kwargs or {}))


# Blocks whose gate and up hand a gradient to what they see: in the second case the first one has nothing to train before them.
@pytest.mark.parametrize("target_modules, blocks", [("all-linear", 2), (["up_proj", "down_proj"], 1)], ids=str)
def test_the_last_linear_of_a_checkpointed_block_is_computed_once(target_modules, blocks):
    """As in the backbone alone, whose second runs end before it. From the second forward with checkpointing on."""
    model = adapted(tiny_llama(hidden_size=32, intermediate_size=56), target_modules=target_modules)
    step(model, padded([7, 4]))
    checkpointing(model)
    results = []
    for _ in range(3):
        with Products() as products:
            results.append(step(model, padded([7, 4])))
    assert products.counts[(56, 32)] == 2 + 2 * blocks  # down_proj once a layer, and those gradients
    for logits, gradients in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert all(torch.equal(gradient, results[0][1][name]) for name, gradient in gradients.items())


def test_backward_through_a_checkpointed_graph_twice_and_in_parts():
    model = adapted(**NO_LOSSES)
    checkpointing(model)
    for _ in range(2):
        _, exact = step(model, padded([7, 4]))
    model.zero_grad()
    loss = model(**padded([7, 4])).loss
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    part = layer.loraswitch_B["default"].weight
    (alone,) = torch.autograd.grad(loss, part, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(gradient, 2 * exact[name])
    torch.testing.assert_close(alone, part.grad / 2)
    with pytest.raises(RuntimeError, match="second time|already been freed|unpack is being triggered"):
        loss.backward()


@pytest.mark.parametrize("which", ["base", "b", "a"])
def test_weights_that_are_written_to_before_backward_are_an_error(which):
    model = adapted(tiny_llama(num_hidden_layers=1))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    loss = model(**padded([7, 4])).loss
    weights = {"base": layer.base_layer, "a": layer.loraswitch_A["default"], "b": layer.loraswitch_B["default"]}
    with torch.no_grad():
        weights[which].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("grads", [False, True], ids=["no-grad", "all-frozen"])
def test_weights_of_inference_mode_are_an_input_like_any_other_where_no_backward_follows(grads, counted):
    """They have no version, and it is not asked for."""
    with torch.inference_mode():
        backbone = tiny_llama()
    model, inner = adapted(backbone, **NO_LOSSES), backbone.model
    if grads:
        for name, parameter in model.named_parameters():
            if "loraswitch_" in name:
                parameter.requires_grad_(False)
    else:
        inner.forward = torch.no_grad()(inner.forward)
    with fast_linears.plain():
        expected = model(**padded([7, 4])).logits
    torch.testing.assert_close(model(**padded([7, 4])).logits, expected, rtol=1e-4, atol=1e-5)
    assert counted


def test_accumulation_adds_up():
    model = adapted(**NO_LOSSES)
    batches = [padded([7, 4], seed=seed) for seed in range(2)]
    step(model, batches[0])
    each = [step(model, batch)[1] for batch in batches]
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(gradient, each[0][name] + each[1][name])


def test_training_takes_the_same_course():
    fast = adapted()
    slow = copy.deepcopy(fast)
    losses = [course(fast)]
    with fast_linears.plain():
        losses.append(course(slow))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


class Block(nn.Module):
    """Two linears by names that share their input in most models; here they do as `between` says."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
        self.up_first = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        if self.up_first:
            y = self.up_proj(x)
            return self.gate_proj(self.between(x)) + y
        y = self.gate_proj(x)
        return y + self.up_proj(self.between(x))


def in_place(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.add_(1.0)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"clone": torch.clone, "other": lambda x: x * 2}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_a_linear_that_sees_another_tensor_leaves_its_group(later, up_first, change, counted):
    """From the first forward on, or after some in which they saw the same."""
    torch.manual_seed(0)
    model = adapted(Block(), target_modules=["gate_proj", "up_proj"], **NO_LOSSES)
    block, x, sizes = model.base_model.model, torch.randn(2, 3, 4), []
    if later:
        for _ in range(2):
            model(x).sum().backward()
        assert counted == [2, 2]
    block.between, block.up_first = CHANGES[change], up_first
    for _ in range(4):
        counted.clear()
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        actual = adapter_gradients(model)
        sizes.append(list(counted))
        model.zero_grad()
        with fast_linears.plain():
            expected = model(x)
            expected.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(actual, adapter_gradients(model))
    assert max(sizes[0]) == 2 and sizes[-1] == [1, 1]  # computed in vain at first, then no more


def test_a_tensor_that_was_written_to_in_between_is_another_one():
    torch.manual_seed(0)
    model = adapted(Block(), target_modules=["gate_proj", "up_proj"], **NO_LOSSES)
    model.base_model.model.between = in_place
    x = torch.randn(2, 3, 4)
    with fast_linears.plain():
        expected = model(x)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)


def test_a_copy_of_the_model_learns_for_itself(counted):
    model = adapted()
    for _ in range(2):
        step(model, padded([7, 4]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    for _ in range(2):
        _, gradients = step(twin, padded([7, 4]))
    with fast_linears.plain():
        _, exact = step(twin, padded([7, 4]))
    assert all(relative(gradients[name], exact[name]) < 1e-5 for name in exact)
