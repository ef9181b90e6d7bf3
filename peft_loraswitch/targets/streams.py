"""Which linears see which tokens, decided before anything is replaced.

One routing decision serves every adapted linear only if they all process the same tokens. Encoder-decoder and
vision-language models have several token streams: adapters over more than one are refused here, with a `target_modules`
that works. Single linears that see something else than tokens are refused by `linears.py`; what cannot be known from the
modules is checked while running (`Routing.dense_gates_for`).

Adapting one stream of several is fine: the frame opens where that stream's model is called, wherever that is (`generate`
calls an encoder outside of the model's forward).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Attention over another stream: keys and values see the encoder's tokens. By the module's name, or by its class's.
CROSS_ATTENTION = re.compile(r"(^|\.)\w*(encoder_attn|encdec|encoder_decoder_att|cross_?att)\w*\.", re.IGNORECASE)
CROSS_CLASS = re.compile(r"CrossAtt|MergedAtt")
KEY_OR_VALUE = re.compile(r"(^|[._])(k|v|key|value|kv|kv_proj|k_proj|v_proj|key_proj|value_proj|c_attn|to_kv)$")
# Parts with tokens of their own, also where they are no `PreTrainedModel` of their own.
OTHER_MODALITY = re.compile(
    r"vision|visual|image|video|audio|speech|acoustic|codec|depth|protein|perceiver|resampler|qformer", re.IGNORECASE
)
EXPERT = re.compile(r"(^|\.)experts?(_?\d+)?\.")  # of a mixture-of-experts backbone: sees some of the tokens


def check_streams(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse target modules that do not all see the same tokens.

    Args:
        model: the backbone.
        names: full names of the linears that would be routed, in module order (those before the router, with shared
            experts alone, follow no decision).

    Raises:
        ValueError: names the streams and a `target_modules` that works.
    """
    cross = [name for name in names if is_cross_key_or_value(model, name)]
    streams = _streams(model, [name for name in names if name not in set(cross)])
    if len(streams) > 1 or (streams and cross):
        raise ValueError(_refusal(model, streams, cross))


def has_several_streams(model: nn.Module) -> bool:
    """Whether the model's configuration speaks of more than one token stream."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return True
    return any(getattr(config, key, None) is not None for key in getattr(config, "sub_configs", None) or ())


def _streams(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Names by token stream, that is by the innermost part of the model that has tokens of its own."""
    parts = _parts_with_own_tokens(model)
    streams: dict[str, list[str]] = {}
    for name in names:
        path = max((path for path in parts if not path or name.startswith(path + ".")), key=len)
        streams.setdefault(_modality(path, name), []).append(name)
    base = getattr(model, "base_model_prefix", None)
    if set(streams) == {"", base} and not has_several_streams(model):  # a head on the backbone sees the same tokens
        return {str(base): streams[""] + streams[str(base)]}
    return streams


def _parts_with_own_tokens(model: nn.Module) -> list[str]:
    """Paths of the modules in which a token stream may live: models within the model, and encoder next to decoder."""
    paths = {""}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            paths.add(path)
        children = {name for name, _ in module.named_children()}
        if {"encoder", "decoder"} <= children:
            paths.update(f"{path}.{name}" if path else name for name in ("encoder", "decoder"))
    return sorted(paths)


def _modality(path: str, name: str) -> str:
    """`path`, or a part of it that has another modality: in 'model.vision_embed.layers.0.fc1' 'model.vision_embed'."""
    components = name.split(".")[:-1]
    for depth in range(len(path.split(".")) if path else 0, len(components)):
        if components[depth].isdigit():  # inside a block, a name says which weights, not which tokens
            break
        if OTHER_MODALITY.search(components[depth]):
            path = ".".join(components[: depth + 1])
    return path


def is_cross_key_or_value(model: nn.Module, name: str) -> bool:
    """Whether a linear of `model` makes the keys or values of cross-attention: it sees the encoder's tokens."""
    if not KEY_OR_VALUE.search(name):
        return False
    parent = model.get_submodule(name.rpartition(".")[0])
    is_cross = getattr(parent, "is_cross_attention", False) is True or CROSS_CLASS.search(type(parent).__name__)
    return bool(is_cross or CROSS_ATTENTION.search(name))


def _refusal(model: nn.Module, streams: dict[str, list[str]], cross: list[str]) -> str:
    parts = [f"'{path or '(top)'}' ({len(members)} linears)" for path, members in streams.items()]
    if cross:
        parts.append(f"cross-attention keys and values such as '{cross[0]}' (tokens of the encoder)")
    return (
        "target_modules selects linears that see different tokens, and LoRA-Switch takes one decision per token: "
        f"{', '.join(parts)}. Adapt one stream only. This works: target_modules={suggest(model, streams)!r}"
    )


def suggest(model: nn.Module, streams: dict[str, list[str]]) -> str | list[str]:
    """A `target_modules` for one of the streams: the text decoder or language model if there is one, and of it the
    linears inside its blocks, without experts."""
    candidates = {}
    for path, members in streams.items():
        inside = [name for name in members if re.search(r"\.\d+\.", name[len(path) :])]
        plain = [name for name in inside if not EXPERT.search(name) and not OTHER_MODALITY.search(_ending(name, path))]
        candidates[path] = plain or inside or members

    def preference(path: str) -> tuple[bool | int, ...]:
        return (
            any(re.search(r"\.\d+\.", name[len(path) :]) for name in candidates[path]),
            not OTHER_MODALITY.search(path),
            "decoder" in path,
            bool(re.search(r"language|text|llm", path)),
            "encoder" not in path,
            len(candidates[path]),
        )

    path = max(candidates, key=preference)
    wanted = set(candidates[path])
    endings = sorted({_ending(name, path) for name in wanted})
    pattern = rf"(.*\.)?({'|'.join(re.escape(ending) for ending in endings)})"
    pattern = rf"{re.escape(path)}\.{pattern}" if path else pattern
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    return pattern if matched == wanted else sorted(wanted)


def _ending(name: str, path: str) -> str:
    """The part of a name below the numbered block: 'decoder.layers.0.self_attn.q_proj' -> 'self_attn.q_proj'."""
    relative = name[len(path) + 1 :] if path else name
    return re.split(r"(?:^|\.)\d+\.", relative)[-1]
