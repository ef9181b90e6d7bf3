"""Adapted linears that never run: something reads their weight instead of calling them, so their experts do nothing.

Classes known to do that are refused (`linears.py`). What is not known shows in the first forward that trains: the module that
holds the linear runs, the linear itself does not. A block that is skipped as a whole (layer drop, an encoder that a step does
not need) is no such case, since the module that holds the linear does not run either.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

LIST_AT_MOST = 3


class UnusedLinears:
    """Watches one forward.

    Args:
        root: the backbone.
        layers: its adapted linears, with their full names in it as `name`.
    """

    def __init__(self, root: nn.Module, layers: Iterable[nn.Module]) -> None:
        self.root = root
        self.holders = [(layer, root.get_submodule(str(layer.name).rpartition(".")[0])) for layer in layers]
        self.ran: set[nn.Module] = set()
        self.handles: list[Any] = []

    def begin(self) -> UnusedLinears | None:
        """Itself; None where parts of the model are compiled, which hooks that come and go would have compiled again."""
        if any(
            module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in self.root.modules()
        ):
            return None
        for module in {module for pair in self.holders for module in pair}:
            self.handles.append(module.register_forward_pre_hook(self._note))
        return self

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.ran.add(module)

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def warn(self) -> None:
        """One warning that names the linears that did not run."""
        names = [str(layer.name) for layer, holder in self.holders if holder in self.ran and layer not in self.ran]
        if not names:
            return
        more = f" and {len(names) - LIST_AT_MOST} more" if len(names) > LIST_AT_MOST else ""
        endings = sorted({name.rpartition(".")[2] for name in names})
        warnings.warn(
            f"LoRA-Switch adapts {', '.join(map(repr, names[:LIST_AT_MOST]))}{more}, but the first forward that trains did "
            "not call them, only the modules that hold them: those read the weights themselves, or left them out. The experts "
            f"on these linears do nothing and learn nothing. Add exclude_modules={endings}."
        )


def keep_off_fast_paths(root: nn.Module, layers: set[nn.Module]) -> list[Any]:
    """In eval mode PyTorch's own encoder has fast paths that read the weights of its linears: keep it off those where `layers`
    are within it. Returns handles whose `remove()` takes that back."""
    handles: list[Any] = []
    for module in root.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            inside = layers & set(module.modules())
            if isinstance(module, nn.TransformerEncoderLayer):
                handles += [layer.register_forward_pre_hook(_nothing) for layer in inside]  # a hook is enough
            elif inside:
                handles.append(_WithoutNestedTensors(module))
    return handles


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing but be there."""


class _WithoutNestedTensors:
    """Has an encoder compute padding too, since a layer that is off its fast path does not take nested tensors."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder, self.before = encoder, encoder.use_nested_tensor
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        self.encoder.use_nested_tensor = self.before
