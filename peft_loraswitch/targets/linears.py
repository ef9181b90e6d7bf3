"""Which linears of a backbone can follow a routing decision at all, linear by linear.

A linear must be called once per forward, as a module, with the hidden states of the tokens that were routed. Those that
are not are left out where the choice was ours ("all-linear") and refused where the user named them. Several token
streams in one model are `streams.py`; what cannot be known from the modules is checked while running.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..layer import quantization_backend

# Linears of an encoder that see one vector per sequence.
POOLER = re.compile(r"(^|\.)\w*pooler(\.|$)")
# DeBERTa's disentangled attention sends its table of relative positions through these as well as the tokens.
POSITION_LINEARS = {
    "deberta": ("pos_proj", "pos_q_proj"),
    "deberta-v2": ("query_proj", "key_proj", "pos_key_proj", "pos_query_proj"),
}
# Sliding-window attention with (sequence, batch) inside and (batch, sequence) outside: with as many samples as tokens,
# nothing at run time would tell the two apart.
TIME_FIRST_LINEARS = dict.fromkeys(
    ("longformer", "led"), ("query", "key", "value", "query_global", "key_global", "value_global")
)
# Models that run all their tokens as (sequence, batch). An attention mask is turned for them; what asks for more is refused.
TIME_FIRST_MODELS = ("fsmt", "xlnet")
# Multi-head latent attention (DeepSeek) caches what goes into this one: in decoding it sees the past tokens again.
CACHED_INPUT = ("kv_b_proj",)
# A state-space mixer hands these weights to a fused kernel, or multiplies with them by itself; it does not call the linear.
WEIGHTS_READ_DIRECTLY = ("x_proj", "dt_proj", "out_proj")
# Modules that compute with the weights of these children and do not call them, by class. (What is not listed here is found by the
# first forward that trains: unused_linears.py.)
READS_WEIGHTS_OF = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),  # F.multi_head_attention_forward
    "MobileBertLMPredictionHead": ("dense", "decoder"),  # one product with both
    "DetrMHAttentionMap": ("k_proj",),  # a convolution
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "LSHSelfAttention": ("query_key", "value"),  # Reformer, in cached decoding
}
# Subclasses of nn.Linear in transformers that compute something else (expert routers, grouped weights); this one does not.
PLAIN_SUBCLASSES = ("FalconLinear",)


def is_time_first(model: nn.Module) -> bool:
    """Whether the backbone's linears see their tokens as (sequence, batch)."""
    return _model_type(model) in TIME_FIRST_MODELS


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None))


def is_supported_linear(base: nn.Module) -> bool:
    """Plain linears, GPT-2's Conv1D, and quantised linears that PEFT resolves. `base`: without adapters on it."""
    if isinstance(base, (nn.Linear, Conv1D)):
        return True
    backend = quantization_backend(base)
    return backend is not None and bool(backend.layer_type == "linear")


def left_out(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Those of `names` that "all-linear" does not mean, each with the reason: what `refused` refuses, and heads.

    A head sees pooled vectors, or only the tokens whose logits are asked for; and it is better trained in full
    (`modules_to_save`, into which PEFT puts the usual heads by the task type).
    """
    reasons = refused(model, names)
    backbone = model.base_model if isinstance(model, PreTrainedModel) else model
    if backbone is not model:
        inside = {id(module) for module in backbone.modules()}
        for name in names:
            if id(model.get_submodule(name)) not in inside:
                reasons.setdefault(name, "it is part of the head; if it is to train, modules_to_save must name it")
    return reasons


def refused(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Those of `names` that cannot follow the routing, each with the reason."""
    model_type = _model_type(model)
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output_embeddings = get_output_embeddings() if get_output_embeddings is not None else None
    reasons = {}
    for name in names:
        parent_name, _, child = name.rpartition(".")
        module, parent = model.get_submodule(name), model.get_submodule(parent_name)
        if output_embeddings is not None and module is output_embeddings:
            reasons[name] = (
                "it is the output embedding, which sees only the tokens whose logits are asked for; train it with "
                f"modules_to_save=['{child}'] instead"
            )
        elif POOLER.search(name):
            reasons[name] = "it sees one vector per sequence, not tokens; modules_to_save trains it in full"
        elif child in POSITION_LINEARS.get(model_type, ()):
            reasons[name] = "it also receives the table of relative positions"
        elif child in TIME_FIRST_LINEARS.get(model_type, ()):
            reasons[name] = "it sees the tokens in another order, (sequence, batch)"
        elif child in CACHED_INPUT:
            reasons[name] = "in decoding it sees the past tokens again, from the cache"
        elif child in WEIGHTS_READ_DIRECTLY and hasattr(parent, "A_log") and hasattr(parent, "D"):
            reasons[name] = "the state-space mixer reads its weight without calling it"
        elif isinstance(parent, nn.MultiheadAttention) or child in READS_WEIGHTS_OF.get(type(parent).__name__, ()):
            reasons[name] = f"{type(parent).__name__} reads its weight without calling it"
        elif _computes_something_else(module):
            reasons[name] = f"a {type(module).__name__} is not a plain linear"
    return reasons


def _computes_something_else(module: nn.Module) -> bool:
    cls = type(module)
    return (
        isinstance(module, nn.Linear)
        and cls.__module__.startswith("transformers.models.")
        and cls.forward is not nn.Linear.forward
        and cls.__name__ not in PLAIN_SUBCLASSES
    )
