"""The router's losses: load balance and z-loss. `end_of_forward.py` and `loss_joining.py` add them to a training loss.

The losses are functions of the router's weight and of its (detached) input: they train the router, not the layers below.
With T real tokens (padding does not count), E experts (a base expert is one of them), probabilities p = softmax(logits) and
c_e = how often expert e was chosen:

    balance = E * sum_e (c_e / T) * mean_t p_te       Switch Transformer (arXiv 2101.03961), top-k form of Mixtral
    z       = mean_t logsumexp(logits_t)^2            ST-MoE (arXiv 2202.08906)

**Gradient accumulation.** `balance` is not a mean over tokens, so the sum over micro-batches of its values is not its
value on the whole batch. While accelerate's `GradientState` says that gradients are being accumulated, only the sums that
the gradient needs are kept (`PendingBatches`); the last micro-batch adds the loss of all tokens. The total is that of one
large batch. `GradientState` is the process's, and a run that is interrupted leaves it as it was: see
`PendingBatches.is_last`. Outside of accelerate each forward stands for itself. With several processes each computes the
losses of its own tokens, and the average over processes trains.

**torch.compile.** Everything that lasts from one forward to the next is a buffer that is updated in place: no guard on a
value that changes from step to step, no additional output of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.state import GradientState
from torch import nn

from ..routing.options import RoutingOptions
from ..routing.router import full_precision, router_logits
from ..routing.statistics import RoutedTokens, apply_but_keep_dtypes


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
        # the data loaders under way in the last forward that was not the last of a step; and those of a run that is over
        self.seen_loaders: Any = None
        self.dead_loaders: Any = None if _says_last() else _loaders_under_way()

    def __getstate__(self) -> dict[str, Any]:  # copy.deepcopy and pickle, which cannot take weak references
        return {**self.__dict__, "seen_loaders": None, "dead_loaders": None}

    def allocate(self, num_experts: int, in_features: int, device: torch.device) -> None:
        e, d = num_experts, in_features
        shapes: dict[str, tuple[int, ...]] = {"micro_batches": (), "tokens": (), "counts": (e,), "probabilities": (e,)}
        shapes |= {"z": (), "probability_inputs": (e, d), "products": (e, e, d), "z_inputs": (e, d)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device), persistent=False)
        self.allocated = True

    def _apply(self, fn: Any, recurse: bool = True) -> PendingBatches:
        return apply_but_keep_dtypes(self, super()._apply, fn, recurse)

    def watch(self, weight: torch.Tensor) -> None:
        """Notice the router's gradient, where it stays in `weight.grad` (FSDP and DeepSpeed keep it elsewhere)."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if weight.is_leaf and not distributed and not torch.compiler.is_compiling():
            weight.register_post_accumulate_grad_hook(self._note_backward)

    def _note_backward(self, weight: torch.Tensor) -> None:
        self.backward_ran = True

    def is_stale(self, weight: torch.Tensor) -> bool:
        """Whether what was accumulated is that of an interrupted run: its weights have moved since, or its gradients were
        dropped as well."""
        return self.weight_version != weight._version or (self.backward_ran and weight.grad is None)

    def forget_if_stale(self, weight: torch.Tensor) -> None:
        """Drop what an interrupted run left behind."""
        if self.is_stale(weight):
            self.in_progress = False
            self.weight_version = weight._version

    def is_last(self, weight: torch.Tensor) -> bool:
        """Whether the forward that ends is the last of its step: what `GradientState` says, if its word is still somebody's.

        While an accumulation goes on, the weights stay and the gradients are kept. Where they did not, and the same data loaders
        are under way as before (a new run begins with one more), it was interrupted, and nobody has said so. Nor is it that of a
        model that was made since. A loop without accelerate's data loaders is believed: it sets the state by itself.
        """
        if _says_last():
            self.seen_loaders = self.dead_loaders = None
            return True
        if torch.compiler.is_compiling():  # what changes from step to step would be guarded
            return False
        loaders = _loaders_under_way()
        if loaders is not None and loaders is self.seen_loaders and self.is_stale(weight):
            self.dead_loaders = loaders
        self.seen_loaders = loaders
        return loaders is not None and loaders is self.dead_loaders

    @torch.no_grad()
    def add(self, batches: Sequence[RoutedTokens]) -> None:
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
        """As `RoutedTokens.sums`."""
        return self.tokens, self.counts, self.probabilities, self.z

    def gradient(self, terms: Terms) -> torch.Tensor:
        """The gradient of these tokens' share with respect to the router's weight: [E, d]."""
        balance = terms.load.unsqueeze(-1) * self.probability_inputs
        balance = balance - torch.einsum("e,ejd->jd", terms.load, self.products)
        return terms.balance_coef * balance + terms.z_coef * 2 * self.z_inputs


def _says_last() -> bool:
    # read without an instance: torch 2.11 cannot trace GradientState's __getattr__
    return bool(GradientState._shared_state.get("sync_gradients", True))


def _loaders_under_way() -> Any:
    """Accelerate's list of the data loaders that have begun and not ended, made anew whenever one does; None without any."""
    loaders = GradientState._shared_state.get("_dataloader_references_ref") or ()
    return loaders if len(loaders) > 1 else None


def whole_weight(router: nn.Module) -> torch.Tensor:
    """The router's weight after the layer that holds it has run: by then FSDP2 has sharded it again."""
    weight: Any = router.weight
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    # each process has the gradient of its own tokens: the average trains, as with all weights under FSDP
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    return whole / mesh.size() + whole.detach() * (1 - 1 / mesh.size())


class Terms:
    """What the share of some tokens in both losses depends on besides these tokens: the load and the number of all of them,
    since the last optimiser step."""

    def __init__(self, options: RoutingOptions, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        tokens = tokens.clamp(min=1)  # no token, as where all is padding, gives 0 and not NaN
        self.load = counts / tokens  # [E], c_e / T
        self.balance_coef = options.aux_loss_coef * options.num_choices / tokens
        self.z_coef = options.z_loss_coef / tokens

    def value(self, probabilities: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Both losses, weighted by their coefficients, of the tokens over which these are sums, [E] and a scalar."""
        return self.balance_coef * (self.load * probabilities).sum() + self.z_coef * z

    def gradient(
        self, x: torch.Tensor, probabilities: torch.Tensor, logsumexp: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Its gradient with respect to the router's weight: [E, d]. The arguments are those of a `RoutedTokens`."""
        balance = probabilities * (self.load - (probabilities * self.load).sum(-1, keepdim=True))
        z = 2 * logsumexp.unsqueeze(-1) * probabilities
        of_logits = (self.balance_coef * balance + self.z_coef * z) * real
        return of_logits.T @ x.float()


@dataclass
class Losses:
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


def losses_of(
    pending: PendingBatches, weight: torch.Tensor, options: RoutingOptions, batches: list[RoutedTokens]
) -> Losses | None:
    """The losses to be joined now; None while more micro-batches follow."""
    last = pending.is_last(weight)
    if not last and not pending.allocated:
        pending.allocate(options.num_choices, batches[0].x.shape[-1], batches[0].x.device)
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
    terms = Terms(options, counts, tokens)
    gradients = [terms.gradient(batch.x, batch.probabilities, batch.logsumexp, batch.real) for batch in batches]
    differentiable: list[Callable[..., torch.Tensor]] = [
        partial(_gradient, terms, batch.real, None) for batch in batches
    ]
    if pending.in_progress:
        earlier = pending.gradient(terms)
        gradients[-1] = gradients[-1] + earlier
        differentiable[-1] = partial(_gradient, terms, batches[-1].real, earlier)
        pending.in_progress = False
    return Losses(terms.value(probabilities, z), gradients, differentiable, micro_batches)


def value_of(options: RoutingOptions, batches: Sequence[RoutedTokens]) -> torch.Tensor:
    """The losses of these tokens, by themselves, a scalar: with a graph to the router's weight if `batches` have one."""
    tokens, counts, probabilities, z = (
        torch.stack(each).sum(0) for each in zip(*(b.sums for b in batches), strict=True)
    )
    return Terms(options, counts, tokens).value(probabilities, z)


def _gradient(
    terms: Terms, real: torch.Tensor, earlier: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """`terms.gradient` of the tokens x [..., d], with a graph to the router's weight, and what earlier micro-batches add."""
    x = x.detach().reshape(-1, x.shape[-1])
    logits = router_logits(x, weight)
    with full_precision(x.device):
        own = terms.gradient(x, logits.softmax(-1), logits.logsumexp(-1), real)
    return own if earlier is None else own + earlier
