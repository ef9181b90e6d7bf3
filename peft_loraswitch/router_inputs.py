"""What the router sees while the model reads texts: the hidden states at the first linear that follows a decision.

A forward is broken off there, as soon as what is asked for is known, so that reading costs what the modules below the router
cost: with the default router, which stands on the first linear, an embedding and a norm. Nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapted_layers import adapted_layers
from .layer import LoRASwitchLinear
from .patterns import shown
from .routing.decayed_sums import decayed_sums
from .routing.decision import Routing

AT_A_TIME = 8  # texts in a batch
MAX_TOKENS = 512  # of a text


@dataclass
class Reading:
    """One batch of texts, padded behind the last token.

    Attributes:
        input_ids: int64 [B, T], on the CPU.
        real: bool [B, T], on the CPU: False where padding is.
        x: [B, T, in_features], what the router sees, in the dtype and on the device of the model.
        routing: what it decided, token_shape [B, T] or flattened to [B * T]; None if that was not asked for.
    """

    input_ids: Tensor
    real: Tensor
    x: Tensor
    routing: Routing | None


class _Enough(Exception):
    """Breaks a forward off."""


def tokenizer_of(backbone: Any, given: Any = None) -> Any:
    """`given`, or the tokenizer that stands where the backbone was loaded from.

    Raises:
        ValueError: there is none, or the backbone does not say where that is.
    """
    if given is not None:
        return given
    from transformers import AutoTokenizer

    name = getattr(backbone, "name_or_path", None)
    if not name:
        raise ValueError(f"tokenizer is missing: this {type(backbone).__name__} does not say where it was loaded from.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"tokenizer is missing, and there is none at {shown(name)}: {error}") from error


def tokenized(texts: Sequence[str], tokenizer: Any, max_length: int | None, whose: str = "texts") -> list[list[int]]:
    """The token ids of each text, at most `max_length`, with the tokenizer's special tokens.

    Raises:
        ValueError: an entry is no text or has no tokens. Names `whose`.
    """
    found = []
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{whose}: entry {index} is {shown(text)}; it must be a text with at least one character.")
        ids = list(tokenizer(text)["input_ids"])[:max_length]
        if not ids:
            raise ValueError(f"{whose}: entry {index}, {shown(text)}, has no tokens.")
        found.append(ids)
    return found


def read(
    backbone: nn.Module,
    adapter: str,
    sequences: Sequence[Sequence[int]],
    batch_size: int = AT_A_TIME,
    decide: bool = False,
    progress: str | None = None,
) -> Iterator[Reading]:
    """What the router of `adapter` sees for each of `sequences` of token ids, batch by batch, in their order.

    Args:
        backbone: the model without PEFT's wrapper; `adapter` must be active in it.
        decide: also take the decision.
        progress: title of a progress bar, which only a terminal shows, and only for more than one batch.

    Raises:
        ValueError: the adapter is not active, or `batch_size` is not positive.
        RuntimeError: the forward ended, and no routed linear had run.
    """
    check_active(backbone, adapter)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={shown(batch_size)} must be a positive whole number.")
    starts = range(0, len(sequences), batch_size)
    for start in tqdm(starts, desc=progress, disable=None if progress and len(starts) > 1 else True, leave=False):
        input_ids, real = padded(sequences[start : start + batch_size])
        x, routing = _first_input(backbone, adapter, input_ids, real, decide)
        yield Reading(input_ids, real, x, routing)


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """input_ids int64 [B, T] and real bool [B, T]. Any token does for padding, because the mask leaves it out: the tokenizer
    need not have one of its own."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
    lengths = torch.tensor([len(ids) for ids in sequences])
    return ids, torch.arange(longest) < lengths[:, None]


def check_active(backbone: nn.Module, adapter: str) -> None:
    """Raise a ValueError unless `adapter` works in the forwards of `backbone`: what the router sees may depend on it (shared
    experts below the router, trained tokens)."""
    layer = _routed(backbone, adapter)[0]
    if layer.disable_adapters:
        raise ValueError("The adapters of this model are switched off: switch them on first (enable_adapter_layers()).")
    if adapter not in layer.active_adapters:
        raise ValueError(
            f"Adapter '{adapter}' is not active, {', '.join(layer.active_adapters) or 'none'} is: call "
            f"set_adapter('{adapter}') first."
        )


def linears_of_one_input(backbone: nn.Module, adapter: str) -> dict[str, LoRASwitchLinear]:
    """The routed linears that read the very tensor that the router reads (q, k and v of a block), by name, as they run. Runs
    one forward of a single token."""
    check_active(backbone, adapter)
    seen: list[tuple[LoRASwitchLinear, Any]] = []  # the tensors are kept, so that no two share an id
    ids = torch.zeros((1, 1), dtype=torch.long)
    layers = _routed(backbone, adapter)
    with _hooks(layers, before=lambda layer, x: seen.append((layer, x))):
        _forward(backbone, ids, ids == 0)
    if not seen:
        raise RuntimeError(_not_reached(backbone, adapter))
    names = {id(module): name for name, module in backbone.named_modules()}
    return {names[id(layer)]: layer for layer, x in seen if x is seen[0][1]}


def averaged(x: Tensor, decay: float) -> Tensor:
    """x [B, T, d] -> of each token the mean of the tokens up to it, one that is n tokens back with weight `decay ** n`."""
    if decay == 0:
        return x
    return decayed_sums(x, decay) / decayed_sums(x.new_ones(1, x.shape[1], 1), decay)


def _routed(backbone: nn.Module, adapter: str) -> list[LoRASwitchLinear]:
    return [
        layer
        for layer in adapted_layers(backbone)
        if adapter in layer.routing_options and layer.routing_options[adapter].is_routed
    ]


def _first_input(
    backbone: nn.Module, adapter: str, input_ids: Tensor, real: Tensor, decide: bool
) -> tuple[Tensor, Routing | None]:
    layers = _routed(backbone, adapter)
    found: list[Tensor] = []
    decided: list[Routing] = []

    def before(layer: LoRASwitchLinear, x: Tensor) -> None:
        if not found:  # not only at the linear that holds the router: the first to run has it decide
            found.append(x)
        if not decide:
            raise _Enough

    def after(layer: LoRASwitchLinear) -> None:
        frame = layer.routing_state.running_frame()
        if frame is not None and adapter in frame.routings:
            decided.append(frame.routings[adapter])
            raise _Enough

    with _hooks(layers, before, after if decide else None):
        try:
            _forward(backbone, input_ids, real)
        except _Enough:
            pass
    if not found or (decide and not decided):
        raise RuntimeError(_not_reached(backbone, adapter))
    return found[0].reshape(*input_ids.shape, -1), decided[0] if decided else None


def _not_reached(backbone: nn.Module, adapter: str) -> str:
    return f"No linear that follows the router of adapter '{adapter}' ran in a forward of {type(backbone).__name__}."


@contextmanager
def _hooks(
    layers: Sequence[LoRASwitchLinear],
    before: Callable[[LoRASwitchLinear, Tensor], None],
    after: Callable[[LoRASwitchLinear], None] | None = None,
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(lambda module, args: before(module, args[0])))
            if after is not None:
                handles.append(layer.register_forward_hook(lambda module, args, output: after(module)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(backbone: nn.Module, input_ids: Tensor, real: Tensor) -> None:
    """A forward in evaluation mode, without gradients; the modes are then as before."""
    device = _device_of(backbone)
    inputs = {"input_ids": input_ids.to(device), "attention_mask": real.long().to(device)}
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):  # the decoder reads the same text
        inputs |= {"decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": inputs["attention_mask"]}
    training = [module for module in backbone.modules() if module.training]
    try:
        backbone.eval()
        with torch.no_grad():
            backbone(**inputs)
    finally:
        for module in training:
            module.training = True


def _device_of(backbone: Any) -> torch.device:
    """Where token ids belong."""
    embeddings = backbone.get_input_embeddings() if hasattr(backbone, "get_input_embeddings") else backbone
    devices = [parameter.device for parameter in (*embeddings.parameters(), *backbone.parameters())]
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
