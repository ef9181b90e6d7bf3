"""The router's losses join once over several forwards and backward calls, and keep their precision; second derivatives too."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from helpers import HIDDEN, padded, switch_layers, tokens, without_losses
from joining_tools import (
    AUX,
    Case,
    Objective,
    Z,
    assert_share,
    checkpointed,
    definition,
    plain,
    router,
    seen_by_router,
    trained,
)
from trainer_tools import auxiliary_gradient

pytestmark = pytest.mark.compat

# ------------------------------------------------------------------------- several forwards, several backward calls


@pytest.mark.parametrize("first, second", list(itertools.product(["loss", "logits", "both"], repeat=2)))
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
    """But for the router's input, once a forward, where nothing else keeps it as it is: the experts see it behind a dropout, and
    the router multiplies it in float32."""
    model = trained(lora_dropout=dropout).to(dtype)
    twin, batch = without_losses(model), {"input_ids": tokens(4, 64)}
    activations = 4 * 64 * HIDDEN * dtype.itemsize
    extra = saved_for_backward(model, batch) - saved_for_backward(twin, batch)
    own = activations if dropout and dtype != torch.float32 else 0
    assert extra < own + activations / 2


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
