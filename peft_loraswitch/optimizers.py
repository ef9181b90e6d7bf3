"""PEFT's optimizer helpers, `peft.optimizers.create_*`, on models with LoRA-Switch. Tested with PEFT 0.20 and 0.21.

They find weights by names that hold "lora_A" and "lora_B", and take matrices. Experts are called `loraswitch_A`, and are
stacks of matrices: LoRA+ would give B the learning rate of A without a word, LoRA-FA would train A and stop at the first
step. So for our models they do the same by the modules instead of by the names, expert by expert.

Somebody may have imported a helper before this package. So the function stays the same object and gets other code, which looks
at the model first and calls the original for those of other methods.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import peft
import peft.optimizers
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .adapted_layers import adapted_layers
from .layer import LoRASwitchLayer

Rule = Callable[[Tensor], Tensor]  # from the gradient of a parameter to what the optimizer gets in its place


def loraplus(
    original: Callable[..., Any],
    layers: Sequence[LoRASwitchLayer],
    model: nn.Module,
    optimizer_cls: Any,
    lr: float,
    **options: Any,
) -> Optimizer:
    """LoRA+ (arXiv 2402.12354): the learning rate of B is `loraplus_lr_ratio` times that of all else: A and the router."""
    experts_b = {id(p) for layer in layers for b in layer.loraswitch_B.values() for p in b.parameters()}
    fast_lr = lr * options["loraplus_lr_ratio"]

    def with_b_among_the_fast(groups: list[dict[str, Any]], **kwargs: Any) -> Optimizer:
        fast = next((group for group in groups if group["lr"] == fast_lr), None)  # of two, the one that decays
        if fast is None:
            raise ValueError(
                f"create_loraplus_optimizer of PEFT {peft.__version__} forms other parameter groups than LoRA-Switch knows: "
                "install PEFT 0.21, or give the optimizer your own groups."
            )
        for group in groups:
            if group["lr"] != fast_lr:
                fast["params"] += [p for p in group["params"] if id(p) in experts_b]
                group["params"] = [p for p in group["params"] if id(p) not in experts_b]
        return optimizer_cls(groups, **kwargs)

    with_b_among_the_fast.__name__ = optimizer_cls.__name__  # PEFT knows 8-bit optimizers by name
    return original(model, with_b_among_the_fast, lr=lr, **options)


def lorafa(
    original: Callable[..., Any],
    layers: Sequence[LoRASwitchLayer],
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA (arXiv 2308.03303): A is frozen, and the gradient of B is the one whose `s B A` comes closest to the gradient of
    the full matrix: `grad (A A^T)^-1 / s^2`, for every expert. Everything else that trains gets AdamW.

    `r` and `lora_alpha` are not looked at: every layer knows its scale s.
    """
    configs = getattr(model, "peft_config", {}).values()
    if use_rslora is not None and any(bool(config.use_rslora) != use_rslora for config in configs):
        raise ValueError(f"use_rslora={use_rslora} is not what the adapter's configuration says: leave it out.")
    _refuse_alone("create_lorafa_optimizer", layers)
    rules: list[tuple[nn.Parameter, Rule]] = []
    for layer, adapter, a, b in _pairs(layers):
        a.requires_grad_(False)
        rules.append((b, functools.partial(_times_inverse_gram, a=a, scale=layer.scaling[adapter])))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_cls = _preconditioned(torch.optim.AdamW, rules)
    return optimizer_cls(trainable, lr=lr, weight_decay=weight_decay, eps=1e-6)


def riemannian(
    original: Callable[..., Any],
    layers: Sequence[LoRASwitchLayer],
    model: nn.Module,
    optimizer_cls: Any,
    reg: float = 1e-2,
    **options: Any,
) -> Optimizer:
    """Riemannian preconditioning (arXiv 2402.02347): of A `(B^T B + reg)^-1 grad`, of B `grad (A A^T + reg)^-1`, for every
    expert. The router and everything else that trains is given to `optimizer_cls` as it is."""
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} needs a closure that computes the loss again (as LBFGS does), which is not supported here:"
            " choose another optimizer_cls."
        )
    _refuse_alone("create_riemannian_optimizer", layers)
    rules: list[tuple[nn.Parameter, Rule]] = []
    for _, _, a, b in _pairs(layers):
        if a.requires_grad and b.requires_grad:
            rules.append((a, functools.partial(_inverse_gram_times, b=b, reg=reg)))
            rules.append((b, functools.partial(_times_inverse_gram, a=a, reg=reg)))
    routers = [router.weight for layer in layers for router in layer.loraswitch_router.values()]
    if not rules and not any(weight.requires_grad for weight in routers):
        raise ValueError("create_riemannian_optimizer: the model has no adapter that trains. Set one active first.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _preconditioned(optimizer_cls, rules)(trainable, **options)


OURS: dict[str, Callable[..., Optimizer]] = {
    "create_loraplus_optimizer": loraplus,
    "create_lorafa_optimizer": lorafa,
    "create_riemannian_optimizer": riemannian,
}


# -------------------------------------------------------------------------------------------------------- preconditioning


def _pairs(layers: Iterable[LoRASwitchLayer]) -> Iterable[tuple[LoRASwitchLayer, str, nn.Parameter, nn.Parameter]]:
    """Layer, adapter, A [experts, r, in] and B [experts, out, r]."""
    for layer in layers:
        for adapter in layer.loraswitch_A:
            yield layer, adapter, layer.loraswitch_A[adapter].weight, layer.loraswitch_B[adapter].weight


def _refuse_alone(helper: str, layers: Iterable[LoRASwitchLayer]) -> None:
    if any(experts.own() for layer in layers for experts in layer.loraswitch_A.values()):
        raise ValueError(f"{helper} takes whole stacks of experts: set trainable='all', not a list of experts.")


def _preconditioned(optimizer_cls: Any, rules: list[tuple[nn.Parameter, Rule]]) -> Any:
    """A subclass whose steps see the gradients that the rules make; `.grad` itself stays as it is."""

    class Preconditioned(optimizer_cls):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: Callable[..., Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            gradients = [(parameter, parameter.grad) for parameter, _ in rules]
            try:
                for parameter, rule in rules:
                    if parameter.grad is not None:
                        parameter.grad = rule(parameter.grad)
                super().step()
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient
            return loss

    Preconditioned.__name__ = f"Preconditioned{optimizer_cls.__name__}"
    return Preconditioned


def _times_inverse_gram(gradient: Tensor, a: Tensor, scale: float = 1.0, reg: float = 1e-8) -> Tensor:
    """Of B: [experts, out, r], with A [experts, r, in]."""
    a = _wide(a)
    inverse = _damped_inverse(a @ a.transpose(-1, -2), reg)
    return (_wide(gradient) @ inverse / scale**2).to(gradient.dtype)


def _inverse_gram_times(gradient: Tensor, b: Tensor, reg: float) -> Tensor:
    """Of A: [experts, r, in], with B [experts, out, r]."""
    b = _wide(b)
    return (_damped_inverse(b.transpose(-1, -2) @ b, reg) @ _wide(gradient)).to(gradient.dtype)


def _damped_inverse(gram: Tensor, reg: float) -> Tensor:
    """[experts, r, r]. A pseudo-inverse: A of a rank beyond its features has no other."""
    return torch.linalg.pinv(
        gram + reg * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), hermitian=True
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def run_helper(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optimizer:
    """PEFT's helper `name`, or what stands for it on a model with LoRA-Switch."""
    original = getattr(peft.optimizers, name).before_loraswitch  # where integrations.py keeps it
    try:
        bound = inspect.signature(original).bind(*args, **kwargs)
    except TypeError:  # a wrong call: the original says what is wrong with it
        return original(*args, **kwargs)
    arguments = dict(bound.arguments)
    arguments |= arguments.pop("kwargs", {})
    layers = adapted_layers(arguments["model"])
    return OURS[name](original, layers, **arguments) if layers else original(*args, **kwargs)
