"""`training/triton_launch.py`: when Triton's launcher is called from there, and with what. The kernels here are stand-ins that
do what Triton 3.6 does; `tests/tools/launch_checks.py` has the real ones without a GPU, and the last tests here have both."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vllm_server
from pair_checks import some_choices
from peft_loraswitch.training import pair_kernels, triton_launch
from peft_loraswitch.training.pair_order import order_of
from peft_loraswitch.training.triton_launch import Launcher, Rest

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


METADATA = (4, 1, 0)


class Compiled:
    """For one specialization of arguments, which it refuses to run with others."""

    packed_metadata: Any = METADATA

    def __init__(self, kernel: Kernel, kinds: list[Any]) -> None:
        self.kernel, self.kinds, self.function = kernel, kinds, 1000 + len(kernel.compiled)
        self._run = self.launch

    @property
    def run(self) -> Any:
        return self._run

    def launch(self, *args: Any) -> None:
        assert kinds_of(args[9:], self.kernel.tensors) == self.kinds, "compiled for other arguments"
        assert args[4] == self.function
        self.kernel.launched.append(args)


class Kernel:
    """Of `tensors` tensors and a count, what Triton compiles as a kernel. `public`: the number of launches its own way."""

    def __init__(self, tensors: int) -> None:
        self.tensors, self.pre_run_hooks = tensors, []
        self.compiled: dict[Any, Any] = {}
        self.launched: list[Any] = []
        self.public = 0
        self.make: Any = Compiled
        self.hands_over = lambda args: args

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, num_warps: int, **constants: Any) -> Any:
            self.public += 1
            values = (*args, *constants.values())
            kinds = kinds_of(values, self.tensors)
            key = (str(kinds), triton_launch._current_device())
            if key not in self.compiled:
                self.compiled[key] = self.make(self, kinds)
            compiled, enter, leave = self.compiled[key], RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
            stream = triton_launch._current_stream(triton_launch._current_device())
            compiled.run(
                *grid, stream, compiled.function, METADATA, "told", enter, leave, *self.hands_over(values)
            )  # fmt: skip
            return compiled

        return run


def kinds_of(values: Any, tensors: int) -> list[Any]:
    """As Triton looks at them: whether 16 divides an address, or a number; 1 is a constant. Not so for the first number."""
    kinds: list[Any] = []
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            value = value.data_ptr()
        if type(value) is int and place != tensors:
            kinds.append("1" if value == 1 and place > tensors else value % 16 == 0)
        else:
            kinds.append(type(value))
    return kinds


RUNTIME = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """Tensors of the CPU pass for those of its device `of_tensors`."""
    gpu = SimpleNamespace(current=0, of_tensors=0, stream=7)

    @contextmanager
    def device(index: int) -> Any:
        before, gpu.current = gpu.current, index
        yield
        gpu.current = before

    monkeypatch.setattr(triton_launch, "knobs", SimpleNamespace(runtime=RUNTIME))
    monkeypatch.setattr(triton_launch, "_device_of", lambda each: gpu.of_tensors)
    monkeypatch.setattr(triton_launch, "_current_device", lambda: gpu.current)
    monkeypatch.setattr(triton_launch, "_current_stream", lambda index: 100 * index + gpu.stream)
    monkeypatch.setattr(torch.cuda, "device", device)
    return gpu


def launch(launcher: Any, tensors: list[Tensor], count: int = 5, size: int = 32, grid: Any = (3, 2, 1)) -> None:
    launcher(grid, tensors, [((count,), size, lambda: Rest([size, None, 0.5], {"BLOCK": 8}, {"num_warps": 4}))])


def some(number: int = 2) -> list[Tensor]:
    return [torch.zeros(64) for _ in range(number)]


def test_from_the_third_launch_on_it_is_a_direct_one(gpu):
    kernel = Kernel(3)
    launcher, tensors = Launcher(kernel, tensors=3), some()
    for _ in range(4):
        launch(launcher, tensors)
    assert kernel.public == 2 and len(kernel.launched) == 4
    addresses = [each.data_ptr() for each in tensors]
    direct = (3, 2, 1, 7, 1000, METADATA, None, None, None, *addresses, None, 5, 32, None, 0.5, 8)
    assert kernel.launched[2] == kernel.launched[3] == direct


def test_what_differs_from_call_to_call_is_taken_as_it_is_now(gpu):
    kernel = Kernel(2)
    launcher = Launcher(kernel, tensors=2)
    for _ in range(3):
        launch(launcher, some())
    tensors = some()
    gpu.stream = 9
    launch(launcher, tensors, count=16, grid=(4, 1, 2))
    assert kernel.public == 2
    args = kernel.launched[-1]
    assert args[:4] == (4, 1, 2, 9) and args[9:12] == (*[each.data_ptr() for each in tensors], 16)


def test_each_alignment_is_compiled_for(gpu):
    """Also that of one tensor among several; `Compiled` refuses another one."""
    kernel = Kernel(2)
    launcher, (one, other) = Launcher(kernel, tensors=2), some()
    lying = [[one, other], [one[1:], other], [one, other[3:]], [one[1:], other[1:]], [one[4:], other[8:]]]
    for _ in range(3):
        for tensors in lying:
            launch(launcher, tensors)
    assert len(kernel.compiled) == 4 and len(kernel.launched) == 15 and kernel.public == 8


def test_each_size_is_compiled_for(gpu):
    """1 is a constant; what 16 divides is marked. A count is neither."""
    kernel = Kernel(2)
    launcher, tensors = Launcher(kernel, tensors=2), some()
    for _ in range(3):
        for size in (1, 7, 16, 32):
            launch(launcher, tensors, size=size)
    assert len(kernel.compiled) == 3 and kernel.public == 8
    for count in (1, 16, 17):
        launch(launcher, tensors, count=count)
    assert kernel.public == 8


def test_each_dtype_is_compiled_for(gpu):
    kernel = Kernel(2)
    launcher = Launcher(kernel, tensors=2)
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            launch(launcher, [torch.zeros(64), torch.zeros(64, dtype=dtype)])
    assert kernel.public == 4


def test_on_the_device_of_the_tensors(gpu):
    kernel = Kernel(2)
    launcher, tensors = Launcher(kernel, tensors=2), some()
    for device in (0, 1, 0, 1, 0, 1):
        gpu.of_tensors = device
        launch(launcher, tensors)
        assert gpu.current == 0 and kernel.launched[-1][3] == 100 * device + 7
    assert kernel.public == 4 and [args[4] for args in kernel.launched] == [1000, 1001] * 3


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_told(which, gpu, monkeypatch):
    kernel = Kernel(2)
    launcher, tensors, chain = Launcher(kernel, tensors=2), some(), SimpleNamespace(calls=[])
    for hook, public in ((chain, 2), (print, 3), (chain, 3)):  # an empty chain is none
        monkeypatch.setattr(RUNTIME, which, hook)
        for _ in range(3 if public == 2 else 1):
            launch(launcher, tensors)
        assert kernel.public == public
    chain.calls.append(print)
    launch(launcher, tensors)
    assert kernel.public == 4 and chain in kernel.launched[-1][7:9]
    monkeypatch.setattr(RUNTIME, which, None)
    kernel.pre_run_hooks.append(print)
    launch(launcher, tensors)
    assert kernel.public == 5


def test_where_nothing_is_compiled(gpu, monkeypatch):
    """The interpreter's kernels have no hooks; a CPU; a Triton without knobs."""
    kernel, tensors = Kernel(2), some()
    interpreted = SimpleNamespace(launches=0)

    class Interpreted:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: setattr(interpreted, "launches", interpreted.launches + 1)

    launcher = Launcher(Interpreted(), tensors=2)
    for _ in range(4):
        launch(launcher, tensors)
    assert interpreted.launches == 4
    launcher = Launcher(kernel, tensors=2)
    gpu.of_tensors = -1
    for _ in range(4):
        launch(launcher, tensors)
    gpu.of_tensors = 0
    monkeypatch.setattr(triton_launch, "knobs", None)
    launcher = Launcher(kernel, tensors=2)
    for _ in range(4):
        launch(launcher, tensors)
    assert kernel.public == 8


class Unwatched(Compiled):
    """Of a Triton that keeps its launcher elsewhere."""

    def __init__(self, kernel: Kernel, kinds: list[Any]) -> None:
        super().__init__(kernel, kinds)
        del self._run

    @property
    def run(self) -> Any:
        return self.launch


class Unnamed(Compiled):
    """And of one that has another name for this."""

    @property
    def packed_metadata(self) -> Any:
        raise AttributeError("packed_metadata")


@pytest.mark.parametrize("make", [Unwatched, Unnamed])
def test_names_that_are_not_there(make, gpu):
    kernel = Kernel(2)
    kernel.make = make
    launcher, tensors = Launcher(kernel, tensors=2), some()
    for _ in range(4):
        launch(launcher, tensors)
    assert kernel.public == 4 == len(kernel.launched)


OTHERS = {
    "others": lambda args: (*args[:-1], 9),
    "fewer": lambda args: args[:-1],
    "in another order": lambda args: (args[1], args[0], *args[2:]),
}


@pytest.mark.parametrize("hands_over", OTHERS.values(), ids=OTHERS)
def test_what_is_handed_over_otherwise_stays_so(hands_over, gpu, monkeypatch):
    """A Triton whose launcher takes other arguments: none is called from here."""
    monkeypatch.setattr(Compiled, "launch", lambda self, *args: self.kernel.launched.append(args))
    kernel = Kernel(2)
    kernel.hands_over = hands_over
    launcher, tensors = Launcher(kernel, tensors=2), some()
    for _ in range(4):
        launch(launcher, tensors)
    assert kernel.public == 4 == len(kernel.launched)
    assert all(compiled._run == compiled.launch for compiled in kernel.compiled.values())


def test_a_launch_that_fails_is_looked_at_again(gpu, monkeypatch):
    kernel = Kernel(2)
    launcher, tensors = Launcher(kernel, tensors=2), some()
    launch(launcher, tensors)
    (compiled,) = kernel.compiled.values()
    before = compiled._run

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    compiled._run = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        launch(launcher, tensors)
    assert compiled._run is fails
    compiled._run = before
    for _ in range(3):
        launch(launcher, tensors)
    assert kernel.public == 3 and len(kernel.launched) == 4


@pytest.mark.vllm
def test_tritons_own_arguments():
    """In vllm's environment, which has Triton."""
    assert vllm_server.printed_by("launch_checks.py")[-2:] == ["launches", "alike"]


# ----------------------------------------------------------------------------------------------------------- on a GPU


def products(tokens: int, offset: int) -> tuple[Any, ...]:
    """(function of the kernels, which gives their results); tensors begin `offset` numbers behind where 16 divides."""
    experts, slots, rank, features, n = 6, 2, 16, 256, 3
    order = order_of(some_choices(tokens, experts, slots, 1).cuda(), experts)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.randn(size + offset, generator=generator, device="cuda").to(dtype)[offset:].view(shape)

    rows, gates = random(tokens, features), random(tokens, experts, dtype=torch.float32)
    w = random(n, experts, rank, features)
    small, d_outs = random(tokens * slots, n * rank), [random(tokens, features) for _ in range(n)]
    made = [torch.empty_like(each) for each in (small, *d_outs, small, w)]
    hidden, *outs, d_hidden, d_w = made
    d_gates = torch.empty(n, tokens, experts, device="cuda")

    def run() -> list[Tensor]:
        for each in (*made, d_gates):
            each.zero_()
        pair_kernels.to_rank(rows, w, order, hidden)
        pair_kernels.from_rank(hidden, [w[:1]] * n, order, outs, [None] * n, False, gates, 0.5)
        pair_kernels.to_rank_backward(d_outs, [w[:1]] * n, order, hidden, gates, 0.5, d_hidden, d_gates)
        pair_kernels.weight_gradient(d_outs, d_hidden, order, [each.unsqueeze(0) for each in d_w], gates, 0.5)
        return [*made, d_gates]

    return run, [pair_kernels._launch_to_rank, pair_kernels._launch_from_rank, pair_kernels._launch_weight_gradient]


@pytest.fixture
def own_kinds(monkeypatch) -> None:
    """Nothing is known yet."""
    if pair_kernels.triton is not None:
        for name in ("_launch_to_rank", "_launch_from_rank", "_launch_weight_gradient"):
            monkeypatch.setattr(getattr(pair_kernels, name), "_kinds", {})


def bits(results: list[Tensor]) -> list[Tensor]:
    return [each.clone().view(torch.uint8) for each in results]


def alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("tokens", [1, 130])
def test_direct_launches_have_the_bits_of_public_ones(tokens, offset, own_kinds):
    run, launchers = products(tokens, offset)
    public = bits(run())
    assert all(kind.direct is None for kind in launchers[0]._kinds.values())
    run()
    assert alike(bits(run()), public)
    assert all(launcher._kinds and all(kind.direct for kind in launcher._kinds.values()) for launcher in launchers)


def settled(run: Any) -> Any:
    """The bits of a first run. Behind it and two more, what is launched is launched directly."""
    expected = bits(run())
    for _ in range(2):
        run()
    return expected


@needs_gpu
@pytest.mark.gpu
def test_one_alignment_after_the_other(own_kinds):
    for _ in range(3):
        for offset in (0, 1, 8):
            run, _ = products(64, offset)
            first = bits(run())
            assert alike(bits(run()), first) and all(torch.isfinite(each).all() for each in run())


@needs_gpu
@pytest.mark.gpu
def test_streams(own_kinds):
    """Launched on the current one: what is enqueued there before it comes first."""
    run, _ = products(130, 0)
    expected = settled(run)
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            found = bits(run())  # zeroes on this stream first: a launch on another one is undone by that
        stream.synchronize()
        assert alike(found, expected)


@needs_gpu
@pytest.mark.gpu
def test_graphs(own_kinds):
    run, _ = products(130, 0)
    expected = settled(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for each in results:
        each.fill_(3)
    graph.replay()
    assert alike(bits(results), expected)


@needs_gpu
@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one(own_kinds):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    run, _ = products(130, 0)
    expected = bits(run())
    with torch.cuda.device(1):
        for _ in range(3):
            found = run()
    torch.cuda.synchronize(0)
    assert alike(bits(found), expected)
