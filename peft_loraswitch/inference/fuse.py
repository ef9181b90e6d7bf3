"""fuse_for_inference(): the same model, its adapted linears served by the fused ops. unfuse() takes it back.

Nothing is copied and nothing is merged: each adapted layer changes its class (see fused_layer.py) to one whose forward hands
base weight and experts to one op, together with the linears that receive the same tensor (q, k, v; gate, up). Such groups
are found by watching the tensors of one forward, not by names. On request their weights are moved together (joined_weights.py).

What is done to a fused model is done as if it were not: adapters come and go, are switched, trained, saved and loaded, weights
are written to, moved and cast. One thread may fuse or unfuse while others run the model with strategy "fused"; strategy "merge"
is for one thread. A KeyboardInterrupt at any point leaves the model unfused, as it was.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from .. import kernels
from ..adapted_layers import adapted_layers
from ..layer import LoRASwitchLinear
from ..routing.frame import _keys, current
from .capabilities import base_of, device_of
from .fused_layer import (
    FusedFollower,
    FusedLeader,
    FusedLinear,
    FusedMerged,
    changing,
    invalidate,
    put_on,
    resolve,
    take_off,
)
from .joined_weights import join, part, shared_memory, why_not_joined
from .merged_weights import MergedWeights
from .shared_inputs import Watch

logger = logging.getLogger(__name__)
Strategy = Literal["auto", "fused", "merge"]
STRATEGIES = ("auto", "fused", "merge")


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse_for_inference()` is in force on `model`."""
    return any(isinstance(layer, FusedLinear) for layer in adapted_layers(model))


class Fusion:
    """What `fuse_for_inference()` returns. As a context manager it unfuses at the end of the block.

    Attributes:
        strategy: "fused", "merge", or "none" if fusing was left out, because it would have gained nothing.
        reason: why the kernels are not used, or None if they are.
        groups: names of the linears that share a launch.
        joined: those of the groups whose weights have been moved into one matrix each (`join_weights`).
    """

    def __init__(
        self, model: nn.Module, strategy: str, reason: str | None, groups: list[list[str]],
        joined: list[list[str]] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.strategy, self.reason, self.groups = model, strategy, reason, groups
        self.joined = joined or []

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, *exception: object) -> None:
        unfuse(self.model)

    def __repr__(self) -> str:
        joined = f", joined={len(self.joined)}" if self.joined else ""
        return f"Fusion(strategy={self.strategy!r}, groups={len(self.groups)}{joined}, reason={self.reason!r})"


def fuse(model: nn.Module, strategy: Strategy = "auto", in_place: bool = False, join_weights: bool = False) -> Fusion:
    """Serve the LoRA-Switch layers of `model` by fused ops: the same outputs to the rounding of the dtype, sooner.

    Weights may change afterwards. Experts of another dtype than the backbone (PEFT keeps those of a 16-bit model in float32) are
    served from copies, which the next forward that is not compiled brings up to date; `refresh_fused` says which changes it
    sees. With `in_place`, weights of the backbone must not be written to before `unfuse()`, which writes the old ones back
    (`load_state_dict`, `to` and training excepted).

    Args:
        model: a model with LoRA-Switch layers, usually a `PeftModel`.
        strategy: "fused": base weights and experts in one pass, nothing merged, no copy of the backbone. "merge": the
            paper's method, the experts of a single token are merged into all weights before it runs; needs a second copy
            of the adapted weights. "auto": "fused" on a CUDA GPU, and on a CPU, where the experts that single tokens (decoding)
            chose are read and no others; elsewhere it gains nothing, and the model stays as it is.
        in_place: with "merge": merge into the backbone's own weights, without a second copy on the device (one on the
            host is kept for `unfuse()`). Each token adds a rounding error: docs/kernel_log.md has the measured drift.
        join_weights: with "fused" on a CUDA GPU: move the backbone's weights so that those of linears which receive the same
            tensor lie in one matrix, with a copy of their lora_a. See `joined_weights.py`.

    Returns:
        `Fusion`, which is also a context manager that unfuses.

    Raises:
        ValueError: an unknown strategy, no LoRA-Switch layers, or layers that "merge" cannot serve.
        RuntimeError: the model is fused already.
    """
    with changing:
        fusion = _fuse(model, strategy, in_place, join_weights)
    return fusion


def _fuse(model: nn.Module, strategy: Strategy, in_place: bool, join_weights: bool) -> Fusion:
    layers = adapted_layers(model)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(map(repr, STRATEGIES))}.")
    if in_place and strategy != "merge":
        raise ValueError("in_place=True belongs to strategy='merge'.")
    if join_weights and strategy == "merge":
        raise ValueError("join_weights=True belongs to strategy='fused': with 'merge' there are no products to join.")
    if not layers:
        raise ValueError(f"{type(model).__name__} carries no LoRA-Switch adapter: there is nothing to fuse.")
    if is_fused(model):
        raise RuntimeError("This model is fused already: call unfuse() first.")
    devices = {device_of(base_of(layer)).type for layer in layers}
    on_gpu, on_cpu = "cuda" in devices, devices == {"cpu"}
    reason = kernels.why_not() if on_gpu else f"the model is on a {'CPU' if on_cpu else ', '.join(sorted(devices))}"
    if strategy == "auto" and not (on_gpu or on_cpu):
        logger.warning(f"LoRA-Switch: fuse_for_inference() changes nothing: {reason}, and it gains nothing there.")
        return Fusion(model, "none", reason, [])
    if reason is not None and not on_cpu:
        logger.warning(f"LoRA-Switch: fused without kernels, by PyTorch operations: {reason}.")
    elif on_cpu and strategy != "merge":
        logger.info(
            "LoRA-Switch: fused on a CPU, by PyTorch operations: single tokens read only the experts that they chose; "
            "batches and prompts take as long as before."
        )

    watch = Watch(model, layers)
    try:
        merging = MergedWeights(model, in_place) if strategy == "merge" else None
        groups = watch.groups()
        _put_on_all(layers, groups, merging, watch.dtypes())
        layers[0].routing_state.fused = True
        joined = _join_all(model, layers) if join_weights else []
        names = [[layer.name for layer in group] for group in groups]
        return Fusion(model, "merge" if merging else "fused", reason, names, joined)
    except BaseException:  # a KeyboardInterrupt, too
        watch.stop()
        _take_off_all(model)
        raise


def _put_on_all(
    layers: list[LoRASwitchLinear], groups: list[list[LoRASwitchLinear]], merging: MergedWeights | None,
    seen: dict[int, torch.dtype],
) -> None:  # fmt: skip
    kinds: dict[int, type[FusedLinear]] = {id(layer): FusedMerged if merging else FusedLeader for layer in layers}
    together = [] if merging else groups
    for group in together:
        kinds |= {id(layer): FusedFollower for layer in group[1:]}
    layers[0].routing_state.key = next(_keys)  # frames that other threads have left under an old one are not found
    for layer in layers:
        put_on(layer, kinds[id(layer)], merging, seen.get(id(layer)))
    for first, *others in together:
        first.fusing.members += others  # type: ignore[union-attr, operator]
        for other in others:
            other.fusing.leader = first  # type: ignore[union-attr]
    for layer in layers:
        resolve(layer)  # type: ignore[arg-type]


def _join_all(model: nn.Module, layers: list[Any]) -> list[list[str]]:
    """Join the weights of every group of the active adapter that can be; one line of log says why others are not."""
    joined, reasons, shared = [], set(), shared_memory(model)
    old: list[torch.Tensor] = []
    for layer in layers:
        adapters = layer.active_adapters
        if layer.fusing.leader is not layer:
            continue
        if len(adapters) != 1 or adapters[0] not in layer.fused_groups:
            reasons.add("it is for linears with one active adapter")
            continue
        live = layer.fused_groups[adapters[0]].live
        members = [one.layer for one in live]
        reason = why_not_joined(members, adapters[0], [one.b["weight"] for one in live], shared)
        if reason is not None:
            reasons.add(reason)
            continue
        try:
            old = join(members, adapters[0])  # kept until the next group's are
        except torch.OutOfMemoryError:
            reasons.add("there is too little memory for one group's weights a second time")
            break
        resolve(layer)
        joined.append([member.name for member in members])
    del old
    if joined:
        torch.cuda.empty_cache()  # what the weights have left is in pieces of other sizes than the matrices need
    if reasons:
        logger.warning(f"LoRA-Switch: join_weights left linears as they are: {'; '.join(sorted(reasons))}.")
    return joined


def unfuse(model: nn.Module) -> None:
    """Take `fuse()` back; weights are then what they were, bit for bit. Nothing to do if the model is not fused."""
    with changing:
        try:
            _take_off_all(model)
        except BaseException:  # a KeyboardInterrupt: what it cut short is done again, from the start
            _take_off_all(model)
            raise


def _take_off_all(model: nn.Module) -> None:
    found = adapted_layers(model)
    layers = [layer for layer in found if type(layer) is LoRASwitchLinear or isinstance(layer, FusedLinear)]
    begun = [vars(layer)["fusing"] for layer in layers if "fusing" in vars(layer)]
    if begun and begun[0].merging is not None:
        begun[0].merging.restore()
    part(layers)
    for layer in layers:
        layer.routing_state.fused = False
        current.frames.pop(layer.routing_state.key, None)  # nobody looks for it there any more
        take_off(layer)


def fuse_new_layers(model: nn.Module) -> None:
    """After an adapter has come to linears that had none: if `model` is fused, they are fused as the others are."""
    with changing:
        layers = adapted_layers(model)
        fused = [layer for layer in layers if isinstance(layer, FusedLinear)]
        new = [layer for layer in layers if not isinstance(layer, FusedLinear)]
        if not fused or not new:
            return
        merging = fused[0].fusing.merging
        if merging is None:  # they may belong to the groups of others, and run before those
            joined = any(layer.fusing.joined for layer in fused)
            unfuse(model)
            fuse(model, "fused", join_weights=joined)
            return
        for layer in new:
            put_on(layer, FusedMerged, merging)
            resolve(layer)  # type: ignore[arg-type]


def refresh_fused(model: nn.Module) -> None:
    """Have a fused model take up all that was written to its weights. It is not needed after most changes, since fused layers
    see them:

    - at once, also in compiled code: `load_adapter`, `set_adapter`, `load_state_dict`, `to`, `train()`, `eval()`, assignment of
      parameters, scalings and base layers;
    - at the next forward that is not compiled (`generate` begins with one): writes to experts that PyTorch counts, with those
      through `parameter.data` and by optimisers, fused ones too;
    - not at all where layers work from copies (experts of another dtype than the backbone's or with `join_weights`, strategy
      "merge", scales of 4-bit weights that are quantised themselves): writes of which PyTorch knows nothing, through NumPy,
      DLPack, one's own kernels, a flat buffer that parameters are parts of, or `parameter.data` taken before fusing; of such
      scales any `.data`. Call this after those, and where nothing but compiled code runs.

    Args:
        model: a model with LoRA-Switch layers. Nothing happens if it is not fused.
    """
    with changing:
        for layer in adapted_layers(model):
            if isinstance(layer, FusedLinear):
                invalidate(layer)
