"""Which linears of a model receive the very same tensor, and so can share a launch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..layer import LoRASwitchLinear
from ..routing.frame import NO_ADAPTER
from .capabilities import base_of, facts_of

logger = logging.getLogger(__name__)


class Watch:
    """Looks which linears receive the very same tensor, in one forward of a single token without an adapter."""

    def __init__(self, model: nn.Module, layers: list[LoRASwitchLinear]) -> None:
        self.model, self.layers = model, layers
        # Tensors are kept, so that no two share an id. With versions, since a tensor that is written to is another one.
        self.seen: list[tuple[LoRASwitchLinear, Tensor, int | None]] = []
        self.handles: list[Any] = []
        self.training = [module for module in model.modules() if module.training]

    def groups(self) -> list[list[LoRASwitchLinear]]:
        """Linears of one tensor, in the order they ran."""
        state = self.layers[0].routing_state
        try:
            for layer in self.layers:
                self.handles.append(layer.register_forward_pre_hook(self._see))
            self.model.eval()
            device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu"))
            with torch.no_grad(), state.sample_adapters([NO_ADAPTER]):
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
        except Exception as error:  # a model that wants other inputs: correct all the same, one launch for each linear
            name = type(self.model).__name__
            logger.warning(
                f"LoRA-Switch: the linears of {name} are not grouped, because a forward of input_ids failed: {error}"
            )
            return [[layer] for layer in self.layers]
        finally:
            self.stop()
        return self._by_tensor()

    def dtypes(self) -> dict[int, torch.dtype]:
        """By id of each layer that ran, that of its input."""
        return {id(layer): x.dtype for layer, x, _ in self.seen}

    def _see(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        self.seen.append((layer, x, None if x.is_inference() else x._version))  # type: ignore[arg-type]

    def stop(self) -> None:
        """Leave the model as it was. May be repeated."""
        for handle in self.handles:
            handle.remove()
        for module in self.training:
            module.training = True

    def _by_tensor(self) -> list[list[LoRASwitchLinear]]:
        calls: dict[int, int] = {}
        groups: dict[Any, list[LoRASwitchLinear]] = {}
        for layer, _, _ in self.seen:
            calls[id(layer)] = calls.get(id(layer), 0) + 1
        for layer, x, version in self.seen:
            if calls[id(layer)] == 1:
                base = base_of(layer)
                shared_only = frozenset(
                    name for name, options in layer.routing_options.items() if not options.is_routed
                )
                weight = getattr(base, "weight", None)
                facts = facts_of(layer)
                kind = type(base), getattr(weight, "dtype", None), getattr(weight, "device", None), facts
                key = (id(x), version, *kind, shared_only, id(layer) if facts.hooked else None)
                groups.setdefault(key, []).append(layer)
        return [g[i : i + kernels.MAX_GROUP] for g in groups.values() for i in range(0, len(g), kernels.MAX_GROUP)]
