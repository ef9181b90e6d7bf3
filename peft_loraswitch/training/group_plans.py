"""How the linears that receive one tensor are computed together: a `Plan`, looked up once and kept.

It holds no tensors, and has a fingerprint of everything that the answer depends on (`Looked`), which takes some microseconds a
linear to look at. Where the fused path does not apply there is none, and one line of log for each reason.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..fingerprint import Fingerprint
from ..tensor_parallel import is_split
from ..transforms import more_than_gradients
from .four_bit_weights import four_bit_form
from .gate_hidden import Columns
from .group_function import autocast_dtype
from .group_layout import Spec

logger = logging.getLogger(__name__)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = (nn.Linear, Conv1D)
_said: set[str] = set()


class Plan:
    """How the linears that share their input with one are computed together.

    Attributes:
        looked: whether all of this is still right.
        adapters: those that are added, in this order; none where the layer's own form runs.
        layers: the linears; the first is the one that was asked for.
        own: their base layers' products are computed as well; packed: of weights in 4 bits.
        active: what the first one's adapters were taken from.
        routed, ranks: by adapter, whether there is a decision to follow, and the rank in each linear.
    """

    def __init__(
        self, looked: Looked, adapters: Sequence[str] = (), layers: Sequence[Any] = (), own: bool = False
    ) -> None:
        self.looked, self.adapters, self.layers, self.own = looked, adapters, layers, own
        self.packed = own and type(layers[0].base_layer) not in PRODUCTS
        self.active: str | tuple[str, ...] | None = active_of(layers[0]) if layers else None
        self.routed = {adapter: bool(layers[0].routing_options[adapter].is_routed) for adapter in adapters}
        self.ranks = {
            adapter: tuple(one.loraswitch_A[adapter].weight.shape[1] for one in layers) for adapter in adapters
        }
        self._specs: dict[Any, Spec] = {}
        self.dtype: torch.dtype | None = None

    def spec(
        self, adapter: str, given: bool, in_place: tuple[bool, ...], checkpointed: bool, last: bool, slots: int
    ) -> Spec:
        key = (adapter, given, in_place, checkpointed, last, slots)
        found = self._specs.get(key)
        if found is None:
            columns, start = [], 0
            for one in self.layers:
                experts, rank, _ = one.loraswitch_A[adapter].weight.shape
                columns.append(Columns(start, experts, rank, float(one.scaling[adapter])))
                start = columns[-1].stop
            transposed = not given and type(self.layers[0].base_layer) is Conv1D
            assert self.dtype is not None
            packed = self.packed and not given
            found = Spec(self.dtype, tuple(columns), given, transposed, in_place, checkpointed, last, slots, packed)
            self._specs[key] = found
        return found


class Looked(Fingerprint):
    """All that a plan depends on, besides what is part of its key."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        super().__init__()

    def _take(self) -> list[Any]:
        seen: list[Any] = []
        try:
            for layer in self.layers:
                _look_at(layer, seen)
        except (KeyError, AttributeError):  # an adapter has been deleted
            return [object()]
        return seen


def _look_at(layer: Any, seen: list[Any]) -> None:
    """Add everything that matters of one linear to `seen`. No tensor and no module is among it, so a plan keeps none alive."""
    attributes = layer.__dict__
    modules, active = attributes["_modules"], attributes["_active_adapter"]
    base = modules["base_layer"]
    seen += (
        type(layer),
        "forward" in attributes,
        attributes["_disable_adapters"],
        active_of(layer),
        attributes["training"],
        attributes["cast_input_dtype_enabled"],
        type(base),
        is_hooked(base),
    )
    weights: list[Any] = []
    if type(base) in PRODUCTS:
        parameters = base._parameters
        weights += (parameters["weight"], parameters["bias"])
    else:
        form = four_bit_form(base)
        seen.append(form)
        if form is None:
            seen.append(is_split(layer.get_base_layer()))
        else:  # a weight of one class alone, which is none that is split
            weights.append(base._parameters["bias"])
    a_of, b_of = modules["loraswitch_A"]._modules, modules["loraswitch_B"]._modules
    for adapter in (active,) if type(active) is str else active:
        if adapter not in a_of:
            continue
        options = attributes["routing_options"][adapter]
        dropout = modules["loraswitch_dropout"]._modules[adapter]
        seen += (adapter, attributes["scaling"][adapter], options, type(dropout))
        down, up = a_of[adapter], b_of[adapter]
        seen += (is_hooked(down), down.alone, is_hooked(up), up.alone)
        weights += (down._parameters["weight"], up._parameters["weight"])
    for weight in weights:
        seen += (None,) if weight is None else (
            # attributes: DeepSpeed marks its parameters with them
            type(weight), weight.dtype, weight.device, weight.shape, weight.requires_grad, tuple(weight.__dict__),
        )  # fmt: skip


def active_of(layer: Any) -> str | tuple[str, ...]:
    """What `layer.active_adapters` is made of, to compare."""
    active = layer.__dict__["_active_adapter"]
    return active if type(active) is str else tuple(active)


def key_of(place: tuple[Any, ...], x: Tensor) -> Any:
    """All that a plan depends on, besides the linears themselves; `place` as `_plan` makes it."""
    hooked = bool(nn.modules.module._has_any_global_hook())
    return (place, type(x), x.dim() < 2, more_than_gradients(), hooked)


def make_plan(layer: Any, others: Sequence[Any], x: Tensor) -> Plan:
    looked, adapters = Looked((layer, *others)), adapters_of(layer)
    dtype = _dtype(layer, x, adapters)
    if dtype is None or not adapters:
        return Plan(looked)
    layers = [layer, *(one for one in others if _fits(one, layer, x, adapters, dtype))]
    own = all(_computable(one.base_layer, x, dtype) for one in layers)
    alike = own and all(type(one.base_layer) is type(layer.base_layer) for one in layers)
    plan = Plan(looked, adapters, layers, alike)
    plan.dtype = dtype
    return plan


def adapters_of(layer: Any) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.loraswitch_A]


def _dtype(layer: Any, x: Tensor, adapters: list[str]) -> torch.dtype | None:
    """Of the products; None where this path does not apply."""
    if type(layer).__name__ != "LoRASwitchLinear":
        return plain_form("the model is fused for inference")
    if type(x) not in (Tensor, nn.Parameter) or x.dim() < 2 or x.dtype not in FLOATS:
        return plain_form("the input of a linear is no ordinary tensor")
    if is_split(layer.get_base_layer()):
        return plain_form("the backbone's weights are split over processes (tensor parallel)")
    if more_than_gradients():
        return plain_form("a transform of torch.func is at work")
    if nn.modules.module._has_any_global_hook():
        return plain_form("there are hooks on all modules")
    dtype = autocast_dtype(x)
    for adapter in adapters:
        experts = (layer.loraswitch_A[adapter], layer.loraswitch_B[adapter])
        if not isinstance(layer.loraswitch_dropout[adapter], nn.Identity) and layer.training:
            return plain_form("lora_dropout gives each linear an input of its own")
        for each in experts:
            if is_hooked(each) or not _ordinary(each.weight, x):
                return plain_form("the experts of a linear are spread, moved or hooked")
        wanted = {each.weight.dtype for each in experts}
        if dtype is None and len(wanted) == 1:
            dtype = wanted.pop()
    if dtype is None or dtype not in FLOATS or torch.float64 in (dtype, x.dtype) and x.dtype != dtype:
        return plain_form("dtypes are mixed in a way that this path does not know")
    if dtype != x.dtype and autocast_dtype(x) is None:
        return plain_form("experts and activations have different dtypes, without autocast")
    if not layer.cast_input_dtype_enabled:
        return plain_form("the casting of inputs is switched off")
    return dtype


def _fits(one: Any, first: Any, x: Tensor, adapters: list[str], dtype: torch.dtype) -> bool:
    """Whether the linear `one` can be computed together with `first`."""
    return (
        "forward" not in vars(one)
        and one.disable_adapters == first.disable_adapters
        and adapters_of(one) == adapters
        and all(one.routing_options[each].is_routed == first.routing_options[each].is_routed for each in adapters)
        and all(
            one.loraswitch_A[each].weight.dtype == first.loraswitch_A[each].weight.dtype
            and one.in_features == first.in_features
            for each in adapters
        )
        and _dtype(one, x, adapters) == dtype
    )


def _computable(base: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the base layer is a frozen product and nothing else, of a weight that is there or can be made."""
    if is_hooked(base):
        return False
    if type(base) not in PRODUCTS:
        form = four_bit_form(base)
        # For the library, autocast changes no dtype. It casts the bias for good; here it is cast in each call.
        if form is None or form.device != x.device or (form.compute_dtype or x.dtype) != dtype:
            return False
        return base.bias is None or _frozen(base.bias, x)
    for each in (base.weight, base.bias):
        if each is not None and (not _frozen(each, x) or each.dtype != dtype and autocast_dtype(x) is None):
            return False
    return True


def _frozen(weight: Tensor, x: Tensor) -> bool:
    return _ordinary(weight, x) and not weight.requires_grad and weight.dtype in FLOATS


def _ordinary(weight: Tensor, x: Tensor) -> bool:
    """A tensor that lies where x does, and nothing that only stands for one (shards, other libraries' classes)."""
    if type(weight) not in (nn.Parameter, Tensor) or weight.device != x.device or hasattr(weight, "ds_id"):
        return False
    return weight.numel() > 0


def is_hooked(module: Any) -> bool:
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes  # accelerate's hooks
    )


def plain_form(reason: str) -> Any:
    """None, and one line of log."""
    if reason not in _said:
        _said.add(reason)
        logger.warning(f"LoRA-Switch: linears are trained in their plain form, more slowly: {reason}.")
    return None
