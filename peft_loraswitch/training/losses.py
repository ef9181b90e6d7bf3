"""Load-balance loss, z-loss and router statistics. How the losses join a training objective: see `joining.py`.

The losses are functions of the router's weight and of its (detached) input: they train the router, not the layers below.
With T real tokens (padding does not count), probabilities p = softmax(logits) and c_e = how often expert e was chosen:

    balance = E * sum_e (c_e / T) * mean_t p_te       Switch Transformer (arXiv 2101.03961), top-k form of Mixtral
    z       = mean_t logsumexp(logits_t)^2            ST-MoE (arXiv 2202.08906)

**Gradient accumulation.** `balance` is not a mean over tokens, so the sum over micro-batches of its values is not its
value on the whole batch. While accelerate's `GradientState` says that gradients are being accumulated, only the sums that
the gradient needs are kept (`PendingBatches`); the last micro-batch adds the loss of all tokens. The total is that of one
large batch. Outside of accelerate each forward stands for itself. With several processes each computes the losses of its
own tokens, and the average over processes trains.

**torch.compile.** Everything that lasts from one forward to the next is a buffer that is updated in place: no guard on a
value that changes from step to step, no additional output of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import nn

from ..routing.decision import Routing, RoutingOptions, full_precision, router_logits
from .loss_joining import JoinPoint, RouterGradient, add_to_loss, join_at_outputs

if TYPE_CHECKING:
    from ..routing.frame import RoutingFrame, RoutingState


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
    def add(self, batches: Sequence[_Batch]) -> None:
        """The tokens of one micro-batch, in the passes of its forward."""
        if not self.in_progress:
            for buffer in self.buffers():
                buffer.zero_()
            self.in_progress, self.backward_ran = True, False
        self.micro_batches.add_(1)
        for batch in batches:
            for total, new in zip(self.sums, batch.sums, strict=True):
                total.add_(new)
            x, p = batch.x.float(), batch.probabilities * batch.real
            pairs = (p.unsqueeze(2) * batch.probabilities.unsqueeze(1)).flatten(1)  # [T, E * E]
            self.probability_inputs.add_(p.T @ x)
            self.products.add_((pairs.T @ x).view_as(self.products))
            self.z_inputs.add_((p * batch.logsumexp.unsqueeze(-1)).T @ x)

    @property
    def sums(self) -> tuple[torch.Tensor, ...]:
        """As `_Batch.sums`."""
        return self.tokens, self.counts, self.probabilities, self.z

    def gradient(self, terms: _Terms) -> torch.Tensor:
        """The gradient of these tokens' share with respect to the router's weight: [E, d]."""
        balance = terms.load.unsqueeze(-1) * self.probability_inputs
        balance = balance - torch.einsum("e,ejd->jd", terms.load, self.products)
        return terms.balance_coef * balance + terms.z_coef * 2 * self.z_inputs


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
    """The routed tokens of one pass, flattened: x [T, d], experts [T, k], real float32 [T, 1]."""

    x: torch.Tensor
    experts: torch.Tensor
    real: torch.Tensor
    num_experts: InitVar[int]
    weight: InitVar[torch.Tensor]  # the router's
    probabilities: torch.Tensor = field(init=False)  # [T, E]
    logsumexp: torch.Tensor = field(init=False)  # [T]
    sums: tuple[torch.Tensor, ...] = field(
        init=False
    )  # over real tokens: their number, counts [E], probabilities [E], z

    def __post_init__(self, num_experts: int, weight: torch.Tensor) -> None:
        logits = router_logits(self.x, weight)
        self.probabilities, self.logsumexp = logits.softmax(-1), logits.logsumexp(-1)
        chosen = self.real.expand(-1, self.experts.shape[-1]).flatten()
        counts = torch.zeros(num_experts, dtype=torch.float32, device=self.x.device)
        counts = counts.scatter_add(0, self.experts.flatten(), chosen)
        z = (self.logsumexp.square() * self.real.squeeze(-1)).sum()
        self.sums = self.real.sum(), counts, (self.probabilities * self.real).sum(0), z


def _whole_weight(router: nn.Module) -> torch.Tensor:
    """The router's weight after the layer that holds it has run: by then FSDP2 has sharded it again."""
    weight: Any = router.weight
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    # each process has the gradient of its own tokens: the average trains, as with all weights under FSDP
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    return whole / mesh.size() + whole.detach() * (1 - 1 / mesh.size())


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
        tokens, counts, probabilities, z = batch.sums
        self.tokens.add_(tokens.long())
        self.counts.add_(counts.long())
        self.probabilities.add_(probabilities)
        self.entropy.add_((torch.special.entr(batch.probabilities).sum(-1) * batch.real.squeeze(-1)).sum())
        self.z.add_(z)

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


class _Terms:
    """What the share of some tokens in both losses depends on besides these tokens: the load and the number of all of them,
    since the last optimiser step."""

    def __init__(self, options: RoutingOptions, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        tokens = tokens.clamp(min=1)  # no token, as where all is padding, gives 0 and not NaN
        self.load = counts / tokens  # [E], c_e / T
        self.balance_coef = options.aux_loss_coef * options.num_experts / tokens
        self.z_coef = options.z_loss_coef / tokens

    def value(self, probabilities: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Both losses, weighted by their coefficients, of the tokens over which these are sums, [E] and a scalar."""
        return self.balance_coef * (self.load * probabilities).sum() + self.z_coef * z

    def gradient(
        self, x: torch.Tensor, probabilities: torch.Tensor, logsumexp: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Its gradient with respect to the router's weight: [E, d]. The arguments are those of a `_Batch`."""
        balance = probabilities * (self.load - (probabilities * self.load).sum(-1, keepdim=True))
        z = 2 * logsumexp.unsqueeze(-1) * probabilities
        of_logits = (self.balance_coef * balance + self.z_coef * z) * real
        return of_logits.T @ x.float()


def add_auxiliary_losses(state: RoutingState, frame: RoutingFrame, output: Any) -> Any:
    """At the end of a forward: count the routed tokens, and in training join the losses to `output` (returned)."""
    passes = (*frame.earlier, frame)
    for adapter in dict.fromkeys(name for each in passes for name in each.routings):
        router_layer = state.router_layers.get(adapter)
        routed = [(each, each.routings[adapter]) for each in passes if adapter in each.routings]
        if router_layer is None or any(routing.router_input is None for _, routing in routed):
            continue  # decided before anybody wanted to know
        options = router_layer.routing_options[adapter]
        router = router_layer.loraswitch_router[adapter]
        records = [recorder.records[adapter] for recorder in state.recorders if adapter in recorder.records]
        if frame.training:
            records.append(router_layer.loraswitch_record[adapter])
        losses = None
        with torch.no_grad(), full_precision(router.weight.device):
            weight = _whole_weight(router)
            batches = [_batch(each, adapter, routing, weight, options) for each, routing in routed]
            for record in records:
                for batch in batches:
                    record.add(batch)
            if frame.training and router.weight.requires_grad and (options.aux_loss_coef or options.z_loss_coef):
                losses = _losses(router_layer.loraswitch_pending[adapter], router.weight, options, batches)
        if losses is not None:
            points = [routing.join_point for _, routing in routed]
            output = _join(output, losses, points, router, _weight_in_loss(frame, losses.micro_batches))
    return output


def _batch(
    frame: RoutingFrame, adapter: str, routing: Routing, weight: torch.Tensor, options: RoutingOptions
) -> _Batch:
    assert routing.router_input is not None
    chosen = routing.experts[..., : options.top_k]  # without the shared experts, which nobody chose
    x, experts = (each.reshape(-1, each.shape[-1]) for each in (routing.router_input, chosen))
    return _Batch(x, experts, _real_tokens(frame, adapter, routing), options.num_experts, weight)


@dataclass
class _Losses:
    """Both losses of all tokens since the last optimiser step.

    Attributes:
        value: scalar.
        gradients: [E, d] each, one for each pass of the forward that just ends; that of earlier micro-batches is in the last.
        differentiable: for each, (x, weight) -> the same with a graph to the router's weight.
        micro_batches: their number.
    """

    value: torch.Tensor
    gradients: list[torch.Tensor]
    differentiable: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
    micro_batches: torch.Tensor | float


def _losses(
    pending: PendingBatches, weight: torch.Tensor, options: RoutingOptions, batches: list[_Batch]
) -> _Losses | None:
    """The losses to be joined now; None while more micro-batches follow."""
    # read without an instance: torch 2.11 cannot trace GradientState's __getattr__
    last = GradientState._shared_state.get("sync_gradients", True)
    if not last and not pending.allocated:
        pending.allocate(options.num_experts, batches[0].x.shape[-1], batches[0].x.device)
        pending.watch(weight)
    if pending.allocated and not torch.compiler.is_compiling():
        pending.forget_if_stale(weight)
    if not last:
        pending.add(batches)
        return None
    micro_batches: torch.Tensor | float = 1.0
    sums = [torch.stack(each).sum(0) for each in zip(*(batch.sums for batch in batches), strict=True)]
    if pending.in_progress:
        sums = [new + earlier for new, earlier in zip(sums, pending.sums, strict=True)]
        micro_batches = pending.micro_batches + 1
    tokens, counts, probabilities, z = sums
    terms = _Terms(options, counts, tokens)
    gradients = [terms.gradient(batch.x, batch.probabilities, batch.logsumexp, batch.real) for batch in batches]
    differentiable: list[Callable[..., torch.Tensor]] = [
        partial(_gradient, terms, batch.real, None) for batch in batches
    ]
    if pending.in_progress:
        earlier = pending.gradient(terms)
        gradients[-1] = gradients[-1] + earlier
        differentiable[-1] = partial(_gradient, terms, batches[-1].real, earlier)
        pending.in_progress = False
    return _Losses(terms.value(probabilities, z), gradients, differentiable, micro_batches)


def _gradient(
    terms: _Terms, real: torch.Tensor, earlier: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """`terms.gradient` of the tokens x [..., d], with a graph to the router's weight, and what earlier micro-batches add."""
    x = x.detach().reshape(-1, x.shape[-1])
    logits = router_logits(x, weight)
    with full_precision(x.device):
        own = terms.gradient(x, logits.softmax(-1), logits.logsumexp(-1), real)
    return own if earlier is None else own + earlier


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


def _join(
    output: Any,
    losses: _Losses,
    points: Sequence[JoinPoint | None],
    router: nn.Module,
    weight_in_loss: torch.Tensor | float,
) -> Any:
    """`output` with the losses joined to what is differentiated of it."""
    fp16 = _is_fp16_autocast(losses.value.device.type)
    here = [point for point in points if point is not None]
    if len(here) == len(points):
        for point, gradient, differentiable in zip(here, losses.gradients, losses.differentiable, strict=True):
            point.gradient.complete(gradient, differentiable, fp16)
        zero = torch.stack([point.loss_scale for point in here]).sum()
    else:
        whole = RouterGradient()
        whole.complete(torch.stack(losses.gradients).sum(0), None, fp16)
        output, zero = join_at_outputs(output, _whole_weight(router), whole)
    return add_to_loss(output, weight_in_loss * (losses.value + zero))


def _is_fp16_autocast(device_type: str) -> bool:
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16


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
