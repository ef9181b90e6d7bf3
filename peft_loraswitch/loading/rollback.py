"""All or nothing: an injection or a load that fails leaves the model as it was.

PEFT and Transformers change the model step by step, read the weights last, and take nothing back when a step fails. So
what makes up the model is noted before the first change: the module tree, every setting, hook and flag. Values of
weights are not copied, but for those that a load overwrites in place: of an adapter that exists, of embeddings (`values`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class Snapshot:
    """The state of some modules (with all that they contain) and other objects, which `restore` puts back in place.

    Args:
        objects: modules, or any objects with a `__dict__`.
        values: tensors that may be overwritten in place, and are copied therefore.
    """

    def __init__(self, *objects: Any, values: Iterable[torch.Tensor] = ()) -> None:
        seen: dict[int, Any] = {}
        for root in objects:
            for item in root.modules() if isinstance(root, nn.Module) else [root]:
                seen[id(item)] = item
                state = getattr(item, "routing_state", None) if isinstance(item, BaseTunerLayer) else None
                if state is not None:
                    seen[id(state)] = state
        modules = [item for item in seen.values() if isinstance(item, nn.Module)]
        self._attributes = [(item, type(item), dict(vars(item))) for item in seen.values()]
        containers = [
            v for _, _, attributes in self._attributes for v in attributes.values() if isinstance(v, (dict, list, set))
        ]
        self._containers = [(value, _contents(value)) for value in containers]
        parameters = {id(p): p for module in modules for p in module.parameters(recurse=False)}
        self._trainable = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]

    def restore(self) -> None:
        """Put everything back. Objects and containers keep their identity: handles of hooks, for one, stay valid."""
        for item, kind, attributes in self._attributes:
            vars(item).clear()
            vars(item).update(attributes)
            if type(item) is not kind:  # fused again, with the new adapter's linears
                item.__class__ = kind
        for container, contents in self._containers:
            _refill(container, contents)
        for parameter, requires_grad in self._trainable:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)
        for item, kind, _ in self._attributes:
            if hasattr(kind, "restored"):
                item.restored()


@contextmanager
def all_or_nothing(*objects: Any) -> Iterator[Snapshot]:
    """Whatever goes wrong within the block, `objects` are afterwards as they were before it. Yields the snapshot, for
    those who want to go back later."""
    snapshot = Snapshot(*objects)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise


def _contents(value: Any) -> Any:
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else set(value)


def _refill(value: Any, contents: Any) -> None:
    if isinstance(value, list):
        value[:] = contents
    else:
        value.clear()
        value.update(contents)
