"""Which linears see which tokens, decided before anything is replaced.

One routing decision serves every adapted linear only if they all process the same tokens. Encoder-decoder and
vision-language models have several token streams, and some linears are fed something else than tokens: those cases are
refused here, with a `target_modules` that would work. What cannot be known from the modules is checked while running
(`Routing.dense_gates_for`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Attention over another stream: keys and values see the encoder's tokens.
CROSS_ATTENTION = re.compile(r"(^|\.)(encoder_attn|EncDecAttention|crossattention|cross_attn|cross_attention)\.")
KEY_OR_VALUE = re.compile(r"(^|[._])(k|v|key|value|kv|kv_proj|k_proj|v_proj|key_proj|value_proj|c_attn)$")
# Linears of an encoder that see one vector per sequence instead of tokens.
POOLER = re.compile(r"(^|\.)\w*pooler(\.|$)")
# DeBERTa's disentangled attention sends its table of relative positions through these as well as the tokens.
POSITION_LINEARS = {
    "deberta": ("pos_proj", "pos_q_proj"),
    "deberta-v2": ("query_proj", "key_proj", "pos_key_proj", "pos_query_proj"),
}


def is_pooler(name: str) -> bool:
    return POOLER.search(name) is not None


def check_streams(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse target modules that do not all see the same tokens.

    Args:
        model: the backbone.
        names: full names of the linears that would be adapted, in module order.

    Raises:
        ValueError: names the modules and a `target_modules` that would work.
    """
    _check_output_embeddings(model, names)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    fed_positions = [n for n in names if n.rpartition(".")[2] in POSITION_LINEARS.get(str(model_type), ())]
    if fed_positions:
        rest = sorted({n.rpartition(".")[2] for n in names} - set(POSITION_LINEARS[str(model_type)])) or ["value_proj"]
        raise ValueError(
            f"target_modules: '{fed_positions[0]}' also receives {model_type}'s table of relative positions, which has no "
            f"routing. This works: target_modules={rest}"
        )
    poolers = [n for n in names if is_pooler(n)]
    if poolers:
        raise ValueError(
            f"target_modules: '{poolers[0]}' sees one vector per sequence, not tokens, so no routing fits it. Add "
            f"exclude_modules=['{poolers[0]}'], or train it in full with modules_to_save."
        )
    cross = [n for n in names if _is_cross_key_or_value(n)]
    streams = _streams(model, [n for n in names if n not in cross])
    if len(streams) > 1 or cross:
        _refuse(streams, cross)


def _streams(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Names by token stream: the innermost `PreTrainedModel` that holds the linear (an encoder, a decoder, a vision
    tower, a language model). Heads on top of the only stream belong to it."""
    models = [path for path, module in model.named_modules() if isinstance(module, PreTrainedModel) or path == ""]
    streams: dict[str, list[str]] = {}
    for name in names:
        holder = max((path for path in models if not path or name.startswith(path + ".")), key=len)
        streams.setdefault(holder, []).append(name)
    if len(streams) == 2 and not _has_several_streams(model):
        outer, inner = sorted(streams, key=len)
        if not outer or inner.startswith(outer + "."):
            return {inner: streams[outer] + streams[inner]}
    return streams


def _has_several_streams(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    if config is None:
        return False
    if getattr(config, "is_encoder_decoder", False):
        return True
    sub_configs = getattr(config, "sub_configs", None) or {}
    return any(getattr(config, key, None) is not None for key in sub_configs)


def _is_cross_key_or_value(name: str) -> bool:
    return bool(CROSS_ATTENTION.search(name) and KEY_OR_VALUE.search(name))


def _refuse(streams: dict[str, list[str]], cross: list[str]) -> None:
    groups = {path: members for path, members in streams.items()}
    described = ", ".join(f"'{path or '(top)'}' ({len(members)} linears)" for path, members in groups.items())
    if cross:
        described += f", and cross-attention keys/values such as '{cross[0]}' (tokens of the encoder)"
    # a text decoder or language model is what people adapt; else the stream with most linears
    best = max(groups, key=lambda path: (bool(re.search(r"decoder|language|text", path)), len(groups[path])), default="")
    endings = sorted({_ending(name, best) for name in groups.get(best, [])})
    prefix = re.escape(best).replace(r"\.", r"\.")
    pattern = rf"{prefix}\..*({'|'.join(re.escape(e) for e in endings)})" if best else rf".*({'|'.join(endings)})"
    raise ValueError(
        "target_modules selects linears that see different tokens, and LoRA-Switch takes one decision per token: "
        f"{described}. Adapt one stream only. This works: target_modules=r'{pattern}'"
    )


def _ending(name: str, holder: str) -> str:
    """The part of a name below the numbered block: 'decoder.layers.0.self_attn.q_proj' -> 'self_attn.q_proj'."""
    relative = name[len(holder) + 1 :] if holder else name
    return re.split(r"(?:^|\.)\d+\.", relative)[-1]


def _check_output_embeddings(model: nn.Module, names: Sequence[str]) -> None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if get_output_embeddings is not None else None
    for name in names:
        if head is not None and model.get_submodule(name) is head:
            raise ValueError(
                f"target_modules: the output embedding '{name}' sees only the tokens whose logits are asked for, so no "
                f"routing fits it. Train it with modules_to_save=['{name.rpartition('.')[2]}'] instead."
            )


def is_supported_linear(module: nn.Module) -> bool:
    """Plain linears and GPT-2's Conv1D; quantised ones are PEFT's to resolve."""
    return isinstance(module, (torch.nn.Linear, Conv1D))
