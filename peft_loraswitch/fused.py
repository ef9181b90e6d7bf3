"""The forwards of fused layers: what `fuse_for_inference()` puts on each adapted linear, and what they need to know of it.

The first linear of a group (linears that receive the same tensor) computes for all of them and leaves the others' results
in the forward's frame, where they pick them up if they really receive that tensor. Whatever the ops do not serve
(training, gradients, mixed batches, several active adapters, autocast) takes the unfused forward, which is always right.

Host time is what these functions are written for. Eager: a group of linears must cost less than the calls it replaces. Under
`torch.compile`: dynamo guards what a forward reads, at every call, and checks a whole decoder block by the versions of its
modules' dictionaries if it finds there nothing but modules, dictionaries, tensors and constants; one object of another
kind, a list, or one object reached by two ways has it compare thousands of values one by one. Hence `FusedLayer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import kernels, ops
from .direct import DirectGroup, launchable
from .frame import RoutingFrame, current
from .layer import LoRASwitchLinear
from .routing import Routing, with_shared

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # pragma: no cover

    class Conv1D: ...  # type: ignore[no-redef]


# Up to so many tokens in flight the kernels beat library products (csrc/README.md, measured on an H200); float32 and
# other cases of the generic kernel read the weight once for every four tokens.
FEW_TOKENS = kernels.FAST_TOKENS
FEW_TOKENS_GENERIC = 4


class FusedLayer(nn.Module):
    """What fusing keeps for one adapted layer, at `layer.fused`: its own parts by another way than through the layer.

    A module only so that dynamo guards it cheaply (see above); never registered, so it is in no state_dict. Everything that
    can change is reached through live dictionaries of the layer, so that what is replaced there is replaced here.

    Attributes:
        key: of the thread's frame in `frame.current.frames`.
        parts: the layer's dictionary of modules (base_layer, loraswitch_A, ...).
        scaling, num_experts, num_shared_experts: the layer's own dictionaries, by adapter.
        plain: the base layer is a 16/32-bit nn.Linear or Conv1D without hooks, whose weight the kernels can read.
        base_type: its type; another one means that somebody replaced it after fusing.
        transposed: it is a Conv1D.
        merging: the `merging.MergedWeights` of strategy "merge", else None.
        kernels: whether the kernels run on the layer's device; few_tokens: up to how many tokens the fused op is used.
        casts_a, casts_b: by adapter, experts in the dtype of the base weight, if theirs is another.
        others: how many more linears are in the group that this layer leads; they are `other0`, `other1`, ...
        direct: by adapter, the group as the kernels take it when no compiler is at work.
    """

    def __init__(self, layer: LoRASwitchLinear, merging: Any = None) -> None:
        super().__init__()
        base: Any = layer.get_base_layer()
        self.key = layer.routing_state.key
        self.name = layer.name
        self.parts: dict[str, Any] = layer._modules
        self.scaling, self.num_experts = layer.scaling, layer.num_experts
        self.num_shared_experts = layer.num_shared_experts
        self.base_type = type(base)
        self.transposed = self.base_type is Conv1D
        self.plain = self.base_type in (nn.Linear, Conv1D) and base.weight.dtype in ops.FLOATS
        # Hooks on the base layer (accelerate's offloading, a user's) must run, so its own forward must.
        self.plain = self.plain and layer.base_layer is base and not (base._forward_hooks or base._forward_pre_hooks)
        self.plain = self.plain and not hasattr(base, "_hf_hook")
        self.__dict__["merging"] = merging
        self.casts_a: dict[str, Tensor] = {}
        self.casts_b: dict[str, Tensor] = {}
        self.versions: dict[str, tuple[int, int]] = {}
        self.others = 0
        self.direct: dict[str, DirectGroup] = {}
        self.handle: Any = None  # of the layer's hook after load_state_dict
        # Looked up once: a compiler that traces the forward cannot ask a library.
        device = base.weight.device
        self.kernels = device.type == "cuda" and kernels.available(device.index or 0)
        if self.kernels:
            kernels.give_workspace(device.index or 0)
        fast = base.weight.dtype in (torch.float16, torch.bfloat16) and not self.transposed
        self.few_tokens = FEW_TOKENS if fast or device.type != "cuda" else FEW_TOKENS_GENERIC
        if device.type == "cuda" and not self.kernels:
            self.few_tokens = 0  # library products beat the ops' PyTorch path on a GPU

    def __getstate__(self) -> dict[str, Any]:  # copy.deepcopy and pickle: pointers do not travel
        return {**self.__dict__, "direct": {}, "casts_a": {}, "casts_b": {}, "versions": {}}

    def take_in(self, others: list[FusedLayer]) -> None:
        """Lead the group of this layer and `others`."""
        for i, other in enumerate(others):
            setattr(self, f"other{i}", other)
        self.others = len(others)

    def members(self) -> list[FusedLayer]:
        """This layer and the others of the group that it leads."""
        return [self, *(getattr(self, f"other{i}") for i in range(self.others))]

    def still_plain(self) -> bool:
        """Whether the base layer is what it was when the model was fused: hooks or another module may have come since."""
        base = self.parts["base_layer"]
        return self.plain and type(base) is self.base_type and not (base._forward_hooks or base._forward_pre_hooks)

    def has(self, adapter: str) -> bool:
        return adapter in self.parts["loraswitch_A"]._modules

    def experts(self, adapter: str) -> tuple[Tensor, Tensor]:
        """lora_a [E, r, in] and lora_b [E, out, r] in the dtype that the layer computes in."""
        a: Tensor = self.parts["loraswitch_A"]._modules[adapter].weight
        b: Tensor = self.parts["loraswitch_B"]._modules[adapter].weight
        dtype = self.parts["base_layer"].weight.dtype if self.plain else a.dtype
        if a.dtype == dtype:
            return a, b
        if torch.compiler.is_compiling():
            if adapter not in self.casts_a or self.casts_a[adapter].dtype != dtype:
                return a.to(dtype), b.to(dtype)
            return self.casts_a[adapter], self.casts_b[adapter]
        self.refresh(adapter)
        return self.casts_a[adapter], self.casts_b[adapter]

    def refresh(self, adapter: str, changed: bool = False) -> None:
        """Bring the casts of `adapter` up to date with its experts, in place where compiled code may read them.

        Args:
            changed: cast in any case. Otherwise only if PyTorch has counted a change, which `tensor.data` gets around.
        """
        a, b = (self.parts[f"loraswitch_{name}"]._modules[adapter].weight.detach() for name in "AB")
        dtype = self.parts["base_layer"].weight.dtype if self.plain else a.dtype
        if a.dtype == dtype:
            return
        versions = (a._version, b._version)
        old = self.casts_a.get(adapter)
        if old is not None and old.dtype == dtype and old.device == a.device and old.shape == a.shape:
            if changed or versions != self.versions[adapter]:
                old.copy_(a)
                self.casts_b[adapter].copy_(b)
        else:
            self.casts_a[adapter], self.casts_b[adapter] = a.to(dtype), b.to(dtype)
            for cast in (self.casts_a[adapter], self.casts_b[adapter]):
                torch._dynamo.mark_static_address(cast, guard=False)  # CUDA graphs read it in place, like a parameter
        self.versions[adapter] = versions


def plan_of(layer: nn.Module) -> FusedLayer:
    return layer.fused  # type: ignore[return-value]


def base_of(layer: LoRASwitchLinear) -> Any:
    return layer.get_base_layer()


# ---------------------------------------------------------------------------------------------------------- forwards


def lead(self: LoRASwitchLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in_features] -> [..., out_features]: stands in for `forward` of the first of a group, or of a single one."""
    plan: FusedLayer = self.fused  # type: ignore[assignment]
    frame = current.frames.get(plan.key)
    adapter = _one(self._active_adapter)
    if frame is None or adapter is None or self.training or self._disable_adapters or args or kwargs:
        return LoRASwitchLinear.forward(self, x, *args, **kwargs)
    routing = _served(self, plan, adapter, x, frame)
    if routing is None:
        return LoRASwitchLinear.forward(self, x)
    if plan.kernels and not torch.compiler.is_compiling():
        group = plan.direct.get(adapter)
        results = group(x, routing) if group is not None else None
        if results is not None:
            if len(results) > 1:
                frame.leave(group.names, x, results, adapter)  # type: ignore[union-attr]
            return results[0]
    return compute(self, plan, adapter, x, routing, frame)


def follow(self: LoRASwitchLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for `forward` of the others of a group."""
    frame = current.frames.get(self.fused_key)  # type: ignore[call-overload]
    if frame is not None:
        waiting = frame.results.pop(self.name, None)
        if waiting is not None and waiting[0] is x and not (args or kwargs):
            if waiting[2] == _one(self._active_adapter) and not (self.training or self._disable_adapters):
                return waiting[1]
    return lead(self, x, *args, **kwargs)


def merge(self: LoRASwitchLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for `forward` under strategy "merge"."""
    plan = plan_of(self)
    frame, adapter = current.frames.get(plan.key), _one(self._active_adapter)
    routing = None
    if not (frame is None or adapter is None or self.training or self._disable_adapters or args or kwargs):
        routing = _served(self, plan, adapter, x, frame)
    if frame is None or adapter is None or routing is None:
        plan.merging.leave_out(frame)  # type: ignore[union-attr, operator]
        return LoRASwitchLinear.forward(self, x, *args, **kwargs)
    merged = plan.merging.forward(self, adapter, x, routing, frame)  # type: ignore[union-attr, operator]
    return compute(self, plan, adapter, x, routing, frame) if merged is None else merged


def _one(active: str | list[str]) -> str | None:
    """The only active adapter, or None if there are several or none."""
    if isinstance(active, str):
        return active
    return active[0] if len(active) == 1 else None


def _served(layer: LoRASwitchLinear, plan: FusedLayer, adapter: str, x: Tensor, frame: RoutingFrame) -> Routing | None:
    """What the tokens of x follow if the fused ops can serve this call, None if it must take the unfused forward."""
    experts = plan.parts["loraswitch_A"]._modules.get(adapter)
    if experts is None or frame.adapter_names is not None:
        return None
    weight = experts._parameters["weight"]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return None
    dtype = plan.parts["base_layer"].weight.dtype if plan.plain else weight.dtype
    if x.dtype != dtype or x.get_device() != weight.get_device() or x.numel() == 0:
        return None
    if torch.is_autocast_enabled("cuda" if x.is_cuda else x.device.type):
        return None
    if plan.num_experts[adapter] == 0:
        routing: Routing | None = frame.shared_routing(adapter, layer, x)
    else:
        routing = frame.routings.get(adapter)
    if routing is None:
        routing = _decide(layer, plan, adapter, frame, x)
    if x.shape[:-1] != routing.token_shape:
        routing.dense_gates_for(x, layer.name)  # the tokens flattened, or an error that says what is wrong
    return routing


def _decide(layer: LoRASwitchLinear, plan: FusedLayer, adapter: str, frame: RoutingFrame, x: Tensor) -> Routing:
    """The decision of this forward: one launch on a GPU, the unfused way elsewhere or when it is being recorded."""
    state = layer.routing_state
    if not plan.kernels or frame.training or state.recorders:
        return frame.routing(adapter, layer, x)
    router_layer = state.router_layer(adapter, layer)
    options = router_layer.routing_options[adapter]
    if options.top_k > kernels.MAX_TOP_K or options.num_experts > kernels.MAX_EXPERTS:
        return frame.routing(adapter, layer, x)
    weight: Any = router_layer.loraswitch_router[adapter].weight
    experts, gates = ops.route(x, weight, options.top_k, options.normalize_gates)
    dense = torch.zeros((*experts.shape[:-1], options.num_experts), dtype=gates.dtype, device=gates.device)
    routing = with_shared(Routing(experts=experts, gates=gates, dense_gates=dense.scatter(-1, experts, gates)), options)
    if not torch.compiler.is_compiling():
        frame.used.add(adapter)
    frame.routings[adapter] = routing
    return routing


# ------------------------------------------------------------------------------------------------------- computation


def compute(
    layer: LoRASwitchLinear, plan: FusedLayer, adapter: str, x: Tensor, routing: Routing, frame: RoutingFrame
) -> Tensor:
    """The layer's output with the adapter, unmerged; the other linears of its group find theirs in the frame."""
    tokens = x.numel() // x.shape[-1]
    if not plan.still_plain():
        return _beside_base(layer, plan, adapter, x, routing)
    group = [plan]
    for member in plan.members()[1:]:
        if member.has(adapter) and member.num_experts[adapter] == plan.num_experts[adapter] and member.still_plain():
            group.append(member)
    active = routing.experts.shape[-1]
    if tokens > plan.few_tokens or not all(within_limits(member, adapter, active) for member in group):
        results = _dense(group, adapter, x, routing)
    else:
        results = _few(group, adapter, x, routing)
    if len(group) > 1:
        frame.leave([member.name for member in group], x, results, adapter)
    return results[0]


def _few(group: list[FusedLayer], adapter: str, x: Tensor, routing: Routing) -> list[Tensor]:
    """The outputs of a group for a few tokens: base weights and experts in one op."""
    plan = group[0]
    bases = [member.parts["base_layer"] for member in group]
    experts = [member.experts(adapter) for member in group]
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    lora_a, lora_b = [a for a, _ in experts], [b for _, b in experts]
    scalings = [member.scaling[adapter] for member in group]
    if plan.kernels and not torch.compiler.is_compiling() and launchable(x):
        if all(t.is_contiguous() for t in (*weights, *lora_a, *lora_b)):
            packed = kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, plan.transposed)
            kernels.warn_if_generic(packed, x, routing.experts)
            for name in [name for name in plan.direct if not plan.has(name)]:  # deleted since
                del plan.direct[name]
            plan.direct[adapter] = DirectGroup(packed, group, adapter)
    return ops.linear(x, routing.experts, routing.gates, weights, biases, lora_a, lora_b, scalings, plan.transposed)


def _dense(group: list[FusedLayer], adapter: str, x: Tensor, routing: Routing) -> list[Tensor]:
    """The outputs of a group for many tokens: one shrink for the whole group, and a product more for each linear."""
    rows = x.reshape(-1, x.shape[-1])
    experts = [member.experts(adapter) for member in group]
    gates = [routing.scaled(member.scaling[adapter], x.dtype) for member in group]
    hidden = ops.group_hidden(rows, [a for a, _ in experts], gates)
    results = []
    for member, h, (_, b) in zip(group, hidden, experts, strict=True):
        base = member.parts["base_layer"]
        result = ops.dense_linear(rows, h, base.weight, base.bias, b, member.transposed)
        results.append(result.view(*x.shape[:-1], b.shape[1]))
    return results


def _beside_base(layer: LoRASwitchLinear, plan: FusedLayer, adapter: str, x: Tensor, routing: Routing) -> Tensor:
    """The base layer's own forward (quantised, hooked), and the experts added to what it returns."""
    base = layer.base_layer(x)
    a, b = plan.experts(adapter)
    unfit = (
        base.dtype != x.dtype or base.device != x.device or not within_limits(plan, adapter, routing.experts.shape[-1])
    )
    if x.numel() // x.shape[-1] <= plan.few_tokens and not unfit:
        return ops.delta(base, x, routing.experts, routing.gates, a, b, plan.scaling[adapter])
    rows = x.to(a.dtype).reshape(-1, x.shape[-1])
    (hidden,) = ops.group_hidden(rows, [a], [routing.scaled(plan.scaling[adapter], a.dtype)])
    if base.dtype != hidden.dtype:
        return base + (hidden @ ops.wide(b).T).to(base.dtype).view(base.shape)
    # out of place: a quantised base layer may return a view
    return torch.addmm(base.reshape(-1, base.shape[-1]), hidden, ops.wide(b).T).view(base.shape)


def within_limits(plan: FusedLayer, adapter: str, active: int) -> bool:
    """Whether the ops take an adapter of this size, with so many experts for each token; beyond, two dense products serve
    it, with one line of log."""
    stack, rank, _ = plan.parts["loraswitch_A"]._modules[adapter].weight.shape
    if active <= kernels.MAX_TOP_K and stack <= kernels.MAX_EXPERTS and rank <= kernels.MAX_RANK:
        return True
    if not torch.compiler.is_compiling():
        kernels._log_once(
            f"LoRA-Switch: adapter '{adapter}' is served by PyTorch operations: the fused ones take at most "
            f"{kernels.MAX_TOP_K} experts per token (top_k + num_shared_experts), {kernels.MAX_EXPERTS} experts and rank "
            f"{kernels.MAX_RANK}."
        )
    return False
