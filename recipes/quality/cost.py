"""What decoding with each method costs on top of the backbone: computed for the Llama-2-7B shape, measured where it was.

Computed: each method is built on that shape (without memory) and the bytes of it that one token reads are counted. Every method
is given kernels as good as LoRA-Switch's fused ones: experts and LoRA ride along in the launches of the backbone's own
linears; a routing decision is one more launch, and linears with the same input share theirs. So layer-wise routing needs four
more launches a block, LoRA-Switch one a model, LoRA none. Real implementations are slower; a LoRA can also be merged, and then
costs nothing.

Measured: the rows of recipes/results/decode_h200.json that have the shape of a method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_loraswitch.layer import LoRASwitchLayer
from recipes.checkout import ROOT
from recipes.quality import base, files, methods
from recipes.quality.moe_lora import MoELoRALinear
from recipes.quality.settings import FULL

DECODE = ROOT / "recipes" / "results" / "decode_h200.json"
SHAPE = "llama-2-7b"
VOCABULARY = 32_000
LAUNCH_US = 1.3  # what one more small kernel adds to a step in a CUDA graph on an H200
INPUTS = ("q_proj", "o_proj", "gate_proj", "down_proj")  # a block's linears with an input that no earlier one has
# method -> (method of the decode benchmark, its rank, how it ran): the same experts, rank per expert and k
MEASURED = {
    "switch": ("fused", 8, "`fuse_for_inference()`"),
    "lora-r16": ("lora", 16, "PEFT's layer, not fused"),
    "lora-r64": ("lora", 64, "PEFT's layer, not fused"),
}


def decode_costs(names: list[str], decode: Path = DECODE) -> dict[str, Any]:
    """For the header of the results.

    Returns:
        shape, backbone_gb, backbone_ms (measured), launch_us, and for each known method: active_rank, mb_per_token,
        launches, computed (step over the backbone's), and measured with its how where there is such a row.
    """
    measured = files.read_json(decode) or {"rows": [], "header": {}}
    step = _row(measured, "backbone", 0)
    shape = FULL.with_changes(hidden=4096, intermediate=11_008, layers=32, heads=32, key_value_heads=32)
    with torch.device("meta"):
        backbone = base.new_model(VOCABULARY, shape)
    linears = methods.linears_of(backbone)
    read = 2 * sum(p.numel() for p in backbone.parameters())  # bf16; the head is read, the embedding hardly
    per_rank = sum(linear.in_features + linear.out_features for linear in linears.values())
    result: dict[str, Any] = {
        "shape": SHAPE,
        "backbone_gb": round(read / 1e9, 3),
        "backbone_ms": step["ms"] if step else None,
        "launch_us": LAUNCH_US,
        "source": f"recipes/results/{decode.name}" if step else None,
        "gpu": measured["header"].get("gpu"),
        "commit": measured["header"].get("commit"),
        "methods": {},
    }
    for name in names:
        if name not in methods.BY_NAME:
            continue
        with torch.device("meta"):
            model = methods.BY_NAME[name].build(base.new_model(VOCABULARY, shape).requires_grad_(False))
        rank = methods.active_rank(model)
        extra = 2 * rank * per_rank + 4 * _router_parameters(model)
        launches = _decisions(model)
        computed = 1 + extra / read + (launches * LAUNCH_US / 1000 / step["ms"] if step else 0)
        found = {"active_rank": rank, "mb_per_token": extra / 1e6, "launches": launches, "computed": computed}
        result["methods"][name] = {key: round(value, 4) for key, value in found.items()}
        result["methods"][name] |= _measured(measured, name)
    return result


def is_outdated(costs: dict[str, Any], decode: Path = DECODE) -> bool:
    """Whether the decode benchmark has measured something else since `decode_costs` made `costs` of it."""
    measured = files.read_json(decode) or {"rows": [], "header": {}}
    step = _row(measured, "backbone", 0)
    taken = {
        name: {key: each[key] for key in ("measured", "how") if key in each} for name, each in costs["methods"].items()
    }
    return costs["backbone_ms"] != (step["ms"] if step else None) or any(
        taken[name] != _measured(measured, name) for name in taken
    )


def _measured(measured: dict[str, Any], name: str) -> dict[str, Any]:
    """What was measured of a method's shape: its step over the backbone's, and how it ran; empty if nothing was."""
    row = _row(measured, *MEASURED[name][:2]) if name in MEASURED else None
    return {"measured": row["ratio"], "how": MEASURED[name][2]} if row else {}


def _row(measured: dict[str, Any], method: str, rank: int) -> dict[str, Any] | None:
    """The step of a compiled loop at batch 1 with 8 experts, top-2."""
    head = measured["header"]
    if method == "fused" and (head.get("num_experts"), head.get("top_k")) != (8, 2):
        return None
    wanted = {"model": SHAPE, "method": method, "mode": "compiled", "batch": 1, "rank": rank}
    return next((row for row in measured["rows"] if all(row.get(k) == v for k, v in wanted.items())), None)


def _router_parameters(model: torch.nn.Module) -> int:
    """Routers are float32 and read in full."""
    return sum(p.numel() for name, p in model.named_parameters() if ".router." in name or "loraswitch_router" in name)


def _decisions(model: torch.nn.Module) -> int:
    """Launches of routers."""
    one = any(isinstance(module, LoRASwitchLayer) and module.loraswitch_router for module in model.modules())
    layer_wise = [name for name, module in model.named_modules() if isinstance(module, MoELoRALinear)]
    return int(one) + sum(name.rpartition(".")[2] in INPUTS for name in layer_wise)
