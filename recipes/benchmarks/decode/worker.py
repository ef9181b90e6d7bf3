"""One process of the decode benchmark: builds a model with one method, compiles what its modes need, then measures on command.

Compiling, which takes the time, happens in many processes at once. What touches the GPU happens under `DeviceLock`:
preparations share it, a measurement has it alone. A process gives it back for the time in which it compiles.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from recipes.benchmarks.decode.backbones import bytes_of, quantize
from recipes.benchmarks.decode.device_lock import DeviceLock
from recipes.benchmarks.decode.loops import LENGTHS, LOOP_STEPS, Loop, captured_loop, compiled_loop, generated
from recipes.benchmarks.decode.models import adapt, empty_backbone, fill, synchronize, tensors_of
from recipes.benchmarks.decode.plan import FUSED, Job, batch_of, kind_of, tokens_of
from recipes.benchmarks.decode.profiling import profile_forwards
from recipes.benchmarks.decode.sure_router import make_sure
from recipes.benchmarks.quiet_processor import QuietProcessor

TRIES = 4  # of a sample, until one is undisturbed


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
        self.tokens: Any = None  # that the compiled loop gets, if the number of experts depends on them
        self.mean_experts: float | None = None
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
        import torch
        import torch._inductor.config

        if tensors is None:
            model = empty_backbone(self.job, self.device)
        else:
            model = empty_backbone(self.job, "meta")
            fill(model, tensors)
        if self.job.method == "tuned":
            torch._inductor.config.compile_threads = max(
                1, len(os.sched_getaffinity(0)) - 2
            )  # this job's compiling is the longest
        quantize(model, self.job.backbone, self.device)
        if tensors is not None:
            others = {tensor.data_ptr() for tensor in tensors.values()}
            plain = [p for p in model.parameters() if type(p) is torch.nn.Parameter and p.data_ptr() in others]
            self.shared_bytes = sum(bytes_of(p) for p in plain)
        self.model, self.fuse_seconds = adapt(model, self.job, self.device)
        if self.job.adapter.mean_experts is not None:
            steps = LOOP_STEPS["compiled"][0]
            self.tokens, self.mean_experts = make_sure(self.model, self.job.adapter, steps, self.device)

    def prepare(self, mode: str) -> None:
        import torch

        before = self._allocated()
        kind = kind_of(mode)
        if kind == "compiled":
            self.loops[mode] = compiled_loop(
                self.model, batch_of(mode), self.device, self.job.method == "tuned", self.tokens
            )
        elif kind == "graph":
            self.loops[mode] = captured_loop(self.model, batch_of(mode), self.device)
        elif kind == "prefill":
            ids = torch.randint(5, self.model.config.vocab_size, (1, tokens_of(mode)), device=self.device)

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
        """`milliseconds()` that nobody disturbed by slowing the processor down; the last of `TRIES` if somebody always did.
        A rehearsal, whose numbers say nothing, does not wait for that."""
        if self.device == "cpu":
            return self.milliseconds(mode)
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
        sizes = {name: bytes_of(p) for name, p in self.model.named_parameters()}
        experts = sum(size for name, size in sizes.items() if "loraswitch_A" in name or "loraswitch_B" in name)
        adapter = sum(size for name, size in sizes.items() if "loraswitch_" in name or "lora_" in name)
        embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name)
        tokens, routed = tokens_of(mode), self.job.adapter
        read = sum(sizes.values()) - experts - (0 if self.job.shape.tied else embedding)
        # plain PyTorch multiplies with all experts; merging reads the chosen ones and reads and writes the weights
        chosen = routed.distinct(tokens) / routed.stacked if self.job.method in (*FUSED, "merge") else 1.0
        read += experts * chosen
        adapted = 2 * self.job.shape.linear_elements()
        read += 2 * adapted if self.job.method == "merge" else 0
        return {
            "batch": batch_of(mode), "tokens": tokens, "read_bytes": int(read), "adapted_bytes": adapted,
            "adapter_gib": round(adapter / 2**30, 3), "peak_gib": round(peak / 2**30, 3),
            "fuse_seconds": round(self.fuse_seconds, 3), "compilations": self.compilations,
            "disturbed": self.disturbed[mode], "expert_bytes": int(experts * chosen), "mean_experts": self.mean_experts,
        }  # fmt: skip

    def profile(self, mode: str) -> dict[str, Any]:
        """Where a forward's time goes, see `profile_forwards`."""
        kind = kind_of(mode)
        forwards = max(LENGTHS.values()) if kind in LENGTHS else LOOP_STEPS.get(kind, (1, 0))[0]

        def run() -> None:
            if kind in LENGTHS:
                generated(self.model, kind, self.device, forwards)
            else:
                self.loops[mode].rewind()
                self.loops[mode].run(forwards)
                synchronize(self.device)

        return profile_forwards(run, forwards, self.device)


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
