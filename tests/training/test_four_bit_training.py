"""Training with base layers of bitsandbytes in 4 bits (`training/four_bit_weights.py`): the fused path computes their products
itself, with the results of the library's own products (the `given` way) and of the float64 definition, whose weights are the
dequantised ones; it makes a weight as often as the library, and keeps none; and when it leaves the layers to the library."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fast_linear_checks import CONFIGS, NO_LOSSES, course, relative, step
from four_bit_linear import exact_weight, linear_4bit
from four_bit_training import (
    KINDS,
    LINEARS,
    MODES,
    SOFT,
    agree,
    definition,
    distance,
    given,
    layers_of,
    model_of,
    no_further,
    noted_specs,
    packed,
    plain_twin,
)
from helpers import adapter_gradients, padded
from peft_loraswitch.training import fast_linears, four_bit_weights, pair_products
from peft_loraswitch.training.group_layout import Spec

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}


@pytest.fixture
def specs(monkeypatch) -> list[Spec]:
    return noted_specs(monkeypatch)


# ------------------------------------------------------------------------------------------------------------- the results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_models_equal_the_float64_definition(config, mode, specs):
    model = model_of(mode=mode, **{**NO_LOSSES, **config})
    reference = definition(model, torch.float32)
    for seed in range(2):
        specs.clear()
        batch = padded([7, 4], seed=seed)
        logits, gradients = step(model, batch)
        assert packed(specs) == LINEARS * (1 if mode == MODES[0] else 2) and max(spec.size for spec in specs) == 3
        reference.backbone.zero_grad()
        expected = reference(**batch)
        expected.loss.backward()
        exact, real = reference.gradients(), batch["attention_mask"].bool()
        assert relative(logits[real], expected.logits[real]) < 2e-6
        agree(gradients, {name: exact[name] for name in gradients}, 2e-5)
        with given():
            agree(gradients, step(model, batch)[1], 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_format_in_every_dtype(kind, dtype, specs):
    """No further from the float64 definition than with the library's products."""
    model = model_of(dtype, "non-reentrant", kind, **SOFT)
    reference = definition(model, dtype)
    ours, theirs = 0.0, 0.0
    for seed in range(3):  # single ones are by chance
        batch = padded([7, 4], seed=seed)
        specs.clear()
        logits, gradients = step(model, batch)
        assert packed(specs) == 2 * LINEARS
        with given():
            _, others = step(model, batch)
        reference.backbone.zero_grad()
        expected = reference(**batch)
        expected.loss.backward()
        exact, real = reference.gradients(), batch["attention_mask"].bool()
        assert relative(logits[real], expected.logits[real]) < TOLERANCE[dtype]
        agree(gradients, {name: exact[name] for name in gradients}, 3 * TOLERANCE[dtype])
        ours, theirs = ours + distance(gradients, exact), theirs + distance(others, exact)
    assert ours < 3 * TOLERANCE[dtype] and ours < 1.2 * theirs


@pytest.mark.parametrize(("lengths", "batches"), [([16, 12], 3), ([900, 800], 1)], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_further_than_the_library_from_float32(dtype, lengths, batches):
    """The limit of the tests on a GPU. One gradient of half its size is beyond it, and all of nine tenths."""
    model = model_of(dtype, "no checkpointing", KINDS["blocks of 128"], shape={"max_position_embeddings": 1024}, **SOFT)
    twin = plain_twin(model, dtype).float()
    step(model, padded(lengths))
    data = [padded(lengths, seed=seed) for seed in range(batches)]
    ours = [step(model, each)[1] for each in data]
    with given():
        theirs = [step(model, each)[1] for each in data]
    with fast_linears.plain():
        exact = [step(twin, each)[1] for each in data]
    no_further(ours, theirs, exact)
    for name in exact[0]:
        wrong = [{**gradients, name: gradients[name] * 0.5} for gradients in ours]
        with pytest.raises(AssertionError):
            no_further(wrong, theirs, exact)
    with pytest.raises(AssertionError):
        no_further([{name: 0.9 * each for name, each in gradients.items()} for gradients in ours], theirs, exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activations", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_equals_the_given_way(activations, mode, specs):
    """Experts in float32; activations in bfloat16, or in float32 as `prepare_model_for_kbit_training` has them: then the outputs
    are in float32, too."""
    model = model_of(torch.float32, mode, {"compute_dtype": torch.bfloat16}, **SOFT)
    for name, parameter in model.named_parameters():  # numbers that both dtypes hold
        if "loraswitch_" not in name and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.bfloat16().float()
    reference = definition(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "loraswitch_" not in name and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(activations)
    outputs: list[torch.Tensor] = []
    layers_of(model)[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    batch = padded([7, 4])
    for _ in range(2):
        specs.clear()
        logits, gradients = step(model, batch, torch.bfloat16)
    assert packed(specs) == LINEARS * (1 if mode == MODES[0] else 2)
    assert all(output.dtype == activations for output in outputs) and outputs
    with given():
        other_logits, others = step(model, batch, torch.bfloat16)
    expected = reference(**batch)
    expected.loss.backward()
    exact, real = reference.gradients(), batch["attention_mask"].bool()
    assert relative(logits[real], other_logits[real]) < 0.03 and relative(logits[real], expected.logits[real]) < 0.03
    agree(gradients, others, 0.1)
    assert distance(gradients, exact) < 1.2 * distance(others, exact)


def test_float32_under_autocast_is_left_to_the_library(specs):
    """The default of `BitsAndBytesConfig`; other products are in bfloat16."""
    model = model_of(torch.float32, **SOFT)
    for _ in range(2):
        logits, gradients = step(model, padded([7, 4]), torch.bfloat16)
    assert packed(specs) == 0 and len(specs) == 2 * 8
    with fast_linears.plain():
        other_logits, others = step(model, padded([7, 4]), torch.bfloat16)
    assert relative(logits, other_logits) < 0.03
    agree(gradients, others, 0.1)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_equal_the_given_way(mode, specs):
    model = model_of(mode=mode)
    with pair_products.forced(True):
        for seed in range(2):
            batch = padded([7, 4], seed=seed)
            specs.clear()
            _, gradients = step(model, batch)
            assert packed(specs) and all(spec.slots for spec in specs)
            with given():
                agree(gradients, step(model, batch)[1], 1e-5)


def test_several_adapters_at_once(specs):
    """The first adapter's call computes the base product; what the second adds to is given."""
    model = model_of()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    for seed in range(2):
        specs.clear()
        batch = padded([7, 4], seed=seed)
        _, gradients = step(model, batch)
        assert packed(specs) == LINEARS and sum(spec.size for spec in specs if spec.given) == LINEARS
        with fast_linears.plain():
            agree(gradients, step(model, batch)[1], 1e-5)


def test_experts_that_are_frozen(specs):
    model = model_of(trainable="router")
    _, gradients = step(model, padded([7, 4]))
    assert packed(specs) == LINEARS and len(gradients) == 1
    with given():
        agree(gradients, step(model, padded([7, 4]))[1], 1e-5)


def test_dropout_is_the_layers_own_form():
    model = model_of(lora_dropout=0.5)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(step(model, padded([7, 4]))[1])
        with fast_linears.plain():
            torch.manual_seed(0)
            results.append(step(model, padded([7, 4]))[1])
    agree(results[2], results[3], 1e-9)


def test_what_was_quantised_in_another_dtype(specs):
    """The weight is rounded once, to what the layer computes in, as in the library's forward; its backward would round it to the
    dtype that was quantised first."""
    model = model_of(torch.float32, **SOFT)
    for layer in layers_of(model):
        layer.base_layer.weight.quant_state.dtype = torch.bfloat16
    reference = definition(model, torch.float32)
    batch = padded([7, 4])
    logits, gradients = step(model, batch)
    assert packed(specs) == LINEARS
    expected = reference(**batch)
    expected.loss.backward()
    real = batch["attention_mask"].bool()
    assert relative(logits[real], expected.logits[real]) < 2e-6
    agree(gradients, {name: reference.gradients()[name] for name in gradients}, 2e-5)
    assert all(layer.base_layer.weight.quant_state.dtype == torch.bfloat16 for layer in layers_of(model))


def test_second_derivatives(specs):
    model = model_of(**NO_LOSSES)
    embedding = model.get_input_embeddings()(padded([5])["input_ids"]).detach()

    def twice() -> dict[str, torch.Tensor]:
        model.zero_grad()
        x = embedding.clone().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(inputs_embeds=x, labels=padded([5])["input_ids"]).loss
            (d_x,) = torch.autograd.grad(loss, x, create_graph=True)
            d_x.square().sum().backward()
        return {name: g.clone() for name, g in adapter_gradients(model).items()}

    gradients = twice()
    assert packed(specs) == LINEARS
    reference = copy.deepcopy(model)
    for layer in layers_of(reference):  # the library's backward cannot be differentiated again
        base = layer.base_layer
        layer.base_layer = nn.Linear(layer.in_features, layer.out_features, base.bias is not None).requires_grad_(False)
        with torch.no_grad():
            layer.base_layer.weight.copy_(exact_weight(base))
            if base.bias is not None:
                layer.base_layer.bias.copy_(base.bias)
    model = reference
    agree(gradients, twice(), 1e-4)


# --------------------------------------------------------------------------------------------- how often, and what is kept


class Operations(TorchDispatchMode):
    """Counts those of bitsandbytes: `gemm_4bit`, its product, makes a weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bitsandbytes":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def made(model: Any) -> Counter[str]:
    with Operations() as operations:
        step(model, padded([7, 4]))
    return operations.counts


# With checkpointing the last linear of each block is not computed again: its product in the second run is for nothing.
@pytest.mark.parametrize(("mode", "times"), [("no checkpointing", 2), ("non-reentrant", 3), ("reentrant", 3)])
def test_weights_are_made_as_often_as_by_the_library(mode, times):
    model = model_of(mode=mode)
    model.enable_input_require_grads()
    for _ in range(2):
        step(model, padded([7, 4]))
    spared = 2 if mode == "non-reentrant" else 0
    assert made(model) == {"dequantize_4bit": times * LINEARS - spared}
    with given():
        step(model, padded([7, 4]))
        assert sum(made(model).values()) == times * LINEARS


def test_what_needs_no_gradient_makes_no_weight_in_backward():
    """The first block's q, k and v see the embedding, which is frozen."""
    model = model_of()
    step(model, padded([7, 4]))
    assert made(model) == {"dequantize_4bit": 2 * LINEARS - 3}


@pytest.mark.parametrize("mode", MODES)
def test_no_more_is_kept_than_in_the_given_way(mode):
    model = model_of(torch.bfloat16, mode)

    def kept() -> int:
        tensors: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            model(**padded([70, 40]))
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    for _ in range(2):
        step(model, padded([70, 40]))
    ours = kept()
    with given():
        step(model, padded([70, 40]))
        assert 0 < ours <= kept()


def test_one_weight_at_a_time(monkeypatch):
    """A weight that was made is gone before the next one is."""
    import weakref

    model = model_of(mode="non-reentrant")
    alive: list[Any] = []
    most = 0
    make = four_bit_weights.FourBitWeight.to

    def noting(self: Any, dtype: torch.dtype) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        weight = make(self, dtype)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(four_bit_weights.FourBitWeight, "to", noting)
    for _ in range(2):
        step(model, padded([7, 4]))
    assert len(alive) >= 2 * (3 * LINEARS - 2) and most == 0
    assert not any(each() is not None for each in alive)


def test_backward_goes_by_the_weight_as_it_is_by_then():
    """As the library's; with plain weights this is an error."""
    model = model_of(mode="no checkpointing", **NO_LOSSES)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(**padded([7, 4])).loss
        states = [layer.base_layer.weight.quant_state for layer in layers_of(model)]
        for state in states:
            state.absmax.mul_(2)
        loss.backward()
        for state in states:
            state.absmax.div_(2)
        return adapter_gradients(model)

    unchanged = step(model, padded([7, 4]))[1]
    changed = gradients()
    assert any(relative(changed[name], unchanged[name]) > 0.1 for name in changed)
    with given():
        agree(changed, gradients(), 1e-5)


# ------------------------------------------------------------------------------------------------ where the library computes


def hooked(model: Any) -> int:
    layers_of(model)[0].base_layer.register_forward_hook(lambda module, args, output: output * 2)
    return LINEARS - 3


def hooks_that_are_gone(model: Any) -> int:
    handle = layers_of(model)[0].base_layer.register_forward_hook(lambda module, args, output: output * 2)
    step(model, padded([7, 4]))
    handle.remove()
    return LINEARS


def accelerates_hook(model: Any) -> int:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layers_of(model)[0].base_layer, ModelHook())
    return LINEARS - 3


def dispatched(model: Any) -> int:
    """Hooks on all modules, so also on those of the experts: the layers' own form."""
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return 0


def computes_in_bfloat16(model: Any) -> int:
    for layer in layers_of(model)[:2]:  # q and k
        layer.base_layer.compute_dtype = torch.bfloat16
    return LINEARS - 3


def has_computed_nothing_yet(model: Any) -> int:
    """What it computes in is settled by its own forward."""
    for layer in layers_of(model):
        layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = None, False
    step(model, padded([7, 4]))
    assert all(layer.base_layer.compute_dtype == torch.float32 for layer in layers_of(model))
    return LINEARS


def a_class_of_ones_own(model: Any) -> int:
    import bitsandbytes as bnb

    class Doubled(bnb.nn.Linear4bit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layers_of(model)[0].base_layer.__class__ = Doubled
    return LINEARS - 3


def subclasses(model: Any) -> int:
    import bitsandbytes as bnb

    for layer in layers_of(model):
        layer.base_layer.__class__ = bnb.nn.LinearNF4
    return LINEARS


def one_in_16_bits(model: Any) -> int:
    """Beside others in 4 bits."""
    layer = layers_of(model)[0]
    layer.base_layer = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    return LINEARS - 3


def another_weight(model: Any) -> int:
    """Of another format, in all layers."""
    for layer in layers_of(model):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.base_layer.bias is not None)
        layer.base_layer = linear_4bit(plain, "fp4", True, compute_dtype=torch.float32).train()
    return LINEARS


def bias_in_bfloat16(model: Any) -> int:
    for layer in layers_of(model):
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.data = layer.base_layer.bias.data.bfloat16()
    return LINEARS


def bias_that_trains(model: Any) -> int:
    next(layer for layer in layers_of(model) if layer.base_layer.bias is not None).base_layer.bias.requires_grad_()
    return LINEARS - 3


def a_plain_parameter(model: Any) -> int:
    """As FSDP leaves it; the layer makes a weight of it in its forward."""
    base = layers_of(model)[0].base_layer
    base.weight = nn.Parameter(base.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    return LINEARS - 3


CHANGES: dict[str, Callable[[Any], int]] = {
    "hook": hooked,
    "hook gone": hooks_that_are_gone,
    "accelerate's hook": accelerates_hook,
    "dispatched": dispatched,
    "compute dtype": computes_in_bfloat16,
    "first forward": has_computed_nothing_yet,
    "another class": a_class_of_ones_own,
    "subclass": subclasses,
    "mixed": one_in_16_bits,
    "another weight": another_weight,
    "bias in bfloat16": bias_in_bfloat16,
    "bias trains": bias_that_trains,
    "plain parameter": a_plain_parameter,
}


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("change", CHANGES)
def test_the_step_after_a_change_is_the_plain_forms(change, mode, specs):
    """Of a model that has trained two steps; with how many linears are still computed with their base products."""
    model = model_of(mode=mode, **SOFT)
    for _ in range(2):
        step(model, padded([7, 4]))
    expected = CHANGES[change](model)
    specs.clear()
    _, gradients = step(model, padded([7, 4]))
    assert packed(specs) == expected * (1 if mode == MODES[0] else 2)
    with fast_linears.plain():
        agree(gradients, step(model, padded([7, 4]))[1], 0.02 if "bfloat16" in change or "compute" in change else 1e-5)


def test_a_weight_that_is_not_quantised_yet_and_one_that_is_packed_otherwise():
    model = model_of()
    base = layers_of(model)[0].base_layer
    assert four_bit_weights.four_bit_form(base) == (torch.device("cpu"), torch.float32)
    base.weight.quant_state.packing_format_for_cpu = True  # by bitsandbytes, for some CPUs
    assert four_bit_weights.four_bit_form(base) is None
    base.weight.quant_state.packing_format_for_cpu = False
    base.weight.quant_state = None
    assert four_bit_weights.four_bit_form(base) is None
    assert four_bit_weights.four_bit_form(nn.Linear(2, 2)) is None


def test_a_copy_and_a_pickled_model_train_alike(specs):
    """Pickling loses the class of the library's weights, so there the library computes."""
    model = model_of(**NO_LOSSES)
    for _ in range(2):
        _, exact = step(model, padded([7, 4]))
    for twin, expected in ((copy.deepcopy(model), LINEARS), (pickle.loads(pickle.dumps(model)), 0)):
        for _ in range(2):
            specs.clear()
            _, gradients = step(twin, padded([7, 4]))
            assert packed(specs) == expected
            agree(gradients, exact, 1e-5)


def test_training_takes_the_same_course():
    fast = model_of(mode="non-reentrant")
    slow = copy.deepcopy(fast)
    losses = [course(fast)]
    with given():
        losses.append(course(slow))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
