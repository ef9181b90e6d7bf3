"""The base: a small Llama, pretrained here on general text, and kept as a file so that later runs start from it."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.quality import files
from recipes.quality.settings import LENGTH, Settings
from recipes.tiny_llama import pretraining_optimizers

VERSION = 1  # raised when a change of this file changes the base


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 matrix products on a GPU; a CPU of the kind that tests run on gains nothing from them."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def new_model(vocabulary: int, settings: Settings, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama in float32, tied embeddings, on the CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        initializer_range=settings.hidden**-0.5,  # the usual 0.02 suits widths of 2048
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def fingerprint(general: np.ndarray, vocabulary: int, settings: Settings) -> str:
    """Changes when another base would come out."""
    return files.digest(general, vocabulary, settings.pretraining(), VERSION)


def cached(folder: Path, wanted: str) -> dict[str, Any] | None:
    """What is known of the base in `folder` if it is there, whole, and the wanted one; says why if it is not."""
    info = files.read_json(folder / "base.json")
    weights = folder / "model.safetensors"
    if info is None and not weights.exists():
        return None
    if info is None or not weights.exists():
        print(f"  {folder}: the cached base is incomplete (an interrupted run): it is made again", flush=True)
        return None
    if info.get("fingerprint") != wanted:
        print(f"  {folder}: the cached base was made from other text or settings: it is made again", flush=True)
        return None
    if files.digest_of_file(weights) != info.get("sha256"):
        print(f"  {weights} is damaged (its checksum is not the one in base.json): it is made again", flush=True)
        return None
    return info


def load(folder: Path, vocabulary: int, settings: Settings, device: torch.device) -> LlamaForCausalLM:
    """The frozen base: bf16 on a GPU, float32 on a CPU. Call it after `cached` or `make`."""
    model = new_model(vocabulary, settings)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # the tied head is stored once
    model.tie_weights()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def make(
    folder: Path, general: np.ndarray, held_out: np.ndarray, vocabulary: int, settings: Settings, device: torch.device
) -> dict[str, Any]:
    """Pretrain the base and write it: weights in bf16, then `base.json`, without which they do not count.

    Args:
        general: uint16 [n], the text, one stream of tokens.
        held_out: uint16 [m], text that the base does not see.

    Raises:
        ValueError: the text is shorter than one row.
        OSError: the disk is full.
    """
    for name, stream in (("general", general), ("general_held_out", held_out)):
        if len(stream) <= LENGTH:
            raise ValueError(
                f"{name} holds {len(stream)} tokens, fewer than one row of {LENGTH}: prepare the texts again."
            )
    begun = time.perf_counter()
    model = new_model(vocabulary, settings).to(device)
    trained = pretrain(model, general, settings, device)
    loss = held_out_loss(model, held_out, settings, device)
    state = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.json").unlink(missing_ok=True)
    files.write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))
    seconds = time.perf_counter() - begun
    info = {
        "fingerprint": fingerprint(general, vocabulary, settings),
        "sha256": files.digest_of_file(folder / "model.safetensors"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": round(loss, 4),
        "seconds": round(seconds, 1),
        **trained,
    }
    files.write_json(folder / "base.json", info)
    print(
        f"  base: {info['parameters'] / 1e6:.1f} M parameters, {info['tokens'] / 1e6:.1f} M tokens at "
        f"{info['tokens_per_second'] / 1e3:.0f} k a second, held-out loss {loss:.3f} nats a token "
        f"(untrained: {math.log(vocabulary):.2f}), {seconds:.0f} s with compiling",
        flush=True,
    )
    return info


def pretrain(
    model: LlamaForCausalLM, general: np.ndarray, settings: Settings, device: torch.device
) -> dict[str, float | int]:
    """Next-token training on rows that start anywhere in the stream. Nothing waits for the device but the log lines."""
    steps, rows = settings.pretrain_steps, settings.pretrain_rows
    stream = torch.from_numpy(general.astype(np.int32)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    offsets = torch.arange(LENGTH, device=device)
    optimizers = pretraining_optimizers(model, settings.pretrain_learning_rate, fused=device.type == "cuda")
    model.train()
    compiled: Any = torch.compile(model) if device.type == "cuda" else model
    log_every = max(1, steps // 10)
    begun = steady = time.perf_counter()
    warm = 0  # steps before the clock that measures speed starts: compiling
    for step in range(steps):
        starts = torch.randint(0, len(stream) - LENGTH, (rows, 1), generator=generator, device=device)
        batch = stream[starts + offsets].long()
        with autocast(device):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / (0.03 * steps + 1), 1.4 * (steps - step) / steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.pretrain_learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if step == min(9, steps // 2):
            loss.item()
            steady, warm = time.perf_counter(), step + 1
        elif (step + 1) % log_every == 0:
            value, now = loss.item(), time.perf_counter()
            left = (now - steady) / max(1, step + 1 - warm) * (steps - step - 1)
            print(f"  base: step {step + 1}/{steps}, loss {value:.3f}, {left:.0f} s left", flush=True)
    loss.item()
    seconds = time.perf_counter() - steady
    per_step = rows * LENGTH
    return {
        "tokens": steps * per_step,
        "tokens_per_second": round((steps - warm) * per_step / max(seconds, 1e-9)),
        "compile_seconds": round(steady - begun, 1),
    }


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: np.ndarray, settings: Settings, device: torch.device) -> float:
    """Mean next-token loss on the start of `held_out`, in nats."""
    model.eval()
    count = min(settings.test_rows, len(held_out) // LENGTH)
    rows = torch.from_numpy(held_out[: count * LENGTH].astype(np.int64)).view(count, LENGTH)
    total = 0.0
    for part in rows.split(settings.rows_at_once):
        with autocast(device):
            total += model(input_ids=part.to(device), labels=part.to(device)).loss.item() * len(part)
    return total / count
