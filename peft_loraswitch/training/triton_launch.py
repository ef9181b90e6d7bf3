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

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from triton import knobs
    from triton.runtime import driver
except ImportError:  # no GPU build of PyTorch, or an older Triton
    knobs = driver = None

Grid = tuple[int, int, int]
_watching = threading.Lock()


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


class Launcher:
    """Of one kernel, whose parameters stand in this order: tensors, counts (ints that Triton does not specialize:
    `do_not_specialize`), numbers, constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._kinds: dict[Any, _Kind] = {}
        # The interpreter's kernels have none of these.
        self._compiles = knobs is not None and hasattr(kernel, "pre_run_hooks") and hasattr(knobs, "runtime")

    def __call__(
        self, grid: Grid, tensors: Sequence[Tensor | None], counts: tuple[int, ...], key: Any, rest: Callable[[], Rest]
    ) -> None:
        """On the device of the first tensor, on its current stream.

        Args:
            tensors: all on one device; None: of no use.
            counts: what differs from batch to batch, so that `key` does not: below 2^31.
            key: hashable; everything that `rest` depends on.
            rest: is called if the key is new. (Where addresses or dtypes are of another kind, too.)
        """
        device = _device_of(tensors[0])
        if device is None:
            self._publicly(grid, tensors, counts, rest())
            return
        if device != torch.cuda.current_device():  # Triton launches on the current one
            with torch.cuda.device(device):
                self._launch(device, grid, tensors, counts, key, rest)
        else:
            self._launch(device, grid, tensors, counts, key, rest)

    def _launch(
        self, device: int, grid: Grid, tensors: Sequence[Tensor | None], counts: tuple[int, ...], key: Any,
        rest: Callable[[], Rest],
    ) -> None:  # fmt: skip
        if not self._compiles or self.kernel.pre_run_hooks or _hooked():
            self._publicly(grid, tensors, counts, rest())
            return
        addresses = [None if each is None else each.data_ptr() for each in tensors]
        # As Triton looks at them: of what dtype, and which 16 divides.
        together = 0
        for address in addresses:
            if address:
                together |= address
        odd = tuple([bool(address and address & 15) for address in addresses]) if together & 15 else None
        whole = (key, device, odd, *[None if each is None else each.dtype for each in tensors])
        kind = self._kinds.get(whole)
        if kind is not None and kind.direct:
            kind.run(
                *grid, driver.active.get_current_stream(device), kind.function, kind.metadata, None, None, None,
                *addresses, *counts, *kind.tail,
            )  # fmt: skip
        elif kind is None:
            values = rest()
            compiled = self._publicly(grid, tensors, counts, values)
            if compiled is not None:  # a hook of Triton's cache may forbid to compile
                self._kinds[whole] = _Kind(compiled, values)
        elif kind.direct is None:
            with _watching:
                kind.direct = self._is_as_expected(kind, device, grid, tensors, addresses, counts)
        else:
            self._publicly(grid, tensors, counts, kind.rest)

    def _publicly(self, grid: Grid, tensors: Sequence[Tensor | None], counts: tuple[int, ...], rest: Rest) -> Any:
        return self.kernel[grid](*tensors, *counts, *rest.numbers, **rest.constants, **rest.options)

    def _is_as_expected(
        self, kind: _Kind, device: int, grid: Grid, tensors: Sequence[Tensor | None], addresses: Sequence[int | None],
        counts: tuple[int, ...],
    ) -> bool:  # fmt: skip
        """Launches the public way, and whether Triton has handed to its launcher what would be handed to it here."""
        compiled, seen = kind.compiled, []
        try:
            run = kind.run = compiled.run
            kind.function, kind.metadata = compiled.function, compiled.packed_metadata
            stream = driver.active.get_current_stream(device)
            watched = hasattr(compiled, "_run")
        except AttributeError:
            watched = False
        if watched:

            def watch(*args: Any) -> Any:
                seen.append(args)
                return run(*args)

            compiled._run = watch
        try:
            again = self._publicly(grid, tensors, counts, kind.rest)
        finally:
            if watched:
                compiled._run = run
        if not watched or again is not compiled:
            return False
        first = (*grid, stream, kind.function, kind.metadata)
        last = (*addresses, *counts, *kind.tail)
        # In between: what hooks are told, and two hooks. (Another thread may have launched the same.)
        return any(_same(args[:6], first) and _same(args[9:], last) for args in seen)


class _Kind:
    """Of launches: what Triton has compiled for all of them.

    Attributes:
        direct: whether its launcher is called from here; None: not known yet.
        tail: arguments behind tensors and counts.
    """

    __slots__ = ("compiled", "direct", "function", "metadata", "rest", "run", "tail")

    def __init__(self, compiled: Any, rest: Rest) -> None:
        self.compiled, self.rest = compiled, rest
        self.tail = (*rest.numbers, *rest.constants.values())
        self.direct: bool | None = None
        self.run: Any = None
        self.function: Any = None
        self.metadata: Any = None


def _device_of(each: Tensor | None) -> int | None:
    """None: a CPU."""
    return each.get_device() if each is not None and each.is_cuda else None


def _hooked() -> bool:
    """Whether someone wants to be told of launches. A chain of hooks may be empty."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        enter is not None and getattr(enter, "calls", True) or leave is not None and getattr(leave, "calls", True)
    )


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """A tensor is the same as its address."""
    return len(some) == len(others) and all(
        one is other or (one.data_ptr() if isinstance(one, Tensor) else one) == other
        for one, other in zip(some, others, strict=True)
    )
