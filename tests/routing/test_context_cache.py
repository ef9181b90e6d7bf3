"""router_decay with a KV cache: cached and full decoding agree, whatever is done to the cache."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from generating import CACHES, check_logits, generate, uncached_greedy
from helpers import LAYERS, adapted, padded, randomize_adapter, switch_config, tiny_llama, tokens
from peft_loraswitch import add_expert, remove_expert
from peft_loraswitch.routing.cached_sums import DynamicSums, StaticSums, sums_of

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DECAY = 0.9


@pytest.fixture
def model():
    return adapted(tiny_llama(), router_decay=DECAY)


def hybrid(**overrides):
    """Sliding and full attention in turn, and a window that is full after 4 tokens."""
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**{**settings, **overrides})).eval()


def step(model, ids, past=None, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=past, use_cache=True, **inputs)


def full(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


def in_parts(model, ids, lengths, past=None):
    found = []
    for part in ids.split(lengths, dim=1):
        out = step(model, part, past)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1), past


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 1, 3], [8, 1]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "model's own", "static", "lazy"])
@pytest.mark.parametrize(
    "config", [{}, {"router_module": "layers.1.self_attn.v_proj"}, {"target_modules": ["down_proj"]}], ids=str
)
def test_cached_equals_full(kind, lengths, config):
    model = adapted(tiny_llama(), router_decay=DECAY, **config)
    ids = tokens(2, 9)
    past = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "model's own": lambda: None,
        "static": lambda: StaticCache(config=model.config, max_cache_len=12),
        "lazy": DynamicCache,
    }[kind]()
    found, past = in_parts(model, ids, lengths, past)
    torch.testing.assert_close(found, full(model, ids), **CLOSE)
    assert [type(layer) for layer in past.layers[LAYERS:]] == [StaticSums if kind == "static" else DynamicSums]
    assert past.get_seq_length() == 9


def test_the_state_is_needed(model):
    """What the other tests compare would differ without it."""
    ids = tokens(2, 9)
    out = step(model, ids[:, :8])
    expected = full(model, ids)[:, 8:]
    torch.testing.assert_close(step(model, ids[:, 8:], copy.deepcopy(out.past_key_values)).logits, expected, **CLOSE)
    sums_of(out.past_key_values, "default").keys.zero_()
    assert (step(model, ids[:, 8:], out.past_key_values).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, side):
    batch = padded([8, 5], side="left")
    following, mask = tokens(2, 3, seed=5), batch["attention_mask"]
    if side == "right":  # padding within the sequence, after the prompt
        mask = mask.flip(1)
    ids = torch.cat([batch["input_ids"], following], 1)
    whole = torch.cat([mask, torch.ones_like(following)], 1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)
    expected = full(model, ids, attention_mask=whole, position_ids=positions)
    for past in (None, StaticCache(config=model.config, max_cache_len=16)):
        found = [step(model, ids[:, :8], past, attention_mask=mask, position_ids=positions[:, :8])]
        past = found[0].past_key_values
        for t in range(8, 11):
            inputs = {"attention_mask": whole[:, : t + 1], "position_ids": positions[:, t : t + 1]}
            found.append(step(model, ids[:, t : t + 1], past, **inputs))
        logits = torch.cat([out.logits for out in found], 1)
        torch.testing.assert_close(logits[whole.bool()], expected[whole.bool()], **CLOSE)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("backbone", [tiny_llama, hybrid])
def test_generate(backbone, name):
    model = adapted(backbone(), router_decay=DECAY)
    prompt = tokens(2, 6)
    check_logits(model, generate(model, prompt, **CACHES[name]), prompt)


def test_generate_with_padding():
    model = adapted(tiny_llama(), router_decay=DECAY)
    batch = padded([7, 4], side="left")
    alone = generate(model, batch["input_ids"][1:, 3:]).sequences[:, 4:]
    for settings in ({}, CACHES["static"]):
        out = generate(model, batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
        assert torch.equal(out.sequences[1:, 7:], alone)


@pytest.mark.parametrize("settings", [{}, CACHES["static"]], ids=["dynamic", "static"])
def test_beams(model, settings):
    prompt = tokens(2, 6)
    expected = generate(model, prompt, num_beams=3, use_cache=False).sequences
    assert torch.equal(generate(model, prompt, num_beams=3, **settings).sequences, expected)


@pytest.mark.parametrize("backbone", [tiny_llama, hybrid])
def test_assisted_decoding(backbone):
    model, assistant = adapted(backbone(), router_decay=DECAY), tiny_llama(seed=3)
    prompt = tokens(1, 6)
    expected = uncached_greedy(model, prompt)
    assert torch.equal(generate(model, prompt, assistant_model=assistant).sequences, expected)
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3).sequences, expected)


def test_crop_goes_back_to_any_token(model):
    ids, other = tokens(2, 9), tokens(2, 9, seed=4)
    other[:, :5] = ids[:, :5]
    past = step(model, ids).past_key_values
    past.crop(-4)
    torch.testing.assert_close(step(model, other[:, 5:], past).logits, full(model, other)[:, 5:], **CLOSE)


def test_cropped_to_nothing_it_begins_anew(model):
    """Whatever it held, and whoever has filled it."""
    past = step(model, tokens(2, 9, seed=4)).past_key_values
    for _ in range(2):
        past.crop(-past.get_seq_length())
        found, _ = in_parts(model, tokens(2, 9), [5, 1, 3], past)
        torch.testing.assert_close(found, full(model, tokens(2, 9)), **CLOSE)
        with model.disable_adapter():
            step(model, tokens(2, 1), past)
    past.crop(-9)
    with pytest.raises(ValueError, match="has not seen"):  # one token is left
        step(model, tokens(2, 1), past)
    assert len(past.layers) == LAYERS + 1


@pytest.mark.parametrize("place", ["q_proj", "k_proj"])
@pytest.mark.parametrize("static", [False, True])
def test_the_tokens_of_a_forward_that_fails_are_offered_again(model, static, place):
    """At the router or behind it, before the model has written its first keys."""
    past = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    ids, found = tokens(2, 9), []

    def fail(*args):
        raise RuntimeError("out of memory")

    for part in ids.split([4, 2, 1, 2], dim=1):
        handle = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{place}").register_forward_hook(fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                step(model, part, past)
        handle.remove()
        found.append(step(model, part, past).logits)
    torch.testing.assert_close(torch.cat(found, 1), full(model, ids), **CLOSE)


@pytest.mark.parametrize("static", [False, True])
def test_a_step_that_is_padding_leaves_the_sums(model, static):
    past = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:7] = 0
    for start, end in ((0, 4), (4, 5), (5, 7)):
        before = None if start == 0 else sums_of(past, "default").last().clone()
        positions = (mask[:, :end].cumsum(-1) - 1)[:, start:]
        step(model, tokens(2, 9)[:, start:end], past, attention_mask=mask[:, :end], position_ids=positions)
        if before is not None:
            after = sums_of(past, "default").last()
            assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_selected_repeated_and_reordered_rows(model):
    ids, following = tokens(3, 6), tokens(4, 1, seed=9)
    past = step(model, ids).past_key_values
    past.batch_select_indices(torch.tensor([2, 0]))
    past.batch_repeat_interleave(2)
    past.reorder_cache(torch.tensor([3, 0, 1, 1]))
    rows = ids[torch.tensor([0, 2, 2, 2])]
    expected = full(model, torch.cat([rows, following], 1))[:, -1:]
    torch.testing.assert_close(step(model, following, past).logits, expected, **CLOSE)


@pytest.mark.parametrize("static", [False, True])
def test_reset(model, static):
    past = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    step(model, tokens(2, 5, seed=3), past)
    with model.disable_adapter():
        step(model, tokens(2, 1), past)
    past.reset()
    found, _ = in_parts(model, tokens(2, 9), [5, 1, 3], past)
    torch.testing.assert_close(found, full(model, tokens(2, 9)), **CLOSE)
    assert len(past.layers) == LAYERS + 1


def test_a_prefix_is_used_again(model):
    prefix = step(model, tokens(1, 5)).past_key_values
    for seed in (1, 2):
        rest = tokens(1, 3, seed=seed)
        ids = torch.cat([tokens(1, 5), rest], 1)
        found = generate(model, ids, past_key_values=copy.deepcopy(prefix)).sequences
        assert torch.equal(found, uncached_greedy(model, ids))


def test_two_adapters_in_one_cache(model):
    model.add_adapter("other", switch_config(router_decay=0.3, num_experts=3))
    randomize_adapter(model, "other", seed=4)
    model.eval()
    model.base_model.set_adapter(["default", "other"])
    found, past = in_parts(model, tokens(2, 9), [4, 1, 4])
    torch.testing.assert_close(found, full(model, tokens(2, 9)), **CLOSE)
    assert {(layer.adapter, layer.setting.decay) for layer in past.layers[LAYERS:]} == {
        ("default", DECAY),
        ("other", 0.3),
    }


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_other_experts_is_refused(model, static):
    """As many as there were, but not the same."""
    past = StaticCache(config=model.config, max_cache_len=12) if static else None
    past = step(model, tokens(2, 5), past).past_key_values
    remove_expert(model, 0)
    add_expert(model)
    with pytest.raises(ValueError, match="another setting of it"):
        step(model, tokens(2, 1), past)
    in_parts(model, tokens(2, 9), [4, 5])


def test_mixed_batches(model):
    model.add_adapter("other", switch_config(router_decay=0.3, num_experts=3))
    model.add_adapter("plain", switch_config())
    for name in ("other", "plain"):
        randomize_adapter(model, name, seed=4)
    model.eval()
    names, ids = ["other", "default", "__base__", "plain", "default"], tokens(5, 9)
    expected = full(model, ids, adapter_names=names)
    for past in (None, StaticCache(config=model.config, max_cache_len=12)):
        found = []
        for part in ids.split([4, 1, 1, 3], 1):
            out = step(model, part, past, adapter_names=names)
            past = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)
        with pytest.raises(ValueError, match="has not seen"):  # the rows of another adapter
            step(model, ids[:, :1], past, adapter_names=["default"] * 5)


@pytest.mark.parametrize(
    ("how", "static"),
    [(how, static) for how in ("off", "other", "off for one step") for static in (False, True)]
    + [("another model", False)],
)
def test_tokens_that_the_adapter_has_not_seen(model, how, static):
    past = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    if how in ("off for one step", "another model"):
        step(model, tokens(2, 4), past)
    if how == "another model":
        step(tiny_llama(), tokens(2, 2), past)
    elif how == "other":
        model.add_adapter("other", switch_config())
        model.set_adapter("other")
        step(model, tokens(2, 4), past)
        model.set_adapter("default")
    else:
        with model.disable_adapter():
            step(model, tokens(2, 1), past)
    with pytest.raises(ValueError, match="holds tokens that the adapter 'default' has not seen.*Pass a new cache"):
        step(model, tokens(2, 1), past)


def test_other_kinds_of_past_are_refused(model):
    class Past:
        def get_seq_length(self, *args):
            return 0

        get_query_offset = get_seq_length

        def get_mask_sizes(self, length, layer):
            return length, 0

    with pytest.raises(ValueError, match="past tokens in a Past.*DynamicCache"):
        step(model, tokens(2, 4), Past())
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    with pytest.raises(ValueError, match="offloaded cache"):
        step(model, tokens(2, 4), offloaded)


def test_of_another_batch(model):
    past = step(model, tokens(3, 4)).past_key_values
    with pytest.raises(ValueError, match="holds 3 sequences, and the forward 2"):
        step(model, tokens(2, 1), past)


def test_an_encoder_decoder_cache_keeps_it_with_self_attention():
    from helpers import tiny_t5

    model = adapted(tiny_t5(), router_decay=0.8, target_modules=r"decoder\..*SelfAttention\.[qkv]")
    ids, written = tokens(2, 6), tokens(2, 5, seed=2)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=written).logits
        past, found = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
        for part in written.split([2, 1, 2], 1):
            out = model(input_ids=ids, decoder_input_ids=part, past_key_values=past)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)
    assert sums_of(past.self_attention_cache, "default") is not None
    assert sums_of(past.cross_attention_cache, "default") is None


def test_one_cache_after_another_in_one_forward_each(model):
    """The model's own `_cache` of static generation is reset and used again, also by another adapter."""
    model.add_adapter("other", switch_config(router_decay=0.3))
    randomize_adapter(model, "other", seed=4)
    model.eval()
    past = StaticCache(config=model.config, max_cache_len=12)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        past.reset()
        found, _ = in_parts(model, tokens(2, 6), [4, 1, 1], past)
        torch.testing.assert_close(found, full(model, tokens(2, 6)), **CLOSE, msg=name)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_cache_of_states_without_lengths(fresh):
    torch.manual_seed(0)
    config = tf.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2, pad_token_id=0
    )
    model = adapted(tf.MambaForCausalLM(config).eval(), router_decay=DECAY, target_modules=["in_proj"])
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        past = DynamicCache(config=config) if fresh else None
        out = model(input_ids=ids[:, :4], cache_params=past, use_cache=True)
        found = [out.logits]
        for t in range(4, 7):
            out = model(input_ids=ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)
