"""What `training/triton_launch.py` hands to Triton's launcher, next to what Triton itself hands to it, for the kernels of the
training path and a GPU that is not there: everything but the GPU's driver is the real one.

python tests/tools/launch_checks.py                               # where Triton is installed
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pair_checks import some_choices
from peft_loraswitch.training import gate_kernels, pair_kernels, triton_launch
from peft_loraswitch.training.gate_hidden import Columns, runs
from peft_loraswitch.training.pair_order import order_of

STREAM = 7


class NoGPU:
    """In place of the GPU's driver. `launched` has the arguments of all launches."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.launched, self.utils = GPUTarget("cuda", 90, 32), [], self
        self.numbers = itertools.count(1000)
        self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device: STREAM)

    def get_current_target(self) -> Any:
        return self.target

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, next(self.numbers), 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: self.launched.append(args)


@contextmanager
def no_gpu() -> Iterator[NoGPU]:
    """Tensors of the CPU pass for a GPU's."""
    from triton.runtime import driver

    gpu, before = NoGPU(), driver._active
    driver.set_active(gpu)
    names = {"_device_of": lambda each: 0, "_current_device": lambda: 0, "_current_stream": lambda device: STREAM}
    kept = {name: getattr(triton_launch, name) for name in names}
    for name, stand_in in names.items():
        setattr(triton_launch, name, stand_in)
    try:
        yield gpu
    finally:
        driver._active = before
        for name, each in kept.items():
            setattr(triton_launch, name, each)


def launchers() -> list[Any]:
    return [
        pair_kernels._launch_to_rank, pair_kernels._launch_from_rank, pair_kernels._launch_weight_gradient,
        gate_kernels._launch_gate, gate_kernels._launch_gate_backward,
    ]  # fmt: skip


def plain(args: tuple[Any, ...]) -> list[Any]:
    """Of one launch, but for what hooks are told: addresses in place of tensors, kinds of numbers beside these."""
    numbers = [each.data_ptr() if isinstance(each, Tensor) else each for each in (*args[:6], *args[9:])]
    return [(type(each), each) for each in numbers]


def calls(tokens: int, experts: int, slots: int, rank: int, features: int, offset: int, dtype: torch.dtype) -> Any:
    """Of every kernel in every form; `offset` numbers behind an address that 16 divides."""
    order = order_of(some_choices(tokens, experts, slots, 0), experts)

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.zeros(size + offset, dtype=of)[offset:].view(shape)

    gates, hidden = zeros(tokens, experts, of=torch.float32), zeros(tokens * slots, 3 * rank)
    w, rows, line = zeros(3, experts, rank, features), zeros(tokens, features), zeros(features)
    yield lambda: pair_kernels.to_rank(rows, w, order, hidden)
    for n, bias, add, factors in (
        (1, None, True, None),
        (1, line, False, gates),
        (3, None, False, gates),
        (2, line, False, gates),
    ):
        yield lambda n=n, bias=bias, add=add, factors=factors: pair_kernels.from_rank(
            hidden, [w[:1]] * n, order, [rows] * n, [bias] * n, add, factors, 0.5
        )
    d_gates = zeros(3, tokens, experts, of=torch.float32)
    for n, factors in ((1, None), (3, gates)):
        yield lambda n=n: pair_kernels.to_rank_backward(
            [rows] * n, [w[:1]] * n, order, hidden, gates, 0.5, hidden, d_gates[:n]
        )
        yield lambda n=n, factors=factors: pair_kernels.weight_gradient(
            [rows] * n, hidden, order, [w[:1]] * n, factors, 2.0
        )
    columns = runs((Columns(0, experts, rank, 0.5), Columns(experts * rank, experts, rank, 1.0)))
    wide = zeros(tokens, 2 * experts * rank)
    for chosen, flags in ((gates > 0, (True, True)), (None, (False, False))):
        yield lambda chosen=chosen: gate_kernels.gate(wide, gates, chosen, columns)
        yield lambda chosen=chosen, flags=flags: gate_kernels.gate_backward(wide, wide, gates, chosen, columns, *flags)


CASES = [(64, 4, 2, 16, 64, 0), (64, 4, 2, 16, 64, 1), (1, 1, 1, 1, 1, 0)]


def check_launches() -> int:
    """The first three launches of each kind (the public way, looked at, directly) are alike, and the third is a direct one."""
    number, functions = 0, []
    with no_gpu() as gpu:
        for case in CASES:
            functions.append(set())
            for call in calls(*case, dtype=torch.bfloat16):
                runs_of_it = [launched_by(call, gpu) for _ in range(3)]
                found = [[plain(args) for args in launched] for launched in runs_of_it]
                drop_results(found)
                assert found[0] and found[0] == found[1] == found[2], case
                assert all(args[6] is None for args in runs_of_it[2]), "not launched directly"
                functions[-1] |= {args[4] for args in runs_of_it[2]}
                number += len(found[0])
    assert not functions[0] & functions[1], "what is compiled for one alignment has been launched with another"
    assert all(kind.direct for launcher in launchers() for kind in launcher._kinds.values())
    return number


def launched_by(call: Callable[[], Any], gpu: NoGPU) -> list[tuple[Any, ...]]:
    gpu.launched.clear()
    call()
    return list(gpu.launched)


def drop_results(found: list[list[Any]]) -> None:
    """The gates' kernels have results of their own, elsewhere in each launch: what differs has to be an address each time."""
    for launches in zip(*found, strict=True):
        for place, values in enumerate(zip(*launches, strict=True)):
            if len(set(values)) > 1 and all(kind is int and number > 2**32 for kind, number in values):
                for launch in launches:
                    launch[place] = None


if __name__ == "__main__":
    print(check_launches(), "launches alike")
