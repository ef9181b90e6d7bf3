"""`from_loras`: plain LoRAs become the experts of one routed adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..config import LoRASwitchConfig, check_expert_names
from ..layer import LoRASwitchLinear
from ..loading.layout import backbone_of, some
from ..loading.rollback import all_or_nothing
from ..patterns import shown
from ..targets.selection import module_names
from .experts import adapted_linears
from .lora_files import PlainLora, check_base, folded_b
from .stacks import common_scale, rank_and_alpha, selection

# What the LoRAs decide, or what plain LoRAs have not.
NOT_GIVEN = (
    "peft_type", "r", "num_experts", "num_shared_experts", "target_modules", "exclude_modules", "lora_alpha", "use_rslora",
    "bias", "init_weights", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip


def from_loras(
    model: nn.Module,
    loras: Sequence[str | os.PathLike[str]],
    expert_names: Sequence[str] | None = None,
    adapter_name: str = "default",
    router_module: str | None = None,
    top_k: int = 2,
    ignore_base_name: bool = False,
    hub: dict[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
    **config: Any,
) -> PeftModel:
    """Make one routed adapter of LoRAs that exist: each becomes an expert.

    An expert that a token chooses alone, with gate 1, computes what its LoRA computes, `s_e B_e A_e x`, whatever rank, scale
    (`lora_alpha`, rsLoRA, `rank_pattern`, `alpha_pattern`), linears and dtype each LoRA has. On every linear

    - the rank is the largest of the LoRAs', and the others have zeros beyond theirs (which training leaves zero);
    - a LoRA that does not adapt the linear has an expert of zeros there;
    - the scale s is that of most LoRAs there. A, and B where `s_e = s`, are the file's numbers to the bit (the experts are
      float32, or of a dtype that holds the file's). Elsewhere B_e is multiplied by `s_e / s` and rounded once.

    The router is new: its rows are random, and nothing is known yet of which text is whose. Train it before use.

    Args:
        model: the backbone, or a `PeftModel` whose adapters are LoRA-Switch's; the new one is active only in the first case.
        loras: two or more folders or Hub names of LoRAs that PEFT has saved, as safetensors.
        expert_names: a name for each; None: the last part of its folder or Hub name.
        adapter_name, router_module, top_k: as in `get_peft_model` and `LoRASwitchConfig`. A linear before `router_module` would
            have no experts: if a LoRA adapts one, that is refused.
        ignore_base_name: take LoRAs that name another backbone than `model` (its shapes must fit all the same).
        hub: arguments of `hf_hub_download`, for instance `{"token": ...}`.
        autocast_adapter_dtype: as in `get_peft_model`. False: experts are of the backbone's dtype, and rounded to that.
        config: other fields of `LoRASwitchConfig` that the LoRAs do not decide.

    Returns:
        `PeftModel` in the mode (training or not) of `model`; experts and router are trainable.

    Raises:
        ValueError: a LoRA cannot be an expert (DoRA, `bias`, `modules_to_save`, trained tokens, embeddings, convolutions, other
            methods than LoRA, pickles), does not fit to the backbone, is damaged or missing or holds NaN or Inf; there is
            none or only one, or one twice. Names the file, tensor or field. The model is as it was.

    Example:
        ```py
        model = from_loras(model, ["you/maths-lora", "you/code-lora"], top_k=1)
        ```
    """
    sources = _sources(loras)
    backbone = backbone_of(model)
    _check_call(model, adapter_name, config)
    found = [PlainLora(backbone, source, hub or {}) for source in sources]
    names = _names(found, expert_names)
    if not ignore_base_name:
        check_base(backbone, found)
    scales = _scales(backbone, found)
    settings = _config(backbone, found, scales, names, router_module=router_module, top_k=top_k, **config)
    for lora in found:
        lora.check_finite()
    with all_or_nothing(model):
        if isinstance(model, PeftModel):
            result = model
            model.add_adapter(adapter_name, settings, autocast_adapter_dtype=autocast_adapter_dtype)
        else:
            result = get_peft_model(model, settings, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
            result.train(model.training)
        linears = adapted_linears(backbone, adapter_name)
        _check_all_adapted(found, linears, router_module)
        _write(found, linears, adapter_name, scales)
    return result


# ------------------------------------------------------------------------------------------------------------- checks


def _sources(loras: Any) -> list[str | os.PathLike[str]]:
    if isinstance(loras, (str, os.PathLike)) or not isinstance(loras, Sequence):
        raise ValueError(f"loras={shown(loras)} must be a list of folders or Hub names.")
    for source in loras:
        if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
            raise ValueError(f"loras holds {shown(source)}, which is no folder and no Hub name.")
    if len(loras) < 2:
        raise ValueError(
            f"loras names {len(loras)} LoRA{'' if loras else 's'}: a router needs two or more to choose from. "
            "PeftModel.from_pretrained loads a single one."
        )
    places = [os.path.realpath(source) if os.path.isdir(source) else os.fspath(source) for source in loras]
    twice = [source for source, place in zip(loras, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ValueError(f"loras names {shown(os.fspath(twice[0]))} twice: each LoRA is one expert.")
    return list(loras)


def _check_call(model: nn.Module, adapter_name: str, config: dict[str, Any]) -> None:
    taken = sorted(set(config) & set(NOT_GIVEN))
    if taken:
        raise ValueError(f"from_loras takes no {', '.join(taken)}: the LoRAs decide it, or have nothing like it.")
    unknown = sorted(set(config) - {field.name for field in fields(LoRASwitchConfig)})
    if unknown:
        raise ValueError(f"from_loras does not know {', '.join(unknown)}: they are no fields of LoRASwitchConfig.")
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise ValueError(f"The adapter '{adapter_name}' exists already: delete it first, or give another adapter_name.")


def _names(loras: Sequence[PlainLora], given: Sequence[str] | None) -> list[str]:
    if given is not None:
        check_expert_names("expert_names", given, len(loras))
        return list(given)
    names = [lora.default_name for lora in loras]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Two of the LoRAs are called '{twice}': give expert_names, a name for each.")
    return names


def _check_all_adapted(
    loras: Sequence[PlainLora], linears: dict[str, LoRASwitchLinear], router_module: str | None
) -> None:
    for lora in loras:
        lost = [name for name in lora.linears if name not in linears]
        if lost:
            raise ValueError(
                f"router_module={shown(router_module)}: linears before it follow no decision, but {lora.path} adapts "
                f"{some(lost)}. Choose one before them, or leave router_module out."
            )


# --------------------------------------------------------------------------------------------------- what is to be made


def _scales(backbone: nn.Module, loras: Sequence[PlainLora]) -> dict[str, float]:
    """The scale of each linear that any of the LoRAs adapts, in the backbone's order."""
    return {
        name: common_scale([lora.linears[name].scale for lora in loras if name in lora.linears])
        for name in module_names(backbone)
        if any(name in lora.linears for lora in loras)
    }


def _config(
    backbone: nn.Module, loras: Sequence[PlainLora], scales: dict[str, float], names: list[str], **given: Any
) -> LoRASwitchConfig:
    ranks = {name: max(lora.linears[name].rank for lora in loras if name in lora.linears) for name in scales}
    tasks = {lora.fields.get("task_type") for lora in loras} - {None}
    if len(tasks) == 1:
        given.setdefault("task_type", tasks.pop())
    return LoRASwitchConfig(
        num_experts=len(loras),
        expert_names=names,
        **rank_and_alpha(ranks, scales),
        target_modules=selection(list(ranks), module_names(backbone)),
        **given,
    )


@torch.no_grad()
def _write(
    loras: Sequence[PlainLora], linears: dict[str, LoRASwitchLinear], adapter: str, scales: dict[str, float]
) -> None:
    for layer in linears.values():
        layer.loraswitch_A[adapter].weight.zero_()
        layer.loraswitch_B[adapter].weight.zero_()
    for expert, lora in enumerate(loras):
        for name, a, b in lora.weights():
            into_a, into_b = (m[adapter].weight for m in (linears[name].loraswitch_A, linears[name].loraswitch_B))
            rank = a.shape[0]
            b = folded_b(lora, name, b, scales[name], into_b.dtype)
            into_a[expert, :rank].copy_(a)
            into_b[expert, :, :rank].copy_(b)
