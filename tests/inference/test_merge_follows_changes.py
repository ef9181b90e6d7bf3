"""Strategy "merge" when something changes after `fuse_for_inference()`: as unfused, or an error, never something in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from changes_of_weights import (
    CHANGES,
    another_base_layer,
    another_kind_of_base_layer,
    another_scaling,
    assigned,
    hook_on_base_layer,
    in_place,
    made,
    moved,
    weight_put_into_a_dictionary,
)
from fusing import close, ids, logits

REPLACED = [moved, another_base_layer, another_kind_of_base_layer]  # weights of the backbone


def experts_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loraswitch_A" in name or "loraswitch_B" in name:
                parameter.mul_(1.1)


@pytest.mark.parametrize("change", [*CHANGES, weight_put_into_a_dictionary, experts_in_place])
@pytest.mark.parametrize("prompt", [1, 5])
def test_what_is_changed_is_seen_from_pristine_weights(change, prompt):
    model = made()
    token, tokens = ids(1, 1, "cpu"), ids(1, prompt, "cpu")
    model.fuse_for_inference("merge")
    logits(model, token)
    change(model)
    found = [logits(model, tokens), logits(model, token), logits(model, token)]
    model.unfuse()
    for result, each in zip(found, (tokens, token, token), strict=True):
        assert close(result, logits(model, each), 1e-4)


@pytest.mark.parametrize(
    "change", [c for c in (*CHANGES, experts_in_place) if c not in (*REPLACED, in_place, assigned)]
)
@pytest.mark.parametrize("prompt", [1, 5])
def test_what_is_changed_is_seen_in_place(change, prompt):
    model = made()
    pristine = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    token, tokens = ids(1, 1, "cpu"), ids(1, prompt, "cpu")
    model.fuse_for_inference("merge", in_place=True)
    logits(model, token)
    change(model)
    found = [logits(model, tokens), logits(model, token), logits(model, token)]
    model.unfuse()
    assert all(torch.equal(p, pristine[n]) for n, p in model.named_parameters() if n in pristine)
    for result, each in zip(found, (tokens, token, token), strict=True):
        assert close(result, logits(model, each), 1e-4)


@pytest.mark.parametrize("change", REPLACED)
@pytest.mark.parametrize("prompt", [1, 5])
def test_weights_that_hold_experts_must_not_be_replaced(change, prompt):
    model = made()
    model.fuse_for_inference("merge", in_place=True)
    logits(model, ids(1, 1, "cpu"))
    change(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was replaced while experts were merged into it.*unfuse"):
            logits(model, ids(1, prompt, "cpu"))
    model.unfuse()
    logits(model, ids(1, 1, "cpu"))


@pytest.mark.parametrize("merged_in_place", [False, True])
def test_what_cannot_be_merged_any_more_goes_unmerged_with_one_warning(merged_in_place, caplog):
    model = made()
    token = ids(1, 1, "cpu")
    model.fuse_for_inference("merge", in_place=merged_in_place)
    logits(model, token)
    hook_on_base_layer(model)
    hooked = model.base_model.model.model.layers[1].self_attn.v_proj.base_layer
    for _ in range(3):
        logits(model, token)
    hooked._forward_hooks.clear()
    merged = logits(model, token)
    model.unfuse()
    assert close(merged, logits(model, token), 1e-4)
    assert caplog.text.count("nothing is merged now: strategy='merge' needs plain") == 1


def test_changes_seen_by_a_forward_in_inference_mode_serve_others():
    model = made()
    token = ids(1, 1, "cpu")
    model.fuse_for_inference("merge", in_place=True)
    logits(model, token)
    another_scaling(model)
    with torch.inference_mode():
        first = model(input_ids=token).logits.clone()
    assert close(logits(model, token), first)


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_merged_in_place_moves_without_experts(dtype, prompt):
    model = made()
    token, tokens = ids(1, 1, "cpu"), ids(1, prompt, "cpu")
    weights = {n: p.to(dtype) for n, p in model.named_parameters()}
    model.fuse_for_inference("merge", in_place=True)
    logits(model, token)
    model.to(dtype)
    found = [logits(model, tokens), logits(model, token)]
    model.unfuse()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    for result, each in zip(found, (tokens, token), strict=True):
        assert close(result.double(), logits(model, each).double(), 0.03 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("merge_again", [False, True])
def test_loaded_weights_are_kept_by_a_model_merged_in_place(merge_again, assign):
    model = made()
    token = ids(1, 1, "cpu")
    state = {name: value * 1.25 for name, value in model.state_dict().items()}
    model.fuse_for_inference("merge", in_place=True)
    logits(model, token)
    model.load_state_dict(state, assign=assign)
    if merge_again:
        merged = logits(model, token)
    model.unfuse()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not merge_again or close(merged, logits(model, token), 1e-4)


def test_a_copy_of_a_model_merged_in_place_is_on_its_own():
    model = made()
    token = ids(1, 1, "cpu")
    pristine = {n: p.clone() for n, p in model.named_parameters()}
    model.fuse_for_inference("merge", in_place=True)
    expected = logits(model, token)
    twin = copy.deepcopy(model)
    another_scaling(twin)
    twin.load_state_dict({name: value for name, value in pristine.items() if "base_layer" in name}, strict=False)
    found = logits(twin, token)
    assert close(logits(model, token), expected) and not close(found, expected)
    for each in (twin, model):
        each.unfuse()
        assert all(torch.equal(p, pristine[n]) for n, p in each.named_parameters())
    assert close(found, logits(twin, token), 1e-4)
