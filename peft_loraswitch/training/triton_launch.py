"""Launches of a Triton kernel that cost the host little.

`kernel[grid](...)` binds and looks at every argument in Python, each time: 25 us for a kernel of forty arguments, more than a
small kernel runs. Most arguments are the same in each step. So what Triton has compiled for them is kept, and its launcher called
as Triton calls it, with addresses. The public way remains

- for the first launch of each kind, which compiles;
- for the second, in which is seen what Triton hands to its launcher: if that is not what would be handed to it here, this kind
  stays with the public way, as it does where something is not there by its name (other versions of Triton);
- while hooks ask to be told of launches (profilers), and where nothing is compiled: in Triton's interpreter, on a CPU.

Triton's settings (`triton.knobs`, its environment variables) count as they are when a kind is launched first.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from triton import knobs
except ImportError:  # no GPU build of PyTorch, or an older Triton
    knobs = None

Grid = tuple[int, int, int]
ALIGNED = 16  # bytes: what is compiled for such addresses takes no others
_address_of, _dtype_of, _device_of = Tensor.data_ptr, operator.attrgetter("dtype"), Tensor.get_device
# What Triton itself asks for them; PyTorch for CPUs has neither.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
_watching = threading.Lock()


def current_stream(device: torch.device) -> int:
    """That of a GPU; 0 elsewhere."""
    return 0 if device.type != "cuda" else _current_stream(_current_device() if device.index is None else device.index)


class Rest(NamedTuple):
    """Arguments of a kernel behind its tensors and counts.

    Attributes:
        numbers: sizes, strides, factors; None: of no use.
        constants: `tl.constexpr` ones by name, in the order of the kernel.
        options: of the compiler (`num_warps`, `num_stages`).
    """

    numbers: Sequence[float | None]
    constants: dict[str, Any]
    options: dict[str, Any]


# Of a launch: (counts, key, rest).
# - counts: what differs from batch to batch, so that the key does not: ints below 2^31
# - key: hashable; everything that `rest` depends on
# - rest: is called if the key is new (where addresses or dtypes are of another kind, too)
Launch = tuple[tuple[int, ...], Any, Callable[[], Rest]]


class Launcher:
    """Of one kernel, whose parameters stand in this order: tensors, counts (ints that Triton does not specialize:
    `do_not_specialize`), numbers, constants.

    Args:
        tensors: how many it has. Those behind the ones that a launch gives are None.
    """

    def __init__(self, kernel: Any, tensors: int) -> None:
        self.kernel, self.tensors = kernel, tensors
        self._kinds: dict[Any, _Kind] = {}
        # The interpreter's kernels have no such hooks.
        self._compiles = hasattr(kernel, "pre_run_hooks") and hasattr(
            getattr(knobs, "runtime", None), "launch_enter_hook"
        )

    def __call__(self, grid: Grid, tensors: Sequence[Tensor], launches: Sequence[Launch]) -> None:
        """Launches one after the other, on the device of the tensors, on its current stream."""
        device = _device_of(tensors[0])
        if device >= 0 and device != _current_device():  # Triton launches on the current one
            with torch.cuda.device(device):
                self(grid, tensors, launches)
            return
        if device < 0 or not self._compiles or self.kernel.pre_run_hooks or _watched():
            for counts, _, rest in launches:
                self._publicly(grid, tensors, counts, rest())
            return
        addresses = [*map(_address_of, tensors)]
        odd = None
        if functools.reduce(operator.or_, addresses) % ALIGNED:  # some are: Triton looks which
            odd = tuple([address % ALIGNED != 0 for address in addresses])
        shared = (device, odd, *map(_dtype_of, tensors))
        for counts, key, rest in launches:
            kind = self._kinds.get((key, shared))
            if kind is not None and kind.direct:
                kind.run(
                    *grid, _current_stream(device), kind.function, kind.metadata, None, None, None,
                    *addresses, *kind.absent, *counts, *kind.tail,
                )  # fmt: skip
            elif kind is None:
                values = rest()
                compiled = self._publicly(grid, tensors, counts, values)
                if compiled is not None:  # hooks of Triton's cache may forbid to compile
                    self._kinds[key, shared] = _Kind(compiled, values, self.tensors - len(tensors))
            elif kind.direct is None:
                with _watching:
                    kind.direct = self._is_as_expected(kind, device, grid, tensors, addresses, counts)
            else:
                self._publicly(grid, tensors, counts, kind.rest)

    def _publicly(self, grid: Grid, tensors: Sequence[Tensor], counts: tuple[int, ...], rest: Rest) -> Any:
        absent = (None,) * (self.tensors - len(tensors))
        return self.kernel[grid](*tensors, *absent, *counts, *rest.numbers, **rest.constants, **rest.options)

    def _is_as_expected(
        self, kind: _Kind, device: int, grid: Grid, tensors: Sequence[Tensor], addresses: Sequence[int],
        counts: tuple[int, ...],
    ) -> bool:  # fmt: skip
        """Launches the public way, and whether Triton has handed to its launcher what would be handed to it here."""
        compiled, seen = kind.compiled, []
        try:
            run = kind.run = compiled.run
            kind.function, kind.metadata = compiled.function, compiled.packed_metadata
            known = hasattr(compiled, "_run")
        except AttributeError:
            known = False
        if not known:
            self._publicly(grid, tensors, counts, kind.rest)
            return False

        def watch(*args: Any) -> Any:
            seen.append(args)
            return run(*args)

        compiled._run = watch
        try:
            again = self._publicly(grid, tensors, counts, kind.rest)
        finally:
            compiled._run = run
        first = (*grid, _current_stream(device), kind.function, kind.metadata)
        last = (*addresses, *kind.absent, *counts, *kind.tail)
        # In between: what hooks are told, and two hooks. (Another thread may have launched the same.)
        return again is compiled and any(_same(args[:6], first) and _same(args[9:], last) for args in seen)


class _Kind:
    """Of launches: what Triton has compiled for all of them.

    Attributes:
        direct: whether its launcher is called from here; None: not known yet.
        absent: of tensors; tail: arguments behind counts.
    """

    __slots__ = ("absent", "compiled", "direct", "function", "metadata", "rest", "run", "tail")

    def __init__(self, compiled: Any, rest: Rest, absent: int) -> None:
        self.compiled, self.rest = compiled, rest
        self.absent = (None,) * absent
        self.tail = (*rest.numbers, *rest.constants.values())
        self.direct: bool | None = None
        self.run: Any = None
        self.function: Any = None
        self.metadata: Any = None


def _watched() -> bool:
    """Whether someone wants to be told of launches. A hook may be a chain of them, which may be empty."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        enter is not None and getattr(enter, "calls", True) or leave is not None and getattr(leave, "calls", True)
    )


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """A tensor is the same as its address."""
    return len(some) == len(others) and all(
        one is other or (one.data_ptr() if isinstance(one, Tensor) else one) == other
        for one, other in zip(some, others, strict=True)
    )
