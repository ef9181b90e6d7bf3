"""A stand-in for the CUDA library that computes, on the host, from the struct that it is given: a wrong pointer, size or offset is
a wrong result."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from peft_loraswitch import kernels


def view(pointer: int, *shape: int, kind: Any = ctypes.c_float) -> torch.Tensor:
    """The memory at `pointer` as a tensor; writing to it writes there."""
    size = int(torch.Size(shape).numel())
    dtype = torch.int64 if kind is ctypes.c_int64 else torch.float32
    return torch.frombuffer((kind * size).from_address(pointer), dtype=dtype).view(shape)


class StandIn:
    """What `DirectGroup` and `PackedGroup` use of the library, in float32 on the host."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []  # (linears, tokens) of each
        self.expanded: list[tuple[int, int]] = []  # the same of ls_expand; of ls_widen, with -1 tokens
        self.most_ranks = 128
        self.fewest_tokens = 10**9  # that ls_linear takes as "many"

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
        return kernels.SM90_PATH if args.tokens >= self.fewest_tokens else kernels.FAST_PATH

    def linear(self, group: kernels.abi.Group) -> int:
        tokens, k, width, experts = group.tokens, group.top_k, group.in_features, group.num_experts
        self.calls.append((group.n_items, tokens))
        x = view(group.x, tokens, width)
        chosen, gates = view(group.experts, tokens, k, kind=ctypes.c_int64), view(group.gates, tokens, k)
        view(group.hidden, 64).fill_(float("nan"))
        for item in group.items[: group.n_items]:
            out, rank = item.out_features, item.rank
            result = torch.zeros(tokens, out)
            if item.weight:
                weight = view(item.weight, *((width, out) if group.transposed else (out, width)))
                result += x @ (weight if group.transposed else weight.T)
            if item.base:
                result += view(item.base, tokens, out)
            if item.bias:
                result += view(item.bias, out)
            a, b = view(item.lora_a, experts, rank, width), view(item.lora_b, experts, out, rank)
            for t in range(tokens):
                for e, gate in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
                    result[t] += item.scaling * gate * (b[e] @ (a[e] @ x[t]))
            view(item.out, tokens, out).copy_(result)
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
        hidden = view(args.hidden, tokens, experts * sum(item.rank for item in items))
        chosen, gates = view(args.experts, tokens, k, kind=ctypes.c_int64), view(args.gates, tokens, k)
        for item, part in zip(items, hidden.split([experts * item.rank for item in items], 1), strict=True):
            b, result = (
                view(item.lora_b, experts, item.out_features, item.rank),
                view(item.out, tokens, item.out_features),
            )
            result.copy_(view(item.bias, item.out_features) if item.bias else torch.zeros(item.out_features))
            for j in range(k):
                of_chosen = part.view(tokens, experts, item.rank)[torch.arange(tokens), chosen[:, j]]
                added = torch.einsum("tor,tr->to", b[chosen[:, j]], of_chosen)
                result += item.scaling * gates[:, j, None] * added
        return 0

    def ls_widen(self, group: bytes, stream: int) -> int:
        args = kernels.abi.ExpandArgs.from_buffer_copy(group)
        self.expanded.append((args.n_items, -1))
        for item in args.items[: args.n_items]:
            b = view(item.lora_b, args.num_experts, item.out_features, item.rank)
            view(item.out, item.out_features, args.num_experts * item.rank).copy_(b.transpose(0, 1).flatten(1))
        return 0
