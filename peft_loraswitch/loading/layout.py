"""What the weights file of an adapter may hold for a given model, and which of the model's tensors each becomes.

A file holds names, and every loader writes whatever tensor of the model has one of these names: also one of the backbone,
or of another adapter. So the names that a load may write are settled here, from the model alone; they are those that
PEFT's `save_pretrained` writes for it:

- experts and router, what `modules_to_save` and `trainable_token_indices` train, and with `bias` the backbone's biases;
- the input and output embeddings, which PEFT adds when the vocabulary was resized (or with `save_embedding_layers=True`).
  These belong to the backbone: they need not be there, and a load that writes them says so;
- copies of the second kind's tensors under a second name, which PEFT adds along with the embeddings and never reads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import LoRASwitchConfig
from ..patterns import TimeLimit
from ..peft_names import PREFIX
from ..tensor_parallel import features_of
from .tensor_file import DTYPES, FLOATS, Header, TensorInfo

LIST_AT_MOST = 3
OUR_KEY = re.compile(r"(?P<module>.+)\.loraswitch_(?P<part>A|B|router)\.weight")
SHAPES = {
    "A": "[num_experts, r, in_features]",
    "B": "[num_experts, out_features, r]",
    "router": "[num_experts, in_features]",  # one row more for the base expert
}
WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # where an adapter keeps the module that it stands in for


class Slot(NamedTuple):
    """What a tensor of the file becomes.

    Attributes:
        target: name of the model's tensor; None: of a copy that is not read.
        tensor: the model's tensor, or the one that the copy is of.
        required: the file must hold it.
        of_backbone: it is a tensor of the backbone, which all adapters share.
    """

    target: str | None
    tensor: torch.Tensor
    required: bool = False
    of_backbone: bool = False

    @property
    def is_checked(self) -> bool:
        """Whether its numbers have to be finite: all that the adapter needs, and all that other adapters would have, too."""
        return self.required or self.of_backbone


class Layout:
    """The slots of adapter `adapter_name`, whose modules are in `model` (a PeftModel or the backbone) already."""

    def __init__(self, model: Any, config: LoRASwitchConfig, adapter_name: str) -> None:
        backbone = backbone_of(model)
        self.adapter_name = adapter_name
        self.config = config
        self.state: dict[str, torch.Tensor] = backbone.state_dict(keep_vars=True)
        self.slots: dict[str, Slot] = {}  # by the file's key, without PREFIX
        self.embeddings = tuple(f"{name}." for name in embedding_names(backbone))
        self._add_trained(backbone)
        if config.bias != "none":
            self._add_biases(backbone)
        self._add_shared([key for key in self.state if key.startswith(self.embeddings)], required=False)
        # the same tensor of the backbone has another name where other adapters are around it
        self._plain = {plain_name(name): slot for name, slot in self.slots.items() if slot.of_backbone}

    def find(self, key: str) -> Slot | None:
        """The slot of a key of the file, or None if the file must not hold it."""
        name = key.removeprefix(PREFIX)
        return self.slots.get(name) or self._plain.get(plain_name(name))

    def match(self, where: Any, header: Header, find: Any = None) -> dict[str, Slot]:
        """The slot of every tensor in `header`, compared.

        Args:
            where: the file, for messages.
            find: instead of `self.find`.

        Raises:
            ValueError: tensors are missing, unknown, there twice, or of another shape or dtype. Names them.
        """
        matched: dict[str, Slot] = {}
        unknown, targets = [], set()
        for key, info in header.items():
            slot = (find or self.find)(key)
            if slot is None:
                unknown.append(info.key)
                continue
            if slot.target in targets:
                raise ValueError(f"{where}: holds '{slot.target}' twice, the second time as '{info.key}'.")
            if slot.target is not None:
                targets.add(slot.target)
                self._check_tensor(where, info, slot)
            matched[key] = slot
        refuse(where, list(self._missing(targets)), unknown)
        return matched

    def _missing(self, targets: Collection[str | None]) -> Iterator[str]:
        """The required tensors that are not among `targets`, in words for a message."""
        for name, slot in self.slots.items():
            if slot.required and slot.target not in targets:
                trained_by = re.search(r"\b(modules_to_save|trainable_token)", slot.target or "")
                field = "bias" if slot.of_backbone else trained_by[1] if trained_by else None
                yield f"{PREFIX}{name}" + (f" (of {field})" if field else "")

    def _check_tensor(self, where: Any, info: TensorInfo, slot: Slot) -> None:
        target, wanted = str(slot.target), tuple(slot.tensor.shape)
        ours = ".loraswitch_" in target
        floats = FLOATS if ours or slot.tensor.is_floating_point() else ()
        if info.dtype not in floats and (ours or info.dtype != DTYPES.get(slot.tensor.dtype)):
            kind = "floating-point numbers" if floats else str(slot.tensor.dtype)
            raise ValueError(f"{where}: '{info.key}' holds numbers of type {info.dtype}, not {kind}.")
        if target.startswith(self.embeddings) and ".trainable_tokens_" not in target:
            check_vocabulary(where, info, wanted)
        check_shape(where, info.key, info.shape, wanted, self.config)

    # --------------------------------------------------------------------------------------------------- filling

    def _add_trained(self, backbone: nn.Module) -> None:
        seen: set[int] = set()
        for key, tensor in self.state.items():
            if ".loraswitch_" in key and owner(key) == self.adapter_name:
                self.slots[self._in_file(key)] = Slot(key, tensor, required=id(tensor) not in seen)
                seen.add(id(tensor))
        for name, module in backbone.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                for saved, key in module.adapter_state_dict_load_map(self.adapter_name).items():
                    target = f"{name}.{key}"
                    self.slots[f"{name}.{saved}"] = Slot(target, self.state[target], required=True)

    def _add_biases(self, backbone: nn.Module) -> None:
        if self.config.bias == "all":
            self._add_shared([key for key in self.state if key == "bias" or key.endswith(".bias")], required=True)
            return
        for name, module in backbone.named_modules():
            if isinstance(module, BaseTunerLayer) and f"{name}.base_layer.bias" in self.state:
                adapted = self.adapter_name in getattr(module, "loraswitch_A", {})
                self._add_shared([f"{name}.base_layer.bias"], required=adapted)

    def _add_shared(self, keys: list[str], required: bool) -> None:
        """Tensors of the backbone; those of the adapter among them are in the file under another name already."""
        for key in keys:
            if owner(key) is None:
                self.slots.setdefault(key, Slot(key, self.state[key], required, of_backbone=True))
            elif owner(key) == self.adapter_name:
                self.slots.setdefault(self._in_file(key), Slot(None, self.state[key]))

    def _in_file(self, key: str) -> str:
        """A key of the model without the adapter's name, which is the last component or the one before it."""
        if key.endswith(f".{self.adapter_name}"):
            return key.removesuffix(f".{self.adapter_name}")
        head, _, last = key.rpartition(".")
        return f"{head.removesuffix(f'.{self.adapter_name}')}.{last}"


def backbone_of(model: Any) -> nn.Module:
    """The module whose names a file uses, after PREFIX."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_name(key: str) -> str:
    """A tensor of the backbone by the name it has without adapters."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def owner(key: str) -> str | None:
    """The adapter that a tensor of the model belongs to, None for one of the backbone."""
    for mark in (".loraswitch_", ".modules_to_save.", ".trainable_tokens_"):
        head, found, tail = f".{key}".rpartition(mark)
        parts = tail.split(".")
        if found and mark.endswith("."):
            return parts[0]
        if found and len(parts) > 1:
            return parts[1]
    return None


def embeddings_of(model: Any, which: str) -> nn.Module | None:
    """The "input" or "output" embeddings; None if the model cannot tell."""
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):  # not a model of Transformers, or one without token embeddings
        return None


def without_wrapper(module: Any) -> Any:
    """The module itself, without what PEFT puts around one that is trained in full or in part."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def embedding_names(backbone: Any) -> list[str]:
    """Names of the input and output embeddings, of models that can tell."""
    modules = [embeddings_of(backbone, which) for which in ("input", "output")]
    return [name for name, module in backbone.named_modules() if any(module is m for m in modules)]


# -------------------------------------------------------------------------------------------------- before the injection


def expert_shapes(
    model: nn.Module, config: LoRASwitchConfig, adapted: list[str], router: str, before: Collection[str]
) -> dict[str, tuple[Any, ...]]:
    """Key in the file and shape of the experts and the router of an adapter that is about to be made.

    Args:
        adapted, router, before: see `InjectionPlan`.
    """
    shapes: dict[str, tuple[Any, ...]] = {}
    limit = TimeLimit()
    for name in adapted:
        module: Any = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        in_features, out_features = features_of(base)
        options = config.routing_options()
        experts = (options.shared_only() if name in before else options).num_stacked
        rank = config.rank_of(name, limit)
        shapes[f"{PREFIX}{name}.loraswitch_A.weight"] = (experts, rank, in_features)
        shapes[f"{PREFIX}{name}.loraswitch_B.weight"] = (experts, out_features, rank)
        if name == router:
            shapes[f"{PREFIX}{name}.loraswitch_router.weight"] = (options.num_choices, in_features)
    return shapes


def check_shape(
    where: Any, key: str, shape: tuple[int, ...], wanted: tuple[int, ...], config: LoRASwitchConfig
) -> None:
    """Raise a ValueError unless the two are the same."""
    if shape == wanted:
        return
    features = -2 if "loraswitch_B" in key else -1  # [E, out, r]; [E, r, in], [E, in]
    if "loraswitch" in key and len(shape) == len(wanted) and shape[features] == wanted[features]:
        why = "The adapter has other experts than this configuration asks for: compare num_experts, num_shared_experts and r"
    else:
        name = config.base_model_name_or_path or "its name was not saved"
        why = f"The adapter was made for another backbone ({name})"
    raise ValueError(f"{where}: wrong shape: '{key}' is {list(shape)}, this model needs {list(wanted)}. {why}.")


def check_vocabulary(where: Any, info: TensorInfo, wanted: tuple[int, ...]) -> None:
    """Raise a ValueError if embeddings have another number of rows."""
    if info.shape != wanted and info.shape[1:] == wanted[1:] != ():
        raise ValueError(
            f"{where}: wrong shape: '{info.key}' is {list(info.shape)}, this model has {list(wanted)}: the adapter was "
            f"trained with another vocabulary. Call model.resize_token_embeddings({info.shape[0]}) before loading."
        )


def check_experts(where: Any, header: Header, config: LoRASwitchConfig) -> None:
    """Compare experts and router in the file with the configuration: do the two belong together?

    Raises:
        ValueError: another number of dimensions, experts or ranks than the configuration says. Names tensor and field.
    """
    limit = TimeLimit()
    for key, info in header.items():
        if match := OUR_KEY.fullmatch(key):
            rank = config.rank_of(match["module"].removeprefix(PREFIX), limit)
            _check_experts(where, key, rank, match["part"], info.shape, config)


def _check_experts(
    where: Any, key: str, rank: int, part: str, shape: tuple[int, ...], config: LoRASwitchConfig
) -> None:
    if len(shape) != SHAPES[part].count(",") + 1:
        raise ValueError(f"{where}: wrong shape: '{key}' is {list(shape)}, not {SHAPES[part]}.")
    shared = 0 if part == "router" else config.num_shared_experts
    sizes = {config.num_experts + (config.base_expert if part == "router" else shared)}
    if shared and config.router_module:
        sizes.add(shared)  # a linear before the router
    if shape[0] not in sizes:
        raise ValueError(
            f"{where} holds {shape[0]} experts ('{key}' is {list(shape)}), but the configuration (adapter_config.json) says "
            f"num_experts={config.num_experts}{f', num_shared_experts={shared}' if shared else ''}"
            f"{', base_expert=True' if config.base_expert else ''}: the two do not belong "
            "together."
        )
    found = {"A": shape[1], "B": shape[-1], "router": rank}[part]
    if found != rank:
        raise ValueError(
            f"{where} holds experts of rank {found} ('{key}' is {list(shape)}), but the configuration (adapter_config.json) "
            f"says {'rank_pattern' if config.rank_pattern else 'r'}={rank}: the two do not belong together."
        )


def refuse(where: Any, missing: Collection[str], unknown: Collection[str]) -> None:
    """Raise a ValueError if there are any of the two."""
    problems = [
        f"{what}: {some(sorted(keys))}" for what, keys in (("missing", missing), ("not in the model", unknown)) if keys
    ]
    if problems:
        raise ValueError(
            f"The weights of {where} do not match the LoRA-Switch adapter. Tensors {'; tensors '.join(problems)}. Nothing has "
            "been changed."
        )


def some(items: list[str]) -> str:
    """The first few of them."""
    more = len(items) - LIST_AT_MOST
    return ", ".join(items[:LIST_AT_MOST]) + (f" and {more} more" if more > 0 else "")
