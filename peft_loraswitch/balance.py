"""Load-balance loss, z-loss and router statistics, and how they join a training loss that others compute.

The losses are functions of the router's weight and of its (detached) input: they train the router, not the layers below.
With T real tokens (padding does not count), probabilities p = softmax(logits) and c_e = how often expert e was chosen:

    balance = E * sum_e (c_e / T) * mean_t p_te       Switch Transformer (arXiv 2101.03961), top-k form of Mixtral
    z       = mean_t logsumexp(logits_t)^2            ST-MoE (arXiv 2202.08906)

**Gradient accumulation.** `balance` is not a mean over tokens, so the sum over micro-batches of its values is not its
value on the whole batch. While accelerate's `GradientState` says that gradients are being accumulated, only the sums that
the gradient needs are kept (`PendingBatches`); the last micro-batch adds the loss of all tokens. The total is that of one
large batch. Outside of accelerate each forward stands for itself. With several processes each computes the losses of its
own tokens, and the average over processes trains.

**Joining.** If the output has a scalar loss, the losses are added to it. Trainers that compute the loss from other
outputs (DPO, GRPO, TRL's fused head) get it by `AttachLoss`: the output is passed on unchanged, and its backward adds the
gradient of the losses with weight 1. That weight knows nothing of a factor that is put on the loss later, so where fp16
training scales it (`torch.amp.GradScaler`), attached losses vanish: there is a warning, and bf16 needs no scaling.

**torch.compile.** Everything that lasts from one forward to the next is a buffer that is updated in place: no guard on a
value that changes from step to step, no additional output of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import nn

from .routing import Routing, RoutingOptions

if TYPE_CHECKING:
    from .frame import RoutingFrame, RoutingState


class AttachLoss(torch.autograd.Function):
    """Identity on `tensor`; its backward sends 1 to `loss` besides passing the gradient on."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return grad, torch.ones((), dtype=torch.float32, device=grad.device)


class PendingBatches(nn.Module):
    """Sums over the real tokens of the micro-batches accumulated so far, from which the exact gradient of both losses
    with respect to the router's weight follows once all tokens are known (T tokens, E experts, d inputs):

    probability_inputs[e] = sum_t p_te x_t   [E, d];   products[e, j] = sum_t p_te p_tj x_t   [E, E, d];
    z_inputs[e] = sum_t logsumexp_t p_te x_t [E, d].

    The buffers take memory from the first accumulation on (`products` 4 * E^2 * d bytes: 1 MB for 8 experts, 64 MB for 64, at
    d = 4096). They are cleared when the next one begins, not when the last ends: cleared in the compiled graph that computes
    the loss from them, they would be zeros in its backward (torch 2.13, without any error).
    """

    micro_batches: torch.Tensor
    tokens: torch.Tensor
    counts: torch.Tensor
    probabilities: torch.Tensor
    z: torch.Tensor
    probability_inputs: torch.Tensor
    products: torch.Tensor
    z_inputs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.in_progress = False
        self.weight_version = 0
        self.backward_ran = False  # of any of the micro-batches; see `watch`

    def allocate(self, num_experts: int, in_features: int, device: torch.device) -> None:
        e, d = num_experts, in_features
        shapes: dict[str, tuple[int, ...]] = {"micro_batches": (), "tokens": (), "counts": (e,), "probabilities": (e,)}
        shapes |= {"z": (), "probability_inputs": (e, d), "products": (e, e, d), "z_inputs": (e, d)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device), persistent=False)
        self.allocated = True

    def _apply(self, fn: Any, recurse: bool = True) -> PendingBatches:
        return _apply_but_keep_dtypes(self, super()._apply, fn, recurse)

    def watch(self, weight: torch.Tensor) -> None:
        """Notice the router's gradient, where it stays in `weight.grad` (FSDP and DeepSpeed keep it elsewhere)."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if weight.is_leaf and not distributed and not torch.compiler.is_compiling():
            weight.register_post_accumulate_grad_hook(self._note_backward)

    def _note_backward(self, weight: torch.Tensor) -> None:
        self.backward_ran = True

    def forget_if_stale(self, weight: torch.Tensor) -> None:
        """Drop what an interrupted run left behind: its weights have moved since, or its gradients were dropped as well."""
        if self.weight_version != weight._version or (self.backward_ran and weight.grad is None):
            self.in_progress = False
            self.weight_version = weight._version

    @torch.no_grad()
    def add(self, batch: _Batch) -> None:
        if not self.in_progress:
            for buffer in self.buffers():
                buffer.zero_()
            self.in_progress, self.backward_ran = True, False
        x, probabilities, logsumexp = batch.x.float(), batch.probabilities.detach(), batch.logsumexp.detach()
        p = probabilities * batch.real
        self.micro_batches.add_(1)
        self.tokens.add_(batch.tokens)
        self.counts.add_(batch.counts)
        self.probabilities.add_(p.sum(0))
        self.z.add_((logsumexp.square() * batch.real.squeeze(-1)).sum())
        self.probability_inputs.add_(p.T @ x)
        pairs = (p.unsqueeze(2) * probabilities.unsqueeze(1)).flatten(1)  # [T, E * E]
        self.products.add_((pairs.T @ x).view_as(self.products))
        self.z_inputs.add_((p * logsumexp.unsqueeze(-1)).T @ x)

    def loss(self, load: torch.Tensor, tokens: torch.Tensor, options: RoutingOptions) -> torch.Tensor:
        """Value of these tokens' share, for the load [E] = c_e / T and the token count T of all of them."""
        balance = options.aux_loss_coef * options.num_experts * (load * self.probabilities).sum()
        return (balance + options.z_loss_coef * self.z) / tokens

    def gradient(self, load: torch.Tensor, tokens: torch.Tensor, options: RoutingOptions) -> torch.Tensor:
        """Its gradient with respect to the router's weight: [E, d]."""
        balance = load.unsqueeze(-1) * self.probability_inputs - torch.einsum("e,ejd->jd", load, self.products)
        scale = options.aux_loss_coef * options.num_experts / tokens
        return scale * balance + (2 * options.z_loss_coef / tokens) * self.z_inputs


def _apply_but_keep_dtypes(module: nn.Module, apply: Any, fn: Any, recurse: bool) -> Any:
    """`nn.Module._apply` (to, cuda, bfloat16, ...) that moves counters, but does not round them."""
    before = dict(module.named_buffers(recurse=False))
    apply(fn, recurse)
    for name, value in before.items():
        moved = getattr(module, name)
        source = torch.zeros_like(moved) if value.device.type == "meta" else value  # to_empty() leaves memory as it was
        with torch.inference_mode(False):
            setattr(module, name, source.to(device=moved.device, dtype=value.dtype))
    return module


@dataclass
class _Batch:
    """The routed tokens of one forward, flattened: x [T, d], experts [T, k], real float32 [T, 1]."""

    x: torch.Tensor
    experts: torch.Tensor
    real: torch.Tensor
    probabilities: torch.Tensor = field(init=False)  # [T, E]
    logsumexp: torch.Tensor = field(init=False)  # [T]
    counts: torch.Tensor = field(init=False)  # [E], how often each expert was chosen
    tokens: torch.Tensor = field(init=False)  # scalar, at least 1 so that an empty batch gives 0, not NaN

    @staticmethod
    def concatenate(batches: Sequence[_Batch]) -> _Batch:
        fields = ([getattr(batch, name) for batch in batches] for name in ("x", "experts", "real"))
        return _Batch(*map(torch.cat, fields))

    def route(self, router: nn.Module, num_experts: int) -> None:
        logits = _with_whole_weight(router)(self.x)
        self.probabilities = torch.softmax(logits, dim=-1)
        self.logsumexp = torch.logsumexp(logits, dim=-1)
        chosen = self.real.expand(-1, self.experts.shape[-1]).flatten()
        counts = torch.zeros(num_experts, dtype=torch.float32, device=self.x.device)
        self.counts = counts.scatter_add(0, self.experts.flatten(), chosen)
        self.tokens = self.real.sum()


def _with_whole_weight(router: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The router's forward after the layer that holds it has run: by then FSDP2 has sharded its weight again."""
    weight: Any = router.weight
    if not hasattr(weight, "full_tensor"):
        return router
    from torch.distributed.tensor import Partial

    # each process has the gradient of its own tokens: the average trains, as with all weights under FSDP
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    whole = whole / mesh.size() + whole.detach() * (1 - 1 / mesh.size())
    return lambda x: torch.func.functional_call(router, {"weight": whole}, (x,))


class RoutingRecord(nn.Module):
    """Sums over any number of forwards of one adapter's routing statistics; they stay on their device until read.

    A module with non-persistent buffers: it moves with the layer that holds it, is not saved, and a compiled training step
    updates it in place instead of returning it.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    probabilities: torch.Tensor
    entropy: torch.Tensor
    z: torch.Tensor

    def __init__(self, num_experts: int, device: torch.device | None = None) -> None:
        super().__init__()
        for name, size in (
            ("tokens", 1),
            ("counts", num_experts),
            ("probabilities", num_experts),
            ("entropy", 1),
            ("z", 1),
        ):
            # float32 stops counting at 2**24, a few steps of a large run
            dtype = torch.int64 if name in ("tokens", "counts") else torch.float32
            with torch.inference_mode(False):  # forwards of every mode write to it
                self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutingRecord:
        return _apply_but_keep_dtypes(self, super()._apply, fn, recurse)

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def add(self, batch: _Batch) -> None:
        p = batch.probabilities.detach()
        real = batch.real.squeeze(-1)
        self.tokens.add_(batch.tokens.long())
        self.counts.add_(batch.counts.long())
        self.probabilities.add_((p * batch.real).sum(0))
        self.entropy.add_((torch.special.entr(p).sum(-1) * real).sum())
        self.z.add_((batch.logsumexp.detach().square() * real).sum())

    def summary(self) -> dict[str, Any]:
        """tokens (int), load (E floats, sum 1), entropy of the router's softmax (nats, mean over tokens), dropped_experts
        (indices never chosen), balance_loss and z_loss (unweighted). Waits for the device."""
        tokens = max(float(self.tokens), 1.0)
        counts = self.counts.double().cpu()
        probabilities = self.probabilities.double().cpu() / tokens
        seen = float(self.tokens) > 0
        return {
            "tokens": int(self.tokens),
            "load": (counts / counts.sum().clamp(min=1)).tolist(),
            "entropy": float(self.entropy) / tokens,
            "dropped_experts": [int(e) for e in (counts == 0).nonzero().flatten()] if seen else [],
            "balance_loss": float(len(counts) * (counts / tokens * probabilities).sum()),
            "z_loss": float(self.z) / tokens,
        }


def add_auxiliary_losses(state: RoutingState, frame: RoutingFrame, output: Any) -> Any:
    """At the end of a forward: count the routed tokens, and in training join the losses to `output` (returned)."""
    passes = (*frame.earlier, frame)
    for adapter in dict.fromkeys(name for each in passes for name in each.routings):
        router_layer = state.router_layers.get(adapter)
        routed = [(each, each.routings[adapter]) for each in passes if adapter in each.routings]
        if router_layer is None or any(routing.router_input is None for _, routing in routed):
            continue  # decided before anybody wanted to know
        options = router_layer.routing_options[adapter]
        batches = [_batch(each, adapter, routing, options.top_k) for each, routing in routed]
        batch = batches[0] if len(batches) == 1 else _Batch.concatenate(batches)
        router = router_layer.loraswitch_router[adapter]
        with torch.set_grad_enabled(frame.training and torch.is_grad_enabled()):
            batch.route(router, options.num_experts)
        for recorder in state.recorders:
            if adapter in recorder.records:
                recorder.records[adapter].add(batch)
        if not frame.training:
            continue
        router_layer.loraswitch_record[adapter].add(batch)
        weight: torch.Tensor = router.weight
        if weight.requires_grad and (options.aux_loss_coef or options.z_loss_coef):
            loss = _loss(router_layer.loraswitch_pending[adapter], router, options, batch)
            if loss is not None:
                output = _add_to_output(output, *loss, frame)
    return output


def _batch(frame: RoutingFrame, adapter: str, routing: Routing, top_k: int) -> _Batch:
    assert routing.router_input is not None
    chosen = routing.experts[..., :top_k]  # without the shared experts, which nobody chose
    x, experts = (each.reshape(-1, each.shape[-1]) for each in (routing.router_input, chosen))
    return _Batch(x=x, experts=experts, real=_real_tokens(frame, adapter, routing))


def _loss(
    pending: PendingBatches, router: nn.Module, options: RoutingOptions, batch: _Batch
) -> tuple[torch.Tensor, torch.Tensor | float] | None:
    """(both losses, weighted by their coefficients, of all tokens since the last optimiser step; number of micro-batches)
    or None while more micro-batches follow."""
    weight: torch.Tensor = router.weight  # type: ignore[assignment]
    # read without an instance: torch 2.11 cannot trace GradientState's __getattr__
    last = GradientState._shared_state.get("sync_gradients", True)
    if not last and not pending.allocated:
        pending.allocate(options.num_experts, batch.x.shape[-1], batch.x.device)
        pending.watch(weight)
    if pending.allocated and not torch.compiler.is_compiling():
        pending.forget_if_stale(weight)
    if not last:
        pending.add(batch)
        return None
    tokens, counts = batch.tokens, batch.counts
    if pending.in_progress:
        tokens, counts = tokens + pending.tokens, counts + pending.counts
    tokens = tokens.clamp(min=1)
    load = counts / tokens
    probabilities = (batch.probabilities * batch.real).sum(0) / tokens
    z = (batch.logsumexp.square() * batch.real.squeeze(-1)).sum() / tokens
    loss = options.aux_loss_coef * options.num_experts * (load * probabilities).sum() + options.z_loss_coef * z
    if not pending.in_progress:
        return loss, 1.0
    pending.in_progress = False
    # What the earlier tokens add has a gradient in closed form. The sum of weight * gradient carries it, computed by a
    # forward of the router (row e of its input is the gradient of row e of its weight), because with FSDP only that
    # sees the whole weight.
    carrier = _with_whole_weight(router)(pending.gradient(load, tokens, options)).diagonal().sum()
    loss = loss + pending.loss(load, tokens, options) + (carrier - carrier.detach())
    return loss, pending.micro_batches + 1


def _weight_in_loss(frame: RoutingFrame, micro_batches: torch.Tensor | float) -> torch.Tensor | float:
    """What the losses are multiplied with so that they count once in the trainer's total.

    Trainers that pass `num_items_in_batch` sum the micro-batches' losses, and multiply by the number of processes (which
    average gradients); the others divide each by the number of micro-batches.
    """
    if frame.num_items_in_batch is None:
        return micro_batches
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return 1.0 / distributed.get_world_size()
    return 1.0


def _add_to_output(output: Any, loss: torch.Tensor, micro_batches: torch.Tensor | float, frame: RoutingFrame) -> Any:
    """`output` with the loss joined: see the module's text."""
    joined = False
    for key, tensor in _candidates(output):
        if tensor.dim() == 0:
            tensor = tensor + (_weight_in_loss(frame, micro_batches) * loss).to(
                device=tensor.device, dtype=tensor.dtype
            )
        else:
            _warn_if_scaled(tensor.device.type)
            tensor = AttachLoss.apply(tensor, loss.to(tensor.device))
        output = _replace(output, key, tensor)
        joined = True
    if not joined and not torch.compiler.is_compiling():
        warnings.warn(
            "LoRA-Switch found no differentiable tensor in the output of the model to join the router's losses to "
            f"({type(output).__name__}): the load-balance and z-loss do not train.",
            stacklevel=2,
        )
    return output


def _warn_if_scaled(device_type: str) -> None:
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(device_type):
        return
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16:
        warnings.warn(
            "In fp16 training with a loss that is not the model's own (TRL's trainers) the router's load-balance and z-loss "
            "have no effect: the loss is scaled up afterwards, and they are not. Use bf16.",
            stacklevel=2,
        )


def _candidates(output: Any) -> list[tuple[Any, torch.Tensor]]:
    """Where the loss joins: the output's scalar loss if it has one, else its first differentiable tensor. TRL's fused
    head returns a `loss` that its trainers leave aside and `log_probs` that they use: then both, as only one is used."""
    if isinstance(output, torch.Tensor):
        items: list[tuple[Any, Any]] = [(None, output)]
    elif isinstance(output, dict):
        items = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    else:
        items = []
    found = [
        (key, value)
        for key, value in items
        if isinstance(value, torch.Tensor) and value.requires_grad and value.is_floating_point()
    ]
    if isinstance(output, dict):
        # another scalar is not the loss (a mixture-of-experts backbone returns its own aux_loss)
        found = [(key, value) for key, value in found if key == "loss" or value.dim() > 0]
        named = [(key, value) for key, value in found if key in ("loss", "log_probs")]
        return named or found[:1]
    return found[:1]


def _replace(output: Any, key: Any, tensor: torch.Tensor) -> Any:
    if key is None:
        return tensor
    if isinstance(output, tuple):
        return (*output[:key], tensor, *output[key + 1 :])
    output[key] = tensor
    return output


def _real_tokens(frame: RoutingFrame, adapter: str, routing: Routing) -> torch.Tensor:
    """float32 [T, 1]: 1 for real tokens, 0 for padding. Without a mask (packed, padding-free) all tokens are real."""
    tokens, device = routing.token_shape.numel(), routing.experts.device
    mask = frame.attention_mask
    rows = frame.served_rows(adapter, tokens)
    total = tokens if rows is None else rows[0]
    if isinstance(mask, torch.Tensor):
        if mask.dim() == 4:  # [batch, heads, queries, keys], bool or additive: real if anyone may attend to it
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            mask = allowed[:, 0].any(-2)
        if mask.dim() == 2 and mask.shape[0] > 0:
            per_sample = total // mask.shape[0]
            mask = mask[:, mask.shape[1] - per_sample :]  # cached decoding: the mask covers the past too
            if mask.shape.numel() == total:
                real = mask.reshape(-1, 1).to(device=device, dtype=torch.float32)
                return real if rows is None else real[rows[1]]
    return torch.ones((tokens, 1), dtype=torch.float32, device=device)
