"""Triton kernels compiled for a GPU that need not be there: what the interpreter lets pass, a compiler may refuse.

python tests/tools/compiled_launches.py 90      # the vLLM plugin's kernels, for compute capability 9.0; where Triton is installed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from wgmma_registers import instructions_of, overwritten

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
SHARED_MEMORY = 227 * 1024  # of a block, on sm_90
HOPPER = 9


def command(
    description: str | None, compile_all: Callable[[int], int], check_all: Callable[[], int], argv: list[str]
) -> None:
    """A file of checks as a command: the checks in Triton's interpreter, or with `--compile` for a GPU. Both return how many."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, metavar="CAPABILITY")
    options = parser.parse_args(argv)
    if options.compile:
        print(compile_all(options.compile), "kernels compiled")
    else:
        print(check_all(), "checks passed")


@contextmanager
def compiling(capability: int) -> Iterator[list[str]]:
    """In place of being launched, kernels are compiled for the arguments that they would get. Yields their names."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    compiled: list[str] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        signature: dict[str, str] = {}
        constants, hints = {}, {}
        for place, parameter in enumerate(self.params):
            value = values[parameter.name]
            kind = _type_of(value)
            # As Triton itself does: an int that is 1 is a constant, and what 16 divides is marked.
            if parameter.is_constexpr or kind is None or (type(value) is int and value == 1):
                kind, constants[parameter.name] = "constexpr", value
            elif kind[0] in "*iu" and _address(value) % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
            signature[parameter.name] = kind
        source = ASTSource(self, signature, constants, hints)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.metadata.shared <= SHARED_MEMORY, (self.__name__, made.metadata.shared)
        if capability // 10 == HOPPER and "wgmma.mma_async" in made.asm["ptx"]:
            lines = instructions_of(made.asm["cubin"], knobs.nvidia.nvdisasm.path)
            assert lines and not (bad := overwritten(lines)), (self.__name__, constants, options, bad[:3])
        compiled.append(self.__name__)

    launch = JITFunction.run
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = launch


def _type_of(value: Any) -> str | None:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else None


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def compile_serving_kernels(capability: int) -> list[str]:
    """Every kernel of the plugin, in each dtype, for sizes that 16 divides and sizes that it does not."""
    from peft_loraswitch.vllm_plugin import context_kernel, expand_kernel, route_kernel
    from peft_loraswitch.vllm_plugin.kept_sums import Places
    from peft_loraswitch.vllm_plugin.routing_tables import RoutingTables
    from serving_kernels import grouped

    expand_kernel._is_hopper = lambda device: capability // 10 == HOPPER  # type: ignore[assignment]
    with compiling(capability) as compiled:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tokens, slots, rank, choices, features in ((16, 2, 64, 16, 1024), (7, 3, 40, 9, 1030), (3, 1, 1, 1, 1)):
                tables = RoutingTables(slots, rank, choices, tokens)
                x, router = torch.zeros(tokens, features, dtype=dtype), torch.zeros(slots, choices, features)
                own = torch.zeros(tokens, choices)
                here, token_slots = torch.ones(slots, dtype=torch.bool), torch.zeros(tokens, dtype=torch.long)
                routing = (here, tables.settings, token_slots, True, tables.mask)
                route_kernel.route(x, router, *routing)
                route_kernel.route(x, router, *routing, own)
                route_kernel.route(own, None, *routing)
                tables.kept.allocate(tokens)
                tables.kept.own = own
                places = Places(
                    torch.zeros(5, dtype=torch.int32), torch.zeros(tokens, dtype=torch.long), token_slots,
                    torch.zeros(4, 9, dtype=torch.int32), 16,
                )  # fmt: skip
                context_kernel.route(tokens, here, tables.settings, token_slots, tables.mask, tables.kept, places)
                for widths in ((features,), (features, 3, features)):
                    hidden = torch.zeros(len(widths), tokens, rank)
                    lora_b = [torch.zeros(slots, 1, width, rank, dtype=dtype) for width in widths]
                    out = torch.zeros(tokens, sum(widths), dtype=dtype)
                    meta = grouped(token_slots, slots)
                    for add in (True, False):
                        expand_kernel.expand(hidden, lora_b, tables.mask, out, *meta, slots + 1, 0, add)
            for tokens, rank in ((128, 128), (200, 320)):  # tiles of 64 tokens, several steps
                for kind in (torch.float32, dtype):
                    none, hidden = torch.zeros(tokens, dtype=torch.int32), torch.zeros(1, tokens, rank, dtype=kind)
                    lora_b, out = [torch.zeros(2, 1, 1024, rank, dtype=dtype)], torch.zeros(tokens, 1024, dtype=dtype)
                    expand_kernel.expand(
                        hidden, lora_b, torch.zeros(tokens, rank), out, none, none, none, none, 3, 0, True
                    )
    return compiled


if __name__ == "__main__":
    names = compile_serving_kernels(int(sys.argv[1]))
    print(len(names), "compiled:", *sorted(set(names)))
