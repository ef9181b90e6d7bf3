"""Random damage to a folder with an adapter. Every mutation takes (rng, folder), and says in a few words what it did."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loaders import CONFIG, WEIGHTS

PATTERNS = [  # which take Python for ever to match
    "(a+)+$",
    "(.*)*x",
    "(q|q_|q_p)*proj$",
    "([a-z_.0-9]+)*!",
]
PREFIX = "base_model.model."

SCALARS: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 64, 4096, 2**31, 2**63, 10**30, 0.5, 1.0, -0.0, 1e-30, 1e40, 1e308,
    float("nan"), float("inf"), "", "x", "q_proj", "default", "all-linear", "all", "none", "../..", "a\0b", "é" * 50, "*", "(",
]  # fmt: skip
LISTS: list[Any] = [
    [], [None], [1], [0, 5], [-1], [10**9], [1.5], ["q_proj"], ["lm_head"], ["embed_tokens"], ["norm"], ["no_such"],
    ["q_proj", 3], [["q_proj"]], {}, {"q_proj": 2}, {"q_proj": "2"}, {"q_proj": -1}, {"(": 2}, {"": 3}, {"embed_tokens": [1]},
    {"lm_head": [0, 10**6]}, {"no_such": [1]}, {"a": {"b": []}},
]  # fmt: skip
FIELDS = [
    "r", "num_experts", "top_k", "num_shared_experts", "normalize_gates", "router_module", "target_modules", "exclude_modules",
    "lora_alpha", "use_rslora", "lora_dropout", "bias", "init_weights", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "router_aux_loss_coef",
    "router_z_loss_coef", "router_jitter", "router_decay", "task_type", "peft_type", "auto_mapping", "base_model_name_or_path",
    "revision", "inference_mode", "peft_version", "trainable", "base_expert", "top_p",
]  # fmt: skip
TASKS = ["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
DTYPES = [
    torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ configuration


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    fields = json.loads((folder / CONFIG).read_text())
    said = change(fields)
    (folder / CONFIG).write_text(json.dumps(fields))
    return said


def change_field(rng: random.Random, folder: Path) -> str:
    def change(fields: dict[str, Any]) -> str:
        name = rng.choice(FIELDS)
        value = rng.choice(TASKS) if name == "task_type" and rng.random() < 0.5 else rng.choice(SCALARS + LISTS)
        if name.endswith(("modules", "pattern")) and rng.random() < 0.5:
            pattern = rng.choice(PATTERNS)
            value = {pattern: 3} if name in ("rank_pattern", "alpha_pattern") else pattern
        fields[name] = value
        return f"{name}={value!r}"

    return edit_config(folder, change)


def change_two_fields(rng: random.Random, folder: Path) -> str:
    return f"{change_field(rng, folder)}, {change_field(rng, folder)}"


def change_number(rng: random.Random, folder: Path) -> str:
    """Small whole numbers, which often make sense."""

    def change(fields: dict[str, Any]) -> str:
        name = rng.choice(["r", "num_experts", "top_k", "num_shared_experts", "lora_alpha"])
        fields[name] = rng.choice([1, 2, 3, 4, 5, 4096])
        return f"{name}={fields[name]}"

    return edit_config(folder, change)


def drop_field(rng: random.Random, folder: Path) -> str:
    def change(fields: dict[str, Any]) -> str:
        name = rng.choice(sorted(fields))
        del fields[name]
        return f"without {name}"

    return edit_config(folder, change)


def add_field(rng: random.Random, folder: Path) -> str:
    def change(fields: dict[str, Any]) -> str:
        name = rng.choice(["lora_bias", "R", "", "self", "cls", "runtime_config", "__class__", "kwargs", "subfolder"])
        fields[name] = rng.choice(SCALARS + LISTS)
        return f"{name!r}={fields[name]!r}"

    return edit_config(folder, change)


def replace_config(rng: random.Random, folder: Path) -> str:
    content = rng.choice(
        [b"", b"{}", b"[]", b"null", b"3", b'"x"', b"{", b"\xff\xfe", b"\0" * 99, b"[" * 99_999, b'{"r":' * 5000,
         b'{"peft_type": 3}', b'{"r": ' + b"9" * 9999 + b"}", b'{"peft_type": "LORASWITCH"}',
         b'{"peft_type": "LORASWITCH", "r": NaN}']
    )  # fmt: skip
    (folder / CONFIG).write_bytes(content)
    return f"config is {content[:30]!r}"


# ------------------------------------------------------------------------------------------------------------ tensors


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Any:
    tensors = load_file(folder / WEIGHTS)
    said = change(tensors)
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return said


def on_a_tensor(change: Callable[[random.Random, dict[str, torch.Tensor], str], Any]) -> Callable[..., str]:
    """A mutation of one of the tensors in the file: `change` is called with all of them and a key."""

    def mutate(rng: random.Random, folder: Path) -> str:
        def edit(tensors: dict[str, torch.Tensor]) -> str:
            key = rng.choice(sorted(tensors))
            return f"{change.__name__} {key} {change(rng, tensors, key) or ''}"

        return edit_tensors(folder, edit)

    mutate.__name__ = change.__name__
    return mutate


@on_a_tensor
def drop_tensor(rng, tensors, key):
    del tensors[key]


@on_a_tensor
def rename_tensor(rng, tensors, key):
    old, new = rng.choice(
        [("loraswitch_A", "loraswitch_B"), ("loraswitch_", "lora_"), (PREFIX, ""), (PREFIX, PREFIX * 2), ("layers.0", "layers.9"),
         (".weight", ".default.weight"), (".weight", ".bias"), ("q_proj", "k_proj"), ("loraswitch_B", "loraswitch_router")]
    )  # fmt: skip
    tensors[key.replace(old, new)] = tensors.pop(key)
    return f"{old} -> {new}"


@on_a_tensor
def copy_tensor(rng, tensors, key):
    new = rng.choice(
        [
            key.removeprefix(PREFIX),
            key.replace(".weight", ".default.weight"),
            PREFIX + key,
            key + ".",
            "." + key,
            "",
            key.upper(),
        ]
    )
    tensors[new] = tensors[key].clone()
    return repr(new)


@on_a_tensor
def swap_tensors(rng, tensors, key):
    other = rng.choice(sorted(tensors))
    tensors[key], tensors[other] = tensors[other], tensors[key]
    return other


@on_a_tensor
def another_dtype(rng, tensors, key):
    dtype = rng.choice(DTYPES)
    tensors[key] = tensors[key].to(dtype)
    return dtype


@on_a_tensor
def another_shape(rng, tensors, key):
    tensor = tensors[key]
    made = rng.choice(
        [tensor.transpose(0, -1), tensor[:1], tensor[:0], tensor[..., :1], tensor.flatten(), tensor.unsqueeze(0), tensor.sum(),
         torch.cat([tensor, tensor]), torch.cat([tensor, tensor], -1), tensor.new_zeros(0),
         tensor.repeat(8, *[1] * (tensor.dim() - 1))]
    )  # fmt: skip
    tensors[key] = made
    return list(made.shape)


@on_a_tensor
def another_value(rng, tensors, key):
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, 1e4])
    flat = tensors[key].view(-1)
    flat[rng.randrange(flat.numel())] = value
    return value


@on_a_tensor
def backbone_tensor(rng, tensors, key):
    name = rng.choice(
        ["model.norm.weight", "model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight",
         "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight", "lm_head.original_module.weight",
         "model.embed_tokens.base_layer.weight", "model.rotary_emb.inv_freq", "lm_head.modules_to_save.weight", "lm_head.bias",
         "lm_head.modules_to_save.first.weight", "model.layers.0.self_attn.q_proj.loraswitch_A.first.weight",
         "model.layers.0.self_attn.q_proj.loraswitch_record.default.load", "model.embed_tokens.token_adapter.base_layer.weight"]
    )  # fmt: skip
    shape = rng.choice([(32,), (32, 32), (64, 32), (64, 32), (64, 32), (70, 32), (1,)])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    tensors[rng.choice([PREFIX, PREFIX, PREFIX, ""]) + name] = torch.randn(shape, generator=generator)
    return f"{name} {shape}"


# ---------------------------------------------------------------------------------------------------------- raw bytes


def truncate(rng: random.Random, folder: Path) -> str:
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    size = rng.randrange((folder / name).stat().st_size)
    os.truncate(folder / name, size)
    return f"{name} cut to {size}"


def append(rng: random.Random, folder: Path) -> str:
    name = rng.choice([WEIGHTS, CONFIG])
    with open(folder / name, "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 4096])))
    return f"garbage behind {name}"


def flip_bytes(rng: random.Random, folder: Path) -> str:
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    content = bytearray((folder / name).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if name == WEIGHTS else len(content)
    places = [rng.randrange(end) for _ in range(rng.choice([1, 1, 2, 5]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    (folder / name).write_bytes(content)
    return f"{name} bits at {places}"


def header_length(rng: random.Random, folder: Path) -> str:
    length = rng.choice([0, 1, 2, 7, 100, 10**6, 2**24 + 1, 2**31, 2**62, 2**64 - 1])
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])
    return f"header of {length}"


def edit_header(rng: random.Random, folder: Path) -> str:
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    key = rng.choice(sorted(header))
    part, value = rng.choice(
        [("dtype", "F4"), ("dtype", "F64"), ("dtype", "NOPE"), ("dtype", 3), ("dtype", "BF16"), ("dtype", "C64"), ("more", 1),
         ("shape", [2**62]), ("shape", []), ("shape", [-1]), ("shape", [1.5]), ("shape", "x"), ("shape", [0]), ("shape", None),
         ("shape", [2**40, 2**40]), ("data_offsets", [0, 2**62]), ("data_offsets", [5, 1]), ("data_offsets", [0, 0]),
         ("data_offsets", [])]
    )  # fmt: skip
    if key == "__metadata__":
        header[key] = rng.choice([{}, {"format": "np"}, {"format": 3}, [], None, {"format": "pt", "x": "y" * 9999}])
    else:
        header[key][part] = value
    raw = json.dumps(header).encode()
    if rng.random() < 0.2:  # the same key twice
        raw = raw[:-1] + b", " + json.dumps({key: header[key]}).encode()[1:]
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + content[end:])
    return f"header {key}: {part}={value!r}"


# --------------------------------------------------------------------------------------------------------- no files


def no_file(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    kind = rng.choice(
        ["nothing", "empty", "FIFO", "folder", "loop", "broken link", "device", "socket", "hole", "other file"]
    )
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        (folder / "other").symlink_to(path)
        path.symlink_to(folder / "other")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null"]))
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the whole path may be too long for a socket
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif kind == "hole":
        path.touch()
        os.truncate(path, 2**33)
    elif kind == "other file":
        path.symlink_to(folder / (CONFIG if path.name == WEIGHTS else WEIGHTS))
    return f"{path.name}: {kind}"


def pickles(rng: random.Random, folder: Path) -> str:
    kind = rng.choice(["instead", "beside", "FIFO"])
    tensors = load_file(folder / WEIGHTS)
    if kind != "beside":
        (folder / WEIGHTS).unlink()
    if kind == "FIFO":
        os.mkfifo(folder / "adapter_model.bin")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return f"pickle {kind}"


def nothing(rng: random.Random, folder: Path) -> str:
    return "nothing"


MUTATIONS: list[Callable[[random.Random, Path], str]] = [
    *[change_field] * 8, *[change_two_fields] * 3, *[change_number] * 2, drop_field, add_field, replace_config,
    drop_tensor, rename_tensor, copy_tensor, swap_tensors, *[another_dtype] * 2, *[another_shape] * 2, *[another_value] * 2,
    *[backbone_tensor] * 4, truncate, append, *[flip_bytes] * 3, header_length, *[edit_header] * 3, *[no_file] * 3,
    pickles, nothing,
]  # fmt: skip
