"""A stand-in for the CUDA library that computes, on the host, from the struct that it is given: a wrong pointer, size or offset
is a wrong result."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from kernel_oracle import from_4bit, from_int4
from peft_loraswitch import kernels

KINDS = {
    torch.float32: ctypes.c_float, torch.float16: ctypes.c_int16, torch.bfloat16: ctypes.c_int16, torch.int64: ctypes.c_int64,
    torch.uint8: ctypes.c_uint8, torch.int32: ctypes.c_int32,
}  # fmt: skip


def view(pointer: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The memory at `pointer` as a tensor; writing to it writes there."""
    size = int(torch.Size(shape).numel())
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((KINDS[dtype] * size).from_address(pointer), dtype=dtype).view(shape)


def dtype_of(args: Any) -> torch.dtype:
    return next(dtype for dtype, number in kernels.DTYPES.items() if number == args.dtype)


class StandIn:
    """What `DirectGroup` and `PackedGroup` use of the library, on the host; sums are float32."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []  # (linears, tokens) of each
        self.expanded: list[tuple[int, int]] = []  # the same of ls_expand; of ls_widen, with -1 tokens
        self.most_ranks = 128
        self.fewest_tokens = 10**9  # that ls_linear takes as "many"
        self.takes_four_bits = True

    def __getitem__(self, name: str) -> Any:
        assert name == "ls_linear"

        class Function:  # carries the attributes that ctypes functions have
            restype: Any = None
            argtypes: Any = None

            def __call__(_, group: bytes, stream: int) -> int:
                return self.linear(kernels.abi.Group.from_buffer_copy(group))

        return Function()

    def ls_hidden_elements(self, group: Any) -> int:
        return 64

    def ls_linear_path(self, group: Any) -> int:
        args = group._obj
        assert args.x and args.experts and args.gates and args.hidden and args.items[0].out, "the library refuses those"
        if args.items[0].format:
            reads = self.takes_four_bits and args.tokens <= kernels.FAST_TOKENS and args.x % 16 == 0
            return kernels.FAST_PATH if reads else -1
        return kernels.SM90_PATH if args.tokens >= self.fewest_tokens else kernels.FAST_PATH

    def linear(self, group: kernels.abi.Group) -> int:
        tokens, k, width, experts = group.tokens, group.top_k, group.in_features, group.num_experts
        self.calls.append((group.n_items, tokens))
        dtype = dtype_of(group)
        form = group.items[0].format
        assert not form or (dtype != torch.float32 and tokens <= kernels.FAST_TOKENS and group.x % 16 == 0)
        assert all(item.format == form for item in group.items[: group.n_items])
        assert bool(group.code) == (form == kernels.FORMAT_CODE) and (
            form != kernels.FORMAT_INT4 or dtype == torch.bfloat16
        )
        x = view(group.x, tokens, width, dtype=dtype).float()
        chosen, gates = view(group.experts, tokens, k, dtype=torch.int64), view(group.gates, tokens, k)
        view(group.hidden, 64, dtype=dtype).fill_(float("nan"))
        for item in group.items[: group.n_items]:
            out, rank = item.out_features, item.rank
            result = torch.zeros(tokens, out)
            if form == kernels.FORMAT_INT4:
                rows, padded = -(-out // 8) * 8, -(-width // 1024) * 1024
                tiles = view(item.weight, rows // 8, padded // 128, 32, 4, dtype=torch.int32)
                scales = view(item.scales, padded // group.scale_block, rows, 2, dtype=torch.bfloat16)
                result += x @ from_int4(tiles, scales, out, width).float().T
            elif form == kernels.FORMAT_CODE:
                weight = view(item.weight, out, width // 2, dtype=torch.uint8)
                scales = view(item.scales, out, width // group.scale_block)
                result += x @ from_4bit(weight, scales, view(group.code, 16)).float().T
            elif item.weight:
                weight = view(item.weight, *((width, out) if group.transposed else (out, width)), dtype=dtype).float()
                result += x @ (weight if group.transposed else weight.T)
            if item.base:
                result += view(item.base, tokens, out, dtype=dtype)
            if item.bias:
                result += view(item.bias, out, dtype=dtype)
            a = view(item.lora_a, experts, rank, width, dtype=dtype).float()
            b = view(item.lora_b, experts, out, rank, dtype=dtype).float()
            for t in range(tokens):
                for e, gate in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
                    result[t] += item.scaling * gate * (b[e] @ (a[e] @ x[t]))
            view(item.out, tokens, out, dtype=dtype).copy_(result)
        return 0

    def ls_expand_takes(self, group: Any) -> int:
        args = group._obj
        return int(all(args.num_experts * item.rank <= self.most_ranks for item in args.items[: args.n_items]))

    def ls_widen_takes(self, group: Any) -> int:
        return 1

    def ls_expand(self, group: bytes, stream: int) -> int:
        args = kernels.abi.ExpandArgs.from_buffer_copy(group)
        items, experts, tokens, k = args.items[: args.n_items], args.num_experts, args.tokens, args.top_k
        self.expanded.append((args.n_items, tokens))
        dtype = dtype_of(args)
        width = experts * sum(item.rank for item in items)
        assert args.hidden_stride == width and not any(
            item.base for item in items
        )  # what is called with others is compiled
        hidden = view(args.hidden, tokens, width, dtype=dtype)
        chosen, gates = view(args.experts, tokens, k, dtype=torch.int64), view(args.gates, tokens, k)
        for item, part in zip(items, hidden.split([experts * item.rank for item in items], 1), strict=True):
            out = item.out_features
            b, result = view(item.lora_b, experts, out, item.rank, dtype=dtype), torch.zeros(tokens, out)
            if item.bias:
                result += view(item.bias, out, dtype=dtype)
            for j in range(k):
                of_chosen = part.view(tokens, experts, item.rank)[torch.arange(tokens), chosen[:, j]]
                added = torch.einsum("tor,tr->to", b[chosen[:, j]], of_chosen)
                result += item.scaling * gates[:, j, None] * added
            view(item.out, tokens, out, dtype=dtype).copy_(result)
        return 0

    def ls_widen(self, group: bytes, stream: int) -> int:
        args = kernels.abi.ExpandArgs.from_buffer_copy(group)
        self.expanded.append((args.n_items, -1))
        experts, dtype = args.num_experts, dtype_of(args)
        for item in args.items[: args.n_items]:
            out, rank = item.out_features, item.rank
            b = view(item.lora_b, experts, out, rank, dtype=dtype)
            view(item.out, out, experts * rank, dtype=dtype).copy_(b.transpose(0, 1).flatten(1))
        return 0
