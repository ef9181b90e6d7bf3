"""Tiny seeded models of many architectures, and the few things most tests do to them. Nothing here asserts anything."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from peft_loraswitch import LoRASwitchConfig, LoRASwitchLinear

Maker = TypeVar("Maker", bound=Callable[..., Any])
VOCAB, HIDDEN, LAYERS, HEADS, INTERMEDIATE = 64, 32, 2, 4, 48


def _seeded(model_class: Any, config: Any, seed: int) -> Any:
    """A model in eval mode with weights that depend on `seed` only; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # biases start at zero: a test that drops one would not notice
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _built_once(make: Maker) -> Maker:
    """`make` is called once in a process for each arguments; what it returns is copied, with its configuration."""
    built: dict[Any, Any] = {}

    @functools.wraps(make)
    def copied(*args: Any, **settings: Any) -> Any:
        if any(" at 0x" in repr(value) for value in settings.values()):  # an address tells nothing about its object
            return make(*args, **settings)
        key = (torch.get_default_dtype(), torch.get_default_device(), args, repr(sorted(settings.items())))
        if key not in built:
            with torch.inference_mode(False):
                built[key] = make(*args, **settings)
        return _copy(built[key], {})

    return copied  # type: ignore[return-value]


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, in a third of its time for modules: most of what they hold are empty dictionaries of hooks."""
    if isinstance(value, nn.Module):
        if id(value) not in memo:
            memo[id(value)] = twin = object.__new__(type(value))
            vars(twin).update({name: _copy(held, memo) for name, held in vars(value).items()})
        return memo[id(value)]
    if type(value) in (dict, OrderedDict) and id(value) not in memo:
        memo[id(value)] = twin = type(value)()
        twin.update({name: _copy(held, memo) for name, held in value.items()})
        return twin
    return value if value is None or type(value) in (bool, int, str) else copy.deepcopy(value, memo)


def _ids(**overrides: Any) -> dict[str, Any]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **overrides}


def llama_config(**overrides: Any) -> tf.LlamaConfig:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # the default 0.02 makes logits too small to tell models apart
    }
    return tf.LlamaConfig(**_ids(**{**settings, **overrides}))


@_built_once
def tiny_llama(seed: int = 0, **overrides: Any) -> tf.LlamaForCausalLM:
    return _seeded(tf.LlamaForCausalLM, llama_config(**overrides), seed)


@_built_once
def tiny_llama_classifier(seed: int = 0, num_labels: int = 3, **overrides: Any) -> tf.LlamaForSequenceClassification:
    return _seeded(tf.LlamaForSequenceClassification, llama_config(num_labels=num_labels, **overrides), seed)


@_built_once
def tiny_gpt2(seed: int = 0, **overrides: Any) -> tf.GPT2LMHeadModel:
    """Linears are `Conv1D`: weights transposed, q, k, v in one."""
    settings = {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 128,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return _seeded(tf.GPT2LMHeadModel, tf.GPT2Config(**_ids(**{**settings, **overrides})), seed)


@_built_once
def tiny_opt(seed: int = 0, **overrides: Any) -> tf.OPTForCausalLM:
    """Lists k, v before q but runs q first; its MLP may see flattened tokens."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 128,
        "init_std": 0.2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return _seeded(tf.OPTForCausalLM, tf.OPTConfig(**_ids(**{**settings, **overrides})), seed)


def bert_config(**overrides: Any) -> tf.BertConfig:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    return tf.BertConfig(**{**settings, **overrides})


@_built_once
def tiny_bert(model_class: Any = tf.BertForSequenceClassification, seed: int = 0, **overrides: Any) -> Any:
    """`model_class`: BertForSequenceClassification, BertForTokenClassification, BertModel, ..."""
    return _seeded(model_class, bert_config(**overrides), seed)


def t5_config(**overrides: Any) -> tf.T5Config:
    settings = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_kv": HIDDEN // HEADS,
        "d_ff": INTERMEDIATE,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    return tf.T5Config(**{**settings, **overrides})


@_built_once
def tiny_t5(model_class: Any = tf.T5ForConditionalGeneration, seed: int = 0, **overrides: Any) -> Any:
    return _seeded(model_class, t5_config(**overrides), seed)


def switch_config(**overrides: Any) -> LoRASwitchConfig:
    """A small adapter on every linear: 4 experts, 2 per token, rank 3 (odd on purpose), scale 2."""
    settings = {"r": 3, "num_experts": 4, "top_k": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    return LoRASwitchConfig(**{**settings, **overrides})


def switch_layers(model: nn.Module) -> dict[str, LoRASwitchLinear]:
    """The adapted linears of `model`, by full name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRASwitchLinear)}


def randomize_adapter(model: nn.Module, adapter: str | None = None, std: float = 0.1, seed: int = 1) -> nn.Module:
    """Fill B (zero in a fresh adapter) with noise, and the router with larger weights so that its gates differ clearly.
    `adapter`: only this one. Returns `model`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if adapter is not None and adapter not in parts:
            continue
        scale = std if "loraswitch_B" in parts else 1.0 if "loraswitch_router" in parts else None
        if scale is not None:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(noise.to(parameter.device, parameter.dtype))
    return model


def adapted(model: nn.Module, seed: int = 1, **config: Any) -> PeftModel:
    """`model` with one adapter (`switch_config(**config)`) whose weights all differ from zero, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(model, switch_config(**config))
    randomize_adapter(model, seed=seed)
    return model.eval()


def tokens(batch: int = 2, length: int = 7, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Token ids int64 [batch, length], special ids left out."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (-100 on padding) of samples with these lengths, padded on `side`."""
    longest = max(lengths)
    input_ids = tokens(len(lengths), longest, seed=seed)
    steps = torch.arange(longest)
    rows = [steps < n if side == "right" else steps >= longest - n for n in lengths]
    mask = torch.stack(rows).long()
    return {
        "input_ids": input_ids * mask,
        "attention_mask": mask,
        "labels": torch.where(mask.bool(), input_ids, -100),
    }


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients of all adapter parameters that have one, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if "loraswitch_" in n and p.grad is not None}


def gradients_with_and_without_checkpointing(model: Any, reentrant: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a padded batch's loss: `adapter_gradients` of a copy of `model`, and of one with gradient checkpointing."""
    plain, checked = (copy.deepcopy(model).train() for _ in range(2))
    checked.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checked.enable_input_require_grads()
    for each in (plain, checked):
        each(**padded([7, 5])).loss.backward()
    return adapter_gradients(plain), adapter_gradients(checked)


def router_layer(model: nn.Module, adapter: str = "default") -> LoRASwitchLinear:
    """The adapted linear that holds the router of `adapter`."""
    return next(layer for layer in switch_layers(model).values() if adapter in layer.loraswitch_router)


def without_losses(model: nn.Module) -> nn.Module:
    """A copy with the same weights, no gradients, and both coefficients of the router's losses at 0."""
    twin = copy.deepcopy(model)
    for layer in switch_layers(twin).values():
        for name, options in layer.routing_options.items():
            layer.routing_options[name] = replace(options, aux_loss_coef=0.0, z_loss_coef=0.0)
    twin.zero_grad()
    return twin
