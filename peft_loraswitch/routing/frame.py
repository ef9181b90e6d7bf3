"""Where a routing decision lives: in a `RoutingFrame`, one per forward of the backbone, never longer.

`hooks.py` opens a frame when a forward begins and closes it when that ends; adapted layers in between find it through
`RoutingState.frame`, and the first of them puts the decision into it. The frame is thread-local, so two threads do not see
each other's routing; nothing is kept on a module, so nothing leaks into the next forward, into a compiled graph's outputs, or
into `copy.deepcopy(model)`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from .context import Context, ForwardInputs
from .decision import Routing
from .given import GivenExperts
from .masks import attended_keys
from .options import RoutingOptions
from .statistics import RoutingRecorder

NO_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for "no adapter on this sample"
# Why what needs to know the samples of a batch is refused there.
TIME_FIRST = "this backbone runs its tokens as (sequence, batch), where the samples of a batch cannot be told apart"
# What `RoutingFrame.opened_at` holds instead of an owner's depth:
SECOND_RUN = -1  # in a checkpointed block's second run
OUTSIDE = -2  # outside of any forward, where nothing may be decided
NOTHING_GIVEN: Mapping[str, GivenExperts] = {}


class Relay:
    """Carries the gradient of the gates from checkpointed blocks that run again on their own to where the router runs: see
    `training/gradient_checkpointing.py`."""

    def __init__(self) -> None:
        self.leaf: torch.Tensor | None = None

    def stand_in(self, dense_gates: torch.Tensor) -> torch.Tensor:
        """The leaf that blocks multiply with instead of `dense_gates`, of the same value."""
        if self.leaf is None:
            self.leaf = dense_gates.detach().requires_grad_()
        return self.leaf

    def join(self, grad: torch.Tensor) -> torch.Tensor | None:
        """Hook on the gates that have a graph: adds what the leaf has gathered."""
        if self.leaf is None or self.leaf.grad is None:
            return None
        gathered, self.leaf.grad = self.leaf.grad, None
        return grad + gathered


class RoutingFrame:
    """The routing of one forward.

    Attributes:
        routings: the decisions taken so far, by adapter name.
        attention_mask: the forward's mask, if it had one: which tokens are real (for losses and statistics only).
        inputs: what routers that see context have to know of the forward.
        num_items_in_batch: what the trainer passed, see `training/end_of_forward.py`.
        adapter_names: adapter of each sample (mixed batches), or None.
        given: by adapter name, the experts that tokens are told to use instead of asking the router.
        training: whether a loss may follow: model in train mode and gradients enabled when the frame was opened.
        earlier: finished passes of the same forward, if an owner below the outermost runs several times (a model that
            encodes two sentences, one after the other): other tokens, so other decisions.
        shared: what linears follow that have shared experts only, by adapter name.
        used: adapters that a layer asked for; `trained`: those of them whose experts or router train.
        relays: by adapter name; see `Relay`.
        shared_inputs: which linears are trained together, see `training/learned_groups.py`.
        merged: of strategy "merge": whether this forward reads merged weights; None: not settled yet.
        paused: modules whose gradient checkpointing is off until the frame is closed.
        time_first: the tokens are (sequence, batch).
        at_close: called when it is closed, with whether the forward has come to its end.
        previous: the frame of the forward within which this one runs (a hook that calls the model again), or None.
    """

    def __init__(self, training: bool, adapter_names: Sequence[str] | None = None) -> None:
        self.training = training
        self.previous: RoutingFrame | None = None
        self._callers: dict[int, FrameType] = {}  # by depth, the Python frame from which the owner's forward is called
        self.adapter_names = adapter_names
        self.given: Mapping[str, GivenExperts] = NOTHING_GIVEN
        self.routings: dict[str, Routing] = {}
        self.shared: dict[str, Routing] = {}
        self.attention_mask: torch.Tensor | None = None
        self.inputs = ForwardInputs()
        self.num_items_in_batch: Any = None
        self.earlier: tuple[RoutingFrame, ...] = ()
        self.opened_at = self.deepest = 0  # which owner opened it, which is the innermost entered since
        self.used: set[str] = set()
        self.trained: set[str] = set()
        self.paused: list[nn.Module] = []
        self.at_close: list[Callable[[bool], None]] = []
        self.relays: dict[str, Relay] = {}
        self.shared_inputs: Any = None
        self.merged: bool | None = None
        self.time_first = False
        self._rows: dict[tuple[str, int], torch.Tensor] = {}

    def called_from(self, depth: int, caller: FrameType) -> None:
        """The owner at `depth` has been called, from `caller`."""
        self._callers[depth] = caller

    def continues(self, earlier: RoutingFrame, depth: int) -> None:
        """This frame is of another pass, of the owner at `depth`, of the forward that `earlier` is of."""
        self.num_items_in_batch, self.at_close = earlier.num_items_in_batch, earlier.at_close
        self.given = earlier.given
        self.earlier, self.paused = (*earlier.earlier, earlier), [*earlier.paused, *self.paused]
        self._callers = {outer: caller for outer, caller in earlier._callers.items() if outer < depth}

    def is_running(self) -> bool:
        """Whether the forward that this is the frame of is still running."""
        return self.opened_at < 0 or self.runs(self.opened_at)  # a block's second run ends within a `with`

    def runs(self, depth: int) -> bool:
        """Whether the forward of the owner at `depth` that this frame knows of is still running.

        No hook runs when a forward is left by a KeyboardInterrupt, so being open is not enough. Python refuses to clear the
        frame of a call that is running; where it is not, what the call left in memory is let go of. (Compiled forwards have
        no such frame: what is open runs.)
        """
        caller = self._callers.get(depth)
        if caller is None:
            return depth == self.opened_at
        try:
            caller.clear()
        except RuntimeError:
            return True
        del self._callers[depth]
        return False

    def served_rows(self, adapter: str, num_served: int) -> tuple[int, torch.Tensor] | None:
        """(number of tokens in the batch, indices of the `num_served` that `adapter` serves) in a mixed batch, else None."""
        rows_by_total = ((total, rows) for (name, total), rows in self._rows.items() if name == adapter)
        return next(((total, rows) for total, rows in rows_by_total if rows.numel() == num_served), None)

    def rows(self, adapter: str, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Indices (int64) of the tokens that `adapter` serves in a mixed batch, of `num_tokens` tokens in all."""
        assert self.adapter_names is not None
        key = (adapter, num_tokens)
        if key not in self._rows:
            samples = len(self.adapter_names)
            if samples == 0 or num_tokens % samples:
                raise ValueError(
                    f"adapter_names has {samples} entries, but the batch holds {num_tokens} tokens: give one name per sample."
                )
            chosen = [sample for sample, name in enumerate(self.adapter_names) if name == adapter]
            each = num_tokens // samples  # tokens of one sample, beams included
            first = torch.tensor(chosen, dtype=torch.int64, device=device) * each
            self._rows[key] = (first.unsqueeze(-1) + torch.arange(each, device=device)).flatten()
        return self._rows[key]

    def context(self, adapter: str, options: RoutingOptions, token_shape: torch.Size, device: torch.device) -> Context:
        """The tokens [*token_shape] of this forward as sequences, for an adapter with `router_decay`."""
        served = None if self.adapter_names is None else self.served_rows(adapter, token_shape.numel())
        return Context(self.inputs, adapter, options, token_shape, served, device)

    def real_tokens(self, adapter: str, routing: Routing) -> torch.Tensor:
        """float32 [T, 1]: 1 for real tokens, 0 for padding. Without a mask (packed, padding-free) all tokens are real."""
        tokens, device = routing.token_shape.numel(), routing.experts.device
        mask = self.attention_mask
        rows = self.served_rows(adapter, tokens)
        total = tokens if rows is None else rows[0]
        if isinstance(mask, torch.Tensor):
            if mask.dim() == 4:
                mask = _keys_in_use(mask, total // max(mask.shape[0], 1))
            if mask.dim() == 2 and mask.shape[0] > 0:
                per_sample = total // mask.shape[0]
                mask = mask[:, mask.shape[1] - per_sample :]  # cached decoding: the mask covers the past too
                if mask.shape.numel() == total:
                    real = (mask.T if self.time_first else mask).reshape(-1, 1).to(device=device, dtype=torch.float32)
                    return real if rows is None else real[rows[1]]
        return torch.ones((tokens, 1), dtype=torch.float32, device=device)


def _keys_in_use(mask: torch.Tensor, length: int) -> torch.Tensor:
    """From an attention's own mask [batch, heads, queries, keys]: bool [batch, length], which of the newest `length` keys anyone
    may attend to. A static cache has places behind them that nobody attends to yet."""
    keys = attended_keys(mask)
    places = torch.arange(keys.shape[1], device=keys.device)
    first = ((places + 1) * keys).amax() - length if keys.numel() else places.new_zeros(())
    chosen = first.clamp(min=0) + torch.arange(min(length, keys.shape[1]), device=keys.device)
    return keys.index_select(1, chosen)


class _OfThread:
    """The frame of the forward in flight, names for mixed batches, given experts, and those of the last forward that got them
    with its batch."""

    def __init__(self) -> None:
        self.frame: RoutingFrame | None = None
        self.adapter_names: Sequence[str] | None = None
        self.given: Mapping[str, GivenExperts] = NOTHING_GIVEN
        self.last_given: Mapping[str, GivenExperts] = NOTHING_GIVEN


class _ThreadState(threading.local):
    """`own` is the thread's (threading.local runs __init__ in each). What changes is an attribute of that object and not of this
    one: of a class derived from threading.local, compiled code writes attributes where nobody reads them (torch 2.11 to 2.13)."""

    def __init__(self) -> None:
        self.own = _OfThread()


class _Current(threading.local):
    """Per thread, what fused layers look at, instead of at the state that they share: one object that is reached from every
    layer makes dynamo guard it once for each.

    Attributes:
        frames: of the fused models' forwards in flight, by `RoutingState.key`.
        results: what the first linear of a group has computed for the others, by `fused_slot`: (input, result, adapter, version
            of the input, None where writes are not counted).
    """

    def __init__(self) -> None:
        self.frames: dict[int, RoutingFrame] = {}
        self.results: dict[int, tuple[torch.Tensor, torch.Tensor, str, int | None]] = {}


current = _Current()


_tracing_context = torch._guards.TracingContext.try_get


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traced() -> bool:
    """Whether a compiler is tracing this code. For hooks: where they are outside of what is compiled, dynamo leaves them to
    Python, but not if they ask torch.compiler.is_compiling(): it would then guard what they read, at every step. (No name here
    is a module of torch's, or dynamo would compile this function by itself.)"""
    return _tracing_context() is not None


_keys = itertools.count()


class RoutingState:
    """What all adapted layers of one backbone share: the current frame (per thread), and who wants to know.

    Attributes:
        key: of this backbone in `current.frames`.
        fused: its layers are fused; they look for the frame in `current`.
        router_layers: the layer that holds the router, by adapter name.
        recorders: of the `record_routing()` blocks in progress.
        hooks: what `hooks.connect` has put on the backbone, or None.
        training_groups: linears that receive the same tensor, once a forward that trained has shown them.
        time_first: the backbone runs its tokens as (sequence, batch).
    """

    def __init__(self, time_first: bool = False) -> None:
        self._local = _ThreadState()
        self.key = next(_keys)  # a copy of the model has it too: their forwards do not run within each other
        self.fused = False
        self.router_layers: dict[str, Any] = {}
        self.recorders: list[RoutingRecorder] = []
        self.hooks: Any = None
        self.training_groups: Any = None
        self.time_first = time_first

    def __getstate__(self) -> dict[str, Any]:  # copy.deepcopy and pickle: everything but the frames in flight
        return {**self.__dict__, "_local": None, "recorders": [], "training_groups": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=_ThreadState())

    @property
    def frame(self) -> RoutingFrame | None:
        """The frame of the forward that this thread is in, or None."""
        return self._local.own.frame

    @property
    def adapter_names(self) -> Sequence[str] | None:
        """The names of the mixed batch that this thread is in, one per sample, or None."""
        return self._local.own.adapter_names

    def frame_or_outside(self, compiling: bool = True) -> RoutingFrame:
        """The frame of the forward that this thread is in; if it is in none, one that is good for shared experts only
        (`generate` calls the encoder of an encoder-decoder model by itself).

        Args:
            compiling: False: it is known that no compiler traces this call, which takes less time.
        """
        frame = self.running_frame(compiling)
        if frame is None:
            frame = RoutingFrame(False, self._local.own.adapter_names)
            frame.opened_at = OUTSIDE
        return frame

    def running_frame(self, compiling: bool = True) -> RoutingFrame | None:
        """The frame of the forward that this thread is in, or None. Frames of forwards that have ended without a word (a
        KeyboardInterrupt, a thread that was told to stop) are closed first.

        Args:
            compiling: as above.
        """
        frame = self._local.own.frame
        while not (frame is None or (compiling and traced()) or frame.is_running()):
            self.close_frame(frame, False)
            frame = self._local.own.frame
        return frame

    @contextmanager
    def sample_adapters(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Within it, forwards of this thread use `adapter_names`, one per sample."""
        previous = self._local.own.adapter_names
        self._local.own.adapter_names = adapter_names
        try:
            yield
        finally:
            self._local.own.adapter_names = previous

    @property
    def given(self) -> Mapping[str, GivenExperts]:
        """The experts that forwards of this thread are told to use, by adapter name."""
        return self._local.own.given

    @property
    def last_given(self) -> Mapping[str, GivenExperts]:
        """The experts that this thread's last forward used which got them with its batch."""
        return self._local.own.last_given

    def give_with_batch(self, frame: RoutingFrame, given: Mapping[str, GivenExperts]) -> None:
        """Have the forward of `frame` use the `given` experts, which came with its batch."""
        frame.given = {**frame.given, **given}
        self._local.own.last_given = given

    @contextmanager
    def given_experts(self, given: Mapping[str, GivenExperts]) -> Iterator[None]:
        """Within it, forwards of this thread use the `given` experts, besides those that are given already."""
        previous = self._local.own.given
        self._local.own.given = {**previous, **given}
        try:
            yield
        finally:
            self._local.own.given = previous

    @contextmanager
    def within(self, frame: RoutingFrame) -> Iterator[None]:
        """Make `frame` this thread's frame."""
        previous = self.frame
        self._local.own.frame = frame
        try:
            yield
        finally:
            self._local.own.frame = previous

    def enter(self, frame: RoutingFrame | None) -> None:
        """Make `frame` this thread's frame, from now on; None: it is in none."""
        self._local.own.frame = frame
        if not self.fused:
            return
        if frame is None:
            current.frames.pop(self.key, None)
        else:
            current.frames[self.key] = frame

    def close_frame(self, frame: RoutingFrame, finished: bool) -> None:
        """Go back to the frame before it. `finished`: the forward has come to its end."""
        for module in frame.paused:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        self.enter(frame.previous)
        if self.fused:
            current.results.clear()
        for call in frame.at_close:
            call(finished)
