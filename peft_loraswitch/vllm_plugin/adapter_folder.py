"""A LoRA-Switch adapter read from its folder without PEFT, and checked: what vLLM cannot do is refused here, by name.

The two files are those that `save_pretrained` writes. `LoRASwitchConfig` itself needs PEFT, which vLLM's environment lacks.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..loading.tensor_file import (
    FLOATS,
    check_finite,
    check_regular_file,
    read_header,
    read_json_object,
    read_tensors,
)
from ..patterns import TimeLimit, first_match, shown
from ..routing.options import RoutingOptions

NAME = "LORASWITCH"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<linear>.+)\.loraswitch_(?P<part>A|B|router)\.weight")
MOST = 65536  # experts, and rows of a stack: beyond it a number is a mistake

# Fields that change nothing in a forward with trained weights: they say which linears, how to train, where from.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "expert_names", "inference_mode",
    "init_weights", "layers_pattern", "layers_to_transform", "lora_dropout", "peft_type", "peft_version", "revision",
    "router_aux_loss_coef", "router_jitter", "router_z_loss_coef", "target_modules", "task_type", "trainable",
}  # fmt: skip
# Fields that are read, with what they are where the file does not have them.
READ = {
    "alpha_pattern": {}, "base_expert": False, "lora_alpha": 8, "normalize_gates": None, "num_experts": 8,
    "num_shared_experts": 0, "r": 8, "rank_pattern": {}, "router_module": None, "router_decay": 0.0, "top_k": 2, "top_p": 1.0,
    "use_rslora": False,
}  # fmt: skip
# Fields that must be off, and why.
REFUSED = {
    "bias": ("none", "biases of the backbone that were trained"),
    "modules_to_save": (None, "modules that were trained in full"),
    "trainable_token_indices": (None, "embeddings of tokens that were trained"),
}


@dataclass(frozen=True)
class Experts:
    """The experts on one linear: a [stacked, r, in], b [stacked, out, r], in the file's dtype; scale, what they are multiplied
    with. `stacked` counts the routed experts, then the shared ones; the latter alone on a linear before the one that routes."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def stacked(self) -> int:
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds.

    Attributes:
        folder: for messages.
        options: of routing.
        router_is_named: the configuration says which linear routes; otherwise it is the adapted one that runs first.
        router_linear: the linear that the file keeps the router with; router: its weight, [choices, in].
        experts: by the name of the linear in the checkpoint of the backbone.
        covers_all_blocks: what is adapted in one block of the backbone is adapted in each (behind the router).
    """

    folder: str
    options: RoutingOptions
    router_is_named: bool
    router_linear: str
    router: torch.Tensor
    experts: dict[str, Experts]
    covers_all_blocks: bool


def read_settings(folder: str) -> dict[str, Any] | None:
    """The fields of the adapter's configuration, or None if it is of another method, or not there.

    Raises:
        ValueError: the file is not what it should be. Names it.
    """
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.lexists(path):
        return None
    settings = read_json_object(path)
    return settings if settings.get("peft_type") == NAME else None


def read_adapter(folder: str, settings: Mapping[str, Any]) -> Adapter:
    """The adapter in `folder`, whose configuration holds `settings`.

    Raises:
        ValueError: a field or a tensor is unknown, wrong, or nothing that vLLM can serve; or a file is damaged. Names it.
    """
    where = os.path.join(folder, CONFIG_FILE)
    _check_fields(where, settings)
    fields = {name: settings.get(name, default) for name, default in READ.items()}
    options = _routing_options(where, fields)
    path = os.path.join(folder, WEIGHTS_FILE)
    if not os.path.lexists(path):
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}: save the adapter again with save_pretrained.")
    check_regular_file(path)
    header = read_header(path)
    parts: dict[tuple[str, str], torch.Tensor] = {}
    for key, tensor in zip(header, read_tensors(path, header), strict=True):
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path}: cannot serve '{key}': only experts and a router are served, nothing else that was trained or saved."
            )
        if header[key].dtype not in FLOATS:
            raise ValueError(f"{path}: '{key}' holds numbers of type {header[key].dtype}, not floating-point numbers.")
        parts[match["linear"], match["part"]] = tensor
    check_finite(path, ((f"{linear}.loraswitch_{part}", tensor) for (linear, part), tensor in parts.items()))
    routers = [linear for linear, part in parts if part == "router"]
    if len(routers) != 1:
        raise ValueError(f"{path} holds {len(routers)} routers, not one: it is not a LoRA-Switch adapter, or damaged.")
    router = parts[routers[0], "router"]
    if router.ndim != 2 or router.shape[0] != options.num_choices:
        raise ValueError(
            f"{path}: the router is {list(router.shape)}, but {CONFIG_FILE} says num_experts={options.num_experts}, "
            f"base_expert={options.base_expert}: the two do not belong together."
        )
    limit = TimeLimit()
    experts = {
        linear: _experts(path, linear, parts, options, fields, limit)
        for linear in dict.fromkeys(linear for linear, _ in parts)
    }
    if experts[routers[0]].stacked != options.num_stacked:
        raise ValueError(f"{path}: '{routers[0]}' holds the router, but not all experts.")
    targets = settings.get("target_modules")
    covers_all_blocks = (
        isinstance(targets, list)
        and not any(re.search(r"\.\d+\.", str(target)) for target in targets)
        and settings.get("layers_to_transform") is None
        and not settings.get("exclude_modules")
    )
    named = fields["router_module"] is not None
    return Adapter(folder, options, named, routers[0], router, experts, covers_all_blocks)


def _check_fields(where: str, settings: Mapping[str, Any]) -> None:
    unknown = sorted(set(settings) - WITHOUT_EFFECT - set(READ) - set(REFUSED))
    if unknown:
        raise ValueError(
            f"{where}: unknown field(s) {shown(unknown)}: the adapter was written by a newer version of peft_loraswitch. "
            "Install that version on the server, too."
        )
    for name, (off, what) in REFUSED.items():
        value = settings.get(name, off)
        if value != off and value not in (None, [], {}):
            raise ValueError(f"{where}: {name}={shown(value)} cannot be served by vLLM: it stands for {what}.")


def _routing_options(where: str, fields: Mapping[str, Any]) -> RoutingOptions:
    for name, least in (("num_experts", 1), ("top_k", 1), ("num_shared_experts", 0), ("r", 1)):
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise ValueError(f"{where}: {name}={shown(value)} must be a whole number from {least} to {MOST}.")
    for name in ("base_expert", "use_rslora"):
        if not isinstance(fields[name], bool):
            raise ValueError(f"{where}: {name}={shown(fields[name])} must be true or false.")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = fields[name] or {}
        if not isinstance(pattern, dict) or not all(_is_positive(value) for value in pattern.values()):
            raise ValueError(f"{where}: {name}={shown(pattern)} must be an object of names and numbers above 0.")
    if not _is_positive(fields["lora_alpha"]):
        raise ValueError(f"{where}: lora_alpha={shown(fields['lora_alpha'])} must be a number above 0.")
    top_k, normalize = fields["top_k"], fields["normalize_gates"]
    if top_k > fields["num_experts"]:
        raise ValueError(f"{where}: top_k={top_k} is larger than num_experts={fields['num_experts']}.")
    top_p = fields["top_p"]
    if not _is_positive(top_p) or top_p > 1:
        raise ValueError(f"{where}: top_p={shown(top_p)} must be a number above 0 and at most 1.")
    decay = fields["router_decay"]
    if decay != 0 and (not _is_positive(decay) or decay > 1):
        raise ValueError(f"{where}: router_decay={shown(decay)} must be a number from 0 to 1.")
    if not isinstance(normalize, (bool, type(None))):
        raise ValueError(f"{where}: normalize_gates={shown(normalize)} must be true, false or null.")
    if not isinstance(fields["router_module"], (str, type(None))):
        raise ValueError(
            f"{where}: router_module={shown(fields['router_module'])} must be the name of a linear, or null."
        )
    return RoutingOptions(
        num_experts=fields["num_experts"],
        top_k=top_k,
        normalize_gates=top_k > 1 if normalize is None else normalize,
        num_shared_experts=fields["num_shared_experts"],
        base_expert=fields["base_expert"],
        top_p=float(top_p),
        decay=float(decay),
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _experts(
    path: str,
    linear: str,
    parts: Mapping[tuple[str, str], torch.Tensor],
    options: RoutingOptions,
    fields: Mapping[str, Any],
    limit: TimeLimit,
) -> Experts:
    """The experts on `linear`, compared with the configuration."""
    if (linear, "A") not in parts or (linear, "B") not in parts:
        raise ValueError(f"{path}: of '{linear}' there is only one of A and B: the file is damaged.")
    a, b = parts[linear, "A"], parts[linear, "B"]
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        raise ValueError(
            f"{path}: A of '{linear}' is {list(a.shape)}, B is {list(b.shape)}; not [experts, r, in] and [experts, out, r]."
        )
    counts = {options.num_stacked}
    if options.num_shared_experts and fields["router_module"] is not None:
        counts.add(options.num_shared_experts)
    if a.shape[0] not in counts:
        raise ValueError(
            f"{path} holds {a.shape[0]} experts on '{linear}', but {CONFIG_FILE} says num_experts={options.num_experts}, "
            f"num_shared_experts={options.num_shared_experts}: the two do not belong together."
        )
    rank = _matching(fields, "rank_pattern", linear, fields["r"], limit)
    if a.shape[1] != rank:
        raise ValueError(
            f"{path} holds experts of rank {a.shape[1]} on '{linear}', but {CONFIG_FILE} says {rank}: the two do not belong "
            "together."
        )
    alpha = _matching(fields, "alpha_pattern", linear, fields["lora_alpha"], limit)
    return Experts(a, b, alpha / (math.sqrt(rank) if fields["use_rslora"] else rank))


def _matching(fields: Mapping[str, Any], pattern: str, linear: str, otherwise: Any, limit: TimeLimit) -> Any:
    """What `rank_pattern` or `alpha_pattern` says about `linear`."""
    values = fields[pattern] or {}
    key = first_match(pattern, values, linear, limit)
    return otherwise if key is None else values[key]
