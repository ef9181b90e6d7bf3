"""Whatever of a forward is differentiated, the router gets the gradient of its two losses: once, and scaled as `output.loss` is.

The definition is computed in float64 (`trainer_tools.auxiliary_gradient`) from what the router saw; the rest of the router's
gradient is that of a twin whose losses have coefficients of 0.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers import (
    HIDDEN,
    adapted,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    switch_layers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tokens,
    without_losses,
)
from trainer_tools import auxiliary_gradient

pytestmark = pytest.mark.compat

AUX, Z = 0.5, 0.125
Objective = Callable[[Any], torch.Tensor]


def trained(model: nn.Module | None = None, **config: Any) -> nn.Module:
    model = tiny_llama() if model is None else model
    return adapted(model, **{"router_aux_loss_coef": AUX, "router_z_loss_coef": Z, **config}).train()


def router(model: nn.Module, adapter: str = "default") -> nn.Parameter:
    return router_layer(model, adapter).loraswitch_router[adapter].weight


def seen_by_router(model: nn.Module, batch: dict[str, Any], adapter: str = "default") -> torch.Tensor:
    """[real tokens, in_features]: the input of the linear that routes, in a forward of a copy."""
    model, seen = copy.deepcopy(model), []
    router_layer(model, adapter).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    mask = batch.get("attention_mask")
    return seen[0].flatten(0, -2) if mask is None else seen[0][mask.bool()]


def definition(model: nn.Module, batch: dict[str, Any], adapter: str = "default") -> torch.Tensor:
    """Gradient of both losses on this batch with respect to the router's weight."""
    gradient = auxiliary_gradient(model, seen_by_router(model, batch, adapter), AUX, Z, adapter)
    assert gradient.norm() > 0.05
    return gradient


def assert_share(actual: torch.Tensor, task: torch.Tensor, expected: torch.Tensor) -> None:
    """The router's gradient is the task's and this much of the losses'."""
    error = (actual - task - expected).norm()
    assert error <= 1e-5 * max(task.norm(), expected.norm(), 1), (error, task.norm(), expected.norm())


# ---------------------------------------------------------------------------------------- every output and combination

SPECIAL = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}


def differentiable(output: Any) -> dict[str, torch.Tensor]:
    """Every differentiable tensor of an output, by a name that says where it is."""
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}")
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                walk(item, f"{name}.{index}")
        elif hasattr(value, "layers"):  # a cache
            for index, layer in enumerate(value.layers):
                walk([layer.keys, layer.values], f"{name}.layers.{index}")

    walk(output, "")
    return found


def is_loss(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 0 and name in (".loss", ".0")


def weighted(weights: dict[str, float]) -> Objective:
    """The sum over named outputs of weight * the output times fixed noise; the loss is taken as it is."""

    def objective(output: Any) -> torch.Tensor:
        terms = []
        tensors = differentiable(output)
        for name, weight in weights.items():
            tensor = tensors[name]
            if not is_loss(name, tensor):
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
                tensor = (tensor * noise).sum() / tensor.numel() ** 0.5
            terms.append(weight * tensor)
        return torch.stack(terms).sum()

    return objective


def plain(model: nn.Module) -> nn.Module:
    return model


def checkpointed(reentrant: bool) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    return prepare


def make_llama(**config: Any) -> nn.Module:
    model = trained(**config)
    model.base_model.model.set_attn_implementation("eager")  # the one that returns attentions
    return model


def two_adapters(**config: Any) -> nn.Module:
    model = make_llama(**config)
    settings = {"num_experts": 3, "top_k": 1, "router_aux_loss_coef": AUX, "router_z_loss_coef": Z}
    model.add_adapter("other", switch_config(**settings))
    randomize_adapter(model, "other", seed=5)
    return model


def both(model: nn.Module) -> nn.Module:
    model.base_model.set_adapter(["default", "other"])
    return model


NO_CACHE = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
FORMS: dict[str, tuple[Callable[..., nn.Module], Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    "plain": (make_llama, plain, SPECIAL),
    "checkpointed": (make_llama, checkpointed(False), NO_CACHE),
    "reentrant": (make_llama, checkpointed(True), {"output_hidden_states": True, "use_cache": False}),
    "two adapters": (two_adapters, both, SPECIAL),
    "top 1": (lambda: make_llama(top_k=1), plain, SPECIAL),
    "shared experts": (lambda: make_llama(num_shared_experts=1), plain, SPECIAL),
    "gpt2": (lambda: trained(tiny_gpt2()), plain, {"output_hidden_states": True}),
}


class Case:
    """A model, its twin without losses, and the definition of the losses' gradients, by adapter."""

    def __init__(self, form: str, labels: bool = True, return_dict: bool = True) -> None:
        make, prepare, flags = FORMS[form]
        model = make()
        self.twin, self.model = prepare(without_losses(model)), prepare(model)
        self.batch = {**padded([7, 4, 1], seed=3), **flags, "return_dict": return_dict}
        if not labels:
            del self.batch["labels"]
        self.adapters = list(self.model.active_adapters)
        self.definitions = {name: definition(self.model, self.batch, name) for name in self.adapters}
        output = differentiable(self.model(**self.batch))
        # what is upstream of the routing trains no router: the embeddings, where they are made to need a gradient
        first = {name for name, tensor in output.items() if name.endswith(".0") and tensor.shape[-1:] == (HIDDEN,)}
        self.names = [name for name in output if name not in first]

    def loss_name(self) -> str | None:
        output = differentiable(self.twin(**self.batch))
        return next((name for name, tensor in output.items() if is_loss(name, tensor)), None)

    def check(self, objective: Objective, scale: float) -> None:
        for model in (self.model, self.twin):
            model.zero_grad()
            objective(model(**self.batch)).backward()
        for adapter in self.adapters:
            expected = scale * self.definitions[adapter]
            assert_share(router(self.model, adapter).grad, router(self.twin, adapter).grad, expected)
        pairs = zip(self.model.named_parameters(), self.twin.parameters(), strict=True)
        for (name, parameter), other in pairs:
            if parameter.grad is not None and "loraswitch_router" not in name:
                assert torch.equal(parameter.grad, other.grad), name  # the losses train the router and nothing else


LABELS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("labels, return_dict", LABELS)
@pytest.mark.parametrize("form", FORMS)
def test_every_output_brings_the_losses(form, labels, return_dict):
    """Each differentiable output alone: with its weight if it is the loss, else with weight 1."""
    case = Case(form, labels, return_dict)
    loss = case.loss_name()
    assert (loss is not None) == labels
    assert len(case.names) >= 3
    for name in case.names:
        case.check(weighted({name: 0.375}), 0.375 if name == loss else 1.0)


@pytest.mark.parametrize("labels, return_dict", LABELS)
@pytest.mark.parametrize("form", FORMS)
def test_combinations_of_outputs(form, labels, return_dict):
    """Up to five outputs with weights of any sign: with the loss's weight if it is among them, else with weight 1."""
    case, draw = Case(form, labels, return_dict), random.Random(form)
    loss = case.loss_name()
    for _ in range(8):
        names = draw.sample(case.names, draw.randint(2, min(5, len(case.names))))
        weights = {name: draw.choice([-2.0, 0.25, 1.0, 3.0]) for name in names}
        case.check(weighted(weights), weights.get(loss, 1.0))


@pytest.mark.parametrize("form", ["plain", "reentrant"])
def test_a_weight_of_zero_is_a_weight(form):
    case = Case(form)
    case.check(weighted({".loss": 0.0, ".logits": 1.0}), 0.0)


def test_a_weighted_cross_entropy_beside_the_models_own_loss():
    """What people write: classes with weights."""
    case = Case("plain")
    labels, weight = case.batch["labels"][:, 1:].flatten(), torch.linspace(0.5, 2, 64)

    def objective(output: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels, weight=weight)

    case.check(objective, 1.0)
    case.check(lambda output: 0.5 * output.loss + 0.5 * objective(output), 0.5)


def test_outputs_that_do_not_depend_on_the_routing_bring_nothing():
    """A deep router: the first block's hidden states have nothing to do with it."""
    model = make_llama(router_module="layers.1.self_attn.q_proj", num_shared_experts=1)
    batch = {**padded([7, 4]), "output_hidden_states": True}
    model(**batch).hidden_states[1].sum().backward()
    assert router(model).grad is None
    expected = definition(model, batch)
    twin = without_losses(model)
    for each in (model, twin):
        output = each(**batch)
        (output.hidden_states[1].sum() + output.logits.sum()).backward()
    assert_share(router(model).grad, router(twin).grad, expected)


# ------------------------------------------------------------------------- several forwards, several backward calls


@pytest.mark.parametrize("first, second", itertools.product(["loss", "logits", "both"], repeat=2))
def test_two_forwards_in_one_objective(first, second):
    """DPO's chosen and rejected, a contrastive loss: each forward by its own rule."""
    objectives = {
        "loss": (lambda output: 0.5 * output.loss, 0.5),
        "logits": (lambda output: 3 * output.logits.square().mean(), 1.0),
        "both": (lambda output: 0.25 * output.loss + output.logits.square().mean(), 0.25),
    }
    model, batches = trained(), [padded([7, 4], seed=1), padded([3, 6], seed=2)]
    twin = without_losses(model)
    expected = torch.zeros_like(router(model))
    chosen = [objectives[first], objectives[second]]
    for batch, (_, scale) in zip(batches, chosen, strict=True):
        expected += scale * definition(model, batch)
    for each in (model, twin):
        outputs = [each(**batch) for batch in batches]
        with torch.no_grad(), each.disable_adapter():
            each(**batches[0])  # the reference
        sum(objective(output) for output, (objective, _) in zip(outputs, chosen, strict=True)).backward()
    assert_share(router(model).grad, router(twin).grad, expected)


CALLS: dict[str, tuple[Objective, float | None]] = {
    "0.5 loss": (lambda output: 0.5 * output.loss, 0.5),
    "2 loss and logits": (lambda output: 2 * output.loss + output.logits.mean(), 2.0),
    "logits": (lambda output: output.logits.square().mean(), None),
    "hidden states": (lambda output: output.hidden_states[-1].square().mean(), None),
}


@pytest.mark.parametrize("form", ["plain", "checkpointed", "reentrant"])
def test_several_backward_calls_join_once(form):
    """In total with what the loss is scaled with in all of them, in whatever order; with 1 if it is in none."""
    case = Case(form)
    for calls in [c for n in (2, 3) for c in itertools.product(CALLS, repeat=n)][:: 1 if form == "plain" else 7]:
        scales = [CALLS[call][1] for call in calls if CALLS[call][1] is not None]
        for model in (case.model, case.twin):
            model.zero_grad()
            output = model(**case.batch)
            for call in calls:
                CALLS[call][0](output).backward(retain_graph=True)
        expected = (sum(scales) if scales else 1.0) * case.definitions["default"]
        assert_share(router(case.model).grad, router(case.twin).grad, expected)


def test_a_call_after_the_gradients_were_dropped_joins_again():
    case = Case("plain")
    for model in (case.model, case.twin):
        output = model(**case.batch)
        for _ in range(2):
            model.zero_grad()
            output.logits.square().mean().backward(retain_graph=True)
    assert_share(router(case.model).grad, router(case.twin).grad, case.definitions["default"])


def test_autograd_grad_returns_the_share_and_does_not_count():
    """Measuring gradients of parts of an objective changes nothing for the backward call that trains."""
    case, weights = Case("plain"), []
    for model in (case.model, case.twin):
        output, found = model(**case.batch), []
        parts = [output.loss, output.logits.square().mean(), output.hidden_states[-1].square().mean()]
        for part in (*parts, parts[1]):
            found.append(torch.autograd.grad(2 * part, router(model), retain_graph=True)[0])
        # no router asked for: no share, and nothing that counts
        experts = switch_layers(model)["base_model.model.model.layers.1.mlp.up_proj"].loraswitch_A["default"].weight
        found.append(torch.autograd.grad(parts[1], experts, retain_graph=True)[0])
        parts[1].backward(inputs=[experts], retain_graph=True)
        parts[1].backward()
        weights.append([*found, router(model).grad])
    for index, (actual, task) in enumerate(zip(*weights, strict=True)):
        scale = {0: 2.0, 4: 0.0}.get(index, 1.0)
        assert_share(actual, task, scale * case.definitions["default"] if index != 4 else torch.zeros_like(actual))


@pytest.mark.parametrize("objective", ["loss", "logits"])
def test_second_derivatives(objective):
    """What differentiating the gradient of the router adds to a twin's is the losses' second derivative, once."""
    case, direction = Case("plain"), torch.randn(4, HIDDEN)
    found = []
    for model in (case.model, case.twin):
        output = model(**case.batch)
        value = 0.5 * output.loss if objective == "loss" else output.logits.square().mean()
        (gradient,) = torch.autograd.grad(value, router(model), create_graph=True)
        found.append(torch.autograd.grad((gradient * direction).sum(), router(model))[0])
    step, weight = 1e-4, router(case.model)
    start, sides = weight.detach().clone(), []
    for sign in (1, -1):
        weight.data = start + sign * step * direction
        sides.append(auxiliary_gradient(case.model, seen_by_router(case.model, case.batch), AUX, Z))
    expected = (sides[0] - sides[1]) / (2 * step) * (0.5 if objective == "loss" else 1.0)
    assert expected.norm() > 0.1
    assert (found[0] - found[1] - expected).norm() <= 1e-2 * expected.norm()


def test_forward_derivatives():
    import torch.autograd.forward_ad as forward_ad

    case, direction = Case("plain"), torch.randn(4, HIDDEN)
    found = []
    for model in (case.model, case.twin):
        (name,) = [n for n, _ in model.named_parameters() if "loraswitch_router" in n]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(router(model).detach().requires_grad_(), direction)
            output = torch.func.functional_call(model, {name: dual}, args=(), kwargs=case.batch)
            found.append(forward_ad.unpack_dual(output.loss).tangent)
    expected = (case.definitions["default"] * direction).sum()
    assert (found[0] - found[1]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_weights_that_are_no_leaves():
    """Meta-learning: the second forward's weights are those of the first less a step."""
    case, found = Case("plain"), []
    for model in (case.model, case.twin):
        (name,) = [n for n, _ in model.named_parameters() if "loraswitch_router" in n]
        moved = router(model) * 1.0
        output = torch.func.functional_call(model, {name: moved}, args=(), kwargs=case.batch)
        (output.logits.square().mean()).backward()
        found.append(router(model).grad)
    assert_share(*found, case.definitions["default"])


# ------------------------------------------------------------------------------------------------ outputs stay as they are


def stock_lora() -> nn.Module:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    model.base_model.model.set_attn_implementation("eager")
    return model.train()


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda t: t.mul_(2),
    "slice": lambda t: t[..., :-1].div_(2) if t.dim() else t.div_(2),
    "masked_fill_": lambda t: t.masked_fill_(t > 1, 0.0),
    "index": lambda t: t.__setitem__(..., 0.5 * t),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("labels", [True, False])
def test_outputs_may_be_changed_in_place_as_with_lora(labels, change):
    """TRL divides logits by a temperature, in place. (Some outputs are saved for backward: there autograd objects.)"""
    case, lora, allowed = Case("plain", labels), stock_lora(), []

    def objective(output: Any) -> torch.Tensor:
        tensor = differentiable(output)[name]
        CHANGES[change](tensor)
        return tensor.square().mean()

    for name in case.names:
        try:
            objective(lora(**case.batch)).backward()
        except RuntimeError:
            continue
        allowed.append(name)
        if name == ".loss":  # its square is scaled with its value: only that it works
            objective(case.model(**case.batch)).backward()
        else:
            case.check(objective, 1.0)
    assert ".logits" in allowed and len(allowed) > 3


@pytest.mark.parametrize("form", ["checkpointed", "reentrant"])
def test_logits_may_be_changed_in_place_with_checkpointing(form):
    case = Case(form)

    def objective(output: Any) -> torch.Tensor:
        output.logits.div_(0.7)
        return output.logits.square().mean()

    case.check(objective, 1.0)


def test_gradients_with_respect_to_outputs():
    """Saliency: outputs are still upstream of the loss."""
    case = Case("plain")
    names = [name for name in case.names if name != ".loss"]
    found = []
    for model in (case.model, case.twin):
        output = model(**case.batch)
        tensors = differentiable(output)
        wanted = [tensors[name] for name in names]
        for tensor in wanted:
            tensor.retain_grad()
        output.loss.backward(retain_graph=True)
        gradients = torch.autograd.grad(output.loss, wanted, allow_unused=True)
        found.append([*gradients, *(tensor.grad for tensor in wanted)])
    assert sum(gradient is not None for gradient in found[0]) > 10
    for actual, expected in zip(*found, strict=True):
        assert (actual is None) == (expected is None) and (actual is None or torch.equal(actual, expected))


# ---------------------------------------------------------------------------------------- outputs of the model's own kind


@dataclass
class Result:
    loss: torch.Tensor | None
    y: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    loss: torch.Tensor | None
    y: torch.Tensor


class Slots:
    __slots__ = ("loss", "y")

    def __init__(self, loss: torch.Tensor | None, y: torch.Tensor) -> None:
        self.loss, self.y = loss, y


Named = namedtuple("Named", ["y", "loss"])
MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "dataclass": Result,
    "frozen dataclass": Frozen,
    "namespace": lambda loss, y: SimpleNamespace(loss=loss, y=y),
    "named tuple": lambda loss, y: Named(y, loss),
    "dict": lambda loss, y: {"y": y, "loss": loss},
    "nested": lambda loss, y: {"loss": loss, "more": [{"y": y}]},
}


class Own(nn.Module):
    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(HIDDEN, 5), make

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        return self.make(y.square().mean(), y)


def y_of(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        return output["more"][0]["y"] if "more" in output else output["y"]
    return output.y


def loss_of(output: Any) -> torch.Tensor:
    return output["loss"] if isinstance(output, dict) else output.loss


@pytest.mark.parametrize("kind", MAKERS)
def test_outputs_of_any_class(kind):
    torch.manual_seed(0)
    model = trained(Own(MAKERS[kind]), target_modules=["linear"])
    twin, x = without_losses(model), torch.randn(6, HIDDEN)
    assert type(model(x)) is type(twin(x))
    assert loss_of(model(x)) > loss_of(twin(x))
    expected = auxiliary_gradient(model, x, AUX, Z)
    objectives: list[tuple[Objective, float]] = [
        (lambda output: y_of(output).sum(), 1.0),
        (lambda output: 0.5 * loss_of(output), 0.5),
        (lambda output: 0.5 * loss_of(output) + y_of(output).sum(), 0.5),
    ]
    for objective, scale in objectives:
        for each in (model, twin):
            each.zero_grad()
            objective(each(x)).backward()
        assert_share(router(model).grad, router(twin).grad, scale * expected)


def test_what_no_output_shows():
    """An output without a place for the loss, and none at all: what a hook has caught brings the losses too."""
    for make in (Slots, lambda loss, y: ()):
        model = trained(Own(make), target_modules=["linear"])
        twin, x = without_losses(model), torch.randn(6, HIDDEN)
        for each in (model, twin):
            caught: list[torch.Tensor] = []
            router_layer(each).register_forward_hook(lambda module, args, output, to=caught: to.append(output))
            each(x)
            caught[0].square().mean().backward()
        assert_share(router(model).grad, router(twin).grad, auxiliary_gradient(model, x, AUX, Z))


def test_a_head_on_hidden_states_caught_by_a_hook():
    model = trained(tiny_bert())
    twin, batch = without_losses(model), padded([7, 4])
    del batch["labels"]
    expected = definition(model, batch)
    for each in (model, twin):
        caught: list[torch.Tensor] = []
        layer = each.base_model.model.bert.encoder.layer[1]
        layer.register_forward_hook(lambda module, args, output, to=caught: to.append(output))
        each(**batch)
        hidden = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
        hidden.square().mean().backward()
    assert_share(router(model).grad, router(twin).grad, expected)


def test_training_through_the_cache_of_an_earlier_forward():
    """Gist tokens: the first forward's only use is its cache. Both forwards bring their losses."""
    model, first, second = trained(), tokens(2, 5), tokens(2, 3, seed=1)
    twin = without_losses(model)
    expected = definition(model, {"input_ids": first}) + definition(model, {"input_ids": second})
    for each in (model, twin):
        cache = each(input_ids=first, use_cache=True).past_key_values
        each(input_ids=second, past_key_values=cache).logits.square().mean().backward()
    # the router of the first layer sees embeddings: the second forward's input does not depend on the cache
    assert_share(router(model).grad, router(twin).grad, expected)


class TwoTowers(nn.Module):
    """Encodes two inputs, one after the other, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 5))

    def forward(self, a: torch.Tensor, b: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        a, b = self.encoder(a), self.encoder(b)
        output = {"a": a, "b": b}
        return output if labels is None else {"loss": (a * b).mean(), **output}


def test_several_passes_of_one_forward():
    model = trained(TwoTowers(), target_modules=["0", "2"])
    twin, a, b = without_losses(model), torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    expected = auxiliary_gradient(model, torch.cat([a, b]), AUX, Z)
    cases: list[tuple[bool, Objective, float]] = [
        (False, lambda output: output["a"].sum() * output["b"].sum(), 1.0),
        (True, lambda output: output["a"].sum() * output["b"].sum(), 1.0),
        (True, lambda output: 0.5 * output["loss"], 0.5),
        (True, lambda output: 0.5 * output["loss"] + output["a"].sum(), 0.5),
    ]
    for labels, objective, scale in cases:
        for each in (model, twin):
            each.zero_grad()
            objective(each(a, b, labels or None)).backward()
        assert_share(router(model).grad, router(twin).grad, scale * expected)


def test_an_output_that_cannot_carry_the_losses_is_reported():
    """A reentrant checkpoint leaves only the outputs, and this one has no tensor that can be found."""

    class Checkpointing(Own):
        def forward(self, x: torch.Tensor) -> Any:
            with torch.no_grad():
                self.linear(x)
            return Slots(None, x.sum().requires_grad_())

    model = trained(Checkpointing(Slots), target_modules=["linear"])
    with pytest.warns(UserWarning, match="found no differentiable tensor.*Slots.*Return a tensor.*use_reentrant"):
        model(torch.randn(3, HIDDEN))


# --------------------------------------------------------------------------------------------- precision, memory, accumulation


def test_a_loss_scaler_scales_the_losses_with_the_loss():
    """fp16: whatever else is in the objective, what output.loss is scaled with comes with it. Nothing warns."""
    case, scale = Case("plain"), 1024.0
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for model in (case.model, case.twin):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with torch.autocast("cpu", dtype=torch.float16, enabled=False):
                output = model(**case.batch)
            scaler.scale(0.5 * output.loss + output.logits.square().mean()).backward()
    assert_share(router(case.model).grad / scale, router(case.twin).grad / scale, 0.5 * case.definitions["default"])


def test_a_loss_scaler_on_other_outputs_is_reported_when_it_happens():
    model, batch = trained(), padded([7, 5])
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output.loss.backward(retain_graph=True)
    model.zero_grad()
    with pytest.warns(UserWarning, match="fp16.*no effect.*Use bf16, or train on output.loss"):
        output.logits.float().square().mean().backward()


def test_autocast_does_not_round_the_losses():
    """Sums over tokens are float32, also those that wait for the other micro-batches."""
    from accelerate.state import GradientState

    model, batches = trained(num_experts=8), [padded([7, 4], seed=seed) for seed in range(3)]
    twin = without_losses(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.cat([seen_by_router(model, batch) for batch in batches])
    for each in (model, twin):
        for index, batch in enumerate(batches):
            GradientState()._set_sync_gradients(index == 2)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = each(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            (logits.float().mean() * 0).backward()  # only the losses
    assert_share(router(model).grad, router(twin).grad, auxiliary_gradient(model, x, AUX, Z))


@pytest.mark.parametrize("last", ["loss", "logits", "both"])
@pytest.mark.parametrize("other", ["loss", "logits"])
def test_accumulation_with_any_objective(other, last):
    """The last micro-batch brings the losses of all, by the rule; a trainer divides each loss by their number."""
    from accelerate.state import GradientState

    objectives: dict[str, tuple[Objective, float]] = {
        "loss": (lambda output: output.loss / 3, 1.0),
        "logits": (lambda output: output.logits.square().mean() / 3, 1.0),
        "both": (lambda output: (0.5 * output.loss + output.logits.mean()) / 3, 0.5),
    }
    model, batches = trained(), [padded([7, 4], seed=1), padded([3, 6], seed=2), padded([5], seed=3)]
    twin = without_losses(model)
    x = torch.cat([seen_by_router(model, batch) for batch in batches])
    for each in (model, twin):
        for index, batch in enumerate(batches):
            GradientState()._set_sync_gradients(index == 2)
            objectives[last if index == 2 else other][0](each(**batch)).backward()
    expected = objectives[last][1] * auxiliary_gradient(model, x, AUX, Z)
    assert_share(router(model).grad, router(twin).grad, expected)


def saved_for_backward(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that autograd keeps for backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)  # kept, so that no memory is used twice
    assert output is not None
    return sum(storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_the_activations_is_kept(dtype, dropout):
    """[T, hidden] in float32 is 4 * T * hidden bytes; what the losses keep is less than one of those in the model's dtype."""
    model = trained(lora_dropout=dropout).to(dtype)
    twin, batch = without_losses(model), {"input_ids": tokens(4, 64)}
    activations = 4 * 64 * HIDDEN * dtype.itemsize
    extra = saved_for_backward(model, batch) - saved_for_backward(twin, batch)
    assert extra < activations / 2


def test_forwards_leave_nothing_behind():
    """Without a garbage collection: a cycle through the autograd graph is never found by one."""
    for prepare in (plain, checkpointed(False), checkpointed(True)):
        model = prepare(trained())
        gc.disable()
        try:
            output = model(**padded([7, 4]))
            kept = weakref.ref(output.logits)
            graph = weakref.ref(output.loss)
            output.loss.backward()
            del output
            assert kept() is None and graph() is None
        finally:
            gc.enable()
