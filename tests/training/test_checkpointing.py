"""Gradient checkpointing: gradients of router and experts equal those without it, or there is a clear error."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from peft import get_peft_model
from torch import nn

from checkpoint_steps import STEPS, assert_same_gradients, checkpointed, compare, lm_batch, two_in_reverse
from helpers import (
    adapted,
    adapter_gradients,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
    tokens,
)

DEEP = 3  # blocks: one before, one with and one after a router in the middle
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


@REENTRANT
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.compat
def test_gradients_equal_those_without_checkpointing(step, reentrant):
    compare(lambda: adapted(tiny_llama(num_hidden_layers=DEEP)), step, reentrant)


def llama_deep_router() -> nn.Module:
    return adapted(tiny_llama(num_hidden_layers=DEEP), router_module="layers.1.mlp.gate_proj")


def llama_two_adapters() -> nn.Module:
    model = adapted(tiny_llama())
    torch.manual_seed(2)
    model.add_adapter("other", switch_config(num_experts=3, top_k=1, r=2))
    model.base_model.set_adapter(["default", "other"])
    return randomize_adapter(model)


def opt_project_in() -> nn.Module:
    """The router sits outside of every block, before them."""
    model = adapted(tiny_opt(word_embed_proj_dim=16), target_modules=["project_in", "q_proj", "fc1", "fc2"])
    assert len([name for name in switch_layers(model) if "project_in" in name]) == 1
    return model


def noisy_llama() -> nn.Module:
    return adapted(tiny_llama(attention_dropout=0.2), lora_dropout=0.3, router_jitter=0.2)


MODELS = {
    "deep_router": llama_deep_router,
    "two_adapters": llama_two_adapters,
    "opt": lambda: adapted(tiny_opt()),
    "opt_project_in": opt_project_in,
    "gpt2": lambda: adapted(tiny_gpt2()),
    "jitter_and_dropout": noisy_llama,
    "untrained_experts": lambda: get_peft_model(tiny_llama(), switch_config()),
    "top_1": lambda: adapted(tiny_llama(), top_k=1),
}


@REENTRANT
@pytest.mark.parametrize("name", MODELS)
def test_models(name, reentrant):
    compare(MODELS[name], two_in_reverse, reentrant)


@REENTRANT
def test_frozen_router(reentrant):
    """Experts train under a router that does not."""

    def freeze(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            if "loraswitch_router" in name:
                parameter.requires_grad_(False)
        return model.train()

    plain = freeze(adapted(tiny_llama()))
    recomputing = freeze(checkpointed(adapted(tiny_llama()), reentrant))
    for model in (plain, recomputing):
        two_in_reverse(model)
    expected, actual = adapter_gradients(plain), adapter_gradients(recomputing)
    assert expected.keys() == actual.keys() and not any("router" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


@REENTRANT
@pytest.mark.parametrize("kind", ["sequence", "token", "llama_sequence"])
def test_classifiers(kind, reentrant):
    from transformers import BertForSequenceClassification, BertForTokenClassification

    def make() -> nn.Module:
        if kind == "llama_sequence":
            return adapted(tiny_llama_classifier(), modules_to_save=["score"])
        model_class = BertForSequenceClassification if kind == "sequence" else BertForTokenClassification
        return adapted(tiny_bert(model_class), exclude_modules=["classifier"])

    def step(model: nn.Module) -> None:
        batch = lm_batch()
        batch["labels"] = batch["labels"] % 3 if kind == "token" else torch.tensor([0, 2])
        model(**batch).loss.backward()

    compare(make, step, reentrant)


@REENTRANT
@pytest.mark.parametrize("every", [2, 3])
def test_every_n_layers(every, reentrant):
    """Some blocks run again and some do not: the router must sum up what both kinds send."""
    compare(lambda: adapted(tiny_llama(num_hidden_layers=4)), two_in_reverse, reentrant, every_n_layers=every)


@REENTRANT
def test_router_in_a_block_that_is_not_checkpointed(reentrant):
    make = lambda: adapted(tiny_llama(num_hidden_layers=4), router_module="layers.1.self_attn.q_proj")  # noqa: E731
    compare(make, two_in_reverse, reentrant, every_n_layers=2)


def test_reentrant_with_inputs_that_need_no_gradient_is_refused():
    """Torch only warns, and the router would train on the auxiliary losses alone."""
    model = adapted(tiny_llama(num_hidden_layers=4)).train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    model.base_model.model.disable_input_require_grads()
    with pytest.raises(RuntimeError, match="enable_input_require_grads"):
        model(**lm_batch()).loss.backward()


def test_checkpointing_switched_on_and_off_between_steps():
    plain, changing = adapted(tiny_llama()).train(), adapted(tiny_llama()).train()
    for seed, reentrant in enumerate((None, False, None, True)):
        if reentrant is None:
            changing.base_model.model.activation_checkpointing_disable()
        else:
            checkpointed(changing, reentrant)
        for model in (plain, changing):
            model(**lm_batch(seed=seed)).loss.backward()
    assert_same_gradients(plain, changing)


@REENTRANT
def test_adapter_switched_before_backward(reentrant):
    """The recomputation sees the adapter of its forward... or torch refuses; never another adapter's gradient."""
    model = checkpointed(llama_two_adapters(), reentrant).train()
    model.set_adapter("default")
    expected = llama_two_adapters().train()
    expected.set_adapter("default")
    expected(**lm_batch()).loss.backward()
    loss = model(**lm_batch()).loss
    model.set_adapter("other")
    try:
        loss.backward()
    except RuntimeError:
        return
    assert_same_gradients(expected, model)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Plain(nn.Module):
    """A model that calls `torch.utils.checkpoint` itself, on blocks `first` and later ones."""

    def __init__(self, first: int = 0, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.first, self.reentrant = first, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if self.reentrant is None or index < self.first:
                x = block(x)
            else:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def plain_gradients(first: int, reentrant: bool | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(Plain(first, reentrant), switch_config(target_modules=["up", "down"]))
    randomize_adapter(model).train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    model(x).square().mean().backward()
    return adapter_gradients(model)


@REENTRANT
@pytest.mark.parametrize("first", [0, 1])
def test_checkpoint_called_by_the_model_itself(first, reentrant):
    """Right, or an error that says what to do; never silently wrong."""
    expected = plain_gradients(first, None)
    try:
        actual = plain_gradients(first, reentrant)
    except RuntimeError as error:
        assert "checkpoint" in str(error)
        return
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@REENTRANT
def test_checkpoint_around_the_whole_model(reentrant):
    model = adapted(tiny_llama()).train()
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=tokens()).loss.backward()
    expected = adapter_gradients(model)
    model.zero_grad()

    def run(inputs_embeds: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=inputs_embeds, labels=tokens()).loss

    torch.utils.checkpoint.checkpoint(run, embedded, use_reentrant=reentrant).backward()
    actual = adapter_gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_nothing_is_kept_after_the_forward(reentrant):
    """Without any garbage collection: the decision is freed with the graph, even if backward never runs."""
    from peft_loraswitch.routing.frame import RoutingFrame

    frames: list[weakref.ref] = []
    original = RoutingFrame.__init__

    def remember(self: RoutingFrame, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        frames.append(weakref.ref(self))

    model = adapted(tiny_llama()).train()
    if reentrant is not None:
        checkpointed(model, reentrant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutingFrame, "__init__", remember)
        gc.collect()
        gc.disable()
        try:
            for backward in (True, False):
                hidden: list[weakref.ref] = []
                handle = model.base_model.model.model.layers[0].input_layernorm.register_forward_hook(
                    lambda module, args, output, hidden=hidden: hidden.append(weakref.ref(output))
                )
                loss = model(**lm_batch()).loss
                if backward:
                    loss.backward()
                handle.remove()
                del loss
                assert frames and all(frame() is None for frame in frames), backward
                assert hidden and all(tensor() is None for tensor in hidden), backward
        finally:
            gc.enable()


@REENTRANT
def test_deepcopy_after_a_training_forward(reentrant):
    model = checkpointed(adapted(tiny_llama()), reentrant).train()
    loss = model(**lm_batch()).loss
    clone = copy.deepcopy(model)
    assert not any(module.routing_state.frame for module in switch_layers(clone).values())
    clone(**lm_batch()).loss.backward()
    loss.backward()
    assert_same_gradients(model, clone)
    # and the copy is one of its own: nothing it does reaches the original
    states = {id(layer.routing_state) for layer in switch_layers(clone).values()}
    assert len(states) == 1 and states.isdisjoint(id(layer.routing_state) for layer in switch_layers(model).values())
    before = model.base_model.router_stats()["tokens"]
    clone(**lm_batch())
    assert model.base_model.router_stats()["tokens"] == before


def test_an_error_in_a_block_leaves_no_routing_behind():
    model = adapted(tiny_llama())
    expected = model(input_ids=tokens(seed=1)).logits

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt  # not an Exception: always_call hooks do not run for it

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens(seed=0))
    handle.remove()
    torch.testing.assert_close(model(input_ids=tokens(seed=1)).logits, expected, rtol=0, atol=0)
