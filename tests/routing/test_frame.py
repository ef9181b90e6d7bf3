"""The frame: one per forward, and per pass through the backbone if a forward makes several."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from helpers import (
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    switch_config,
    switch_layers,
    tiny_bert,
    tokens,
)

pytestmark = pytest.mark.compat


class TwoSentences(nn.Module):
    """Encodes two sentences, one after the other, with one encoder: other tokens, so other decisions."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertModel

        self.encoder = tiny_bert(BertModel, add_pooling_layer=False)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)

    def forward(self, first: dict, second: dict) -> torch.Tensor:
        return (self.encode(**first) * self.encode(**second)).sum(-1)


def sentence(seed: int, lengths: list[int]) -> dict[str, torch.Tensor]:
    batch = padded(lengths, seed=seed)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def siamese(**config) -> nn.Module:
    torch.manual_seed(0)
    targets = r".*encoder\.layer\..*(query|key|value|dense)"
    return randomize_adapter(get_peft_model(TwoSentences(), switch_config(target_modules=targets, **config)))


@pytest.mark.parametrize("lengths", [[5, 3], [7, 7]])  # same shape as the first sentence or not
def test_a_second_pass_takes_its_own_decision(lengths):
    model = siamese().eval()
    first, second = sentence(0, [7, 6]), sentence(1, lengths)
    inner = model.base_model.model
    separately = (inner.encode(**first) * inner.encode(**second)).sum(-1)
    torch.testing.assert_close(model(first, second), separately, rtol=1e-6, atol=1e-6)


def test_statistics_count_every_pass():
    model = siamese().train()
    model(sentence(0, [7, 6]), sentence(1, [5, 3]))
    stats = model.router_stats()
    assert stats["tokens"] == 7 + 6 + 5 + 3


def test_losses_are_those_of_the_tokens_of_all_passes():
    """As if both sentences had gone through in one batch."""
    lengths = [[7, 6], [7, 7]]
    first, second = sentence(0, lengths[0]), sentence(1, lengths[1])

    def router_gradient(coefficient: float, together: bool) -> torch.Tensor:
        model = siamese(router_aux_loss_coef=coefficient, router_z_loss_coef=coefficient / 10).train()
        if together:
            batch = {key: torch.cat([first[key], second[key]]) for key in first}
            hidden = model.base_model.model.encoder(**batch).last_hidden_state.mean(1)
            (hidden[:2] * hidden[2:]).sum().backward()
        else:
            model(first, second).sum().backward()
        return next(g for name, g in adapter_gradients(model).items() if "router" in name)

    auxiliary = [router_gradient(1.0, together) - router_gradient(0.0, together) for together in (True, False)]
    assert auxiliary[0].norm() > 1e-2
    torch.testing.assert_close(auxiliary[1], auxiliary[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("through", ["whole", "inner"])
def test_a_forward_that_fails_leaves_no_routing_behind(error, through):
    from helpers import tiny_llama

    model = adapted(tiny_llama())
    call = model if through == "whole" else model.base_model.model.model
    expected = call(input_ids=tokens(seed=1))[0]

    def fail(*_) -> None:
        raise error

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(input_ids=tokens(seed=0))
    handle.remove()
    for _ in range(2):
        torch.testing.assert_close(call(input_ids=tokens(seed=1))[0], expected, rtol=0, atol=0)


def test_routing_ends_with_its_forward():
    from helpers import tiny_llama

    model = adapted(tiny_llama()).train()
    state = next(iter(switch_layers(model).values())).routing_state
    seen = []
    handle = model.base_model.model.model.layers[1].register_forward_hook(lambda *_: seen.append(state.frame))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(input_ids=tokens())
        assert seen[-1] is not None and state.frame is None
    handle.remove()
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj.*before any routing"):
        model.base_model.model.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, 32))
