"""Checks of what is about to be loaded: the weights file beside adapter_config.json, and the tensors PEFT read from it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

if TYPE_CHECKING:
    from .config import LoRASwitchConfig

LIST_AT_MOST = 3


def check_weights_file(folder: str | os.PathLike, config: LoRASwitchConfig) -> None:
    """Check the weights file in a local folder against the config, reading its header only. A Hub name is not a folder:
    nothing to check then (downloads are verified by the client, shapes when they are loaded).

    Raises:
        ValueError: the file is truncated, is a pickle, or holds experts of another number or rank than the config says.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        pickle = os.path.join(folder, WEIGHTS_NAME)
        if os.path.isfile(pickle):
            raise ValueError(
                f"{pickle} is a pickle, which can run code when it is loaded; LoRA-Switch adapters are safetensors only. If "
                f"you trust it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), '{path}')"
            )
        return
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): copy or download it again.") from error
    for key, shape in shapes.items():
        if ".loraswitch_" in key and shape and shape[0] != config.num_experts:
            raise ValueError(
                f"{path} holds {shape[0]} experts ('{key}' is {list(shape)}), but adapter_config.json beside it says "
                f"num_experts={config.num_experts}: the two files do not belong together."
            )
        if ".loraswitch_A." in key and len(shape) == 3 and not config.rank_pattern and shape[1] != config.r:
            raise ValueError(
                f"{path} holds experts of rank {shape[1]} ('{key}' is {list(shape)}), but adapter_config.json beside it "
                f"says r={config.r}: the two files do not belong together."
            )


def check_adapter_state_dict(
    model: nn.Module, config: LoRASwitchConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Check tensors, with the model's own keys, before they are loaded; on failure the new adapter is taken off again.

    Raises:
        ValueError: tensors are missing, unknown or of another shape. Names them.
    """
    own = model.state_dict()
    inserted = "" if any(key.startswith("base_model.model.") for key in own) else "base_model.model."
    given = {key.removeprefix(inserted) if inserted else key: tensor for key, tensor in state_dict.items()}
    wanted = {key for key in own if ".loraswitch_" in key and f".{adapter_name}." in key.rpartition(".loraswitch_")[2]}
    problems = []
    missing = sorted(wanted - set(given))
    unknown = sorted(set(given) - set(own))
    wrong = [key for key in sorted(wanted & set(given)) if given[key].shape != own[key].shape]
    if wrong:
        problems.append(
            "wrong shape: "
            + _some([f"{key} is {list(given[key].shape)}, the model needs {list(own[key].shape)}" for key in wrong])
            + f" (config: num_experts={config.num_experts}, r={config.r}; does the adapter fit this backbone?)"
        )
    if missing:
        problems.append("missing: " + _some(missing))
    if unknown:
        problems.append("not in the model: " + _some(unknown))
    if problems:
        from .discard import discard_adapter

        discard_adapter(model, adapter_name)
        raise ValueError(
            f"The weights of LoRA-Switch adapter '{adapter_name}' do not match the model. " + "; ".join(problems) + ". The "
            "adapter was taken off again; nothing else has changed."
        )


def _some(items: list[str]) -> str:
    more = len(items) - LIST_AT_MOST
    return ", ".join(items[:LIST_AT_MOST]) + (f" and {more} more" if more > 0 else "")
