"""vLLM's wrapper of GPUs with the plugin's mask in it, on a CPU: plain and compiled. For vLLM's environment, without a GPU.

    TRITON_INTERPRET=1 python tests/tools/serving_gpu_wrapper.py

The expand kernel runs in Triton's interpreter. vLLM's own shrink is one of PyTorch's operations here, behind an op of the same
arguments, since vLLM does not let its kernels be interpreted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper import punica_gpu

from peft_loraswitch.routing.options import RoutingOptions
from peft_loraswitch.vllm_plugin.masked_lora import RoutingWrapper, mask_wrapper
from peft_loraswitch.vllm_plugin.routing_site import RoutingSite
from peft_loraswitch.vllm_plugin.routing_tables import RoutingTables, write_mask

SLOTS, RANK, INSIDE, OUTPUTS = 3, 16, 24, (20, 12)
library = torch.library.Library("serving_gpu_wrapper", "DEF")


def shrink(
    x: Tensor, lora_a: list[Tensor], y: Tensor, mapping: Tensor, order: Tensor, counts: Tensor, starts: Tensor, ids: Tensor,
    no_lora: Tensor, groups: Tensor, scale: float,
) -> None:  # fmt: skip
    if no_lora.item():
        return
    for part, a in enumerate(lora_a):
        for token, slot in enumerate(mapping.tolist()):
            y[part, token] = a[slot, 0] @ x[token] * scale if slot >= 0 else 0


def replace_kernels() -> None:
    library.define(
        "shrink(Tensor x, Tensor[] lora_a, Tensor(a!) y, Tensor mapping, Tensor order, Tensor counts, Tensor starts, Tensor ids, "
        "Tensor no_lora, Tensor groups, float scale) -> ()"
    )
    library.impl("shrink", shrink, "CompositeExplicitAutograd")
    torch.library.register_fake("serving_gpu_wrapper::shrink", lambda *arguments: None, lib=library)
    punica_gpu.lora_shrink = torch.ops.serving_gpu_wrapper.shrink
    punica_gpu.LoRAKernelMeta = LoRAKernelMeta  # not there without Triton's driver


def check(specialize_active_lora: bool) -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(max_loras=SLOTS, specialize_active_lora=specialize_active_lora)
    wrapper: Any = punica_gpu.PunicaWrapperGPU(64, 8, "cpu", lora_config=config)
    tables = RoutingTables(SLOTS, RANK, max_choices=8, max_tokens=64)
    mask_wrapper(wrapper, tables)
    site = RoutingSite(tables, INSIDE, first=True)
    routing = RoutingWrapper(wrapper, site)
    tables.place(0, RoutingOptions(4, 2, True))
    site.place(0, torch.randn(4, INSIDE))  # slot 0 is routed, the others hold plain LoRAs
    lora_a = tuple(torch.randn(SLOTS, 1, RANK, INSIDE) for _ in OUTPUTS)
    lora_b = tuple(torch.randn(SLOTS, 1, outputs, RANK) for outputs in OUTPUTS)
    weight = torch.randn(INSIDE, sum(OUTPUTS))

    def linears(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x @ weight, x @ weight
        routing.add_lora_linear(first, x, lora_a, lora_b, 1.0, OUTPUTS)
        wrapper.add_lora_linear(second, x, lora_a, lora_b, 1.0, OUTPUTS)
        return first, second

    for function in (linears, torch.compile(linears, fullgraph=True, dynamic=True)):
        for tokens in (5, 9, 18):
            x, slots = torch.randn(tokens, INSIDE), torch.randint(-1, SLOTS, (tokens,))
            wrapper._token_lora_indices[:tokens] = slots
            wrapper.token_mapping_meta.prepare_tensors(slots)
            mask = torch.empty(tokens, RANK)
            write_mask(x, site.router, site.here, tables.settings, slots, True, mask)
            wanted = x @ weight
            for token, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    parts = zip(lora_a, lora_b, strict=True)
                    wanted[token] += torch.cat([b[slot, 0] @ (mask[token] * (a[slot, 0] @ x[token])) for a, b in parts])
            tables.mask.fill_(torch.nan)
            for y in function(x):
                torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-3)

            wrapper.token_mapping_meta.prepare_tensors(torch.full((tokens,), -1))
            tables.mask.fill_(torch.nan)
            for y in function(x):
                torch.testing.assert_close(y, x @ weight)
            assert tables.mask.isnan().all()


if __name__ == "__main__":
    replace_kernels()
    check(specialize_active_lora=False)
    check(specialize_active_lora=True)
    print("passed")
