"""LoRA-RITE (arXiv 2410.20625) for every expert's A and B as a pair, by `pytorch_optimizer.LoRARite` (tested with 4.1).

That class takes two matrices a pair, and works through the pairs one after the other, in some hundred small operations each.
Here its own functions run over all experts of all linears of one shape at once (`torch.vmap`), with the same numbers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .adapted_layers import adapted_layers
from .optimizers import _pairs, _refuse_alone, _wide

KEPT = ("v_l", "v_r", "m_l", "m_r", "basis_l", "basis_r", "escape_l", "escape_r")  # of a pair, between two steps
USED = ("init_pair_state", "build_pair_info", "apply_pair_update", "helper")


def create_lorarite_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    """An optimizer for all that trains: LoRA-RITE for the experts, AdamW for the router and everything else.

    Args:
        model: with LoRA-Switch, on the device where it trains.
        options: of `pytorch_optimizer.LoRARite`. `betas` are those of AdamW as well.

    Raises:
        ImportError: pytorch_optimizer is not installed.
        ValueError: no adapter whose A and B both train, one that trains single experts, or a rank above the features of a linear.
    """
    layers = adapted_layers(model)
    _refuse_alone("create_lorarite_optimizer", layers)
    pairs = []
    for layer, adapter, a, b in _pairs(layers):
        if a.requires_grad and b.requires_grad:
            if a.shape[1] > min(a.shape[2], b.shape[1]):
                raise ValueError(
                    f"create_lorarite_optimizer: the rank {a.shape[1]} of adapter '{adapter}' is above the features of "
                    f"'{layer.name}' ({a.shape[2]} and {b.shape[1]}), which LoRA-RITE cannot rotate: lower it by rank_pattern."
                )
            pairs.append((a, b))
    if not pairs:
        raise ValueError(
            "create_lorarite_optimizer: the model has no adapter that trains A and B of its experts. Set one active that does; "
            'with trainable="router" there are none to train, and any other optimizer trains the router.'
        )
    paired = {id(each) for pair in pairs for each in pair}
    rest = [each for each in model.parameters() if each.requires_grad and id(each) not in paired]
    return ExpertsRite(pairs, rest, lr=lr, weight_decay=weight_decay, **options)


class ExpertsRite(Optimizer):
    """Its first group are the pairs, A [E, r, in] and B [E, out, r] in turns; the second one, if there is one, is AdamW's."""

    def __init__(
        self, pairs: list[tuple[nn.Parameter, nn.Parameter]], rest: list[nn.Parameter], **options: Any
    ) -> None:
        self.engine = _engine(options)
        settings = {key: value for key, value in self.engine.param_groups[0].items() if key != "params"}
        super().__init__([{"params": [each for pair in pairs for each in pair], **settings}], settings)
        self.rest: torch.optim.AdamW | None = None
        if rest:
            self.rest = torch.optim.AdamW(
                rest, lr=settings["lr"], betas=settings["betas"], weight_decay=settings["weight_decay"]
            )
            self.param_groups.append(self.rest.param_groups[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, engine = self.param_groups[0], self.engine
        batches: dict[Any, list[tuple[nn.Parameter, nn.Parameter]]] = {}
        for a, b in zip(group["params"][::2], group["params"][1::2], strict=True):
            if a.grad is not None and b.grad is not None:
                step = self.state[a].get("step", 0)
                batches.setdefault((a.shape[1:], b.shape[1:], a.dtype, a.device, step), []).append((a, b))
        begun, squares = [], []
        for (*_, step), found in batches.items():
            a, b, d_a, d_b = (
                _wide(torch.cat(each)) for each in zip(*((a, b, a.grad, b.grad) for a, b in found), strict=True)
            )
            if step:
                kept = {key: _wide(torch.cat([self.state[one][key] for one, _ in found])) for key in KEPT}
            else:
                kept = torch.vmap(functools.partial(_first, engine, group))(a, b)
            info = torch.vmap(functools.partial(_begin, engine, group, step))(a, b, d_a, d_b, kept)
            squares.append(info["update_l"].pow(2).sum() + info["update_r"].pow(2).sum())
            begun.append((step, found, a, b, info))
        for step, found, a, b, info in begun:
            norm = sum(each.to(a.device) for each in squares)
            finish = torch.vmap(functools.partial(_finish, engine, group, step), in_dims=(0, 0, 0, None))
            a, b, kept = finish(a, b, info, torch.sqrt(torch.as_tensor(norm)))
            sizes = [len(one) for one, _ in found]
            for i, (one, other) in enumerate(found):
                first = sum(sizes[:i])
                part = slice(first, first + sizes[i])
                one.copy_(a[part])
                other.copy_(b[part])
                self.state[one] = {"step": step + 1, **{key: kept[key][part].clone() for key in KEPT}}
        if self.rest is not None:
            self.rest.param_groups, self.rest.state = self.param_groups[1:], self.state  # also after a load
            self.rest.step()
        return loss


def _engine(options: dict[str, Any]) -> Any:
    """The library's optimizer, whose functions are used; of its own it has two matrices that nobody reads."""
    try:
        library: Any = importlib.import_module("pytorch_optimizer.optimizer.lora_rite")
    except ImportError as error:
        raise ImportError(
            "LoRA-RITE is taken from pytorch_optimizer, 4.1 or newer: pip install pytorch_optimizer"
        ) from error

    class Helper(library.LoRARiteHelper):  # type: ignore[misc]
        """torch.vmap has no rule for the library's moving of dimensions; for a matrix it is a transposition."""

        @staticmethod
        def move_lora_dim_to_last(tensor: Tensor, dim: int) -> tuple[Tensor, torch.Size]:
            moved = tensor.mT if dim == 0 else tensor
            return moved, moved.shape

        @staticmethod
        def restore_original_shape_and_dim(tensor: Tensor, dim: int, shape: torch.Size) -> Tensor:
            return tensor.mT if dim == 0 else tensor

    unused = [nn.Parameter(torch.zeros(1, 1)) for _ in range(2)]
    engine = library.LoRARite(unused, **{**options, "lora_l_dim": 0, "lora_r_dim": -1})
    missing = [name for name in USED if not hasattr(engine, name)]
    if missing:
        raise ImportError(f"This pytorch_optimizer has another LoRARite, without {', '.join(missing)}: install 4.1.")
    engine.helper = Helper(maybe_inf_to_nan=engine.helper.maybe_inf_to_nan)
    return engine


# Each of one pair, A [r, in] and B [out, r]:


def _first(engine: Any, group: dict[str, Any], a: Tensor, b: Tensor) -> dict[str, Tensor]:
    state: dict[str, Any] = {}
    engine.init_pair_state(group, state, a, b)
    return {key: state[key] for key in KEPT}


def _begin(
    engine: Any, group: dict[str, Any], step: int, a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor, kept: dict[str, Tensor]
) -> dict[str, Tensor]:  # fmt: skip
    a.grad, b.grad = d_a, d_b
    engine.state = {a: {"step": step, **kept}}
    found = dict(engine.build_pair_info(group, a, b))
    engine.state = {}
    return {key: value for key, value in found.items() if key != "step"}


def _finish(
    engine: Any, group: dict[str, Any], step: int, a: Tensor, b: Tensor, info: dict[str, Tensor], norm: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    a, b = a.clone(), b.clone()  # they are written to
    engine.state = {a: {"step": step, **info}}
    engine.apply_pair_update(group, a, b, norm)
    kept = {key: engine.state[a][key] for key in KEPT}
    engine.state = {}
    return a, b, kept
