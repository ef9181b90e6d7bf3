"""The benchmark's models: random weights, shared between processes, bare or adapted by a job's method.

PyTorch is imported within functions here and in the other files of this folder: the process that plans and starts the others
imports them all, and does without the seconds that PyTorch takes.
"""

from __future__ import annotations

import time
from typing import Any

from recipes.benchmarks.decode.plan import FUSED, TARGETS, Job


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
    if job.method not in ("backbone", "tuned"):
        config: Any = LoraConfig(r=job.rank, target_modules=TARGETS, init_lora_weights=False)
        if job.method != "lora":
            composed = {"normalize_gates": True, "base_expert": True, "router_decay": 1.0}
            config = LoRASwitchConfig(
                target_modules=TARGETS, init_weights=False, **_settings(job), **(composed if job.method == "imported" else {}),
            )  # fmt: skip
        with torch.device(device):
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model = model.eval().requires_grad_(False)
    if job.method == "kernels":  # our own kernels, no experts: rank 0 is what a LoRASwitchConfig refuses
        for module in model.modules():
            if hasattr(module, "loraswitch_A"):
                a, b = module.loraswitch_A["default"], module.loraswitch_B["default"]
                a.weight = torch.nn.Parameter(a.weight[:, :0].contiguous(), requires_grad=False)
                b.weight = torch.nn.Parameter(b.weight[:, :, :0].contiguous(), requires_grad=False)
    if job.method == "imported":  # every second LoRA has half the rank, and zeros behind
        for module in model.modules():
            if hasattr(module, "loraswitch_A"):
                module.loraswitch_A["default"].weight.data[::2, job.rank // 2 :] = 0
                module.loraswitch_B["default"].weight.data[::2, :, job.rank // 2 :] = 0
    if job.method not in ("kernels", "merge", *FUSED):
        return model, 0.0
    synchronize(device)
    start = time.perf_counter()
    model.fuse_for_inference("merge" if job.method == "merge" else "fused", join_weights=job.method == "joined")
    synchronize(device)
    return model, time.perf_counter() - start


def _settings(job: Job) -> dict[str, Any]:
    """The fields of the configuration that say how many experts there are, of which rank, and how many a token gets."""
    adapter, rank = job.adapter, max(job.rank, 1)
    experts, top_k = adapter.experts or 8, adapter.top_k or 2  # "kernels" takes their weights out again
    settings: dict[str, Any] = {"r": rank, "num_experts": experts, "top_k": top_k, "num_shared_experts": adapter.shared}
    before = job.shape.layers // 8 if adapter.deep_router else 0
    if before:
        settings["router_module"] = f"layers.{before}.self_attn.q_proj"
        settings["rank_pattern"] = {rf"layers\.({'|'.join(map(str, range(before)))})\..*": rank * experts}
    return settings


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
