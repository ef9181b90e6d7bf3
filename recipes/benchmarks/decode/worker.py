"""One process of the decode benchmark: builds a model with one method, compiles what its modes need, then measures on command.

Compiling, which takes the time, happens in many processes at once. What touches the GPU happens under `DeviceLock`:
preparations share it, a measurement has it alone. A process gives it back for the time in which it compiles.
"""

from __future__ import annotations

import cProfile
import ctypes
import fcntl
import gc
import os
import pstats
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from recipes.benchmarks.decode.plan import (
    CACHE,
    NUM_EXPERTS,
    PREFILL,
    PROMPT,
    TARGETS,
    TOP_K,
    Job,
    batch_of,
    kind_of,
)
from recipes.benchmarks.quiet_processor import QuietProcessor
from recipes.benchmarks.token_times import token_times

# Tokens of one sample: steps of a loop (and as many before them as give the host its lead), or of one `generate`. Short ones:
# a processor is undisturbed for tenths of a second.
LOOP_STEPS = {"compiled": (10, 3), "graph": (8, 2)}
LENGTHS = {"static": 24, "eager": 6}
TRIES = 4  # of a sample, until one is undisturbed


@dataclass
class Loop:
    """`run(steps)` runs so many; `rewind()` makes room for the next: a cache ends somewhere."""

    run: Callable[[int], None]
    rewind: Callable[[], None] = lambda: None


class DeviceLock:
    """One GPU among processes: `shared()` while preparing, `exclusive()` while measuring. Released when a process ends.

    Who wants it exclusively closes a gate first, so that preparations that begin meanwhile wait.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.gate, self.use = (os.open(folder / f"{device}.{name}", os.O_CREAT | os.O_RDWR) for name in ("gate", "use"))

    def shared(self) -> None:
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        fcntl.flock(self.use, fcntl.LOCK_SH)
        fcntl.flock(self.gate, fcntl.LOCK_UN)

    def exclusive(self, deadline: float) -> bool:
        """Whether it was had before `deadline` (time.monotonic())."""
        return self._wait(self.gate, deadline) and self._wait(self.use, deadline)

    def release(self) -> None:
        fcntl.flock(self.use, fcntl.LOCK_UN)
        fcntl.flock(self.gate, fcntl.LOCK_UN)

    def _wait(self, lock: int, deadline: float) -> bool:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.01)
        return False


# ------------------------------------------------------------------------------------------------------- the model


def empty_backbone(job: Job, device: str) -> Any:
    """The bare model; on "meta" without memory."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

    shape = job.shape
    config_class: Any = {"mistral-7b": MistralConfig, "qwen3-0.6b": Qwen3Config}.get(job.model, LlamaConfig)
    extra = {"sliding_window": None} if job.model == "mistral-7b" else {}
    config = config_class(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=4096, tie_word_embeddings=shape.tied, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def tensors_of(model: Any) -> dict[str, Any]:
    """Parameters and buffers by name; a tied one under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def fill(model: Any, tensors: dict[str, Any]) -> None:
    """Put another process's tensors in place of the meta tensors of `model`."""
    import torch

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied: dict[int, Any] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in parameters:
            parameter = tied.setdefault(tensor.data_ptr(), torch.nn.Parameter(tensor, requires_grad=False))
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = tensor
    left = [name for name, tensor in tensors_of(model).items() if tensor.is_meta]
    if left:
        raise RuntimeError(f"tensors of the model without a value: {', '.join(left[:5])}")


def adapt(model: Any, job: Job, device: str) -> tuple[Any, float]:
    """(model with the job's method, seconds that fuse_for_inference took)"""
    import torch
    from peft import LoraConfig, get_peft_model

    from peft_loraswitch import LoRASwitchConfig

    torch.manual_seed(1)
    if job.method != "backbone":
        config: Any = LoraConfig(r=job.rank, target_modules=TARGETS, init_lora_weights=False)
        if job.method != "lora":
            config = LoRASwitchConfig(
                r=max(job.rank, 1), num_experts=NUM_EXPERTS, top_k=TOP_K, target_modules=TARGETS, init_weights=False
            )
        with torch.device(device):
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model = model.eval().requires_grad_(False)
    if job.method == "kernels":  # our own kernels, no experts: rank 0 is what a LoRASwitchConfig refuses
        for module in model.modules():
            if hasattr(module, "loraswitch_A"):
                a, b = module.loraswitch_A["default"], module.loraswitch_B["default"]
                a.weight = torch.nn.Parameter(a.weight[:, :0].contiguous(), requires_grad=False)
                b.weight = torch.nn.Parameter(b.weight[:, :, :0].contiguous(), requires_grad=False)
    if job.method not in ("kernels", "fused", "merge"):
        return model, 0.0
    synchronize(device)
    start = time.perf_counter()
    model.fuse_for_inference(strategy="merge" if job.method == "merge" else "fused")
    synchronize(device)
    return model, time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------- the modes


class Decoder:
    """A greedy decode step over a static cache: what a serving loop runs."""

    def __init__(self, model: Any, batch: int, device: str) -> None:
        import torch
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        # different tokens, so that different experts are chosen all over the batch
        ids = torch.randint(5, model.config.vocab_size, (batch, PROMPT), device=device)
        self.position = torch.full((batch, 1), PROMPT, dtype=torch.long, device=device)
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits.argmax(-1)

    def rewind(self) -> None:
        """Back to the end of the prompt: every step adds a token to the cache."""
        layers: Any = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(PROMPT)

    def step(self, token: Any, position: Any) -> Any:
        out = self.model(input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)


def compiled_loop(model: Any, batch: int, device: str) -> Loop:
    """A loop over a step that torch.compile has turned into one CUDA graph."""
    import torch

    decoder = Decoder(model, batch, device)
    options: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
    # dynamic=False: a second batch size in this process must not get a graph for any batch size
    step = torch.compile(decoder.step, fullgraph=True, dynamic=False, **options)

    def run(tokens: int) -> None:
        token = decoder.token
        for _ in range(tokens):
            torch.compiler.cudagraph_mark_step_begin()
            token = step(token, decoder.position).clone()

    run(6)
    return Loop(run, decoder.rewind)


def captured_loop(model: Any, device: str) -> Loop:
    """A loop over one decode step captured into a CUDA graph as it is, without a compiler."""
    import torch

    decoder = Decoder(model, 1, device)
    if device != "cuda":

        def uncaptured(tokens: int) -> None:
            for _ in range(tokens):
                decoder.step(decoder.token, decoder.position)

        return Loop(uncaptured, decoder.rewind)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            decoder.step(decoder.token, decoder.position)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = decoder.step(decoder.token, decoder.position)

    def run(tokens: int) -> None:
        assert kept is not None and decoder is not None  # what the graph reads and writes stays alive
        for _ in range(tokens):
            graph.replay()

    return Loop(run, decoder.rewind)


def generated(model: Any, kind: str, device: str, tokens: int | None = None) -> list[float]:
    """Seconds of each decode step of a `generate` of so many tokens, or of as many as a sample of this kind has."""
    import torch

    ids = torch.randint(5, model.config.vocab_size, (1, PROMPT), device=device)
    options = {"cache_implementation": "static"} if kind == "static" else {}
    return token_times(model, ids, tokens or LENGTHS[kind], **options)


class Worker:
    """The model of one job and its prepared modes."""

    def __init__(self, job: Job, device: str, lock: DeviceLock) -> None:
        self.job, self.device, self.lock = job, device, lock
        self.serving = False  # a measurement has the GPU: nothing is locked or given back
        self.compilations = 0  # of graphs and CUDA graphs, since the last look
        self.loops: dict[str, Loop] = {}
        self.ready: list[str] = []
        self.held: dict[str, int] = {}  # bytes that preparing a mode left allocated
        self.model: Any = None
        self.fuse_seconds = 0.0
        self.shared_bytes = 0
        self.processor: QuietProcessor | None = None
        self.disturbed: Counter[str] = Counter()  # samples of a mode

    # -- preparing

    def watch_compilation(self) -> None:
        from torch._dynamo.callback import CallbackTrigger, callback_handler

        def begin(args: Any) -> None:
            self.compilations += 1
            if not self.serving and args.callback_trigger is CallbackTrigger.DYNAMO:
                synchronize(self.device)
                self.lock.release()

        def end(args: Any) -> None:
            if not self.serving and args.callback_trigger is CallbackTrigger.DYNAMO:
                self.lock.shared()

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)

    def breathe(self) -> None:
        """Let a measurement in that waits for the GPU."""
        synchronize(self.device)
        self.lock.release()
        self.lock.shared()

    def build(self, tensors: dict[str, Any] | None) -> None:
        """`tensors`: the backbone's, if another process holds them."""
        if tensors is None:
            model = empty_backbone(self.job, self.device)
        else:
            model = empty_backbone(self.job, "meta")
            fill(model, tensors)
            self.shared_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.model, self.fuse_seconds = adapt(model, self.job, self.device)

    def prepare(self, mode: str) -> None:
        import torch

        before = self._allocated()
        kind = kind_of(mode)
        if kind == "compiled":
            self.loops[mode] = compiled_loop(self.model, batch_of(mode), self.device)
        elif kind == "graph":
            self.loops[mode] = captured_loop(self.model, self.device)
        elif kind == "prefill":
            ids = torch.randint(5, self.model.config.vocab_size, (1, PREFILL), device=self.device)

            def prefill(times: int) -> None:
                for _ in range(times):
                    self.model(input_ids=ids, logits_to_keep=1, use_cache=False)

            prefill(1)
            self.loops[mode] = Loop(prefill)
        elif kind in LENGTHS:
            for _ in range(2 if kind == "static" else 1):
                generated(self.model, kind, self.device)
        else:
            raise ValueError(f"unknown mode {mode!r}")
        gc.collect()
        self.held[mode] = self._allocated() - before
        self.ready.append(mode)

    def _allocated(self) -> int:
        import torch

        synchronize(self.device)
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    # -- measuring

    def sample(self, mode: str) -> float:
        """`milliseconds()` that nobody disturbed by slowing the processor down; the last of `TRIES` if somebody always did."""
        if self.processor is None:  # not before all other processes stand still
            self.processor = QuietProcessor()
        for _ in range(TRIES):
            quiet = self.processor.seek()
            milliseconds = self.milliseconds(mode)
            if quiet and self.processor.is_quiet():
                return milliseconds
        self.disturbed[mode] += 1
        return milliseconds

    def milliseconds(self, mode: str) -> float:
        """Milliseconds of one token (of the median one, for `generate`; of one forward, for a prefill)."""
        import torch

        kind = kind_of(mode)
        if kind in LENGTHS:
            return statistics.median(generated(self.model, kind, self.device)) * 1e3
        run = self.loops[mode].run
        steps, lead = LOOP_STEPS.get(kind, (1, 0))
        self.loops[mode].rewind()
        run(lead)
        if self.device != "cuda":
            begin = time.perf_counter()
            run(steps)
            return (time.perf_counter() - begin) / steps * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(steps)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / steps

    def begin(self, mode: str) -> None:
        import torch

        if kind_of(mode) in LENGTHS:  # clocks and caches
            generated(self.model, kind_of(mode), self.device)
        else:
            self.milliseconds(mode)
        self.compilations = 0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def finish(self, mode: str) -> dict[str, Any]:
        """What a row says besides its time."""
        import torch

        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        peak += self.shared_bytes - sum(size for name, size in self.held.items() if name != mode)
        sizes = {name: p.numel() * p.element_size() for name, p in self.model.named_parameters()}
        experts = sum(size for name, size in sizes.items() if "loraswitch_A" in name or "loraswitch_B" in name)
        adapter = sum(size for name, size in sizes.items() if "loraswitch_" in name or "lora_" in name)
        embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name)
        tokens = PREFILL if mode == "prefill" else batch_of(mode)
        read = sum(sizes.values()) - experts - (0 if self.job.shape.tied else embedding)
        # plain PyTorch multiplies with all experts; merging reads the chosen ones and reads and writes the weights
        read += experts * (min(1.0, TOP_K * tokens / NUM_EXPERTS) if self.job.method in ("fused", "merge") else 1)
        adapted = 2 * self.job.shape.linear_elements()
        read += 2 * adapted if self.job.method == "merge" else 0
        return {
            "batch": batch_of(mode), "tokens": tokens, "read_bytes": int(read), "adapted_bytes": adapted,
            "adapter_gib": round(adapter / 2**30, 3), "peak_gib": round(peak / 2**30, 3),
            "fuse_seconds": round(self.fuse_seconds, 3), "compilations": self.compilations,
            "disturbed": self.disturbed[mode],
        }  # fmt: skip

    def profile(self, mode: str) -> dict[str, Any]:
        """Where a forward's time goes: the GPU's busy time, its kernels, and the host's functions. Milliseconds a forward."""
        import torch
        from torch.profiler import ProfilerActivity

        kind = kind_of(mode)
        forwards = max(LENGTHS.values()) if kind in LENGTHS else LOOP_STEPS.get(kind, (1, 0))[0]

        def run() -> None:
            if kind in LENGTHS:
                generated(self.model, kind, self.device, forwards)
            else:
                self.loops[mode].rewind()
                self.loops[mode].run(forwards)
                synchronize(self.device)

        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
        host = cProfile.Profile()
        host.runcall(run)
        activities = [ProfilerActivity.CUDA] if self.device == "cuda" else [ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as traced:
            run()
        kernels = [
            (event.time_range.start, event.time_range.end, event.name)
            for event in traced.events() or []
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        busy, until = 0.0, 0.0
        by_name: dict[str, list[float]] = {}
        for begin, end, name in sorted(kernels):
            busy += max(0.0, end - max(begin, until))  # dependent launches overlap
            until = max(until, end)
            by_name.setdefault(name, []).append(end - begin)
        top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
        stats = pstats.Stats(host).stats  # type: ignore[attr-defined]
        slowest = sorted(stats.items(), key=lambda item: -item[1][2])[:20]
        return {
            "forwards": forwards, "wall_ms": round(wall / forwards * 1e3, 4),
            "gpu_busy_ms": round(busy / forwards / 1e3, 4), "gpu_kernels": round(len(kernels) / forwards, 1),
            "kernels_ms": {name[:90]: [round(sum(t) / forwards / 1e3, 4), round(len(t) / forwards, 1)] for name, t in top},
            # with cProfile, which doubles the time of short functions: shares count, not sums
            "host_ms": {
                f"{Path(file).name}:{line} {name}"[:90]: [round(own / forwards * 1e3, 4), round(calls / forwards, 1)]
                for (file, line, name), (_, calls, own, _, _) in slowest
            },
        }  # fmt: skip


class Ceilings:
    """What no method can beat: reading and writing memory, and the linears alone. Answers like a Worker."""

    def __init__(self, device: str) -> None:
        self.device = device

    def measure(self, mode: str) -> Any:
        import torch

        if mode == "copy":  # TB/s of reading and writing
            words = 2**29 if self.device == "cuda" else 2**20
            source, target = (torch.randint(9, (words,), dtype=torch.int32, device=self.device) for _ in range(2))
            times = []
            for _ in range(8):
                synchronize(self.device)
                start = time.perf_counter()
                target.copy_(source)
                synchronize(self.device)
                times.append(time.perf_counter() - start)
            rate = 2 * 4 * words / sorted(times)[len(times) // 2] / 1e12
            del source, target
            if self.device == "cuda":
                torch.cuda.empty_cache()
            return round(rate, 3)
        from recipes.benchmarks import linears

        return linears.measure(mode.partition(":")[2], 8, [1], [0, 8, 16, 64], torch)


# -------------------------------------------------------------------------------------------------------- the process


def begin_process(log: str) -> None:
    """Output to a file; no longer alive than the process that started this one."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def import_everything(device: str) -> dict[str, Any]:
    """What takes seconds and needs no GPU; then what is said of the GPU and the software."""
    import peft
    import torch
    import torch._inductor.compile_fx
    import transformers

    from peft_loraswitch import kernels

    torch.multiprocessing.set_sharing_strategy("file_system")  # of CPU tensors; a GPU's go by their address
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cuda = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "cpu",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 64.0,
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "kernels": kernels.build_info() if kernels.available() else f"not used: {kernels.why_not()}",
    }  # fmt: skip


def hold_weights(job: Job, device: str, connection: Connection, locks: Path, log: str) -> None:
    """The process that keeps the weights of a model for all jobs of that model; each "send" sends their addresses."""
    begin_process(log)
    import_everything(device)
    lock = DeviceLock(locks, device)
    try:
        connection.send(("hello", None))
        connection.recv()  # there is memory now
        lock.shared()
        tensors = tensors_of(empty_backbone(job, device))
        synchronize(device)
        lock.release()
        connection.send(("loaded", None))
        while connection.recv() == "send":
            connection.send(tensors)
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}"))


def serve(job: Job, device: str, connection: Connection, locks: Path, log: str) -> None:
    """The process of a job: says hello, gets the weights, prepares, says what is ready, then answers commands."""
    begin_process(log)
    try:
        connection.send(("hello", import_everything(device)))
        command, payload = connection.recv()
        lock = DeviceLock(locks, device)
        if job.method == "ceilings":
            ceilings = Ceilings(device)
            connection.send(("ready", list(job.modes)))
            while True:
                connection.send(ceilings.measure(connection.recv()[1]))
        worker = Worker(job, device, lock)
        tensors = None
        if command == "shared":
            try:
                tensors = connection.recv()
                next(iter(tensors.values())).sum().item()  # an address that cannot be read shows now
            except Exception as error:
                connection.send(("unshared", f"{type(error).__name__}: {error}"))
                tensors = None
                connection.recv()  # there is memory for weights of its own
        worker.watch_compilation()
        lock.shared()
        start = time.monotonic()
        worker.build(tensors)
        for mode in job.modes:
            worker.breathe()
            try:
                worker.prepare(mode)
                print(f"{mode} is ready after {time.monotonic() - start:.1f} s", flush=True)
            except Exception as error:
                traceback.print_exc()
                connection.send(("skipped", (mode, f"{type(error).__name__}: {error}".splitlines()[0])))
        synchronize(device)
        lock.release()
        worker.serving = True
        connection.send(("ready", worker.ready))
        while True:
            name, mode = connection.recv()
            connection.send(getattr(worker, name)(mode))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))
