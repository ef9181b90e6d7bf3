"""Linears that receive the same tensor, with one adapter, as the ops take them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels, ops
from ..layer import LoRASwitchLinear
from ..routing.decision import Routing, decide, routing_of
from ..routing.frame import RoutingFrame, current
from ..routing.router import router_logits
from .capabilities import BaseFacts, within_limits
from .eager_launch import DirectDeltas, DirectFewTokens
from .four_bit import HALVES, FourBitFormat
from .joined_weights import lies_in, why_not_joined
from .live_linear import LiveLinear, fingerprint_of

# Up to so many tokens the stream-K GEMM is faster than a library's product with weights in one matrix (docs/kernel_log.md).
JOINED_TOKENS = 64
FourBitParts = tuple[
    list[Tensor], list[Tensor], Tensor | None, list[Tensor | None], list[Tensor], list[Tensor], list[float]
]  # weights, scales, code, biases, lora_a, lora_b, scalings


class FusedGroup(nn.Module):
    """Linears that receive the same tensor, with one adapter, as the ops take them.

    A module only so that dynamo guards it cheaply (see `fused_layer.py`); never registered, so it is in no state_dict.

    Attributes:
        adapter: its name; key: of the thread's frame in `frame.current.frames`.
        number: its own, and that of the group which takes its place (another would have code compiled again).
        size: number of linears; slot0, slot1, ...: their `fused_slot`.
        base0, base1, ...: `_parameters` of their base layers, where new ones are seen; a0, b0, ...: the experts' weights, or
            the casts of those; scaling0, ...: their layers' dictionaries.
        modules0, ...: `_modules` of the layers, for the base layers whose own forwards compute what the ops cannot.
        four_bit: the base layers' weights have 4 bits, and the ops read them for few tokens: packed0, ..., scales0, ...,
            code0 (see `FourBitWeight`).
        plain, transposed, kernels, few_tokens: see `BaseFacts`.
        matrix: weights and lora_a, one after the other, if they lie so in memory (`joined_weights.py`); else None. moved0, ...:
            the parameters whose memory is in it.
        compiled_tokens: up to how many tokens compiled code goes by `ops.linear`: where a GPU has a kernel for it, more.
        routed: they follow the decision; False: they have shared experts only.
        within: the ops take an adapter of this size.
        offloaded: the experts' weights are somewhere else until their modules are called (accelerate's offloading).
        live: each linear; fingerprint: of all that is read of them. No forward that is compiled without gradients looks at these.
        direct: the group as the kernels take it when no compiler is at work, once it has been called so; deltas: the same of one
            that is not plain.
    """

    def __init__(
        self, live: list[LiveLinear], adapter: str, facts: BaseFacts, number: int | None = None, matrix: Tensor | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self._register(number)
        self.live, self.fingerprint = live, fingerprint_of(live, adapter, facts.plain)  # before what it is of is read
        layers = [one.layer for one in live]
        first = layers[0]
        self.adapter, self.key, self.size = adapter, first.routing_state.key, len(layers)
        self.plain, self.transposed, self.kernels = facts.plain, facts.transposed, facts.kernels
        self.few_tokens = facts.few_tokens
        self.routed = first.routing_options[adapter].is_routed
        active = first.routing_options[adapter].num_active
        self.within = all(within_limits(layer, adapter, active) for layer in layers)
        for i, one in enumerate(self.live):
            values = {"slot": one.layer.fused_slot, "base": one.base, "scaling": one.scaling}
            values |= {"a": one.a["weight"], "b": one.b["weight"]}
            if not facts.plain:
                values["modules"] = one.layer._modules
            if facts.four_bit is not None and one.four_bit is not None:
                values |= {"packed": one.four_bit.packed, "scales": one.four_bit.scales, "code": one.four_bit.code}
            self.__dict__.update({f"{name}{i}": value for name, value in values.items()})  # not among its parameters
        self.four_bit = facts.four_bit is not None and self._reads_four_bits(facts.four_bit, active)
        self.matrix = matrix if matrix is not None and self._lies_in(matrix) else None
        if self.matrix is not None:
            self.__dict__.update({f"moved{i}": one.base["weight"] for i, one in enumerate(live)})
        self.compiled_tokens = self._compiled_tokens(active)
        self.offloaded = any(tensor.is_meta for one in live for tensor in (one.a["weight"], one.b["weight"]))
        self.direct: DirectFewTokens | None = None
        self.deltas: DirectDeltas | None = None

    def _lies_in(self, matrix: Tensor) -> bool:
        if not self.plain:
            return False
        weights, _, lora_a, _, _ = self.parts()
        return lies_in(matrix, weights, lora_a)

    def joined_matrix(self) -> Tensor | None:
        """`matrix`, unless another parameter has been assigned: compiled code checks which it is."""
        if self.matrix is None:
            return None
        for i in range(self.size):
            if getattr(self, f"base{i}")["weight"] is not getattr(self, f"moved{i}"):
                return None
        return self.matrix

    def _compiled_tokens(self, active: int) -> int:
        if not (self.plain and self.kernels and self.within):
            return self.few_tokens
        weights, biases, lora_a, lora_b, scalings = self.parts()
        if not all(t.is_contiguous() for t in (*weights, *biases, *lora_a, *lora_b) if t is not None):
            return self.few_tokens
        try:
            packed = kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, self.transposed)
        except RuntimeError:  # tensors without memory: a tracer's
            return self.few_tokens
        if packed.path_of(kernels.SPLIT_K_TOKENS, active) != kernels.SM90_PATH:
            return self.few_tokens
        return kernels.SPLIT_K_TOKENS if self.matrix is None else JOINED_TOKENS

    def _register(self, number: int | None) -> None:
        self.number = next(_numbers) if number is None else number
        _groups[self.number] = self

    def __getstate__(self) -> dict[str, Any]:  # copy.deepcopy and pickle: pointers do not travel
        return {**self.__dict__, "direct": None, "deltas": None, "matrix": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register(None)
        self.compiled_tokens = self.few_tokens  # until it is known where it is now

    def _reads_four_bits(self, kept: FourBitFormat, active: int) -> bool:
        """Whether what the ops make of the base layers' weights is what the layers' own forwards make of them, and there is a
        kernel for it, with so many experts for each token."""
        if not self.within or any(one.four_bit is None for one in self.live):
            return False
        weights, _, _, biases, lora_a, lora_b, _ = self.four_bit_parts()
        dtype = lora_a[0].dtype
        if dtype not in HALVES or kept.compute_dtype not in (None, dtype):
            return False
        if any(bias is not None and bias.dtype != dtype for bias in biases):
            return False
        experts = (*lora_a, *lora_b)
        if not all(t.is_contiguous() and t.dtype == dtype and t.device == weights[0].device for t in experts):
            return False
        packed = self.pack_four_bits()
        return all(packed.path_of(tokens, active) == kernels.FAST_PATH for tokens in (1, kernels.FAST_TOKENS))

    def leave(self, x: Tensor, results: list[Tensor]) -> Tensor:
        """The first of `results`; the others are left where the group's other linears look for them, with the version of x, which
        may be written to before they run. Where writes are not counted, nothing waits if hooks run in between."""
        if self.size > 1:
            if not torch.compiler.is_compiling() and not x.is_inference():
                version = x._version
            elif has_hooks_between(self.number):
                return results[0]
            else:
                version = None
            waiting = current.results
            for i in range(1, self.size):
                waiting[getattr(self, f"slot{i}")] = (x, results[i], self.adapter, version)
        return results[0]

    def trains(self) -> bool:
        """Whether anything that the ops read asks for gradients, which they do not have."""
        for one in self.live:
            pair = (one.layer.loraswitch_A, one.layer.loraswitch_B)
            own = [weight for experts in pair for weight in experts[self.adapter].parameters()]
            base = one.base.get("weight"), one.base.get("bias")  # a quantised one may have neither
            if any(tensor is not None and tensor.requires_grad for tensor in (*own, *base)):
                return True
        return False

    def routing(self, layer: LoRASwitchLinear, x: Tensor, frame: RoutingFrame) -> Routing | None:
        """What the tokens of x follow, if the ops can serve this call; None if it must take the unfused forward."""
        a: Tensor = self.a0  # type: ignore[assignment]
        if frame.adapter_names is not None or x.dtype != a.dtype or x.get_device() != a.get_device() or x.numel() == 0:
            return None
        gradients = torch.is_grad_enabled()
        if gradients and (x.requires_grad or self.trains()):
            return None
        if torch.is_autocast_enabled("cuda" if x.is_cuda else x.device.type):
            return None
        if self.routed:
            routing = frame.routings.get(self.adapter)
            if routing is None:
                routing = self._decide(layer, x, frame)
        else:
            routing = layer.shared_routing(self.adapter, frame, x)
        if gradients and routing.gates.requires_grad:
            return None
        if routing.experts.get_device() != x.get_device():  # a model spread over several devices
            routing = routing.on(x.device)
        if x.shape[:-1] != routing.token_shape:
            routing.dense_gates_for(x, layer.name)  # the tokens flattened, or an error that says what is wrong
        return routing

    def _decide(self, layer: LoRASwitchLinear, x: Tensor, frame: RoutingFrame) -> Routing:
        """The decision of this forward: one launch on a GPU, the unfused way elsewhere or when it is being recorded."""
        state, adapter = layer.routing_state, self.adapter
        if not self.kernels or frame.training or state.recorders or frame.given:
            return layer.routing_for(adapter, frame, x)
        router_layer = layer.router_layer(adapter)
        options = router_layer.routing_options[adapter]
        if options.top_k > kernels.MAX_TOP_K or options.num_choices > kernels.MAX_EXPERTS:
            return layer.routing_for(adapter, frame, x)
        weight: Any = router_layer.loraswitch_router[adapter].weight
        if weight.dtype not in ops.FLOATS or (torch.is_grad_enabled() and weight.requires_grad):
            return layer.routing_for(adapter, frame, x)
        if options.decay:
            context = frame.context(adapter, options, x.shape[:-1], x.device)
            if context.length == 1 and context.previous is not None:
                real = None if context.real is None else context.real.flatten()
                experts, gates, sums = ops.route_context(
                    x,
                    weight,
                    context.previous,
                    options.decay,
                    options.top_k,
                    options.normalize_gates,
                    real,
                    options.top_p,
                )
                context.keep(sums.unsqueeze(1))
            else:
                logits = context.logits(router_logits(x, weight))
                experts, gates = decide(logits, options.top_k, options.normalize_gates, options.top_p)
        else:
            experts, gates = ops.route(x, weight, options.top_k, options.normalize_gates, options.top_p)
        routing = routing_of(experts, gates, options)
        if not torch.compiler.is_compiling():
            frame.used.add(adapter)
        frame.routings[adapter] = routing
        return routing

    def parts(self) -> tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor], list[float]]:
        """weights, biases, lora_a, lora_b, scalings"""
        bases = [getattr(self, f"base{i}") for i in range(self.size)]
        return [base["weight"] for base in bases], [base["bias"] for base in bases], *self.experts()

    def four_bit_parts(self) -> FourBitParts:
        """As `ops.linear_4bit` takes them."""
        several = range(self.size)
        packed, scales = ([getattr(self, f"{name}{i}") for i in several] for name in ("packed", "scales"))
        code: Tensor | None = self.code0  # type: ignore[assignment]
        return packed, scales, code, [getattr(self, f"base{i}")["bias"] for i in several], *self.experts()

    def pack_four_bits(self) -> kernels.PackedGroup:
        """The same as the kernels take it."""
        weights, scales, code, biases, lora_a, lora_b, scalings = self.four_bit_parts()
        return kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, scales=scales, code=code)

    def experts(self) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """lora_a, lora_b, scalings"""
        lora_a = [getattr(self, f"a{i}") for i in range(self.size)]
        lora_b = [getattr(self, f"b{i}") for i in range(self.size)]
        return lora_a, lora_b, [getattr(self, f"scaling{i}")[self.adapter] for i in range(self.size)]

    def base_layers(self) -> list[Any]:
        """Of a group that is not plain."""
        return [getattr(self, f"modules{i}")["base_layer"] for i in range(self.size)]


_numbers = itertools.count()
_any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook
_groups: weakref.WeakValueDictionary[int, FusedGroup] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_hooks(number: int) -> bool:
    """Whether a base layer of the group has hooks, asked when a compiler traces and not again: like PyTorch itself, compiled
    code does not notice hooks that come later, and is spared two guards a linear."""
    return any(one.hooked for one in _groups[number].live)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_hooks_between(number: int) -> bool:
    """Whether hooks run between the group's linears, which may write to what these receive. Under a compiler as `has_hooks`."""
    layers = [one.layer for one in _groups[number].live]
    return bool(_any_global_hook()) or any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def say_what_is_faster(number: int) -> None:
    """One line of log, when a compiler traces many tokens of a group that could be joined and is not."""
    live = _groups[number].live
    if why_not_joined([one.layer for one in live], _groups[number].adapter, [one.b["weight"] for one in live]) is None:
        kernels.log_once(
            "LoRA-Switch: compiled batches as large as this one go faster with fuse_for_inference(join_weights=True), which "
            "moves the backbone's weights in memory: see docs/inference.md."
        )
