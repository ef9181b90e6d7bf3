"""XLNet and FSMT run their tokens as (sequence, batch): masks are turned, and what has to know the samples is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from helpers import VOCAB, adapted, padded, switch_layers, tokens
from multistream import fsmt
from peft_loraswitch import use_experts


def xlnet():
    torch.manual_seed(0)
    config = tf.XLNetConfig(
        vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0, initializer_range=0.2
    )
    return tf.XLNetLMHeadModel(config).eval()


MODELS = {
    "xlnet": (xlnet, "all-linear"),
    "fsmt": (fsmt, r"model\.encoder\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"),
}
models = pytest.mark.parametrize("name", MODELS)


def routed(name, **config):
    make, targets = MODELS[name]
    return adapted(make(), target_modules=targets, **config)


def inputs(name, lengths):
    batch = {key: value for key, value in padded(lengths).items() if key != "labels"}
    return batch | ({"decoder_input_ids": tokens(len(lengths), 4)} if name == "fsmt" else {})


@models
@pytest.mark.parametrize("lengths", [[6, 3, 2], [3, 2, 1], [4, 4]], ids=str)
def test_only_real_tokens_count(name, lengths):
    model = routed(name)
    seen = []
    router = next(layer for layer in switch_layers(model).values() if "default" in layer.loraswitch_router)
    router.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = inputs(name, lengths)
    with torch.no_grad(), model.record_routing() as recorder:
        model(**batch)
    (x,) = seen
    assert x.shape[:2] == (max(lengths), len(lengths)), "not time first: this test sees nothing"
    real = x.transpose(0, 1)[batch["attention_mask"].bool()]
    experts = (real @ router.loraswitch_router["default"].weight.T).softmax(-1).topk(2).indices
    load = torch.bincount(experts.flatten(), minlength=4) / experts.numel()
    stats = recorder.summary()
    assert stats["tokens"] == sum(lengths)
    assert stats["load"] == pytest.approx(load.tolist())


@models
def test_what_needs_to_know_the_samples_is_refused(name):
    with pytest.raises(ValueError, match=r"router_decay=0.9: .*\(sequence, batch\).*Set it to 0"):
        routed(name, router_decay=0.9)
    model, batch = routed(name), inputs(name, [4, 4, 4])
    with pytest.raises(ValueError, match=r"adapter_names: .*\(sequence, batch\)"):
        model(**batch, adapter_names=["default", "__base__", "default"])
    with use_experts(model, [0, 1, 2]), pytest.raises(ValueError, match=r"use_experts: .*\(sequence, batch\)"):
        model(**batch)
    with torch.no_grad(), use_experts(model, 1):
        model(**batch)
