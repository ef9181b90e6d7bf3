"""A plain LoRA as PEFT saves it, read for a backbone and checked: is it one that an expert can be?

For an input x, a LoRA adds `s B A x` to a linear, A [r, in] and B [out, r], `s = lora_alpha / r` (`/ sqrt(r)` with rsLoRA):
just what one expert does. `rank_pattern` and `alpha_pattern` say other r and `lora_alpha` for some linears. Whatever else a
LoRA may have (DoRA's magnitudes, biases, modules trained in full, embeddings, ...) an expert cannot express.

Only headers are read here, but for one pass that looks for NaN and Inf. Nothing of the backbone is changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..config import LoRASwitchConfig
from ..loading.layout import refuse, some
from ..loading.load import renaming
from ..loading.tensor_file import FLOATS, Header, check_finite, read_header, read_tensors
from ..loading.weights_file import find_file, find_weights_file, read_config_file
from ..patterns import TimeLimit, shown
from ..peft_names import NAME, PREFIX
from ..saving.safe_save import UNFINISHED
from ..targets.linears import is_supported_linear, refused
from ..targets.selection import module_names, selects
from ..tensor_parallel import features_of
from .stacks import folded

KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)\.weight")
# Fields of LoraConfig that have a counterpart here, or none and change nothing of what the LoRA computes once it is trained.
SAME_MEANING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
ORIGIN = ("base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version", "auto_mapping")
WITHOUT_EFFECT = (
    "inference_mode", "lora_dropout", "ensure_weight_tying", "runtime_config",
    "fan_in_fan_out",  # how the backbone stores its weight: PEFT sets it by the module, and only merging asks
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of an initialisation: see INITS
    "megatron_config", "megatron_core", "qalora_group_size",
)  # fmt: skip
# Initialisations that leave the backbone as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract something from it.
INITS = (None, True, False, "gaussian", "orthogonal", "eva")
WHY = {
    "use_dora": "DoRA divides by the norm of the merged weight, which depends on the expert",
    "bias": "the biases of the backbone are there once, for all experts",
    "lora_bias": "an expert has no bias",
    "modules_to_save": "these modules are there once, for all experts",
    "trainable_token_indices": "the embeddings are there once, for all experts",
    "target_parameters": "experts are added to linears, not to parameters",
    "layer_replication": "it is for a backbone with other blocks",
    UNFINISHED: "a save into this folder was broken off, so that the weights may belong to another configuration: save again",
    "alora_invocation_tokens": "an aLoRA works from its invocation tokens on only",
}
# What a tensor's name tells of a LoRA that an expert cannot be.
FOREIGN = {
    "lora_magnitude_vector": "it belongs to DoRA",
    "lora_embedding_": "it adapts an embedding",
    "lora_A.bias": "an expert has no bias",
    "lora_B.bias": "an expert has no bias",
    ".bias": "it is a bias of the backbone",
}


@dataclass(frozen=True)
class Matrices:
    """Where the two matrices of a LoRA on one linear stand in its file, and what they are multiplied with."""

    key_a: str
    key_b: str
    rank: int
    scale: float


class PlainLora:
    """A LoRA in a folder or on the Hub, compared with a backbone.

    Attributes:
        source: the folder or name that it was asked for by.
        fields: its adapter_config.json.
        path: its weights file.
        linears: its matrices, by the full name of the linear in the backbone, in the backbone's order.

    Args:
        backbone: the model that it is for; its linears may carry LoRA-Switch adapters already.
        hub: arguments of `hf_hub_download`.

    Raises:
        ValueError: the files are missing, damaged or no plain LoRA, or do not fit to the backbone. Names file, field or tensor.
    """

    def __init__(self, backbone: nn.Module, source: str | os.PathLike[str], hub: dict[str, Any]) -> None:
        self.source = os.fspath(source)
        config = find_file(source, CONFIG_NAME, **hub)
        if config is None:
            raise ValueError(f"{self.source} is no adapter: there is no {CONFIG_NAME}.")
        self.fields = read_config_file(config)
        settings = _settings(config, self.fields)
        path = find_weights_file(source, **hub)
        if path is None:
            raise ValueError(f"{self.source} holds no weights: there is no {SAFETENSORS_WEIGHTS_NAME}.")
        self.path = path
        pairs = _pairs(path, read_header(path), renaming({"model": backbone}, backbone))
        _check_selection(path, backbone, settings, pairs)
        limit = TimeLimit()
        self.linears = {
            name: _matrices(path, name, backbone.get_submodule(name), pairs[name], settings, limit)
            for name in module_names(backbone)
            if name in pairs
        }
        unfit = refused(backbone, list(self.linears))
        for name, reason in unfit.items():
            raise ValueError(f"{path}: it adapts '{name}', which cannot follow a routing decision: {reason}.")

    @property
    def base_name(self) -> str | None:
        """The backbone that it was trained on, if it says so."""
        return self.fields.get("base_model_name_or_path") or None

    @property
    def default_name(self) -> str:
        """The last part of its folder or Hub name."""
        return Path(os.path.abspath(self.source) if os.path.isdir(self.source) else self.source).name

    def check_finite(self) -> None:
        """Raise a ValueError if there is NaN or Inf among the weights. Reads all of them."""
        keys = [key for found in self.linears.values() for key in (found.key_a, found.key_b)]
        check_finite(self.path, zip(keys, read_tensors(self.path, keys), strict=True))

    def weights(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name of the linear, A [r, in] and B [out, r], one linear after the other, on the CPU in the file's dtype."""
        tensors = read_tensors(self.path, [key for m in self.linears.values() for key in (m.key_a, m.key_b)])
        for name in self.linears:
            yield name, next(tensors), next(tensors)


def check_base(backbone: nn.Module, loras: Iterable[PlainLora]) -> None:
    """The LoRAs must have been trained on this backbone, as far as the names tell; else on the same, whatever it is."""
    name, whose = getattr(backbone, "name_or_path", None), "the model's name"
    for lora in loras:
        if not name:
            name, whose = lora.base_name, f"that of {lora.path}"
        if lora.base_name and not _same_base(lora.base_name, str(name)):
            raise ValueError(
                f"{lora.path}: base_model_name_or_path={shown(lora.base_name)}, but {whose} is {shown(name)}. If the weights are "
                "the same under another name, pass ignore_base_name=True."
            )


def _same_base(first: str, second: str) -> bool:
    return first == second or (
        os.path.isdir(first) and os.path.isdir(second) and os.path.realpath(first) == os.path.realpath(second)
    )


def folded_b(lora: PlainLora, name: str, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """B of the linear `name`, in `dtype`, as it must be where the stack's scale is `scale`.

    Raises:
        ValueError: a number is beyond `dtype`.
    """
    ratio = lora.linears[name].scale / scale
    result = folded(b, ratio, dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"{lora.path}: B of '{name}' times {ratio:.3g}, its scale over that of the other experts, is beyond {dtype}."
        )
    return result


# ------------------------------------------------------------------------------------------------------- configuration


def _settings(path: str, fields: dict[str, Any]) -> LoRASwitchConfig:
    """The fields that say what the LoRA computes, checked: those of an adapter with one expert."""
    kind = fields.get("peft_type")
    if kind == NAME:
        raise ValueError(f"{path}: this is a LoRA-Switch adapter already; write its experts with export_expert first.")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type={shown(kind)} is not LORA: only plain LoRAs can become experts.")
    known = {*SAME_MEANING, *SELECTION, *ORIGIN, *WITHOUT_EFFECT, "init_lora_weights"}
    for name, value in fields.items():
        # a number alone belongs to something else that is switched off
        if name not in known and value not in (None, False, [], {}, "none") and type(value) not in (int, float):
            why = WHY.get(name, "this kind of LoRA computes something else than B A x, or is newer than this version")
            raise ValueError(f"{path}: {name}={shown(value)} has no counterpart in an expert: {why}.")
    init = fields.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in INITS):
        raise ValueError(
            f"{path}: init_lora_weights={shown(init)} has changed the backbone that the LoRA was trained on. Let PEFT "
            "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(fields.get(name), (str, type(None))):
            raise ValueError(f"{path}: {name}={shown(fields[name])} must be a text or null.")
    names = [name for name in (*SAME_MEANING, *SELECTION) if fields.get(name) is not None]
    if "r" not in names:
        raise ValueError(f"{path}: r is missing.")
    try:
        return LoRASwitchConfig(num_experts=1, top_k=1, **{name: fields[name] for name in names})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ------------------------------------------------------------------------------------------------------------- weights


def _pairs(path: str, header: Header, rename: Any) -> dict[str, dict[str, Any]]:
    """A and B, by the name of the linear in the backbone."""
    pairs: dict[str, dict[str, Any]] = {}
    for key, info in header.items():
        match = KEY.fullmatch(rename(key).removeprefix(PREFIX))
        if match is None:
            why = next(
                (why for mark, why in FOREIGN.items() if mark in key),
                "it is no LoRA matrix, perhaps a tensor of the backbone",
            )
            raise ValueError(f"{path}: '{key}' has no counterpart in an expert: {why}.")
        if info.dtype not in FLOATS:
            raise ValueError(f"{path}: '{key}' holds numbers of type {info.dtype}, not floating-point numbers.")
        if len(info.shape) != 2:
            what = "of a convolution" if len(info.shape) > 2 else "no matrix"
            raise ValueError(f"{path}: wrong shape: '{key}' is {list(info.shape)}, {what}; an expert adapts linears.")
        parts = pairs.setdefault(match["module"], {})
        if match["part"] in parts:
            raise ValueError(f"{path}: '{key}' and '{parts[match['part']].key}' are the same tensor.")
        parts[match["part"]] = info
    if not pairs:
        raise ValueError(f"{path} holds no LoRA weights.")
    lacking = [f"{name}.lora_{part}.weight" for name, parts in pairs.items() for part in "AB" if part not in parts]
    refuse_tensors(path, lacking, [])
    return pairs


def refuse_tensors(path: str, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """`refuse`, of a plain LoRA."""
    try:
        refuse(path, list(missing), list(unknown))
    except ValueError as error:
        raise ValueError(str(error).replace("the LoRA-Switch adapter", "the backbone as a LoRA")) from None


def _check_selection(path: str, backbone: nn.Module, settings: LoRASwitchConfig, pairs: dict[str, Any]) -> None:
    """The linears in the file must be those of the backbone that the configuration selects."""
    names = module_names(backbone)
    refuse_tensors(
        path, [], [f"{name}.lora_{part}.weight" for name in pairs if name not in set(names) for part in "AB"]
    )
    targets = settings.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return  # PEFT's own choice, which it saves as a list
    limit = TimeLimit()
    selected = {name for name in names if selects(settings, name, limit)}
    refuse_tensors(path, [f"{name}.lora_A.weight" for name in selected - set(pairs)], [])
    if left := sorted(set(pairs) - selected):
        raise ValueError(
            f"{path}: it holds weights for {some(left)}, which target_modules={shown(targets)} in {CONFIG_NAME} does not name: "
            "PEFT would not load them. The two do not belong together."
        )


def _matrices(
    path: str, name: str, module: nn.Module, pair: dict[str, Any], settings: LoRASwitchConfig, limit: TimeLimit
) -> Matrices:
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not is_supported_linear(base):
        raise ValueError(f"{path}: it adapts '{name}', a {type(base).__name__}; an expert adapts linears.")
    in_features, out_features = features_of(base)
    rank = settings.rank_of(name, limit)
    a, b = pair["A"], pair["B"]
    for info, held, wanted in ((a, a.shape[1], in_features), (b, b.shape[0], out_features)):
        if held != wanted:
            raise ValueError(
                f"{path}: wrong shape: '{info.key}' is {list(info.shape)}, the linear of this model has "
                f"{in_features} inputs and {out_features} outputs. The LoRA was made for another backbone."
            )
    for info, held in ((a, a.shape[0]), (b, b.shape[1])):
        if held != rank:
            raise ValueError(
                f"{path}: '{info.key}' is {list(info.shape)}, of rank {held}, but {CONFIG_NAME} says "
                f"{'rank_pattern' if settings.rank_pattern else 'r'}={rank}: the two do not belong together."
            )
    return Matrices(a.key, b.key, rank, settings.scale_of(name, limit))
