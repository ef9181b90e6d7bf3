"""Mixed batches: `adapter_names=`, in forward and generate, gives each sample its own adapter, or "__base__" for none.

The names travel with the thread (`RoutingState.sample_adapters`) and into the frame of each forward, where the adapted
linears find them. PEFT's wrappers around modules that an adapter trains in full (`modules_to_save`, trainable tokens) do
not know frames: hooks hand them their names for as long as the call lasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .frame import NO_ADAPTER, RoutingState


@contextmanager
def mixed_batch(
    model: nn.Module,
    state: RoutingState,
    loaded: Iterable[str],
    adapter_names: Sequence[str],
    inputs: tuple,
    named: dict,
) -> Iterator[None]:
    """Within it, forwards of this thread use `adapter_names`, one per sample.

    Args:
        model: the backbone.
        loaded: names of the adapters it has.
        inputs, named: arguments of the call, for its batch size.

    Raises:
        ValueError: a name that is not loaded, or not one name per sample.
    """
    names = list(adapter_names)
    known = {*loaded, NO_ADAPTER}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"adapter_names holds {unknown}, which are not loaded. Choose from {sorted(known)}.")
    if not names:
        raise ValueError("adapter_names is empty: give one name per sample.")
    check_batch_size(names, inputs, named)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    hook = partial(_run_per_sample, state)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in wrappers]
    try:
        with state.sample_adapters(names):
            yield
    finally:
        for handle in handles:
            handle.remove()


def check_batch_size(names: Sequence[str], inputs: tuple, named: dict) -> None:
    """One name per sample, if the arguments show the batch size. (Within generate, beams multiply it.)"""
    candidates = (*inputs[:1], named.get("input_ids"), named.get("inputs"), named.get("inputs_embeds"))
    tensors = [value for value in candidates if isinstance(value, torch.Tensor) and value.dim() > 1]
    if tensors and tensors[0].shape[0] != len(names):
        raise ValueError(
            f"adapter_names has {len(names)} entries, but the batch has {tensors[0].shape[0]} samples: give one name per sample."
        )


def _run_per_sample(state: RoutingState, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of PEFT's wrapper. Its own forward looks at the active adapter first, and gives up on adapters that do
    not wrap this module; so its answer is replaced, with `__base__` for those."""
    frame = state.frame
    if frame is None or frame.adapter_names is None:  # another thread's forward
        return None
    each = len(args[0]) // len(frame.adapter_names)
    wrapped = module._adapters
    names = [name if name in wrapped else NO_ADAPTER for name in frame.adapter_names for _ in range(each)]  # type: ignore[operator]
    return module._mixed_batch_forward(*args, adapter_names=names, **kwargs)  # type: ignore[operator]
