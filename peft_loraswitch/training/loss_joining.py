"""How the router's losses join a training objective that others compute.

**The rule.** Where `output.loss` takes part in what is differentiated, the router's losses come with it and scale with it,
once. Where it does not, they join once a forward, with weight 1, by whatever else of the forward is differentiated: logits,
hidden states, a cache, what a hook has caught.

**In eager mode** they join where the decision is taken, because everything that depends on the routing passes through it.
`_AtDecision` is the identity on the gates, with two more edges in the autograd graph: to the router's weight, which receives
the gradient of the losses, and from a scalar zero that is added to `output.loss`. Autograd runs such a node once per backward
call, after everything that it waits for: if the zero has received a gradient by then, that is what `output.loss` is scaled
with; if not, something else of the forward is being differentiated. Outputs are left as they are: they may be changed in
place, be differentiated with respect to, or be of any class.

**Several backward calls through one forward** (`retain_graph=True`) count together: in total the losses come with what
`output.loss` is scaled with in all of them, or with 1 if it is in none. If it comes last, after they have joined with 1, only
the rest is added. `torch.autograd.grad` returns the losses' part whenever it is asked for the router's weight, and neither
looks at earlier calls nor counts as one. (Where the weight is no leaf, as under `torch.func.functional_call`, backward calls
do not know of each other either.)

**At the outputs.** A decision that was taken without a graph (the first run of a reentrant checkpoint) or in a graph of its
own (a block that is compiled by itself) cannot carry the losses: there the differentiable tensors of the output do
(`_AtOutputs`, `_Passage`). **In a compiled model** all outputs pass through the graph in which the forward ends. Backward is one
graph for all of them, and those that nobody uses receive zeros: there the losses scale with what `output.loss` receives if that
is not zero, and come with weight 1 if it is.

**Under a transform of `torch.func`** (grad, vjp, jvp, ...) what is differentiated is a function's value. So there the losses
are a term of `output.loss` like any other, and come with nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..routing.decision import JoinPoint, Routing

SecondOrder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class RouterGradient:
    """The gradient of the router's losses with respect to its weight, of one forward, and how often it has joined.

    Attributes:
        value: float32 [num_experts, in_features]; None as long as the forward runs, and if it has no losses.
        differentiable: (x, weight) -> the same with a graph to the weight, for second derivatives; None: there are none.
        is_scaled_later: the forward ran under fp16 autocast, so a loss scaler is likely.
    """

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self.differentiable: SecondOrder | None = None
        self.is_scaled_later = False
        self._joined: str | None = None  # "alone" or "with the loss", in an earlier backward call
        self._was_differentiated = False  # by a call with create_graph=True

    def complete(self, value: torch.Tensor, differentiable: SecondOrder | None, is_scaled_later: bool) -> None:
        """The forward has ended: from now on there is something to deliver."""
        self.value, self.differentiable, self.is_scaled_later = value, differentiable, is_scaled_later

    def factor(self, weight: Any, loss_scale: torch.Tensor | None) -> torch.Tensor | float | None:
        """What the gradient is multiplied with in the backward call in progress; None: it has no part in it.

        Args:
            weight: the node of the autograd graph that the router's weight is.
            loss_scale: gradient of the scalar that was added to `output.loss`; None if that is not differentiated.
        """
        if self.value is None or not _is_wanted(weight):
            return None
        if loss_scale is None and self._was_differentiated:
            return None  # this may be the derivative of a gradient that has the losses' part in it
        self._was_differentiated |= torch.is_grad_enabled()
        if not _accumulates(weight):
            return self._alone() if loss_scale is None else loss_scale
        # what an earlier call has added may have been dropped since, by zero_grad()
        joined = None if weight.variable.grad is None else self._joined
        if loss_scale is None:
            self._joined = joined or "alone"
            return None if joined else self._alone()
        self._joined = "with the loss"
        return loss_scale - 1.0 if joined == "alone" else loss_scale

    def _alone(self) -> float:
        if self.is_scaled_later:
            warnings.warn(
                "In fp16 training with a loss that is not the model's own (TRL's trainers) the router's load-balance and "
                "z-loss have no effect: the loss is scaled up afterwards, and they are not. Use bf16, or train on output.loss.",
                stacklevel=2,
            )
        return 1.0


def _is_wanted(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad is asked for
        return True


def _accumulates(node: Any) -> bool:
    """Whether the node adds to the `.grad` of a leaf in the backward call in progress."""
    if not hasattr(node, "variable"):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False


class _AtDecision(torch.autograd.Function):
    """Identity on the gates of a decision; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, gates: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gradient: RouterGradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.gradient, ctx.dtype = gradient, weight.dtype
        return gates.detach(), gates.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, loss_scale: torch.Tensor | None) -> tuple[Any, ...]:
        losses = ctx.gradient
        factor = losses.factor(ctx.next_functions[2][0], loss_scale)
        if factor is None:
            return grad, None, None, None
        second_order = torch.is_grad_enabled()  # backward(create_graph=True)
        gradient = losses.differentiable(*ctx.saved_tensors) if second_order else losses.value
        return grad, None, (factor * gradient).to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, gates: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # the value that is added to the loss has the losses' forward derivative
        return gates, gates.new_zeros(())


def join_at_decision(routing: Routing, weight: torch.Tensor) -> None:
    """Make the gates of a decision that has just been taken the point where the losses join."""
    gradient = RouterGradient()
    gates, loss_scale = _AtDecision.apply(routing.dense_gates, routing.router_input, weight, gradient)  # type: ignore[no-untyped-call]
    routing.dense_gates, routing.join_point = gates, JoinPoint(gradient, loss_scale)


class _AtOutputs(torch.autograd.Function):
    """Two scalar zeros: one for `_Passage`, one for `output.loss`. As `_AtDecision`, on no path of the model's own."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: RouterGradient) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.dtype = gradient, weight.dtype
        zero = torch.zeros((), dtype=torch.float32, device=weight.device)
        return zero, zero.clone()

    @staticmethod
    def backward(ctx: Any, passed: torch.Tensor | None, loss_scale: torch.Tensor | None) -> tuple[Any, ...]:
        factor = ctx.gradient.factor(ctx.next_functions[0][0], loss_scale)
        return None if factor is None else (factor * ctx.gradient.value).to(ctx.dtype), None


class _AtOutputsCompiled(torch.autograd.Function):
    """Two scalar zeros, as `_AtOutputs`; the gradient is there, and a value decides who takes part: all outputs share a backward,
    and what nobody differentiates receives zeros."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(gradient)
        ctx.dtype = weight.dtype
        zero = torch.zeros((), dtype=torch.float32, device=weight.device)
        return zero, zero.clone()

    @staticmethod
    def backward(ctx: Any, passed: torch.Tensor, loss_scale: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        factor = torch.where(loss_scale != 0, loss_scale, torch.ones_like(loss_scale))
        return (factor * gradient).to(ctx.dtype), None


class _Passage(torch.autograd.Function):
    """Identity on an output, whose backward also sends 1 to `zero`. `detach`, because a view of another kind that is made in
    here could not be changed in place."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.device = zero.device
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None
        return grad, torch.ones((), dtype=torch.float32, device=ctx.device)


def join_at_outputs(output: Any, weight: torch.Tensor, gradient: RouterGradient) -> tuple[Any, torch.Tensor]:
    """(output, scalar zero to be added to its loss): `gradient` goes to `weight` when `output` is differentiated."""
    assert gradient.value is not None
    compiling = torch.compiler.is_compiling()
    if compiling:
        passed, loss_scale = _AtOutputsCompiled.apply(weight, gradient.value)  # type: ignore[no-untyped-call]
    else:
        passed, loss_scale = _AtOutputs.apply(weight, gradient)  # type: ignore[no-untyped-call]
    # Behind a graph break an output may come from an earlier graph: what passes here is one of the graph that has the losses.
    passages, loss = _Passages(passed), _loss_of(output)
    if loss is not None:
        passages.leave_alone(loss[1])
    output = passages(output)
    if loss is None and not passages.made and not compiling:
        warnings.warn(
            "LoRA-Switch found no differentiable tensor in the output of the model to join the router's losses to "
            f"({type(output).__name__}): the load-balance and z-loss do not train. Return a tensor, a tuple or a dict; or, "
            "with gradient checkpointing, use gradient_checkpointing_kwargs={'use_reentrant': False}.",
            stacklevel=2,
        )
    return output, loss_scale


class _Passages:
    """Replaces every differentiable tensor of an output (in nested tuples, lists, dicts and caches; if it is an object of a
    class of its own, in its attributes), the same one by the same one."""

    def __init__(self, zero: torch.Tensor) -> None:
        self.zero = zero
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: (the tensor itself, its replacement)
        self._left: list[int] = []

    def leave_alone(self, tensor: torch.Tensor) -> None:
        self._left.append(id(tensor))

    def __call__(self, output: Any) -> Any:
        replaced = self._within(output)
        if replaced is output and not self.made and not isinstance(output, (torch.Tensor, dict, tuple, list)):
            self._within_attributes(output)
        return replaced

    def _within(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._replaced(value)
        if isinstance(value, dict):
            for key, item in list(value.items()):
                replaced = self._within(item)
                if replaced is not item:
                    value[key] = replaced
        elif isinstance(value, (tuple, list)):
            items = [self._within(item) for item in value]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                return _sequence_like(value, items)
        elif isinstance(value, (Cache, CacheLayerMixin)):
            self._within_attributes(value)
        return value

    def _within_attributes(self, value: Any) -> None:
        for name, item in list(getattr(value, "__dict__", {}).items()):
            replaced = self._within(item)
            if replaced is not item:
                object.__setattr__(value, name, replaced)  # also of a frozen dataclass: the model has just made it

    def _replaced(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _is_differentiable(tensor) or id(tensor) in self._left:
            return tensor
        if id(tensor) not in self.made:
            self.made[id(tensor)] = (tensor, _Passage.apply(tensor, self.zero))  # type: ignore[no-untyped-call]
        return self.made[id(tensor)][1]


def add_under_transform(output: Any, term: torch.Tensor) -> Any:
    """`output` with `term` (a scalar) added to its loss, under a transform of torch.func; a warning if it has none."""
    if _loss_of(output, _is_floating) is None:
        warnings.warn(
            "Under a transform of torch.func the losses of LoRA-Switch's router are a part of output.loss alone, and the model "
            f"has returned none ({type(output).__name__}): the load-balance and z-loss do not train. Call the model with labels, "
            "or set router_aux_loss_coef and router_z_loss_coef to 0.",
            stacklevel=2,
        )
    return add_to_loss(output, term, _is_floating)


def add_to_loss(output: Any, term: torch.Tensor, may_be: Callable[[Any], bool] | None = None) -> Any:
    """`output` with `term` (a scalar) added to its loss, if it has one, found as `_loss_of` says."""
    found = _loss_of(output, may_be)
    if found is None:
        return output
    key, loss = found
    return _with_loss(output, key, loss + term.to(device=loss.device, dtype=loss.dtype))


def _loss_of(output: Any, may_be: Callable[[Any], bool] | None = None) -> tuple[Any, torch.Tensor] | None:
    """(where, the loss): the output itself, its "loss" (of a dict, a named tuple or an object), or the first value of a plain
    tuple that `may_be` one (None: that is differentiable); if that is a scalar."""
    may_be = may_be or _is_differentiable
    key: Any = "loss"
    value: Any = None
    if isinstance(output, torch.Tensor):
        key, value = None, output
    elif isinstance(output, dict):
        value = output.get("loss")
    elif isinstance(output, (tuple, list)) and "loss" not in getattr(output, "_fields", ()):
        key, value = next(((i, v) for i, v in enumerate(output) if may_be(v)), (None, None))
    else:
        value = getattr(output, "loss", None)
    return (key, value) if may_be(value) and value.dim() == 0 else None


def _with_loss(output: Any, key: Any, loss: torch.Tensor) -> Any:
    if key is None:
        return loss
    if isinstance(output, tuple):
        position = output._fields.index(key) if key == "loss" else key  # type: ignore[attr-defined]
        return _sequence_like(output, [*output[:position], loss, *output[position + 1 :]])
    if isinstance(output, (dict, list)):
        output[key] = loss
    else:
        object.__setattr__(output, key, loss)
    return output


def _sequence_like(example: Any, items: list[Any]) -> Any:
    return type(example)._make(items) if hasattr(example, "_make") else type(example)(items)


def _is_differentiable(value: Any) -> bool:
    return _is_floating(value) and value.requires_grad


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
