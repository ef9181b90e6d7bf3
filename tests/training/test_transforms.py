"""Transforms of torch.func over a model in train mode: the router's losses are a term of `output.loss` like any other, nothing
else has a part of them, and nothing outside is written to."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from helpers import HIDDEN, adapter_gradients, padded, router_layer, tiny_llama, tokens, without_losses
from joining_tools import AUX, FORMS, Case, Z, assert_share, definition, router, seen_by_router, trained
from trainer_tools import auxiliary_gradient

pytestmark = pytest.mark.compat
Values = dict[str, torch.Tensor]


def trained_values(model: nn.Module) -> Values:
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


def the_router(values: Values, adapter: str = "default") -> torch.Tensor:
    (found,) = [each for name, each in values.items() if f"loraswitch_router.{adapter}." in name]
    return found


def called(model: nn.Module, values: Values, batch: dict[str, Any]) -> Any:
    return functional_call(model, values, args=(), kwargs=batch)


@pytest.mark.parametrize("return_dict", [True, False], ids=["dict", "tuple"])
@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("checkpointed", "reentrant")])
def test_grad(form, return_dict):
    """torch.func knows no checkpointing."""
    case = Case(form, return_dict=return_dict)

    def objective(values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        loss = called(case.model, values, case.batch)
        loss = loss.loss if return_dict else loss[0]
        return 0.5 * loss, loss

    actual, value = grad(objective, has_aux=True)(trained_values(case.model))
    for model in (case.twin, case.model):
        loss = model(**case.batch)
        loss = loss.loss if return_dict else loss[0]
        (0.5 * loss).backward()
    torch.testing.assert_close(value, loss.detach())
    for adapter in case.adapters:
        task = router(case.twin, adapter).grad
        assert_share(the_router(actual, adapter), task, 0.5 * case.definitions[adapter])
    for name, expected in adapter_gradients(case.model).items():
        assert (actual[name] - expected).norm() <= 1e-5 * max(expected.norm(), 1e-3), name


def test_a_router_that_sees_context():
    """Its losses are of the mean inputs, and its logits are not the weight times the newest token."""
    model, batch = trained(router_decay=0.9), padded([7, 4, 1], seed=3)
    actual = grad(lambda values: called(model, values, batch).loss)(trained_values(model))
    model(**batch).loss.backward()
    twin = without_losses(model)
    twin.zero_grad()
    twin(**batch).loss.backward()
    expected = router(model).grad
    assert (expected - router(twin).grad).norm() > 0.05
    assert (the_router(actual) - expected).norm() < 1e-5 * expected.norm()


def test_vjp_scales_the_losses_with_the_loss_alone():
    case = Case("plain")

    def outputs(values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        output = called(case.model, values, case.batch)
        return output.loss, output.logits

    (loss, logits), pull = vjp(outputs, trained_values(case.model))
    noise = torch.randn(logits.shape)
    output = case.twin(**case.batch)
    weight = router(case.twin)
    for of_loss, of_logits in ((3.0, 0.0), (0.0, 1.0), (-2.0, 1.0)):
        (actual,) = pull((torch.full_like(loss, of_loss), of_logits * noise))
        task = (of_loss * output.loss, (of_logits * noise * output.logits).sum())
        (expected,) = torch.autograd.grad(sum(task), weight, retain_graph=True)
        assert_share(the_router(actual), expected, of_loss * case.definitions["default"])


def test_jacobians_of_logits_have_no_part_of_the_losses():
    case = Case("plain")
    rows = [
        jacrev(lambda values, model=model: called(model, values, case.batch).logits[0, 2, :3])(trained_values(model))
        for model in (case.model, case.twin)
    ]
    assert the_router(rows[0]).norm() > 1e-3
    torch.testing.assert_close(the_router(rows[0]), the_router(rows[1]))


def test_jvp():
    case, found = Case("plain"), []
    direction = torch.randn(4, HIDDEN)
    for model in (case.model, case.twin):
        (name,) = [n for n, _ in model.named_parameters() if "loraswitch_router" in n]
        weight = router(model).detach()
        _, tangent = jvp(lambda w, m=model, n=name: called(m, {n: w}, case.batch).loss, (weight,), (direction,))
        found.append(tangent)
    expected = (case.definitions["default"] * direction).sum()
    assert (found[0] - found[1]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_second_derivatives():
    case, direction, found = Case("plain"), torch.randn(4, HIDDEN), []
    for model in (case.model, case.twin):

        def slope(values: Values, model: nn.Module = model) -> torch.Tensor:
            first = grad(lambda inner: called(model, inner, case.batch).loss)(values)
            return (the_router(first) * direction).sum()

        found.append(the_router(grad(slope)(trained_values(model))))
    step, weight = 1e-4, router(case.model)
    start, sides = weight.detach().clone(), []
    for sign in (1, -1):
        weight.data = start + sign * step * direction
        sides.append(auxiliary_gradient(case.model, seen_by_router(case.model, case.batch), AUX, Z))
    expected = (sides[0] - sides[1]) / (2 * step)
    assert expected.norm() > 0.1
    assert (found[0] - found[1] - expected).norm() <= 1e-2 * expected.norm()


def test_gradients_by_sample():
    """vmap(grad): each sample as if it were alone, its router losses as well."""
    model = trained(tiny_llama(attn_implementation="eager"))
    ids = tokens(3, 6)
    values = trained_values(model)

    def of_sample(values: Values, row: torch.Tensor) -> torch.Tensor:
        return called(model, values, {"input_ids": row[None], "labels": row[None]}).loss

    actual = vmap(grad(of_sample), in_dims=(None, 0))(values, ids)
    for index, row in enumerate(ids):
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for name, expected in adapter_gradients(model).items():
            assert (actual[name][index] - expected).norm() <= 1e-4 * max(expected.norm(), 1e-3), name


def test_without_labels_there_is_a_warning():
    model, batch = trained(), {"input_ids": tokens(2, 5)}

    def objective(values: Values, model: nn.Module) -> torch.Tensor:
        return called(model, values, batch).logits.square().mean()

    with pytest.warns(
        UserWarning, match="torch.func.*returned none.*labels.*router_aux_loss_coef and router_z_loss_coef to 0"
    ):
        actual = grad(objective)(trained_values(model), model)
    twin = without_losses(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = grad(objective)(trained_values(twin), twin)
    torch.testing.assert_close(the_router(actual), the_router(expected))


def test_a_router_that_is_not_differentiated_has_no_losses():
    model, batch = trained(), padded([7, 4])
    values = {name: each for name, each in trained_values(model).items() if "loraswitch_router" not in name}
    router(model).requires_grad_(False)
    _, loss = grad(lambda v: (called(model, v, batch).loss,) * 2, has_aux=True)(values)
    torch.testing.assert_close(loss, without_losses(model)(**batch).loss.detach())


def test_nothing_outside_is_touched():
    """Neither the statistics nor what waits for other micro-batches; the next ordinary step is what it would have been."""
    from accelerate.state import GradientState

    model, batches = trained(), [padded([7, 4], seed=1), padded([3, 6], seed=2), padded([5], seed=3)]
    expected = copy.deepcopy(model)
    for each in (expected, model):
        for index, batch in enumerate(batches):
            GradientState()._set_sync_gradients(index == 2)
            each(**batch).loss.backward()
            if each is model:
                before = {name: buffer.clone() for name, buffer in model.named_buffers()}
                found = the_router(grad(lambda v, b=batch: called(model, v, b).loss)(trained_values(model)))
                twin = without_losses(model)
                twin.zero_grad()
                twin(**batch).loss.backward()
                assert_share(found, router(twin).grad, definition(model, batch))
                for name, buffer in model.named_buffers():
                    assert torch.equal(buffer, before[name]), name
    for name, gradient in adapter_gradients(expected).items():
        assert torch.equal(adapter_gradients(model)[name], gradient), name


def test_losses_of_no_weight_do_not_join():
    """A decision has a point where they join only if there is something to join."""
    points = []
    for model in (trained(), without_losses(trained())):
        layer = router_layer(model)
        decide = layer.decide

        def remember(*args: Any, decide: Any = decide) -> Any:
            routing = decide(*args)
            points.append(routing.join_point)
            return routing

        layer.decide = remember
        model(**padded([7, 4])).loss.backward()
    assert points[0] is not None and points[1] is None
