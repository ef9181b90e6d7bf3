"""Mixed batches: `adapter_names=`, in forward and generate, gives each sample its own adapter, or "__base__" for none.

The names travel with the thread (`RoutingState.sample_adapters`) and into the frame of each forward, where the adapted
linears find them. PEFT's wrappers around modules that an adapter trains in full (`modules_to_save`, trainable tokens) do
not know frames: a hook on each hands it its names. It is put there by the first mixed batch and stays, because another thread
may be running the module while a call begins or ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .routing.frame import NO_ADAPTER, TIME_FIRST, RoutingState
from .routing.given import GivenExperts


@contextmanager
def mixed_batch(
    model: nn.Module,
    state: RoutingState,
    loaded: Iterable[str],
    adapter_names: Sequence[str],
    inputs: tuple[Any, ...],
    named: dict[str, Any],
) -> Iterator[None]:
    """Within it, forwards of this thread use `adapter_names`, one per sample.

    Args:
        model: the backbone.
        loaded: names of the adapters it has.
        inputs, named: arguments of the call, for its batch size.

    Raises:
        ValueError: a name that is not loaded, or not one name per sample.
    """
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names={adapter_names!r} must be a list with one name per sample.")
    if state.time_first:
        raise ValueError(f"adapter_names: {TIME_FIRST}. Run the samples of each adapter by themselves.")
    names = list(adapter_names)
    known = {*loaded, NO_ADAPTER}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"adapter_names holds {unknown}, which are not loaded. Choose from {sorted(known)}.")
    if not names:
        raise ValueError("adapter_names is empty: give one name per sample.")
    check_batch_size(names, inputs, named)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            _hook(module, state)
    with state.sample_adapters(names):
        yield


def _hook(module: nn.Module, state: RoutingState) -> None:
    """Put the hook on `module`, unless it is there. By a key of its own and not by register_forward_hook(), which would enter
    one more each time, and enters the hook before it enters that the hook takes keyword arguments: another thread may call it
    in between."""
    key: Any = f"loraswitch {state.key}"
    if key not in module._forward_hooks:
        module._forward_hooks_with_kwargs[key] = True
        module._forward_hooks[key] = _PerSample(state)


def check_batch_size(names: Sequence[str], inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """One name per sample, if the arguments show the batch size. (Within generate, beams multiply it.)"""
    samples = _batch_size(inputs, named)
    if samples is not None and samples != len(names):
        raise ValueError(
            f"adapter_names has {len(names)} entries, but the batch has {samples} samples: give one name per sample."
        )


def check_given(given: GivenExperts, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """The same for experts that are given per sample."""
    samples = _batch_size(inputs, named)
    if samples is not None:
        given.check_batch_size(samples)


def _batch_size(inputs: tuple[Any, ...], named: dict[str, Any]) -> int | None:
    candidates = (*inputs[:1], named.get("input_ids"), named.get("inputs"), named.get("inputs_embeds"))
    tensors = [value for value in candidates if isinstance(value, torch.Tensor) and value.dim() > 1]
    return tensors[0].shape[0] if tensors else None


class _PerSample:
    """Forward hook of PEFT's wrapper. Its own forward looks at the active adapter first, and gives up on adapters that do
    not wrap this module; so its answer is replaced, with `__base__` for those. (An object: `copy.deepcopy` copies its state too.)
    """

    def __init__(self, state: RoutingState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        names = self.state.adapter_names
        frame = self.state.running_frame()
        if frame is not None:
            names = frame.adapter_names
        if names is None:
            return None
        wrapped: Any = module._adapters
        if isinstance(module, ModulesToSaveWrapper) and len(set(names)) == 1:  # PEFT cannot mix every kind of module
            one = module.modules_to_save[names[0]] if names[0] in wrapped else module.original_module
            return one(*args, **kwargs)
        each = len(args[0]) // len(names)
        per_row = [name if name in wrapped else NO_ADAPTER for name in names for _ in range(each)]
        return module._mixed_batch_forward(*args, adapter_names=per_row, **kwargs)  # type: ignore[operator]
