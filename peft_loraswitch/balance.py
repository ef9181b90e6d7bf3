"""Load-balance loss, z-loss and router statistics, and how they join a training loss that others compute.

The losses are functions of the router's weight and of its (detached) input: they train the router, not the layers below.
With T real tokens (padding does not count), probabilities p = softmax(logits) and c_e = how often expert e was chosen:

    balance = E * sum_e (c_e / T) * mean_t p_te       Switch Transformer (arXiv 2101.03961), top-k form of Mixtral
    z       = mean_t logsumexp(logits_t)^2            ST-MoE (arXiv 2202.08906)

**Gradient accumulation.** `balance` is not a mean over tokens, so the sum over micro-batches of its values is not its
value on the whole batch. While accelerate's `GradientState` says that gradients are being accumulated, only the sums that
the gradient needs are kept (`PendingBatches`); the last micro-batch adds the loss of all tokens. The total is that of one
large batch. Outside of accelerate each forward stands for itself.

**Joining.** If the output has a scalar loss, the losses are added to it. Trainers that compute the loss from other
outputs (DPO, GRPO, TRL's fused head) get it by `AttachLoss`: the output is passed on unchanged, and its backward adds the
gradient of the losses with weight 1.
"""

from __future__ import annotations

import warnings
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


@dataclass
class PendingBatches:
    """Sums over the real tokens of the micro-batches accumulated so far, from which the exact gradient of both losses
    with respect to the router's weight follows once all tokens are known (T tokens, E experts, d inputs):

    probability_inputs[e] = sum_t p_te x_t   [E, d];   products[e, j] = sum_t p_te p_tj x_t   [E, E, d];
    z_inputs[e] = sum_t logsumexp_t p_te x_t [E, d].
    """

    weight_version: int
    micro_batches: int = 0
    tokens: torch.Tensor | float = 0.0
    counts: torch.Tensor | float = 0.0
    probabilities: torch.Tensor | float = 0.0
    z: torch.Tensor | float = 0.0
    probability_inputs: torch.Tensor | float = 0.0
    products: torch.Tensor | float = 0.0
    z_inputs: torch.Tensor | float = 0.0

    def add(self, batch: _Batch) -> None:
        x, p = batch.x.float(), batch.probabilities.detach() * batch.real
        logsumexp = batch.logsumexp.detach()
        self.micro_batches += 1
        self.tokens = self.tokens + batch.tokens
        self.counts = self.counts + batch.counts
        self.probabilities = self.probabilities + p.sum(0)
        self.z = self.z + (logsumexp.square() * batch.real.squeeze(-1)).sum()
        self.probability_inputs = self.probability_inputs + p.T @ x
        pairs = (p.unsqueeze(2) * batch.probabilities.detach().unsqueeze(1)).flatten(1)  # [T, E * E]
        self.products = self.products + (pairs.T @ x).unflatten(0, (p.shape[1], p.shape[1]))
        self.z_inputs = self.z_inputs + (p * logsumexp.unsqueeze(-1)).T @ x

    def gradient(self, load: torch.Tensor, tokens: torch.Tensor, options: RoutingOptions) -> torch.Tensor:
        """Gradient [E, d] of these tokens' share, for the load [E] = c_e / T and the token count T of all of them."""
        balance = load.unsqueeze(-1) * self.probability_inputs - torch.einsum("e,ejd->jd", load, self.products)
        scale = options.aux_loss_coef * options.num_experts / tokens
        return scale * balance + (2 * options.z_loss_coef / tokens) * self.z_inputs


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

    def route(self, router: nn.Module, num_experts: int) -> None:
        logits = router(self.x)
        self.probabilities = torch.softmax(logits, dim=-1)
        self.logsumexp = torch.logsumexp(logits, dim=-1)
        chosen = self.real.expand(-1, self.experts.shape[-1]).flatten()
        counts = torch.zeros(num_experts, dtype=torch.float32, device=self.x.device)
        self.counts = counts.scatter_add(0, self.experts.flatten(), chosen)
        self.tokens = self.real.sum()


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
        for name, size in (("tokens", 1), ("counts", num_experts), ("probabilities", num_experts), ("entropy", 1), ("z", 1)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutingRecord:
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():  # model.to(bfloat16) must not turn counters into bfloat16
            setattr(self, name, buffer.float())
        return self

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def add(self, batch: _Batch) -> None:
        p = batch.probabilities.detach()
        real = batch.real.squeeze(-1)
        self.tokens += batch.tokens
        self.counts += batch.counts
        self.probabilities += (p * batch.real).sum(0)
        self.entropy += (torch.special.entr(p).sum(-1) * real).sum()
        self.z += (batch.logsumexp.detach().square() * real).sum()

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
    for adapter, routing in frame.routings.items():
        router_layer = state.router_layers.get(adapter)
        if routing.router_input is None or router_layer is None:
            continue
        options = router_layer.routing_options[adapter]
        router = router_layer.loraswitch_router[adapter]
        batch = _Batch(
            x=routing.router_input.flatten(0, -2),
            experts=routing.experts.flatten(0, -2),
            real=_real_tokens(frame, adapter, routing),
        )
        with torch.set_grad_enabled(frame.training and torch.is_grad_enabled()):
            batch.route(router, options.num_experts)
        for recorder in state.recorders:
            if adapter in recorder.records:
                recorder.records[adapter].add(batch)
        if not frame.training:
            continue
        router_layer.loraswitch_record[adapter].add(batch)
        if options.aux_loss_coef or options.z_loss_coef:
            output = _join(state, adapter, frame, router, options, batch, output)
    return output


def _join(
    state: RoutingState,
    adapter: str,
    frame: RoutingFrame,
    router: nn.Module,
    options: RoutingOptions,
    batch: _Batch,
    output: Any,
) -> Any:
    weight: torch.Tensor = router.weight  # type: ignore[assignment]
    if not weight.requires_grad:
        return output
    pending = state.pending.get(adapter)
    if pending is not None and pending.weight_version != weight._version:
        pending = None  # left over from a run that stopped half-way: those tokens were routed by other weights
    if not GradientState().sync_gradients:
        if pending is None:
            pending = state.pending[adapter] = PendingBatches(weight._version)
        pending.add(batch)
        return output
    state.pending.pop(adapter, None)
    tokens = batch.tokens if pending is None else batch.tokens + pending.tokens
    tokens = tokens.clamp(min=1)
    counts = batch.counts if pending is None else batch.counts + pending.counts
    load = counts / tokens
    probabilities = (batch.probabilities * batch.real).sum(0) / tokens
    z = (batch.logsumexp.square() * batch.real.squeeze(-1)).sum() / tokens
    loss = options.aux_loss_coef * options.num_experts * (load * probabilities).sum() + options.z_loss_coef * z
    micro_batches = 1
    if pending is not None:
        micro_batches += pending.micro_batches
        value = options.aux_loss_coef * options.num_experts * (load * pending.probabilities).sum() / tokens
        value = value + options.z_loss_coef * pending.z / tokens
        # the gradient of the earlier tokens is known in closed form; weight - weight.detach() is zero and carries it
        gradient = pending.gradient(load, tokens, options)
        loss = loss + value + ((weight - weight.detach()).float() * gradient).sum()
    return _add_to_output(output, loss, _weight_in_loss(frame, micro_batches))


def _weight_in_loss(frame: RoutingFrame, micro_batches: int) -> float:
    """What the losses are multiplied with so that they count once in the trainer's total.

    Trainers that pass `num_items_in_batch` sum the micro-batches' losses, and multiply by the number of processes (which
    average gradients); the others divide each by the number of micro-batches.
    """
    if frame.num_items_in_batch is None:
        return float(micro_batches)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return 1.0 / distributed.get_world_size()
    return 1.0


def _add_to_output(output: Any, loss: torch.Tensor, weight: float) -> Any:
    """`output` with the loss joined: see the module's text."""
    joined = False
    for key, tensor in _candidates(output):
        if tensor.dim() == 0:
            tensor = tensor + (weight * loss).to(device=tensor.device, dtype=tensor.dtype)
        else:
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
    rows = frame.served_rows(adapter)
    total = tokens if rows is None else rows[0]
    if isinstance(mask, torch.Tensor):
        if mask.dim() == 4:  # [batch, 1 or heads, queries, keys], bool or additive: real if it may attend at all
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            mask = allowed[:, 0].any(-1)
        if mask.dim() == 2 and mask.shape[0] > 0:
            per_sample = total // mask.shape[0]
            mask = mask[:, mask.shape[1] - per_sample :]  # cached decoding: the mask covers the past too
            if mask.shape.numel() == total:
                real = mask.reshape(-1, 1).to(device=device, dtype=torch.float32)
                return real if rows is None else real[rows[1]]
    return torch.ones((tokens, 1), dtype=torch.float32, device=device)
