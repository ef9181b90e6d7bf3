"""fuse_for_inference(): the same model, its adapted linears served by the fused ops. unfuse() takes it back.

Nothing is copied and nothing is merged: each adapted layer gets another `forward` (an attribute of the instance) that
hands base weight and experts to one op, together with the linears that receive the same tensor (q, k, v; gate, up). Such
groups are found by watching the tensors of one forward, not by names; the first of a group computes for all, the others
pick their result up from the forward's frame, if they really receive that tensor. Whatever the ops do not serve
(training, gradients, mixed batches, several active adapters, autocast) takes the unfused forward, which is always right.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import kernels, ops
from .frame import RoutingFrame
from .layer import LoRASwitchLinear
from .routing import Routing, with_shared

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # pragma: no cover

    class Conv1D: ...  # type: ignore[no-redef]


logger = logging.getLogger(__name__)
Strategy = Literal["auto", "fused", "merge"]
STRATEGIES = ("auto", "fused", "merge")

# Up to so many tokens in flight the kernels beat library products (csrc/README.md, measured on an H200); float32 and
# other cases of the generic kernel read the weight once for every four tokens.
FEW_TOKENS = kernels.FAST_TOKENS
FEW_TOKENS_GENERIC = 4


class FusedLayer:
    """What fusing keeps for one adapted layer, at `layer.fused`.

    Attributes:
        base: the base layer.
        group: layers that receive the same tensor, in the order they run, this one among them.
        plain: the base layer is a 16/32-bit nn.Linear or Conv1D, whose weight the kernels can read.
        transposed: it is a Conv1D.
        merging: the `merging.MergedWeights` of strategy "merge", else None.
        kernels: whether the kernels run on the layer's device; few_tokens: up to how many tokens the fused op is used.
    """

    def __init__(self, layer: LoRASwitchLinear, merging: Any = None) -> None:
        base: Any = layer.get_base_layer()
        self.base = base
        self.group: list[LoRASwitchLinear] = [layer]
        self.transposed = type(base) is Conv1D
        self.plain = type(base) in (nn.Linear, Conv1D) and base.weight.dtype in ops.FLOATS
        # Hooks on the base layer (accelerate's offloading, a user's) must run, so its own forward must.
        self.plain = self.plain and layer.base_layer is base and not (base._forward_hooks or base._forward_pre_hooks)
        self.plain = self.plain and not hasattr(base, "_hf_hook")
        self.merging = merging
        self.casts: dict[
            str, tuple[Tensor, Tensor]
        ] = {}  # experts in the dtype of the base weight, if theirs is another
        self.stale = False  # the experts may have been trained since: cast again
        self.packed: dict[str, kernels.PackedGroup] = {}
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
        return {**self.__dict__, "packed": {}, "casts": {}}


def plan_of(layer: nn.Module) -> FusedLayer:
    return layer.fused  # type: ignore[return-value]


def base_of(layer: LoRASwitchLinear) -> Any:
    return layer.get_base_layer()


def experts_of(layer: LoRASwitchLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """lora_a [E, r, in] and lora_b [E, out, r] in the dtype that the layer computes in."""
    fused = plan_of(layer)
    a: Tensor = layer.loraswitch_A[adapter].weight  # type: ignore[assignment]
    b: Tensor = layer.loraswitch_B[adapter].weight  # type: ignore[assignment]
    dtype = fused.base.weight.dtype if fused.plain else a.dtype
    if a.dtype == dtype:
        return a, b
    casts = fused.casts.get(adapter)
    if casts is not None and not fused.stale and casts[0].dtype == dtype and casts[0].device == a.device:
        return casts
    if torch.compiler.is_compiling():
        return a.to(dtype), b.to(dtype)
    casts = (a.detach().to(dtype), b.detach().to(dtype))
    for tensor in casts:
        torch._dynamo.mark_static_address(tensor, guard=False)  # CUDA graphs read it in place, like a parameter
    for member in fused.group:  # packed groups point at the old casts
        plan_of(member).packed.pop(adapter, None)
    fused.casts[adapter], fused.stale = casts, False
    return casts


# ------------------------------------------------------------------------------------------------------------ forward


def fused_forward(self: LoRASwitchLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in_features] -> [..., out_features]; stands in for `LoRASwitchLinear.forward`."""
    frame, fused = self.routing_state.frame, plan_of(self)
    shared = getattr(frame, "shared_results", None)
    if shared is not None:
        waiting = shared.pop(self.name, None)
        if waiting is not None and waiting[0] is x:  # the first of the group has checked everything for all
            return waiting[1]
    adapter = _served_adapter(self, fused, x, frame)
    if adapter is None or frame is None or args or kwargs:
        if self.training and not torch.compiler.is_compiling():
            fused.stale = True
        if fused.merging is not None:
            fused.merging.leave_out(frame)
        return LoRASwitchLinear.forward(self, x, *args, **kwargs)
    if self.num_experts[adapter] == 0:
        routing: Routing | None = frame.shared_routing(adapter, self, x)
    else:
        routing = frame.routings.get(adapter)
    if routing is None:
        routing = _decide(self, adapter, frame, x)
    if x.shape[:-1] != routing.token_shape:
        routing.dense_gates_for(x, self.name)  # the tokens flattened, or an error that says what is wrong
    if fused.merging is not None:
        merged = fused.merging.forward(self, adapter, x, routing, frame)
        if merged is not None:
            return merged
    return compute(self, adapter, x, routing, frame)


def _served_adapter(layer: LoRASwitchLinear, fused: FusedLayer, x: Tensor, frame: RoutingFrame | None) -> str | None:
    """The one adapter to apply by the fused ops, or None if this call must take the unfused forward."""
    if frame is None or frame.adapter_names is not None or layer.training or layer._disable_adapters:
        return None
    active = layer._active_adapter
    if not isinstance(active, str):
        if len(active) != 1:
            return None
        active = active[0]
    if active not in layer.loraswitch_A:
        return None
    experts: Any = layer.loraswitch_A[active].weight
    if torch.is_grad_enabled() and (x.requires_grad or experts.requires_grad):
        return None
    if torch.is_autocast_enabled(x.device.type) or x.device != experts.device or x.numel() == 0:
        return None
    dtype = fused.base.weight.dtype if fused.plain else experts.dtype
    return active if x.dtype == dtype else None


def _decide(layer: LoRASwitchLinear, adapter: str, frame: RoutingFrame, x: Tensor) -> Routing:
    """The decision of this forward: one launch on a GPU, the unfused way elsewhere or when it is being recorded."""
    state = layer.routing_state
    if not plan_of(layer).kernels or frame.training or state.recorders:
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


def compute(layer: LoRASwitchLinear, adapter: str, x: Tensor, routing: Routing, frame: RoutingFrame) -> Tensor:
    """The layer's output with the adapter, unmerged; the other linears of its group leave theirs in the frame."""
    fused = plan_of(layer)
    tokens = x.numel() // x.shape[-1]
    a, b = experts_of(layer, adapter)
    if not fused.plain:
        base = layer.base_layer(x)
        unfit = base.dtype != x.dtype or base.device != x.device or not within_limits(layer, adapter)
        if tokens > fused.few_tokens or unfit:
            return _add_dense(layer, base, x, routing, adapter, a, b, in_place=False)
        return ops.delta(base, x, routing.experts, routing.gates, a, b, layer.scaling[adapter])
    if tokens > fused.few_tokens:
        return _add_dense(layer, layer.base_layer(x), x, routing, adapter, a, b, in_place=True)
    group = [m for m in fused.group if _same_launch(m, layer, adapter)]
    if group[0] is not layer:
        group = [layer]
    results = _launch(group, adapter, x, routing)
    if len(group) > 1:
        shared = getattr(frame, "shared_results", None)
        if shared is None:
            shared = frame.shared_results = {}  # type: ignore[attr-defined]
        for member, result in zip(group[1:], results[1:], strict=True):
            shared[member.name] = (x, result)
    return results[0]


def _same_launch(member: LoRASwitchLinear, leader: LoRASwitchLinear, adapter: str) -> bool:
    if member is leader:
        return True
    if (
        adapter not in member.loraswitch_A
        or member._active_adapter != leader._active_adapter
        or member._disable_adapters
    ):
        return False
    return member.num_experts[adapter] == leader.num_experts[adapter]


def within_limits(layer: LoRASwitchLinear, adapter: str) -> bool:
    """Whether the ops take an adapter of this size; beyond, two dense products serve it, with one line of log."""
    shared = layer.num_shared_experts[adapter]
    active = layer.top_k[adapter] + shared
    if (
        active <= kernels.MAX_TOP_K
        and layer.num_experts[adapter] + shared <= kernels.MAX_EXPERTS
        and layer.r[adapter] <= kernels.MAX_RANK
    ):
        return True
    if not torch.compiler.is_compiling():
        kernels._log_once(
            f"LoRA-Switch: adapter '{adapter}' is served by PyTorch operations: the fused ones take at most "
            f"{kernels.MAX_TOP_K} experts per token (top_k + num_shared_experts), {kernels.MAX_EXPERTS} experts and rank "
            f"{kernels.MAX_RANK}."
        )
    return False


def _launch(group: list[LoRASwitchLinear], adapter: str, x: Tensor, routing: Routing) -> list[Tensor]:
    leader = group[0]
    fused = plan_of(leader)
    # Without a compiler, kernels are called directly: a dispatcher's round through lists of tensors costs more than the launch.
    direct = (
        fused.kernels and not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cuda and x.is_contiguous()
    )
    if direct:
        packed = fused.packed.get(adapter)
        if packed is not None and len(packed.out_features) == len(group) and not fused.stale and packed.is_current():
            return packed(x, routing.experts, routing.gates)
    experts = [experts_of(member, adapter) for member in group]
    if not all(within_limits(member, adapter) for member in group):
        return [
            _add_dense(member, member.base_layer(x), x, routing, adapter, a, b, in_place=True)
            for member, (a, b) in zip(group, experts, strict=True)
        ]
    bases = [plan_of(member).base for member in group]
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    lora_a, lora_b = [a for a, _ in experts], [b for _, b in experts]
    scalings = [member.scaling[adapter] for member in group]
    if direct and all(t.is_contiguous() for t in (*weights, *lora_a, *lora_b)):
        packed = kernels.PackedGroup(weights, biases, lora_a, lora_b, scalings, fused.transposed)
        kernels.warn_if_generic(packed, x, routing.experts)
        fused.packed[adapter] = packed
    return ops.linear(x, routing.experts, routing.gates, weights, biases, lora_a, lora_b, scalings, fused.transposed)


def _add_dense(
    layer: LoRASwitchLinear,
    base: Tensor,
    x: Tensor,
    routing: Routing,
    adapter: str,
    a: Tensor,
    b: Tensor,
    in_place: bool,
) -> Tensor:
    """base [..., out] plus what the experts add, by two dense products (many tokens)."""
    gates = routing.dense_gates_for(x, layer.name).reshape(-1, a.shape[0])
    hidden, up = ops.dense_factors(x.to(a.dtype).reshape(-1, x.shape[-1]), gates, a, b, layer.scaling[adapter])
    if base.dtype != hidden.dtype:
        return base + (hidden @ up).to(base.dtype).view(base.shape)
    rows = base.reshape(-1, base.shape[-1])
    if in_place and not torch.compiler.is_compiling() and rows.data_ptr() == base.data_ptr():
        rows.addmm_(hidden, up)  # `base` is this call's own: no copy of it
        return base
    return torch.addmm(rows, hidden, up).view(base.shape)


# ------------------------------------------------------------------------------------------------ finding the groups


def _watch_groups(model: nn.Module, layers: list[LoRASwitchLinear]) -> list[list[LoRASwitchLinear]]:
    """Linears that received the very same tensor in one forward of a single token, in the order they ran."""
    seen: list[tuple[LoRASwitchLinear, Tensor]] = []  # tensors are kept, so that no two share an id

    def watch(layer: nn.Module, args: tuple) -> None:
        seen.append((layer, args[0]))  # type: ignore[arg-type]

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    except Exception as error:  # a model that wants other inputs: correct all the same, one launch for each linear
        name = type(model).__name__
        logger.warning(
            f"LoRA-Switch: the linears of {name} are not grouped, because a forward of input_ids failed: {error}"
        )
        return [[layer] for layer in layers]
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    calls: dict[int, int] = {}
    groups: dict[Any, list[LoRASwitchLinear]] = {}
    for layer, _ in seen:
        calls[id(layer)] = calls.get(id(layer), 0) + 1
    for layer, x in seen:
        if calls[id(layer)] == 1:
            base = base_of(layer)
            key = (id(x), type(base), base.weight.dtype, base.weight.device)
            groups.setdefault(key, []).append(layer)
    return [g[i : i + kernels.MAX_GROUP] for g in groups.values() for i in range(0, len(g), kernels.MAX_GROUP)]


# ---------------------------------------------------------------------------------------------------- fuse and unfuse


def adapted_layers(model: nn.Module) -> list[LoRASwitchLinear]:
    return [module for module in model.modules() if isinstance(module, LoRASwitchLinear)]


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse_for_inference()` is in force on `model`."""
    return any(hasattr(layer, "fused") for layer in adapted_layers(model))


class Fusion:
    """What `fuse_for_inference()` returns. As a context manager it unfuses at the end of the block.

    Attributes:
        strategy: "fused", "merge", or "none" if fusing would have changed nothing and was left out.
        reason: why the kernels are not used, or None if they are.
        groups: names of the linears that share a launch.
    """

    def __init__(self, model: nn.Module, strategy: str, reason: str | None, groups: list[list[str]]) -> None:
        self.model, self.strategy, self.reason, self.groups = model, strategy, reason, groups

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, *exception: object) -> None:
        unfuse(self.model)

    def __repr__(self) -> str:
        return f"Fusion(strategy={self.strategy!r}, groups={len(self.groups)}, reason={self.reason!r})"


def fuse(model: nn.Module, strategy: Strategy = "auto", in_place: bool = False) -> Fusion:
    """Serve the LoRA-Switch layers of `model` by fused ops: the same outputs to the rounding of the dtype, sooner.

    Args:
        model: a model with LoRA-Switch layers, usually a `PeftModel`.
        strategy: "fused": base weights and experts in one pass, nothing merged, no copy of the backbone. "merge": the
            paper's method, the experts of a single token are merged into all weights before it runs; needs a second copy
            of the adapted weights. "auto": "fused" on a GPU; on a CPU, where it gains nothing, the model stays as it is.
        in_place: with "merge": merge into the backbone's own weights, without a second copy on the device (one on the
            host is kept for `unfuse()`). Each token adds a rounding error: see csrc/README.md for the measured drift.

    Returns:
        `Fusion`, which is also a context manager that unfuses.

    Raises:
        ValueError: an unknown strategy, no LoRA-Switch layers, or layers that "merge" cannot serve.
        RuntimeError: the model is fused already.
    """
    layers = adapted_layers(model)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(map(repr, STRATEGIES))}.")
    if in_place and strategy != "merge":
        raise ValueError("in_place=True belongs to strategy='merge'.")
    if not layers:
        raise ValueError(f"{type(model).__name__} carries no LoRA-Switch adapter: there is nothing to fuse.")
    if is_fused(model):
        raise RuntimeError("This model is fused already: call unfuse() first.")
    on_gpu = any(base_of(layer).weight.device.type == "cuda" for layer in layers)
    reason = kernels.why_not() if on_gpu else "the model is on a CPU"
    if strategy == "auto" and not on_gpu:
        logger.warning(
            "LoRA-Switch: fuse_for_inference() changes nothing on a CPU: the model's own forward is as fast."
        )
        return Fusion(model, "none", reason, [])
    if reason is not None:
        logger.warning(f"LoRA-Switch: fused without kernels, by PyTorch operations: {reason}.")

    # What can fail comes before the first change; casts, which cannot, are taken back.
    merging = None
    if strategy == "merge":
        from .merging import MergedWeights

        merging = MergedWeights(layers, in_place)
    groups = _watch_groups(model, layers)
    plans = {id(layer): FusedLayer(layer, merging) for layer in layers}
    for group in groups:
        if all(plans[id(layer)].plain for layer in group):
            for layer in group:
                plans[id(layer)].group = group
    try:
        for layer in layers:
            layer.fused = plans[id(layer)]  # type: ignore[assignment]
            layer.forward = MethodType(fused_forward, layer)  # type: ignore[method-assign]
        for layer in layers:
            for adapter in layer.loraswitch_A:
                experts_of(layer, adapter)  # casts are made now, not within a compiled forward
    except BaseException:
        unfuse(model)
        raise
    return Fusion(model, "merge" if merging else "fused", reason, [[layer.name for layer in group] for group in groups])


def unfuse(model: nn.Module) -> None:
    """Take `fuse()` back; weights are then what they were, bit for bit. Nothing to do if the model is not fused."""
    layers = [layer for layer in adapted_layers(model) if hasattr(layer, "fused")]
    merging = plan_of(layers[0]).merging if layers else None
    if merging is not None:
        merging.restore()
    for layer in layers:
        del layer.fused
        layer.__dict__.pop("forward", None)
