"""Decoding with a cache gives the logits of a full forward, whichever way the tokens are found, and wherever the router is.

The reference never caches: one full forward over the finished sequence, in which each token is routed anew.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from generating import CACHES, NEW, check_logits, full_forward, generate, uncached_greedy
from helpers import adapted, padded, switch_layers, tiny_gpt2, tiny_llama, tiny_opt, tokens

ROUTERS = {"first": None, "deeper": "layers.1.self_attn.q_proj", "mlp": "layers.1.mlp.gate_proj"}


def llama(router: str = "first", **config: Any) -> PeftModel:
    model = adapted(tiny_llama(num_hidden_layers=3), router_module=ROUTERS[router], task_type="CAUSAL_LM", **config)
    return model


@pytest.mark.compat
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("cache", CACHES)
def test_each_step_has_the_logits_of_a_full_forward(cache: str, router: str):
    model, prompt = llama(router), tokens(2, 5)
    torch.manual_seed(3)
    out = generate(model, prompt, **CACHES[cache])
    assert out.sequences.shape == (2, 5 + NEW)
    check_logits(model, out, prompt)
    with model.disable_adapter():
        plain = full_forward(model, out.sequences, 5)
    assert (torch.stack(out.logits, dim=1) - plain).abs().max() > 0.1, "the adapter is at work"
    if not CACHES[cache].get("do_sample"):
        assert torch.equal(out.sequences, uncached_greedy(model, prompt))
    else:  # the same seed draws the same tokens, with a cache or without
        torch.manual_seed(3)
        again = generate(model, prompt, **CACHES[cache], use_cache=False)
        assert torch.equal(again.sequences, out.sequences)


@pytest.mark.parametrize("top_k", [1, 4])
def test_other_gates(top_k: int):
    model, prompt = llama("deeper", top_k=top_k), tokens(2, 5)
    check_logits(model, generate(model, prompt), prompt)


@pytest.mark.compat
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
def test_left_padding(make: Any):
    """Each sample of a padded batch decodes as it does alone."""
    model = adapted(make(), task_type="CAUSAL_LM")
    lengths = [6, 2, 4]
    batch = padded(lengths, side="left")
    out = generate(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    steps = torch.stack(out.logits, dim=1)
    for row, length in enumerate(lengths):
        prompt = batch["input_ids"][row : row + 1, -length:]
        alone = generate(model, prompt)
        assert torch.equal(alone.sequences[0], out.sequences[row, -length - NEW :])
        torch.testing.assert_close(torch.stack(alone.logits, dim=1)[0], steps[row], rtol=1e-4, atol=1e-4)
        check_logits(model, alone, prompt)


@pytest.mark.compat
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sample", [False, True])
def test_beam_search(sample: bool, router: str):
    """Beams are reordered with their cache; nothing of the routing may stay with the row."""
    model, prompt = llama(router), tokens(2, 5)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        settings = {"num_beams": 4, "num_return_sequences": 2, "do_sample": sample, "output_scores": True}
        found.append(generate(model, prompt, use_cache=use_cache, **settings))
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, rtol=1e-4, atol=1e-4)
    # the score of a beam is the mean log-probability of its tokens under a full forward
    if not sample:
        sequences = found[0].sequences
        log_probs = full_forward(model, sequences, 5).log_softmax(-1)
        picked = log_probs.gather(-1, sequences[:, 5:, None]).squeeze(-1)
        torch.testing.assert_close(picked.mean(-1), found[0].sequences_scores, rtol=1e-4, atol=1e-4)


SPECULATIVE: dict[str, Any] = {
    "assistant": lambda: {"assistant_model": tiny_llama(seed=3)},
    "good_assistant": lambda: {"assistant_model": tiny_llama(num_hidden_layers=3)},
    "adapted_assistant": lambda: {"assistant_model": adapted(tiny_llama(seed=3), task_type="CAUSAL_LM")},
    "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.compat
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("how", SPECULATIVE)
def test_speculative_decoding(how: str, router: str):
    """Several tokens are checked at once and the cache is cut back: still the same tokens as one by one."""
    model = llama(router)
    prompt = torch.tensor([[7, 8, 9, 11, 7, 8, 9, 11, 7, 8]])
    out = generate(model, prompt, **SPECULATIVE[how](), max_new_tokens=12)
    assert torch.equal(out.sequences, uncached_greedy(model, prompt, 12))
    check_logits(model, out, prompt)


def test_continuous_batching():
    """`generate_batch`: requests of different lengths share forwards of shape (1, tokens), run by another thread."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = llama("deeper")
    prompts = [tokens(1, length, seed=length) for length in (5, 9, 3, 12)]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=16)  # too small for all at once
    out = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts],
        generation_config=settings,
        continuous_batching_config=batching,
        warmup=False,
    )
    wanted = [uncached_greedy(model, prompt)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    assert [result.generated_tokens for result in out.values()] == wanted
    assert all(layer.routing_state.frame is None for layer in switch_layers(model).values())


@pytest.mark.compat
@pytest.mark.parametrize("router", ROUTERS)
def test_cache_by_hand(router: str):
    """A prompt in uneven pieces, one token, several tokens: each piece is routed on its own, and nothing is left over."""
    model, ids = llama(router), tokens(2, 13)
    cache = tf.DynamicCache(config=model.get_base_model().config)
    with torch.no_grad():
        pieces = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([5, 1, 4, 1, 2], dim=1)]
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_inputs_embeds():
    model, prompt = llama("deeper"), tokens(2, 5)
    embeds = model.get_input_embeddings()(prompt)
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(out, uncached_greedy(model, prompt)[:, 5:])


@pytest.mark.compat
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("where", ["router", "later", "head"])
def test_routing_does_not_outlive_a_forward_that_fails(where: str, training: bool):
    model = llama().train(training)
    layers = list(switch_layers(model).values())
    broken = {"router": layers[0], "later": layers[-1], "head": model.get_base_model().lm_head}[where]
    state = layers[0].routing_state
    inside = []

    def fail(module: Any, args: Any, output: Any) -> None:
        inside.append(set(state.frame.routings))
        raise ZeroDivisionError

    handle = broken.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=tokens(), labels=tokens())
    # there was a decision in flight, except where nobody asks for it any more
    assert ("default" in inside[0]) == (where != "head" or training)
    assert state.frame is None
    handle.remove()
    # another batch of another shape is routed afresh
    model.eval()
    prompt = tokens(3, 4)
    check_logits(model, generate(model, prompt), prompt)


@pytest.mark.compat
def test_training_mode_decodes_the_same_tokens():
    """`generate` in the middle of training (as GRPO does) neither adds losses nor depends on the mode."""
    model, prompt = llama(router="deeper"), tokens(2, 5)
    wanted = generate(model, prompt).sequences
    model.train()
    with torch.no_grad():
        assert torch.equal(generate(model, prompt).sequences, wanted)
    assert model.router_stats()["tokens"] == 0, "only forwards that may train are counted"
