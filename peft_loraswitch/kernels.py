"""Finds and loads the compiled kernels (csrc/), and calls them.

The library is plain C (csrc/loraswitch.h), loaded with ctypes, so one wheel serves every torch and Python. Loading never
needs a GPU. Without the library, or without a GPU that it runs on, `ops.py` uses PyTorch instead; `why_not()` says why.
The one switch: PEFT_LORASWITCH_KERNELS=0 in the environment turns the kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p, sizeof
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

SWITCH = "PEFT_LORASWITCH_KERNELS"
LIBRARY = Path(__file__).with_name("libloraswitch.so")

# csrc/loraswitch.h; tests compare these with the header
ABI_VERSION = 4
MAX_GROUP, MAX_TOP_K, MAX_EXPERTS, MAX_RANK, FAST_TOKENS = 8, 8, 256, 256, 32
TUNING_STREAM, TUNING_REGISTERS, TUNING_PANEL, TUNING_TWO_LAUNCHES, TUNING_IMPATIENT = 1, 2, 3, 4, 8
TUNING_NARROW, TUNING_WIDE = 16, 32
WORKSPACE_BYTES = 32 << 20  # a captured model of 32 layers takes 2 KiB at rank 8, 114 KiB at rank 64
FAST_PATH, GENERIC_PATH, MANY_PATH = 0, 1, 2
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Item(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("base", c_void_p),
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("out", c_void_p),
        ("scaling", c_float),
        ("out_features", c_int32),
        ("rank", c_int32),
        ("reserved", c_int32),
    ]


class Group(Structure):
    _fields_ = [
        ("items", Item * MAX_GROUP),
        ("x", c_void_p),
        ("experts", c_void_p),
        ("gates", c_void_p),
        ("hidden", c_void_p),
        ("n_items", c_int32),
        ("tokens", c_int32),
        ("in_features", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("dtype", c_int32),
        ("transposed", c_int32),
        ("device", c_int32),
        ("tuning", c_int32),
        ("reserved", c_int32),
    ]


class MergeItem(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("source", c_void_p),
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("first_tile", c_int64),
        ("scaling", c_float),
        ("out_features", c_int32),
        ("in_features", c_int32),
        ("rank", c_int32),
        ("transposed", c_int32),
        ("reserved", c_int32),
    ]


class MergeArgs(Structure):
    _fields_ = [
        ("items", c_void_p),
        ("tile_item", c_void_p),
        ("experts", c_void_p),
        ("gates", c_void_p),
        ("old_experts", c_void_p),
        ("old_gates", c_void_p),
        ("n_tiles", c_int64),
        ("n_items", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("dtype", c_int32),
        ("fast", c_int32),
        ("device", c_int32),
        ("max_rank", c_int32),
        ("reserved", c_int32),
    ]


class ExpandItem(Structure):
    _fields_ = [
        ("lora_b", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("scaling", c_float),
        ("out_features", c_int32),
        ("rank", c_int32),
        ("reserved", c_int32),
    ]


class ExpandArgs(Structure):
    _fields_ = [
        ("items", ExpandItem * MAX_GROUP),
        ("hidden", c_void_p),
        ("experts", c_void_p),
        ("gates", c_void_p),
        ("n_items", c_int32),
        ("tokens", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("dtype", c_int32),
        ("device", c_int32),
    ]


SIGNATURES = {
    "ls_abi_version": (c_int, []),
    "ls_build_info": (c_char_p, []),
    "ls_error_string": (c_char_p, [c_int]),
    "ls_device_count": (c_int, [POINTER(c_int)]),
    "ls_device_supported": (c_int, [c_int]),
    "ls_driver_version": (c_int, [POINTER(c_int)]),
    "ls_router": (c_int, [c_void_p] * 4 + [c_int32] * 8 + [c_void_p]),
    "ls_set_workspace": (c_int, [c_int32, c_void_p, c_int64]),
    "ls_workspace_left": (c_int64, [c_int32]),
    "ls_hidden_elements": (c_int64, [POINTER(Group)]),
    "ls_linear_path": (c_int, [POINTER(Group)]),
    "ls_linear": (c_int, [POINTER(Group), c_void_p]),
    "ls_expand_takes": (c_int, [POINTER(ExpandArgs)]),
    "ls_expand": (c_int, [c_char_p, c_void_p]),  # a struct as bytes: filled in by `struct`, faster than field by field
    "ls_widen_takes": (c_int, [POINTER(ExpandArgs)]),
    "ls_widen": (c_int, [c_char_p, c_void_p]),
    "ls_merge_tiles": (c_int64, [c_int32, c_int32]),
    "ls_merge_is_fast": (c_int, [POINTER(MergeItem), c_int32]),
    "ls_merge": (c_int, [POINTER(MergeArgs), c_void_p]),
}


# ---------------------------------------------------------------------------------------------- finding and loading


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None) or (None, why not). Needs no GPU."""
    if os.environ.get(SWITCH, "1") == "0":
        return None, f"turned off by {SWITCH}=0"
    if not LIBRARY.exists():
        return None, (
            "this installation has no compiled kernels (a pure-Python wheel or a source checkout): install with nvcc 12.8 "
            "or newer at hand, or run `python setup.py build_kernels` in the checkout"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    if (version := library.ls_abi_version()) != ABI_VERSION:
        return None, f"{LIBRARY.name} has ABI {version}, this package needs {ABI_VERSION}: reinstall, or build it again"
    return library, None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it cannot be loaded; the message says why.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"The LoRA-Switch kernels are not available: {reason}.")
    return loaded


@functools.cache
def why_not(device: int | None = None) -> str | None:
    """Why the kernels cannot run on CUDA device `device` (default: on any); None if they can."""
    loaded, reason = _load()
    if loaded is None:
        return reason
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "this torch has no CUDA"
        return "torch finds no usable CUDA GPU"
    count = c_int()
    if code := loaded.ls_device_count(byref(count)):
        hint = " (the kernels need driver 580 or newer)" if code == 35 else ""
        return f"CUDA error {code}: {_error_string(code)}{hint}"
    devices = range(torch.cuda.device_count()) if device is None else [device]
    codes = [loaded.ls_device_supported(index) for index in devices]
    if not codes or all(codes):
        return f"the library ({build_info()}) has no code for this GPU: {_error_string(codes[0]) if codes else 'none'}"
    return None


def available(device: int | None = None) -> bool:
    """Whether the kernels run on CUDA device `device` (default: on any)."""
    return why_not(device) is None


def build_info() -> str:
    """Compiler and architectures of the loaded library."""
    return library().ls_build_info().decode()


def _error_string(code: int) -> str:
    return library().ls_error_string(code).decode()


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"LoRA-Switch kernel {what} failed with error {code}: {_error_string(code)}.")


def _stream(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


_workspaces: dict[int, torch.Tensor] = {}
_workspaces_lock = threading.Lock()


def give_workspace(device: int) -> None:
    """Let groups of linears on CUDA device `device` run as one launch: once per process, 32 MiB for good.

    Not while a CUDA graph is captured or compiled code runs: graphs would take the memory for theirs.
    """
    with _workspaces_lock:
        if device in _workspaces:
            return
        zeroed = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=torch.device("cuda", device))
        torch.cuda.current_stream(device).synchronize()  # launches of any stream will use it
        _check(library().ls_set_workspace(device, zeroed.data_ptr(), WORKSPACE_BYTES), "ls_set_workspace")
        _workspaces[device] = zeroed


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


# ------------------------------------------------------------------------------------------------------------ calls


def router(x: torch.Tensor, weight: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in], weight [E, in], contiguous -> experts int64 [T, top_k], gates float32 [T, top_k]."""
    tokens, num_experts, device = x.shape[0], weight.shape[0], x.get_device()
    experts = torch.empty((tokens, top_k), dtype=torch.int64, device=x.device)
    gates = torch.empty((tokens, top_k), dtype=torch.float32, device=x.device)
    code = library().ls_router(
        x.data_ptr(), weight.data_ptr(), experts.data_ptr(), gates.data_ptr(), tokens, x.shape[1], num_experts, top_k,
        int(normalize), DTYPES[x.dtype], DTYPES[weight.dtype], device, _stream(device),
    )  # fmt: skip
    _check(code, "ls_router")
    return experts, gates


class PackedGroup:
    """A group of linears as the kernels take it, packed once; a call fills in only what changes from token to token.

    Args:
        weights: [out, in] each, or [in, out] if `transposed`; None: the linear has no weight, only a base result.
        biases: [out] or None, each.
        lora_a, lora_b: [E, r, in] and [E, out, r], each, in the dtype of x; r = 0: no adapter on that linear.
        scalings: one float each.
        tuning: 0, or a kernel shape to try in a benchmark.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor | None],
        biases: Sequence[torch.Tensor | None],
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        scalings: Sequence[float],
        transposed: bool = False,
        tuning: int = 0,
    ) -> None:
        self.group = group = Group()
        # Kept alive, and looked at before each launch: `model.to(...)` gives a parameter new memory behind our back.
        self.tensors = [t for t in (*weights, *biases, *lora_a, *lora_b) if t is not None]
        self.pointers = [t.data_ptr() for t in self.tensors]
        self.dtype, self.device = lora_a[0].dtype, lora_a[0].device
        self.out_features = [b.shape[1] for b in lora_b]
        group.n_items = len(lora_a)
        group.num_experts, _, group.in_features = lora_a[0].shape
        group.dtype, group.transposed, group.device = DTYPES[self.dtype], int(transposed), self.device.index or 0
        group.tuning = tuning
        for item, w, bias, a, b, s in zip(group.items, weights, biases, lora_a, lora_b, scalings, strict=False):
            item.weight = None if w is None else w.data_ptr()
            item.bias = None if bias is None else bias.data_ptr()
            item.out_features, item.rank, item.scaling = b.shape[1], a.shape[1], s
            if item.rank:
                item.lora_a, item.lora_b = a.data_ptr(), b.data_ptr()
        self._hidden_sizes: dict[tuple[int, int], int] = {}
        if self.device.type == "cuda" and 0 <= library().ls_workspace_left(group.device) < WORKSPACE_BYTES // 64:
            _log_once(
                f"LoRA-Switch: so many CUDA graphs have been captured on device {group.device} in this process that more will "
                "run two launches for each group of linears instead of one (about 2 % slower)."
            )

    def is_current(self) -> bool:
        """Whether every tensor is still where it was when the group was packed."""
        return [t.data_ptr() for t in self.tensors] == self.pointers

    def __call__(
        self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, bases: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """x [..., in], experts and gates [..., k], contiguous; bases [..., out] -> [..., out] for each linear."""
        group = Group.from_buffer_copy(self.group)  # this call's own: other threads may be calling too
        reference = byref(group)
        top_k = experts.shape[-1]
        shape = x.shape[:-1]
        tokens = group.tokens = experts.numel() // top_k if top_k else x.numel() // x.shape[-1]
        group.top_k = top_k
        size = self._hidden_sizes.get((tokens, top_k))
        if size is None:
            size = self._hidden_sizes[tokens, top_k] = library().ls_hidden_elements(reference)
        hidden = x.new_empty(size)
        results = [x.new_empty((*shape, out)) for out in self.out_features]
        group.x, group.experts, group.gates = x.data_ptr(), experts.data_ptr(), gates.data_ptr()
        group.hidden = hidden.data_ptr()
        for item, result in zip(group.items, results, strict=False):
            item.out = result.data_ptr()
        for item, base in zip(group.items, bases, strict=False):
            item.base = base.data_ptr()
        _check(library().ls_linear(reference, _stream(group.device)), "ls_linear")
        return results

    def path(self, x: torch.Tensor, experts: torch.Tensor) -> int:
        """FAST_PATH, GENERIC_PATH or MANY_PATH: what a call with these would take (float32 always takes the generic one)."""
        group = Group.from_buffer_copy(self.group)
        group.tokens, group.top_k = x.numel() // x.shape[-1], experts.shape[-1]
        group.x = group.experts = group.gates = group.hidden = x.data_ptr()
        for item in group.items:
            item.out = x.data_ptr()
        return library().ls_linear_path(byref(group))


def warn_if_generic(packed: PackedGroup, x: torch.Tensor, experts: torch.Tensor) -> None:
    """One line of log, once per reason, where 16-bit linears must take the slower path."""
    if packed.path(x, experts) == GENERIC_PATH and packed.dtype != torch.float32:
        ranks = sorted({item.rank for item in packed.group.items[: packed.group.n_items]})
        layout = "Conv1D [in, out]" if packed.group.transposed else "[out, in]"
        _log_once(
            f"LoRA-Switch: the slower kernel serves linears with in_features={packed.group.in_features}, ranks {ranks}, "
            f"{layout} weights; the fast one needs [out, in] weights, in_features and ranks divisible by 8, memory "
            f"aligned to 16 bytes and at most {FAST_TOKENS} tokens."
        )


class Expansion(NamedTuple):
    """A group of linears as `expand` and `widen` take it.

    Attributes:
        template: an `ExpandArgs` with all that does not differ from call to call.
        expands, widens: whether the kernel takes them.
        outs, ranks: of each linear, the latter those of all its experts together.
    """

    template: bytes
    expands: bool
    widens: bool
    outs: list[int]
    ranks: list[int]


_CALL = Struct("PPPii")  # hidden, experts, gates, n_items, tokens: neighbours in `ExpandArgs`
assert (
    ExpandArgs.gates.offset == ExpandArgs.hidden.offset + 16
    and ExpandArgs.tokens.offset == ExpandArgs.gates.offset + 12
)
_POINTER = Struct("P")
_OUTPUTS = [ExpandArgs.items.offset + i * sizeof(ExpandItem) + ExpandItem.out.offset for i in range(MAX_GROUP)]


empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # what compiled code calls


def _empty(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`like.new_empty((rows, columns))` in less time."""
    if empty_strided_cuda is not None and torch._C._cuda_getDevice() == like.get_device():
        return empty_strided_cuda((rows, columns), (columns, 1), like.dtype)
    return like.new_empty((rows, columns))


@functools.lru_cache(maxsize=4096)
def _expansion(
    linears: tuple[tuple[int, int | None, torch.Size, float], ...], dtype: torch.dtype, top_k: int, device: int
) -> Expansion:
    """linears: address of lora_b, address of the bias, shape [E, out, r] of lora_b, scaling."""
    args = ExpandArgs(
        n_items=len(linears), num_experts=linears[0][2][0], top_k=top_k, dtype=DTYPES[dtype], device=device
    )
    for item, (lora_b, bias, (_, out, rank), scaling) in zip(args.items, linears, strict=False):
        item.lora_b, item.bias, item.out_features, item.rank, item.scaling = lora_b, bias, out, rank, scaling
    takes = [bool(function(byref(args))) for function in (library().ls_expand_takes, library().ls_widen_takes)]
    outs, ranks = ([shape[axis] for _, _, shape, _ in linears] for axis in (1, 2))
    return Expansion(bytes(args), takes[0], takes[1], outs, [linears[0][2][0] * rank for rank in ranks])


def expansion(
    lora_b: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], scalings: Sequence[float], top_k: int
) -> Expansion:
    """lora_b [E, out, r] each, contiguous, with the same E; biases [out] or None."""
    linears = [
        (b.data_ptr(), None if bias is None else bias.data_ptr(), b.shape, scaling)
        for b, bias, scaling in zip(lora_b, biases, scalings, strict=True)
    ]
    return _expansion(tuple(linears), lora_b[0].dtype, top_k, lora_b[0].get_device())


def _pack_outputs(buffer: bytearray, results: list[torch.Tensor]) -> None:
    for result, offset in zip(results, _OUTPUTS, strict=False):
        _POINTER.pack_into(buffer, offset, result.data_ptr())


def expand(group: Expansion, hidden: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> list[torch.Tensor]:
    """hidden [T, sum of E * r], experts, gates [T, k], all contiguous -> [T, out] for each linear. One launch, if
    `group.expands`."""
    tokens, buffer = hidden.shape[0], bytearray(group.template)
    results = [_empty(hidden, tokens, out) for out in group.outs]
    _CALL.pack_into(
        buffer, ExpandArgs.hidden.offset, hidden.data_ptr(), experts.data_ptr(), gates.data_ptr(), len(results), tokens
    )
    _pack_outputs(buffer, results)
    _check(library().ls_expand(bytes(buffer), _stream(hidden.get_device())), "ls_expand")
    return results


def widen(group: Expansion, like: torch.Tensor) -> list[torch.Tensor]:
    """lora_b of all experts as one matrix, [out, E * r] for each linear, dtype and device of `like`. One launch, if
    `group.widens`."""
    buffer = bytearray(group.template)
    results = [_empty(like, out, ranks) for out, ranks in zip(group.outs, group.ranks, strict=True)]
    _pack_outputs(buffer, results)
    _check(library().ls_widen(bytes(buffer), _stream(like.get_device())), "ls_widen")
    return results


class MergeTable:
    """Every adapted linear of a model on one device, as `ls_merge` takes them: packed once, in device memory.

    Args:
        weights: written, [out, in] or [in, out] if transposed[i].
        sources: what the experts are added to, same shapes; may be the weights themselves (in place).
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        scalings: Sequence[float],
        transposed: Sequence[bool],
    ) -> None:
        lib = library()
        self.tensors = [*weights, *sources, *lora_a, *lora_b]
        self.pointers, self.scalings = [t.data_ptr() for t in self.tensors], list(scalings)
        self.device, dtype = weights[0].device, DTYPES[weights[0].dtype]
        items = (MergeItem * len(weights))()
        self.args = args = MergeArgs(dtype=dtype, n_items=len(weights), device=self.device.index or 0, fast=1)
        args.num_experts = lora_a[0].shape[0]
        counts = []
        for i, item in enumerate(items):
            item.weight, item.source = weights[i].data_ptr(), sources[i].data_ptr()
            item.lora_a, item.lora_b = lora_a[i].data_ptr(), lora_b[i].data_ptr()
            item.scaling, item.transposed, item.first_tile = scalings[i], int(transposed[i]), args.n_tiles
            _, item.rank, item.in_features = lora_a[i].shape
            item.out_features = lora_b[i].shape[1]
            args.max_rank = max(args.max_rank, item.rank)
            counts.append(lib.ls_merge_tiles(weights[i].shape[0], weights[i].shape[1]))
            args.n_tiles += counts[-1]
            args.fast = int(args.fast and lib.ls_merge_is_fast(byref(item), dtype))
        if not args.fast and weights[0].dtype != torch.float32:
            _log_once(
                "LoRA-Switch: the slower merge kernel is used: a size, an alignment or a Conv1D rules out the fast one."
            )
        index = torch.arange(len(weights), dtype=torch.int32)
        self.tile_item = index.repeat_interleave(torch.tensor(counts)).to(self.device)
        self.items = torch.frombuffer(bytearray(items), dtype=torch.uint8).to(self.device)
        args.items, args.tile_item = self.items.data_ptr(), self.tile_item.data_ptr()

    def is_current(self) -> bool:
        """Whether every tensor is still where it was when the table was made."""
        return [t.data_ptr() for t in self.tensors] == self.pointers

    def __call__(
        self,
        experts: torch.Tensor,
        gates: torch.Tensor,
        old_experts: torch.Tensor | None = None,
        old_gates: torch.Tensor | None = None,
    ) -> None:
        """experts int64 [k], gates float32 [k] in; those of `old_experts` and `old_gates` out. One launch."""
        args = MergeArgs.from_buffer_copy(self.args)
        args.experts, args.gates, args.top_k = experts.data_ptr(), gates.data_ptr(), experts.shape[-1]
        args.old_experts = None if old_experts is None else old_experts.data_ptr()
        args.old_gates = None if old_gates is None else old_gates.data_ptr()
        _check(library().ls_merge(byref(args), _stream(args.device)), "ls_merge")
