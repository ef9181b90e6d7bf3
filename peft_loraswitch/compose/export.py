"""`export_expert`: an expert becomes a plain LoRA, which PEFT loads without this package."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import LoRASwitchConfig
from ..layer import LoRASwitchLinear
from ..loading.layout import backbone_of
from ..loading.tensor_file import check_finite
from ..loading.weights_file import read_config_file
from ..peft_names import PREFIX
from ..saving.safe_save import replace_both
from ..targets.selection import module_names
from .experts import adapted_linears, check_in_memory, config_of, index_of
from .stacks import rank_and_alpha, selection, used_rows


def export_expert(
    model: nn.Module, expert: str | int, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write one expert as a plain LoRA, `adapter_model.safetensors` and `adapter_config.json`, which loads with PEFT alone.

    It computes what the adapter computes for tokens that choose this expert alone with gate 1. Shared experts are in it with
    their gate 1 / top_k, as further components: every token has them. (On linears before the router there are only these.)

    Components that are zero in A and in B are left out, so that of an imported LoRA its own rank comes back, and, where
    `from_loras` had no scale to fold into B, its own numbers. Linears with nothing left are not among its target_modules. The
    numbers keep the dtype that the experts have in the model.

    vLLM reads r and lora_alpha, but no patterns: it gets the scale right where that is the same on all linears, as in an adapter
    without alpha_pattern of its own and in one of LoRAs whose scales agree.

    Args:
        model: a model with LoRA-Switch adapters, also a fused one.
        expert: name or index of a routed expert.
        folder: for the two files. A plain LoRA that is there is replaced.
        adapter_name: which adapter; may be left out if there is only one.

    Raises:
        ValueError: the expert is unknown, zero everywhere, or holds NaN or Inf; the folder holds an adapter of another kind.
        RuntimeError: the model is offloaded.
        OSError: the files cannot be written; those of before are then still there.
    """
    adapter, config = config_of(model, adapter_name)
    index = index_of(config, expert)
    backbone = backbone_of(model)
    path = _checked_folder(folder)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    linears = adapted_linears(backbone, adapter)
    check_in_memory(linears.values())
    for name, layer in linears.items():
        a, b = _matrices(layer, adapter, index)
        if a.shape[0]:
            ranks[name], scales[name] = a.shape[0], layer.scaling[adapter]
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
    if not tensors:
        raise ValueError(f"expert {expert!r} is zero on every linear: there is nothing to write.")
    check_finite(f"expert {expert!r}", tensors.items())
    transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in linears.values())
    lora = _config(config, backbone, ranks, scales, transposed)
    replace_both(
        path,
        _writer(lambda beside: save_file(tensors, beside, metadata={"format": "pt"})),
        lambda beside: lora.save_pretrained(os.path.dirname(beside)),
    )


def _writer(write: Callable[[str], Any]) -> Callable[[str], Any]:
    """`write`, whose failures are OSErrors, which safetensors reports in its own way."""

    def run(beside: str) -> None:
        try:
            write(beside)
        except Exception as error:
            raise error if isinstance(error, OSError) else OSError(f"{beside} cannot be written: {error}") from error

    return run


def _checked_folder(folder: str | os.PathLike[str]) -> str:
    path = os.fspath(folder)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"folder={path!r} is a file, not a folder.")
    config = os.path.join(path, CONFIG_NAME)
    if os.path.lexists(config) and read_config_file(config).get("peft_type") != "LORA":
        raise ValueError(f"folder={path!r} holds an adapter that is no plain LoRA: choose another one.")
    if not os.path.lexists(config) and os.path.lexists(os.path.join(path, SAFETENSORS_WEIGHTS_NAME)):
        raise ValueError(f"folder={path!r} holds weights without {CONFIG_NAME}: choose another one.")
    return path


@torch.no_grad()
def _matrices(layer: LoRASwitchLinear, adapter: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of the expert and of the shared ones behind it, on the CPU, without zero components."""
    a, b = layer.loraswitch_A[adapter].weight, layer.loraswitch_B[adapter].weight
    routed = layer.routing_options[adapter].num_experts
    parts = [(a[index], b[index])] if routed else []
    parts += [(a[e], b[e] / layer.routing_options[adapter].top_k) for e in range(routed, a.shape[0])]
    kept = [(a_[rows], b_[:, rows]) for a_, b_ in parts for rows in [used_rows(a_, b_)]]
    return torch.cat([a for a, _ in kept]).cpu().contiguous(), torch.cat([b for _, b in kept], 1).cpu().contiguous()


def _config(
    config: LoRASwitchConfig,
    backbone: nn.Module,
    ranks: dict[str, int],
    scales: dict[str, float],
    transposed: bool,
) -> LoraConfig:
    lora = LoraConfig(
        **rank_and_alpha(ranks, scales),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    # here, because LoraConfig makes a set of a list: the same expert is the same file
    lora.target_modules = selection(list(ranks), module_names(backbone))
    return lora
