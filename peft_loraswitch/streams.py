"""Which linears see which tokens, decided before anything is replaced.

One routing decision serves every adapted linear only if they all process the same tokens. Encoder-decoder and
vision-language models have several token streams: they are refused here, with a `target_modules` that would work. Single
linears that see something else than tokens are `targets.py`; what cannot be known from the modules is checked while
running (`Routing.dense_gates_for`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Attention over another stream: keys and values see the encoder's tokens.
CROSS_ATTENTION = re.compile(r"(^|\.)(encoder_attn|EncDecAttention|crossattention|cross_attn|cross_attention)\.")
KEY_OR_VALUE = re.compile(r"(^|[._])(k|v|key|value|kv|kv_proj|k_proj|v_proj|key_proj|value_proj|c_attn)$")


def check_streams(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse target modules that do not all see the same tokens.

    Args:
        model: the backbone.
        names: full names of the linears that would be adapted, in module order.

    Raises:
        ValueError: names the modules and a `target_modules` that would work.
    """
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
    groups = dict(streams)
    described = ", ".join(f"'{path or '(top)'}' ({len(members)} linears)" for path, members in groups.items())
    if cross:
        described += f", and cross-attention keys/values such as '{cross[0]}' (tokens of the encoder)"
    # a text decoder or language model is what people adapt; else the stream with most linears
    best = max(
        groups, key=lambda path: (bool(re.search(r"decoder|language|text", path)), len(groups[path])), default=""
    )
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
