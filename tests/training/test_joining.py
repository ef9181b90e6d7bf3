"""Whatever of a forward is differentiated, the router gets the gradient of its losses: once, and scaled as `output.loss` is."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers import HIDDEN, padded, router_layer, tiny_bert, tiny_llama, tokens, without_losses
from joining_tools import (
    AUX,
    FORMS,
    Case,
    Objective,
    Z,
    assert_share,
    definition,
    differentiable,
    make_llama,
    router,
    trained,
    weighted,
)
from trainer_tools import auxiliary_gradient

pytestmark = pytest.mark.compat

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
    case, draw = Case(form, labels, return_dict), random.Random(f"{form} {labels} {return_dict}")
    loss = case.loss_name()
    for _ in range(4):
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
