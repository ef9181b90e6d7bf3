"""Calls of the kernels: tensors in, tensors out. The arguments are checked before, in `ops`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import byref, sizeof
from struct import Struct
from typing import NamedTuple

import torch

from .abi import (
    DTYPES,
    FAST_TOKENS,
    FORMAT_CODE,
    FORMAT_INT4,
    GENERIC_PATH,
    INT4_FEATURES,
    MAX_GROUP,
    WORKSPACE_BYTES,
    ExpandArgs,
    ExpandItem,
    Group,
    MergeArgs,
    MergeItem,
)  # fmt: skip
from .loader import check, library, log_once, stream_of


def router(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, normalize: bool, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in], weight [E, in], contiguous -> experts int64 [T, top_k], gates float32 [T, top_k]."""
    tokens, num_experts, device = x.shape[0], weight.shape[0], x.get_device()
    experts = torch.empty((tokens, top_k), dtype=torch.int64, device=x.device)
    gates = torch.empty((tokens, top_k), dtype=torch.float32, device=x.device)
    code = library().ls_router(
        x.data_ptr(), weight.data_ptr(), experts.data_ptr(), gates.data_ptr(), tokens, x.shape[1], num_experts, top_k,
        int(normalize), top_p, DTYPES[x.dtype], DTYPES[weight.dtype], device, stream_of(device),
    )  # fmt: skip
    check(code, "ls_router")
    return experts, gates


def router_context(
    x: torch.Tensor, weight: torch.Tensor, previous: torch.Tensor, decay: float, top_k: int, normalize: bool,
    real: torch.Tensor | None, top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [T, in], weight [E, in], previous float32 [T, E + 1], real bool [T] or None, contiguous -> experts int64 [T, top_k],
    gates float32 [T, top_k], sums float32 [T, E + 1]."""
    tokens, num_experts, device = x.shape[0], weight.shape[0], x.get_device()
    experts = torch.empty((tokens, top_k), dtype=torch.int64, device=x.device)
    gates = torch.empty((tokens, top_k), dtype=torch.float32, device=x.device)
    sums = torch.empty_like(previous)
    code = library().ls_router_context(
        x.data_ptr(), weight.data_ptr(), previous.data_ptr(), None if real is None else real.data_ptr(),
        experts.data_ptr(), gates.data_ptr(), sums.data_ptr(), decay, tokens, x.shape[1], num_experts, top_k,
        int(normalize), top_p, DTYPES[x.dtype], DTYPES[weight.dtype], device, stream_of(device),
    )  # fmt: skip
    check(code, "ls_router_context")
    return experts, gates, sums


class PackedGroup:
    """A group of linears as the kernels take it, packed once; a call fills in only what changes from token to token.

    Args:
        weights: [out, in] each, or [in, out] if `transposed`; None: the linear has no weight, only a base result. With `scales`
            of 4 bits, with `code` uint8 [out, in / 2], that of the even feature in the higher half of a byte; without it int32
            tiles as torchao packs them (`LS_FORMAT_INT4` in csrc/loraswitch.h).
        biases: [out] or None, each.
        lora_a, lora_b: [E, r, in] and [E, out, r], each, in the dtype of x; r = 0: no adapter on that linear.
        scalings: one float each.
        tuning: 0, or a sum of `TUNING_*`, to test or measure a kernel that would not be chosen.
        scales: for weights of 4 bits, one for each `block` of features: with `code` float32 [out, in / block] each, without it
            bfloat16 [in / block, out, 2], a scale and a zero, in and out padded as the tiles are. For up to `FAST_TOKENS` tokens
            in 16 bits, tiles in bfloat16.
        code: float32 [16]: what a weight's 4 bits stand for, before the scale.
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
        scales: Sequence[torch.Tensor] = (),
        code: torch.Tensor | None = None,
    ) -> None:
        self.group = group = Group()
        self.tensors = [t for t in (*weights, *biases, *lora_a, *lora_b, *scales, code) if t is not None]  # kept alive
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
        if code is not None:
            group.code, group.scale_block = code.data_ptr(), group.in_features // scales[0].shape[1]
        elif scales:
            padded = -(-group.in_features // INT4_FEATURES) * INT4_FEATURES
            group.scale_block = padded // scales[0].shape[0]
        for item, scale in zip(group.items, scales, strict=False):
            item.scales, item.format = scale.data_ptr(), FORMAT_INT4 if code is None else FORMAT_CODE
        self._hidden_sizes: dict[tuple[int, int], int] = {}
        if self.device.type == "cuda" and 0 <= library().ls_workspace_left(group.device) < WORKSPACE_BYTES // 64:
            log_once(
                f"LoRA-Switch: so many CUDA graphs have been captured on device {group.device} in this process that more will "
                "run two launches for each group of linears instead of one: about 2 % slower, by more with 17 to 128 tokens."
            )

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
        check(library().ls_linear(reference, stream_of(group.device)), "ls_linear")
        return results

    def path(self, x: torch.Tensor, experts: torch.Tensor) -> int:
        """FAST_PATH, GENERIC_PATH or SM90_PATH: what a call with these would take (float32 always takes the generic one), or -1:
        no kernel takes it."""
        return self.path_of(x.numel() // x.shape[-1], experts.shape[-1], x.data_ptr())

    def path_of(self, tokens: int, top_k: int, address: int = 256) -> int:
        """The same for so many tokens at `address`, of which nothing is read."""
        group = Group.from_buffer_copy(self.group)
        group.tokens, group.top_k = tokens, top_k
        group.x = group.experts = group.gates = group.hidden = address
        for item in group.items:
            item.out = address
        return library().ls_linear_path(byref(group))


def warn_if_generic(packed: PackedGroup, x: torch.Tensor, experts: torch.Tensor) -> None:
    """One line of log, once per reason, where 16-bit linears must take the slower path."""
    if packed.path(x, experts) == GENERIC_PATH and packed.dtype != torch.float32:
        ranks = sorted({item.rank for item in packed.group.items[: packed.group.n_items]})
        layout = "Conv1D [in, out]" if packed.group.transposed else "[out, in]"
        log_once(
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


_CALL = Struct("PPPqii")  # hidden, experts, gates, hidden_stride, n_items, tokens: neighbours in `ExpandArgs`
assert (
    ExpandArgs.gates.offset == ExpandArgs.hidden.offset + 16
    and ExpandArgs.tokens.offset == ExpandArgs.gates.offset + 20
)
_OUTPUT = Struct("P")
_BASE_OUTPUT = Struct("PPq")  # base, out, base_stride: neighbours in `ExpandItem`
assert ExpandItem.base_stride.offset == ExpandItem.base.offset + 16
_ITEMS = [ExpandArgs.items.offset + i * sizeof(ExpandItem) for i in range(MAX_GROUP)]


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


def _stride(rows: torch.Tensor) -> int:
    """From one row to the next; where there is none, PyTorch has any number, and calls it contiguous."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def expand(
    group: Expansion, hidden: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, bases: Sequence[torch.Tensor] = ()
) -> list[torch.Tensor]:  # fmt: skip
    """hidden [T, sum of E * r], experts, gates [T, k]; bases [T, out] each, or none -> [T, out] for each linear. Experts and
    gates are contiguous, rows of hidden and bases may lie anywhere. One launch, if `group.expands`."""
    tokens, buffer = hidden.shape[0], bytearray(group.template)
    results = [_empty(hidden, tokens, out) for out in group.outs]
    _CALL.pack_into(
        buffer, ExpandArgs.hidden.offset, hidden.data_ptr(), experts.data_ptr(), gates.data_ptr(), _stride(hidden),
        len(results), tokens,
    )  # fmt: skip
    for i, (result, item) in enumerate(zip(results, _ITEMS, strict=False)):
        base, stride = (bases[i].data_ptr(), _stride(bases[i])) if bases else (0, 0)
        _BASE_OUTPUT.pack_into(buffer, item + ExpandItem.base.offset, base, result.data_ptr(), stride)
    check(library().ls_expand(bytes(buffer), stream_of(hidden.get_device())), "ls_expand")
    return results


def widen(group: Expansion, like: torch.Tensor) -> list[torch.Tensor]:
    """lora_b of all experts as one matrix, [out, E * r] for each linear, dtype and device of `like`. One launch, if
    `group.widens`."""
    buffer = bytearray(group.template)
    results = [_empty(like, out, ranks) for out, ranks in zip(group.outs, group.ranks, strict=True)]
    for result, item in zip(results, _ITEMS, strict=False):
        _OUTPUT.pack_into(buffer, item + ExpandItem.out.offset, result.data_ptr())
    check(library().ls_widen(bytes(buffer), stream_of(like.get_device())), "ls_widen")
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
            log_once(
                "LoRA-Switch: the slower merge kernel is used: a size, an alignment or a Conv1D rules out the fast one."
            )
        index = torch.arange(len(weights), dtype=torch.int32)
        self.tile_item = index.repeat_interleave(torch.tensor(counts)).to(self.device)
        self.items = torch.frombuffer(bytearray(items), dtype=torch.uint8).to(self.device)
        args.items, args.tile_item = self.items.data_ptr(), self.tile_item.data_ptr()

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
        check(library().ls_merge(byref(args), stream_of(args.device)), "ls_merge")
