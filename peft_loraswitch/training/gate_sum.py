"""One gradient of the gates for all groups of linears that share them.

Autograd would have a tensor of each group and a launch for each sum, some hundred of them. Here the groups add to one tensor, in
the launch that computes their part, and hand nothing on; the function that the gates came through hands on the sum. Autograd
calls it when all groups are done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo import compiled_autograd

from .triton_launch import current_stream

_graph_task = torch._C._current_graph_task_id
_NOTHING: tuple[int, Tensor | None] = (-1, None)


class GateSum:
    """What the groups' backward have added up so far in one backward pass, on one stream, that of the forward (`stream`), as
    nothing here waits for another.

    The first pass that comes has it until it takes the sum. Any other goes by autograd meanwhile: one in another thread, or in a
    hook of the first. So do those after a pass that has failed or has not asked for the gates, which never takes it.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        # "sum": a pass and what it has. Of several threads one alone puts it there (`setdefault`).
        self._kept: dict[str, tuple[int, Tensor]] = {}

    def so_far(self, device: torch.device) -> Tensor | None:
        """To add to; None: nothing yet. Then `keep` what there is."""
        task, total = self._kept.get("sum", _NOTHING)
        return total if task == _graph_task() and self._stream == current_stream(device) else None

    def keep(self, total: Tensor) -> bool:
        """Whether it is kept; if not, it goes on by autograd: it comes from another pass or stream, or autograd is compiled and
        sums what each group hands on."""
        if compiled_autograd.in_compiled_autograd_region or self._stream != current_stream(total.device):
            return False
        task = _graph_task()
        return self._kept.setdefault("sum", (task, total))[0] == task

    def take(self) -> Tensor | None:
        """The sum, if it is of this pass."""
        task, total = self._kept.get("sum", _NOTHING)
        if total is None or task != _graph_task():
            return None
        self._kept.clear()
        return total


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, total: GateSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total = total
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, d_gates: Tensor | None) -> tuple[Tensor | None, None]:
        total = ctx.total.take()
        if total is None:
            return d_gates, None
        return total if d_gates is None else d_gates + total, None


_apply: Any = _Gates.apply


def summed(gates: Tensor) -> tuple[Tensor, GateSum | None]:
    """The gates to hand to groups, and where these add up; None: by autograd."""
    if not (gates.requires_grad and torch.is_grad_enabled() and gates.dtype == torch.float32):
        return gates, None
    total = GateSum(current_stream(gates.device))
    return _apply(gates, total), total
