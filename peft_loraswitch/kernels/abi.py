"""csrc/loraswitch.h in ctypes: constants, structs and signatures. A test compares them with the header."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p

import torch

ABI_VERSION = 9
MAX_GROUP, MAX_TOP_K, MAX_EXPERTS, MAX_RANK, FAST_TOKENS = 8, 8, 256, 256, 32
TUNING_STREAMING, TUNING_REGISTERS, TUNING_PERSISTENT, TUNING_TWO_LAUNCHES, TUNING_IMPATIENT = 1, 2, 3, 4, 8
TUNING_NARROW, TUNING_WIDE = 16, 32
TUNING_SPLIT_K, SPLIT_K_TOKENS = 64, 128
# A captured model of 32 layers takes 2 KiB; by linear_streaming.cu at rank 64 it takes 114, by linear_split_k_sm90.cu 134.
WORKSPACE_BYTES = 32 << 20
FAST_PATH, GENERIC_PATH, SM90_PATH = 0, 1, 2
INT4_ROWS, INT4_FEATURES = 8, 1024
FORMAT_DTYPE, FORMAT_CODE, FORMAT_INT4 = 0, 1, 2  # of weights
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Item(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("base", c_void_p),
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("out", c_void_p),
        ("scaling", c_float),
        ("out_features", c_int32),
        ("rank", c_int32),
        ("format", c_int32),
        ("scales", c_void_p),
    ]


class Group(Structure):
    _fields_ = [
        ("items", Item * MAX_GROUP),
        ("x", c_void_p),
        ("experts", c_void_p),
        ("gates", c_void_p),
        ("hidden", c_void_p),
        ("n_items", c_int32),
        ("tokens", c_int32),
        ("in_features", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("dtype", c_int32),
        ("transposed", c_int32),
        ("device", c_int32),
        ("tuning", c_int32),
        ("scale_block", c_int32),
        ("code", c_void_p),
    ]


class MergeItem(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("source", c_void_p),
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("first_tile", c_int64),
        ("scaling", c_float),
        ("out_features", c_int32),
        ("in_features", c_int32),
        ("rank", c_int32),
        ("transposed", c_int32),
        ("reserved", c_int32),
    ]


class MergeArgs(Structure):
    _fields_ = [
        ("items", c_void_p),
        ("tile_item", c_void_p),
        ("experts", c_void_p),
        ("gates", c_void_p),
        ("old_experts", c_void_p),
        ("old_gates", c_void_p),
        ("n_tiles", c_int64),
        ("n_items", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("dtype", c_int32),
        ("fast", c_int32),
        ("device", c_int32),
        ("max_rank", c_int32),
        ("reserved", c_int32),
    ]


class ExpandItem(Structure):
    _fields_ = [
        ("lora_b", c_void_p),
        ("bias", c_void_p),
        ("base", c_void_p),
        ("out", c_void_p),
        ("base_stride", c_int64),
        ("scaling", c_float),
        ("out_features", c_int32),
        ("rank", c_int32),
        ("reserved", c_int32),
    ]


class ExpandArgs(Structure):
    _fields_ = [
        ("items", ExpandItem * MAX_GROUP),
        ("hidden", c_void_p),
        ("experts", c_void_p),
        ("gates", c_void_p),
        ("hidden_stride", c_int64),
        ("n_items", c_int32),
        ("tokens", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("dtype", c_int32),
        ("device", c_int32),
    ]


SIGNATURES = {
    "ls_abi_version": (c_int, []),
    "ls_build_info": (c_char_p, []),
    "ls_error_string": (c_char_p, [c_int]),
    "ls_device_count": (c_int, [POINTER(c_int)]),
    "ls_device_supported": (c_int, [c_int]),
    "ls_driver_version": (c_int, [POINTER(c_int)]),
    "ls_router": (c_int, [c_void_p] * 4 + [c_int32] * 5 + [c_float] + [c_int32] * 3 + [c_void_p]),
    "ls_router_context": (c_int, [c_void_p] * 7 + [c_float] + [c_int32] * 5 + [c_float] + [c_int32] * 3 + [c_void_p]),
    "ls_set_workspace": (c_int, [c_int32, c_void_p, c_int64]),
    "ls_workspace_left": (c_int64, [c_int32]),
    "ls_hidden_elements": (c_int64, [POINTER(Group)]),
    "ls_linear_path": (c_int, [POINTER(Group)]),
    "ls_linear": (c_int, [POINTER(Group), c_void_p]),
    "ls_expand_takes": (c_int, [POINTER(ExpandArgs)]),
    "ls_expand": (c_int, [c_char_p, c_void_p]),  # a struct as bytes: filled in by `struct`, faster than field by field
    "ls_widen_takes": (c_int, [POINTER(ExpandArgs)]),
    "ls_widen": (c_int, [c_char_p, c_void_p]),
    "ls_merge_tiles": (c_int64, [c_int32, c_int32]),
    "ls_merge_is_fast": (c_int, [POINTER(MergeItem), c_int32]),
    "ls_merge": (c_int, [POINTER(MergeArgs), c_void_p]),
}
