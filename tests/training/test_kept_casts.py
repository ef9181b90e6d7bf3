"""The weights that a checkpointed block has cast in its first run are those of its second and of its backward
(`group_layout.KeptByBlock`), and so are the hidden and the gated hidden: made once where they are small, twice where they are
large, gone as backward goes on."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch

from checkpoint_steps import checkpointed, lm_batch
from helpers import adapted, adapter_gradients, tiny_llama
from peft_loraswitch.training import fast_linears, group_function, group_layout
from peft_loraswitch.training.pair_products import forced

BLOCKS, GROUPS = 3, 4  # q k v, o, gate up, down


@pytest.fixture
def made(monkeypatch) -> list[weakref.ref]:
    """The memory of all weights that were cast, in order."""
    memories: list[weakref.ref] = []
    init = group_layout.Casts.__init__

    def remember(self: Any, a: Any, b: Any, spec: Any, memory: Any = None) -> None:
        init(self, a, b, spec, memory)
        if memory is None:
            memories.append(weakref.ref(self.memory))

    monkeypatch.setattr(group_layout.Casts, "__init__", remember)
    return memories


@pytest.fixture
def hidden(monkeypatch) -> list[weakref.ref]:
    """The hidden of each group that was computed, in order."""
    found: list[weakref.ref] = []
    compute = group_function._hidden

    def remember(*args: Any) -> torch.Tensor:
        result = compute(*args)
        found.append(weakref.ref(result))
        return result

    monkeypatch.setattr(group_function, "_hidden", remember)
    return found


@pytest.fixture
def gated(monkeypatch) -> list[weakref.ref]:
    """The gated hidden of each group that a forward computed, in order."""
    found: list[weakref.ref] = []
    compute = group_function.gate

    def remember(*args: Any) -> torch.Tensor:
        result = compute(*args)
        found.append(weakref.ref(result))
        return result

    monkeypatch.setattr(group_function, "gate", remember)
    return found


def model_of(reentrant: bool | None) -> Any:
    model = adapted(tiny_llama(num_hidden_layers=BLOCKS), target_modules="all-linear", num_experts=4, top_k=2).train()
    return model if reentrant is None else checkpointed(model, reentrant)


def loss_of(model: Any) -> torch.Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        return model(**lm_batch()).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: each.clone() for name, each in adapter_gradients(model).items()}


def alive(made: list[weakref.ref]) -> int:
    return sum(each() is not None for each in made)


@pytest.mark.parametrize(
    "reentrant, limit, times",
    [(None, 2**24, 1), (False, 2**24, 1), (False, 0, 2), (True, 2**24, 2)],
    ids=["not-checkpointed", "small", "large", "reentrant"],
)
def test_weights_are_cast_once_where_they_are_small(reentrant, limit, times, made, monkeypatch):
    """With the same bits, and nothing is left of them after backward, although the loss is still there."""
    monkeypatch.setattr(group_layout, "KEPT_BYTES", limit)
    model = model_of(reentrant)
    gradients(model)  # the last group of each block is known after it
    made.clear()
    loss = loss_of(model)
    kept = 0 if reentrant or not limit else BLOCKS * GROUPS
    assert alive(made) == kept
    loss.backward()
    assert len(made) == times * BLOCKS * GROUPS and alive(made) == 0
    monkeypatch.setattr(group_layout, "KEPT_BYTES", 0)
    actual = adapter_gradients(model)
    for name, expected in gradients(copy.deepcopy(model)).items():
        torch.testing.assert_close(actual[name], expected, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("share, times", [(8.0, 1), (0.0, 2)], ids=["small", "large"])
@pytest.mark.parametrize("twice", [False, True], ids=["one-backward", "two-backwards"])
def test_the_hidden_is_computed_once_where_it_is_small(share, times, twice, hidden, monkeypatch):
    """With the same bits, and nothing is left of it after backward. A second backward computes it anew."""
    model = model_of(False)
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", 0.0)
    gradients(model)
    expected = gradients(model)
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", share)
    hidden.clear()
    loss = loss_of(model)
    assert len(hidden) == BLOCKS * GROUPS and alive(hidden) == (BLOCKS * GROUPS if share else 0)
    loss.backward(retain_graph=twice)
    assert len(hidden) == times * BLOCKS * GROUPS and alive(hidden) == 0
    if twice:
        model.zero_grad()
        loss.backward()
        assert len(hidden) == (times + 1) * BLOCKS * GROUPS and alive(hidden) == 0
    for name, actual in adapter_gradients(model).items():
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "share, limit, kept",
    [(8.0, 2**20, GROUPS - 1), (8.0, 0, 0), (0.0, 2**20, 0)],
    ids=["small", "large", "without-the-hidden"],
)
def test_the_gates_are_applied_once_where_the_hidden_is_small(share, limit, kept, gated, monkeypatch):
    """The last group of a block needs no gated hidden in the second run."""
    model = model_of(False)
    monkeypatch.setattr(group_layout, "KEPT_GATED_BYTES", 0)
    gradients(model)
    expected = gradients(model)
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", share)
    monkeypatch.setattr(group_layout, "KEPT_GATED_BYTES", limit)
    gated.clear()
    loss = loss_of(model)
    assert len(gated) == BLOCKS * GROUPS and alive(gated) == BLOCKS * kept
    loss.backward()
    assert len(gated) == BLOCKS * (GROUPS + GROUPS - 1 - kept) and alive(gated) == 0
    for name, actual in adapter_gradients(model).items():
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("pairs", [False, True], ids=["all-experts", "by-pairs"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gradients_with_all_that_is_kept_equal_those_without(device, pairs, hidden, gated, monkeypatch):
    model = model_of(False).to(device)
    batch = {key: value.to(device) for key, value in lm_batch().items()}

    def results() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16), forced(pairs):
            loss = model(**batch).loss
            with torch.autocast(device, enabled=False):
                loss.backward()
        return {name: each.clone() for name, each in adapter_gradients(model).items()}

    results()
    for name in ("KEPT_HIDDEN", "KEPT_GATED_BYTES", "KEPT_BYTES"):
        monkeypatch.setattr(group_layout, name, 0)
    expected, without = results(), len(hidden)
    for name in ("KEPT_HIDDEN", "KEPT_GATED_BYTES", "KEPT_BYTES"):
        monkeypatch.setattr(group_layout, name, 2**24)
    hidden.clear()
    actual = results()
    assert len(hidden) == BLOCKS * GROUPS < without and bool(gated) != pairs
    for name, exact in expected.items():  # attention on a GPU need not give the same bits twice
        assert (actual[name] - exact).norm() <= (0.02 if device == "cuda" else 0) * exact.norm(), name


@pytest.mark.parametrize("share", [8.0, 0.0], ids=["small", "large"])
def test_a_group_that_a_block_calls_twice_has_two(share, monkeypatch):
    """The mlp of each block runs on its own result once more: backward takes the hidden of the right call."""
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", share)
    model, plain = model_of(False), model_of(None)
    for each in (model, plain):
        for block in each.base_model.model.model.layers:
            forward = block.mlp.forward
            block.mlp.forward = lambda x, forward=forward: forward(forward(x).tanh())
    for _ in range(2):
        model.zero_grad()
        model(**lm_batch()).loss.backward()  # float32
    with fast_linears.plain():
        plain(**lm_batch()).loss.backward()
    actual = adapter_gradients(model)
    for name, exact in adapter_gradients(plain).items():
        assert (actual[name] - exact).norm() < 1e-4 * exact.norm(), name


def test_backward_finds_no_block_any_more(monkeypatch):
    """Backward makes it all from what autograd has kept, and from the weights."""
    model = model_of(False)
    gradients(model)
    expected = gradients(model)
    loss = loss_of(model)
    backward = group_function._Group.backward

    def without(ctx: Any, *d_outputs: Any) -> Any:
        ctx.call.block = lambda: None
        return backward(ctx, *d_outputs)

    monkeypatch.setattr(group_function._Group, "backward", staticmethod(without))
    loss.backward()
    for name, actual in adapter_gradients(model).items():
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_memory_goes_block_by_block(made):
    model = model_of(False)
    gradients(model)
    made.clear()
    counts: list[int] = []
    for block in model.base_model.model.model.layers:
        block.register_full_backward_hook(lambda *_: counts.append(alive(made)))
    loss_of(model).backward()
    assert len(counts) == BLOCKS
    assert counts[0] > counts[1] > counts[2]


def test_backward_is_that_of_the_weights_that_the_forward_saw():
    """FSDP frees and fills them in between; whatever is there, gradients are those of this forward."""
    model = model_of(False)
    gradients(model)
    expected = gradients(model)
    loss = loss_of(model)
    experts = [p for name, p in model.named_parameters() if "loraswitch_A" in name or "loraswitch_B" in name]
    assert experts
    for parameter in experts:
        parameter.data.zero_()
    loss.backward()
    for name, actual in adapter_gradients(model).items():
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def gradients_of_changed(change: str, autocast: bool, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Of a forward with experts of which the parts `change` ("A", "B", "AB" or "") are written to before backward."""
    model, batch = model_of(False).to(device), {key: value.to(device) for key, value in lm_batch().items()}
    for _ in range(2):  # the last group of each block is known after the first forward
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
    for name, parameter in model.named_parameters():
        if any(f"loraswitch_{part}." in name for part in change):
            parameter.data.mul_(3)
    loss.backward()
    return {name: each.clone() for name, each in adapter_gradients(model).items()}


@pytest.mark.parametrize("change", ["A", "B", "AB"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_what_is_written_between_forward_and_backward_changes_nothing_where_weights_are_kept(
    device, autocast, change, monkeypatch
):
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", 8.0)
    actual = gradients_of_changed(change, autocast, device)
    for name, exact in gradients_of_changed("", autocast, device).items():
        bound = 0.02 if device == "cuda" else 0  # attention on a GPU need not give the same bits twice
        assert (actual[name] - exact).norm() <= bound * exact.norm(), name


@pytest.mark.parametrize("change", ["A", "B", "AB"])
def test_it_changes_what_it_changes_in_the_plain_form_where_weights_are_too_large_to_keep(change, monkeypatch):
    monkeypatch.setattr(group_layout, "KEPT_BYTES", 0)
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", 8.0)
    actual, unchanged = gradients_of_changed(change, False), gradients_of_changed("", False)
    with fast_linears.plain():
        expected = gradients_of_changed(change, False)
    moved = [(actual[name] - each).norm() > 0.1 * each.norm() for name, each in unchanged.items()]
    assert any(moved)
    for name, exact in expected.items():
        assert (actual[name] - exact).norm() < 1e-4 * exact.norm(), name


@pytest.mark.parametrize("change", ["A", "B", "AB"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kept", [0, 1, 2], ids=["none", "o", "o-and-down"])
def test_no_hidden_is_kept_that_the_second_run_need_not_have(kept, autocast, change, monkeypatch):
    """Behind a group whose weights are too large to keep, inputs may be others in the second run. Same bits as without."""
    init = group_layout.Layout.__init__
    sizes: set[int] = {0}

    def remember(self: Any, *args: Any) -> None:
        init(self, *args)
        sizes.add(self.bytes)

    monkeypatch.setattr(group_layout.Layout, "__init__", remember)
    gradients_of_changed("", autocast)
    assert len(sizes) == 4  # q k v and gate up have the same
    monkeypatch.setattr(group_layout, "KEPT_BYTES", sorted(sizes)[kept])
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", 0.0)
    expected = gradients_of_changed(change, autocast)
    monkeypatch.setattr(group_layout, "KEPT_HIDDEN", 8.0)
    actual = gradients_of_changed(change, autocast)
    for name, exact in expected.items():
        torch.testing.assert_close(actual[name], exact, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_backward_twice_from_one_forward():
    model = model_of(False)
    expected = gradients(model)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, actual in adapter_gradients(model).items():
        torch.testing.assert_close(actual, 2 * expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_experts_that_are_frozen_change_nothing_for_the_router(reentrant):
    model = model_of(reentrant)
    gradients(model)
    expected = gradients(model)
    for name, parameter in model.named_parameters():
        if "loraswitch_A" in name or "loraswitch_B" in name:
            parameter.requires_grad_(False)
    actual = gradients(model)
    assert len(actual) == 1 and all("router" in name for name in actual)
    for name, gradient in actual.items():
        assert gradient.norm() > 1e-4
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def model_that_trains(device: str = "cpu") -> Any:
    """Without checkpointing; groups are known."""
    model = model_of(None).to(device)
    gradients(model)
    return model


@pytest.mark.parametrize("change", ["A", "B", "AB"])
def test_without_checkpointing_backward_goes_by_the_weights_of_the_forward(change):
    """Also where a write cannot be seen. The next forward goes by what is there then."""
    model = model_that_trains()
    expected = gradients(model)
    loss = loss_of(model)
    experts = [p for n, p in model.named_parameters() if any(f"loraswitch_{part}." in n for part in change)]
    for each in experts:
        each.data.mul_(3)
    loss.backward()
    for name, actual in adapter_gradients(model).items():
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    changed = gradients(model)
    for name, each in gradients(copy.deepcopy(model)).items():
        torch.testing.assert_close(changed[name], each, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert any((changed[name] - each).norm() > 0.1 * each.norm() for name, each in expected.items())


@pytest.mark.parametrize("how", ["in place", "data", "another parameter", "state dict"])
def test_without_checkpointing_each_forward_of_a_step_takes_the_weights_that_are_there(how):
    """Two forwards, of which the second has other weights, before the backward of either."""
    model, other = model_that_trains(), model_that_trains()
    first = gradients(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "loraswitch_B" in name:
                parameter.mul_(-2)
    second = gradients(other)
    loss = loss_of(model)
    found = {}
    if how == "in place":  # seen by autograd, so it has to come behind the backward
        loss.backward()
        found = {name: each.clone() for name, each in adapter_gradients(model).items()}
    for module in [m for name, m in model.named_modules() if name.endswith("loraswitch_B.default")]:
        if how == "in place":
            with torch.no_grad():
                module.weight.mul_(-2)
        elif how == "data":
            module.weight.data = module.weight.data * -2
        elif how == "another parameter":
            module.weight = torch.nn.Parameter(module.weight.detach() * -2)
        else:
            module.load_state_dict({"weight": module.weight.detach() * -2}, assign=True)
            module.weight.requires_grad_()
    again = loss_of(model)
    again.backward()
    for name, actual in adapter_gradients(model).items():
        torch.testing.assert_close(actual, second[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    if not found:
        model.zero_grad()
        loss.backward()
        found = {name: each for name, each in adapter_gradients(model).items() if "loraswitch_A" in name}
    for name, actual in found.items():
        torch.testing.assert_close(actual, first[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
