"""Tiny backbones, quantised by the libraries that PEFT knows. Each takes a folder that it may write to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from helpers import tiny_llama

SHAPE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes quantises blocks of 64


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved(folder: Path) -> Path:
    tiny_llama(**SHAPE).save_pretrained(folder)
    return folder


def _from_transformers(folder: Path, config: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(saved(folder), quantization_config=config, device_map="cpu").eval()


def torchao_int8(folder: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return _from_transformers(folder, tf.TorchAoConfig(Int8WeightOnlyConfig()))


def torchao_int8_dynamic(folder: Path) -> Any:
    """Activations are quantised too, as they come."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _from_transformers(folder, tf.TorchAoConfig(Int8DynamicActivationInt8WeightConfig()))


def torchao_quantize_(folder: Path) -> Any:
    """Without transformers: nothing on the model says how it was quantised."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_llama(**SHAPE)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.rpartition(".")[2] in LINEARS)
    return model


def bitsandbytes_4bit(folder: Path) -> Any:
    model = _from_transformers(folder, tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes (0.50) repacks weights for inference, and state_dict() then breaks them
        # (a model without any adapter, too).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def bitsandbytes_8bit(folder: Path) -> Any:
    return _from_transformers(folder, tf.BitsAndBytesConfig(load_in_8bit=True))


def hqq_4bit(folder: Path) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = tiny_llama(**SHAPE).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEARS:
            settings = BaseQuantizeConfig(nbits=4, group_size=64)
            quantised = HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, quantised)
    return model


BACKENDS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "torchao": ("torchao", torchao_int8, "torchao"),
    "torchao-dynamic": ("torchao", torchao_int8_dynamic, "torchao"),
    "torchao-direct": ("torchao", torchao_quantize_, "torchao"),
    "bnb-4bit": ("bitsandbytes", bitsandbytes_4bit, "bnb 4bit"),
    "bnb-8bit": ("bitsandbytes", bitsandbytes_8bit, "bnb 8bit"),
    "hqq": ("hqq", hqq_4bit, "hqq"),
}
