"""router_decay in whole models: what a token's decision depends on, and what it does not."""

from __future__ import annotations

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model
from transformers.cache_utils import DynamicCache

from helpers import (
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    tokens,
)
from multistream import SEQ2SEQ
from oracle import Oracle
from peft_loraswitch import record_routing
from peft_loraswitch.routing.context import Context, ForwardInputs
from peft_loraswitch.routing.masks import numbers_of_blocks
from peft_loraswitch.routing.options import RoutingOptions

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
def test_equals_the_oracle(make, decay):
    model = adapted(make(), router_decay=decay)
    batch = padded([7, 4], side="left")
    batch.pop("labels")
    found, expected = logits(model, **batch), Oracle(model)(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real].double(), expected[real], **CLOSE)


@pytest.mark.parametrize(
    "config",
    [
        {"router_module": "layers.1.self_attn.q_proj"},
        {"base_expert": True, "top_k": 1, "normalize_gates": True},
        {"num_shared_experts": 1},
        {"target_modules": ["down_proj"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_with_other_options(config):
    model = adapted(tiny_llama(), router_decay=0.8, **config)
    ids = tokens()
    torch.testing.assert_close(logits(model, input_ids=ids).double(), Oracle(model)(input_ids=ids).logits, **CLOSE)


def test_gradients_equal_the_oracles():
    model = adapted(tiny_llama(), router_decay=0.8, router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()
    batch = padded([7, 4])
    model(**batch).loss.backward()
    oracle = Oracle(model)
    oracle(**batch).loss.backward()
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(gradient.double(), oracle.gradients()[name], rtol=2e-3, atol=1e-5, msg=name)


def test_0_is_the_router_of_one_token():
    plain, zero = adapted(tiny_llama()), adapted(tiny_llama(), router_decay=0)
    assert torch.equal(logits(plain, input_ids=tokens()), logits(zero, input_ids=tokens()))
    assert not torch.equal(
        logits(plain, input_ids=tokens()), logits(adapted(tiny_llama(), router_decay=0.5), input_ids=tokens())
    )


def test_later_tokens_change_nothing_earlier():
    model = adapted(tiny_llama(), router_decay=0.9)
    ids = tokens(1, 9)
    other = ids.clone()
    other[:, 5:] = tokens(1, 4, seed=3)
    assert not torch.equal(ids, other)
    torch.testing.assert_close(
        logits(model, input_ids=ids)[:, :5], logits(model, input_ids=other)[:, :5], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, attention):
    model = adapted(tiny_llama(attn_implementation=attention), router_decay=0.9)
    batch = padded([8, 5], side=side)
    found = logits(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[1]
    real = batch["attention_mask"][1].bool()
    alone = logits(model, input_ids=batch["input_ids"][1, real].unsqueeze(0))[0]
    torch.testing.assert_close(found[real], alone, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_padding_in_the_middle_changes_nothing(decay, attention):
    """As it is in a batch of chats, behind an answer that is shorter than others."""
    model = adapted(tiny_llama(attn_implementation=attention), router_decay=decay)
    ids = tokens(2, 9)
    alone = logits(model, input_ids=ids)
    for gap in (1, 3, 20):
        place = torch.arange(9) + torch.where(torch.arange(9) < 4, 0, gap)
        mask = torch.zeros(2, 9 + gap, dtype=torch.long).index_fill(1, place, 1)
        spread = torch.zeros_like(mask).index_copy(1, place, ids)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = logits(model, input_ids=spread, attention_mask=mask, position_ids=positions)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[:, place], alone, **CLOSE)


def test_what_padding_holds_changes_nothing():
    model = adapted(tiny_llama(), router_decay=1.0)
    batch = padded([8, 5], side="left")
    batch.pop("labels")
    real = batch["attention_mask"].bool()
    other = {**batch, "input_ids": batch["input_ids"].where(real, 60)}
    torch.testing.assert_close(logits(model, **batch)[real], logits(model, **other)[real], **CLOSE)


def test_four_dimensional_masks():
    model = adapted(tiny_llama(), router_decay=0.9)
    batch = padded([8, 5], side="left")
    real = batch["attention_mask"].bool()
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    allowed = (causal & real[:, None, None, :]) & real[:, None, :, None]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    found = logits(model, input_ids=batch["input_ids"], attention_mask=additive, position_ids=positions)
    expected = logits(
        model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
    )
    torch.testing.assert_close(found[real], expected[real], **CLOSE)


@pytest.mark.parametrize("starts", [(0, 0, 0), (0, 3, 20), (7, 4, 6)], ids=str)
@pytest.mark.parametrize("router_module", [None, "layers.1.self_attn.q_proj"])
def test_packed_sequences_are_separate(router_module, starts):
    model = adapted(tiny_llama(), router_decay=0.9, router_module=router_module)
    lengths = [5, 1, 6]
    for batch in (1, 2):
        ids = tokens(batch, 12)
        positions = [torch.arange(start, start + n)[None] for start, n in zip(starts, lengths, strict=True)]
        packed = logits(model, input_ids=ids, position_ids=torch.cat(positions, 1), use_cache=False)
        alone = [
            logits(model, input_ids=part, position_ids=at, use_cache=False)
            for part, at in zip(ids.split(lengths, dim=1), positions, strict=True)
        ]
        torch.testing.assert_close(packed, torch.cat(alone, 1), **CLOSE)


@pytest.mark.parametrize("form", ["bool", "of_each_row", torch.finfo(torch.float32).min, -1e9, -1e4], ids=str)
def test_sequences_packed_by_a_mask_of_blocks_are_separate(form):
    """With padding at the end, and within; and what a block that is not causal says is no border."""
    model = adapted(tiny_llama(), router_decay=0.9)
    ids, lengths = tokens(2, 12), [5, 1, 4]
    allowed = torch.block_diag(*[torch.ones(n, n) for n in (*lengths, 2)]).bool().tril()
    allowed[10:] = allowed[:, 10:] = False  # padding
    allowed[2, :], allowed[:, 2] = False, False
    mask = allowed[None, None].expand(2 if form == "of_each_row" else 1, 1, -1, -1)
    if isinstance(form, float):
        mask = torch.zeros(mask.shape).masked_fill(~mask, form)
    positions = torch.cat([torch.arange(n) for n in (*lengths, 2)])[None]
    found = logits(model, input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    real = torch.tensor([[1, 1, 0, 1, 1]])
    parts = [part.split(lengths, dim=1) for part in (ids[:, :10], positions[:, :10])]
    alone = [
        logits(
            model,
            input_ids=part,
            position_ids=at,
            attention_mask=(real if i == 0 else torch.ones_like(at)).expand(2, -1),
        )
        for i, (part, at) in enumerate(zip(*parts, strict=True))
    ]
    keep = allowed.diagonal()
    torch.testing.assert_close(found[:, keep], torch.cat(alone, 1)[:, keep[:10]], **CLOSE)


def test_a_mask_of_prefixes_has_no_borders():
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[:4, :4] = True
    assert numbers_of_blocks(mask[None, None]).unique().numel() == 1
    windowed = torch.ones(8, 8, dtype=torch.bool).tril().triu(-2)
    assert numbers_of_blocks(windowed[None]).unique().numel() == 1


def test_positions_that_are_no_packing():
    """transformers takes them for one sequence if there is a mask or a cache."""
    model = adapted(tiny_llama(), router_decay=0.9)
    ids, positions = tokens(1, 6), torch.tensor([[0, 1, 2, 9, 10, 11]])
    masked = logits(model, input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    cached = logits(model, input_ids=ids, position_ids=positions, past_key_values=DynamicCache(config=model.config))
    torch.testing.assert_close(cached, masked, **CLOSE)
    batch = padded([6, 3], side="left")
    batch.pop("labels")
    positions = batch["attention_mask"].cumsum(-1) - 1
    positions = positions.masked_fill(positions < 0, 1)  # [1, 1, 1, 0, 1, 2], as generate makes them
    found = logits(model, **batch, position_ids=positions)[1, 3:]
    alone = logits(model, input_ids=batch["input_ids"][1:, 3:])[0]
    torch.testing.assert_close(found, alone, **CLOSE)


def test_a_mixed_batch_equals_its_samples():
    model = adapted(tiny_llama(), router_decay=0.9)
    model.add_adapter("other", switch_config(router_decay=0.4, num_experts=3))
    model.add_adapter("plain", switch_config())
    for name in ("other", "plain"):
        randomize_adapter(model, name, seed=5)
    model.eval()
    names = ["other", "default", "__base__", "plain", "other"]
    batch = padded([8, 5, 6, 3, 7], side="left")
    batch.pop("labels")
    found = logits(model, **batch, adapter_names=names)
    for i, name in enumerate(names):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        real = one["attention_mask"][0].bool()
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, **one)
        else:
            model.set_adapter(name)
            expected = logits(model, **one)
        torch.testing.assert_close(found[i][real], expected[0][real], **CLOSE, msg=name)


def test_two_active_adapters_have_a_decay_each():
    model = adapted(tiny_llama(), router_decay=0.9)
    model.add_adapter("other", switch_config(router_decay=0.2))
    randomize_adapter(model, "other", seed=5)
    model.eval()
    with torch.no_grad():
        model.base_model.set_adapter(["default", "other"])
        frame_logits = logits(model, input_ids=tokens())
    assert torch.isfinite(frame_logits).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = adapted(tiny_llama(), router_decay=0.8).train()
    batch = padded([7, 4])
    model(**batch).loss.backward()
    expected = adapter_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    found = adapter_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_losses_are_those_of_the_decision():
    """By the definition: of the probabilities that the decision comes from."""
    model = adapted(tiny_llama(), router_decay=0.8, router_aux_loss_coef=0.3, router_z_loss_coef=0.2).train()
    batch = padded([7, 4])
    seen = []
    layer = router_layer(model)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    weight = layer.loraswitch_router["default"].weight
    with_losses = model(**batch).loss
    with_losses.backward()
    found = weight.grad.clone()
    handle.remove()
    model.zero_grad()
    from helpers import without_losses
    from oracle import in_context

    twin = without_losses(model).train()
    plain = twin(**batch).loss
    plain.backward()
    real = batch["attention_mask"].bool()
    x = in_context(seen[0], 0.8, real)[real]
    w = weight.detach().double().requires_grad_()
    z = x @ w.T
    p = z.softmax(-1)
    load = torch.zeros(4, dtype=torch.float64).scatter_add(
        0, z.topk(2, -1).indices.flatten(), torch.ones(len(z) * 2).double()
    )
    losses = 0.3 * 4 * (load / len(z) * p.mean(0)).sum() + 0.2 * z.logsumexp(-1).square().mean()
    losses.backward()
    torch.testing.assert_close((with_losses - plain).double(), losses, rtol=1e-4, atol=1e-5)
    expected = w.grad + router_layer(twin).loraswitch_router["default"].weight.grad
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-5)


def test_an_encoder_decoder_model():
    for targets in (r"decoder\..*SelfAttention\.[qkv]", r"encoder\..*\.[qkv]"):
        model = adapted(tiny_t5(), router_decay=0.8, target_modules=targets)
        ids = tokens()
        out = model.generate(
            input_ids=ids,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        full = logits(model, input_ids=ids, decoder_input_ids=out.sequences)[:, :-1]
        torch.testing.assert_close(torch.stack(out.logits, 1), full, **CLOSE)


@pytest.mark.parametrize("name", ["bart", "marian"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_decoders_own_mask_is_not_the_encoders(name, decay):
    """A static cache, and whoever passes one, give it a mask [batch, 1, queries, keys], while the encoder's batch is padded."""
    build, _, _ = SEQ2SEQ[name]
    targets = r".*decoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc1|fc2)"
    model = adapted(build(), router_decay=decay, target_modules=targets)
    batch = padded([7, 4])
    batch.pop("labels")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with record_routing(model) as recorded:
        static = model.generate(**batch, **options, cache_implementation="static")
    assert recorded.summary("default")["tokens"] == static.sequences[:, 1:].numel()
    dynamic = model.generate(**batch, **options)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **CLOSE)
    ids = tokens(2, 5)
    causal = torch.zeros(2, 1, 5, 5).masked_fill(
        ~torch.ones(5, 5, dtype=torch.bool).tril(), torch.finfo(torch.float32).min
    )
    without = logits(model, **batch, decoder_input_ids=ids)
    torch.testing.assert_close(
        logits(model, **batch, decoder_input_ids=ids, decoder_attention_mask=causal), without, **CLOSE
    )
    real = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])  # the decoder's padding, on the right
    found = logits(model, **batch, decoder_input_ids=ids, decoder_attention_mask=real)
    torch.testing.assert_close(found[real.bool()], without[real.bool()], **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_cross_attention_goes_by_the_encoders_mask(name, decay):
    """Keys and values alone are adapted: their tokens are the encoder's, and so is their padding."""
    model = adapted(
        SEQ2SEQ[name][0](),
        router_decay=decay,
        target_modules=r".*(EncDecAttention\.(k|v)|encoder_attn\.(k_proj|v_proj))",
    )
    batch = padded([7, 4], side="left")
    batch.pop("labels")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        with record_routing(model) as recorded:
            found.append(torch.stack(model.generate(**batch, **options, **cache).logits))
        assert recorded.summary("default")["tokens"] == 11 * (6 if cache == {"use_cache": False} else 1)
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    torch.testing.assert_close(found[2], found[0], **CLOSE)
    if name == "t5":  # BART counts positions from the first column, padding or not
        ids, own = tokens(2, 3), {key: value[1:, 3:] for key, value in batch.items()}
        alone = logits(model, **own, decoder_input_ids=ids[1:])
        torch.testing.assert_close(logits(model, **batch, decoder_input_ids=ids)[1:], alone, **CLOSE)


def test_a_decoder_that_knows_of_no_padding_in_what_it_crosses():
    """Whisper's: its mask is that of its own tokens alone."""
    build, inputs, _ = SEQ2SEQ["whisper"]
    model = adapted(build(), router_decay=0.9, target_modules=r".*encoder_attn\.(k_proj|v_proj)")
    batch = inputs()
    without = logits(model, **batch)
    real = torch.ones_like(batch["decoder_input_ids"])
    real[0, -2:] = 0
    found = logits(model, **batch, decoder_attention_mask=real)
    torch.testing.assert_close(found[real.bool()], without[real.bool()], **CLOSE)


def test_a_mask_of_samples_becomes_one_of_frames():
    """wav2vec 2: a model is given sound, and its encoder frames of it, with a mask of their own."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4)}
    convolutions |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    backbone = Wav2Vec2Model(Wav2Vec2Config(**shape, **convolutions, apply_spec_augment=False)).eval()
    model = adapted(backbone, router_decay=0.9, target_modules=r"encoder\.layers\..*(q_proj|v_proj)")
    sound, real = torch.randn(2, 160), torch.ones(2, 160, dtype=torch.long)
    real[0, 80:] = 0
    with torch.no_grad():
        padded_batch = model(input_values=sound * real, attention_mask=real).last_hidden_state
        full = model(input_values=sound[1:], attention_mask=real[1:]).last_hidden_state
        frames = backbone._get_feat_extract_output_lengths(real.sum(1))
        alone = model(input_values=sound[:1, :80], attention_mask=real[:1, :80]).last_hidden_state
    torch.testing.assert_close(padded_batch[1:], full, **CLOSE)
    at = int(frames[0])
    torch.testing.assert_close(padded_batch[:1, :at], alone[:, :at], rtol=1e-3, atol=1e-3)


def test_a_mask_of_another_length_is_refused():
    inputs = ForwardInputs(mask=torch.ones(2, 9), batch=2)
    options = RoutingOptions(4, 2, False, decay=0.9)
    with pytest.raises(ValueError, match="covers 9 tokens, and the forward has 4"):
        Context(inputs, "default", options, torch.Size([2, 4]), None, torch.device("cpu"))


def test_flattened_tokens_are_told_apart():
    model = adapted(tiny_opt(), router_decay=0.8, target_modules=["fc1"])  # OPT's MLP sees [batch * tokens]
    ids = tokens()
    alone = torch.cat([logits(model, input_ids=row.unsqueeze(0)) for row in ids])
    torch.testing.assert_close(logits(model, input_ids=ids), alone, **CLOSE)


def test_a_mask_that_says_nothing_is_refused():
    model = adapted(tiny_llama(), router_decay=0.8)
    with pytest.raises(ValueError, match="attention mask is of shape"):
        logits(model, inputs_embeds=torch.randn(2, 5, 32), attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="covers 3 tokens"):
        logits(model, inputs_embeds=torch.randn(2, 5, 32), attention_mask=torch.ones(2, 3))


@pytest.mark.parametrize("value", [-0.1, 1.01, "0.5", None, True, float("nan"), float("inf")])
def test_bad_values_are_refused(value):
    with pytest.raises(ValueError, match=r"router_decay=.*must be a number in \[0, 1\]"):
        switch_config(router_decay=value)


def test_saved_only_if_used(tmp_path):
    assert "router_decay" not in switch_config().to_dict()
    model = adapted(tiny_llama(), router_decay=0.75)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert again.peft_config["default"].router_decay == 0.75
    assert torch.equal(logits(again, input_ids=tokens()), logits(model, input_ids=tokens()))


def test_statistics_are_of_the_decision():
    model = adapted(tiny_llama(), router_decay=0.8)
    ids = tokens(2, 9)
    with model.record_routing() as whole:
        logits(model, input_ids=ids)
    with model.record_routing() as steps, torch.no_grad():
        past = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        for t in range(4, 9):
            model(input_ids=ids[:, t : t + 1], past_key_values=past)
    expected, found = whole.summary(), steps.summary()
    assert found["tokens"] == expected["tokens"] == 18
    for key in ("load", "entropy", "z_loss", "balance_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key


def test_continuous_batching_is_refused():
    """Its paged cache holds no sums, and packs the tokens of many sequences."""
    model = adapted(tiny_llama(attn_implementation="sdpa"), router_decay=0.8)

    class PagedAttentionCache:
        pass

    inputs = ForwardInputs()
    inputs.see_cache(PagedAttentionCache(), {"default"})
    with pytest.raises(ValueError, match="PagedAttentionCache"):
        options = RoutingOptions(4, 2, False, decay=0.8)
        Context(inputs, "default", options, torch.Size([1, 4]), None, torch.device("cpu"))
    with pytest.raises(ValueError, match="PagedAttentionCache"):
        logits(model, input_ids=tokens(1, 4), position_ids=torch.arange(4)[None], cache=PagedAttentionCache())
