"""The compiled library without a GPU: builds, loads, exports exactly its header, and says why it is not used."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from compiler import setup_with_fresh_library
from fresh import run_python
from paths import ROOT
from peft_loraswitch import kernels

HEADER = (ROOT / "csrc" / "loraswitch.h").read_text()


@pytest.fixture(scope="session")
def library() -> Path:
    """The library of an in-place build, where it is what csrc/ says."""
    setup_with_fresh_library()
    return kernels.loader.LIBRARY


def declared() -> set[str]:
    return set(re.findall(r"^(?:int|int64_t|const char \*)\s*(ls_\w+)\(", HEADER, re.MULTILINE))


def exported(path: Path) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm on this machine")
    out = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[2] for line in out.splitlines() if len(line.split()) == 3 and line.split()[1] in "TDBR"}


def test_the_header_is_the_whole_abi(library):
    assert exported(library) == declared() == set(kernels.abi.SIGNATURES)


def test_it_compiles_for_every_architecture(library):
    loaded = ctypes.CDLL(str(library))
    loaded.ls_build_info.restype = ctypes.c_char_p
    assert loaded.ls_build_info().decode().endswith("sm_80+sm_86+sm_89+sm_90a+sm_100+sm_120+compute_90")


def test_it_links_neither_torch_nor_cudart(library):
    if shutil.which("readelf") is None:
        pytest.skip("no readelf on this machine")
    out = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", out)
    assert needed and not [name for name in needed if re.search(r"cuda|torch|c10|nv", name)]
    assert library.stat().st_size < 5e6


def test_constants_and_struct_layouts_agree_with_the_header(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine")
    structs = {"ls_item": kernels.abi.Item, "ls_group": kernels.abi.Group, "ls_merge_item": kernels.abi.MergeItem}
    structs["ls_merge_args"] = kernels.abi.MergeArgs
    structs |= {"ls_expand_item": kernels.abi.ExpandItem, "ls_expand_args": kernels.abi.ExpandArgs}
    constants = {
        "LS_ABI_VERSION": kernels.ABI_VERSION,
        "LS_MAX_GROUP": kernels.MAX_GROUP,
        "LS_MAX_TOP_K": kernels.MAX_TOP_K,
    }
    constants |= {"LS_MAX_EXPERTS": kernels.MAX_EXPERTS, "LS_MAX_RANK": kernels.MAX_RANK}
    constants |= {"LS_INT4_ROWS": kernels.INT4_ROWS, "LS_INT4_FEATURES": kernels.INT4_FEATURES}
    constants |= {"LS_FORMAT_DTYPE": kernels.FORMAT_DTYPE, "LS_FORMAT_CODE": kernels.FORMAT_CODE}
    constants |= {"LS_FORMAT_INT4": kernels.FORMAT_INT4}
    constants |= {"LS_FAST_TOKENS": kernels.FAST_TOKENS, "LS_TUNING_STREAMING": kernels.TUNING_STREAMING}
    constants |= {"LS_TUNING_PERSISTENT": kernels.TUNING_PERSISTENT, "LS_TUNING_IMPATIENT": kernels.TUNING_IMPATIENT}
    constants |= {"LS_TUNING_REGISTERS": kernels.TUNING_REGISTERS, "LS_FLOAT32": kernels.DTYPES[torch.float32]}
    constants |= {"LS_FLOAT16": kernels.DTYPES[torch.float16], "LS_BFLOAT16": kernels.DTYPES[torch.bfloat16]}
    constants |= {"LS_PATH_FAST": kernels.FAST_PATH, "LS_PATH_GENERIC": kernels.GENERIC_PATH}
    constants |= {"LS_PATH_SM90": kernels.SM90_PATH, "LS_TUNING_TWO_LAUNCHES": kernels.TUNING_TWO_LAUNCHES}
    constants |= {"LS_TUNING_NARROW": kernels.TUNING_NARROW, "LS_TUNING_WIDE": kernels.TUNING_WIDE}
    constants |= {"LS_TUNING_SPLIT_K": kernels.TUNING_SPLIT_K, "LS_SPLIT_K_TOKENS": kernels.SPLIT_K_TOKENS}
    checks = [f"_Static_assert({name} == {value}, {name!r});".replace("'", '"') for name, value in constants.items()]
    for name, struct in structs.items():
        checks.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");')
        for field, _ in struct._fields_:
            offset = getattr(struct, field).offset
            checks.append(f'_Static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    source = tmp_path / "layout.c"
    source.write_text('#include "loraswitch.h"\n' + "\n".join(checks) + "\n")
    subprocess.run(
        ["gcc", "-std=c11", "-Wall", "-Werror", "-c", str(source), "-I", str(ROOT / "csrc"), "-o", "/dev/null"],
        check=True,
    )


def test_more_tokens_than_a_grid_is_high_are_refused_where_no_kernel_takes_them(library):
    loaded = ctypes.CDLL(str(library))
    group = kernels.abi.Group(n_items=1, in_features=64, x=16, hidden=16, experts=16, gates=16, num_experts=4, top_k=2)
    group.items[0].weight = group.items[0].out = group.items[0].lora_a = group.items[0].lora_b = 16
    group.items[0].out_features, group.items[0].rank = 64, 8
    for tokens, path in ((65535, kernels.GENERIC_PATH), (65536, -1)):
        group.tokens = tokens
        assert loaded.ls_linear_path(ctypes.byref(group)) == path


def test_what_is_taken_of_weights_in_4_bits(library):
    loaded = ctypes.CDLL(str(library))

    def path(form: int, **changes: int) -> int:
        group = kernels.abi.Group(
            n_items=2, tokens=1, in_features=1160, num_experts=4, top_k=2, scale_block=128, dtype=2
        )
        group.x = group.hidden = group.experts = group.gates = 16
        if form == kernels.FORMAT_CODE:
            group.in_features, group.code = 1152, 16
        for item in group.items[:2]:
            item.weight = item.out = item.lora_a = item.lora_b = item.scales = 16
            item.out_features, item.rank, item.format = 60, 8, form
        for name, value in changes.items():
            setattr(group if hasattr(group, name) else group.items[1], name, value)
        return loaded.ls_linear_path(ctypes.byref(group))

    code, int4 = kernels.FORMAT_CODE, kernels.FORMAT_INT4
    for form in (code, int4):
        refused = [
            {"tokens": 33},
            {"rank": 12},
            {"transposed": 1},
            {"dtype": 0},
            {"scale_block": 0},
            {"scale_block": 96},
        ]
        refused += [{"weight": 0}, {"scales": 0}, {"weight": 24}, {"format": 3 - form}, {"format": 0}, {"format": 3}]
        refused += [{"out_features": 2**31 - 9}]
        assert path(form) == path(form, tokens=32) == kernels.FAST_PATH
        assert [path(form, **changes) for changes in refused] == [-1] * len(refused)
    assert path(code, code=0) == path(code, scale_block=32) == path(code, in_features=1160) == -1
    assert path(int4, dtype=1) == path(int4, scale_block=512) == path(int4, scale_block=16) == -1
    assert path(int4, in_features=1164) == path(int4, scales=18) == -1
    assert path(code, dtype=1) == path(code, scale_block=64) == path(int4, scale_block=32) == kernels.FAST_PATH


def fresh(code: str, **environment: str) -> str:
    return run_python(code, environment={**os.environ, **environment})


@pytest.mark.slow
def test_one_environment_variable_turns_them_off():
    code = "from peft_loraswitch import kernels; print(kernels.available(), kernels.why_not())"
    assert fresh(code, PEFT_LORASWITCH_KERNELS="0").strip() == "False turned off by PEFT_LORASWITCH_KERNELS=0"


def test_it_loads_without_a_gpu_and_says_so(library):
    code = """
from ctypes import byref, c_int
from peft_loraswitch import kernels
count = c_int()
print(kernels.library().ls_device_count(byref(count)), count.value, kernels.available())
"""
    code_, count, available = fresh(code, CUDA_VISIBLE_DEVICES="-1").split()
    assert int(code_) in (35, 100) and count == "0" and available == "False"


def test_launches_without_a_gpu_return_an_error_and_do_not_crash(library):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    lib = kernels.library()
    group = kernels.abi.Group(n_items=1, tokens=1, in_features=8, top_k=1, num_experts=1, dtype=2)
    assert lib.ls_linear(ctypes.byref(group), None) == 100002  # no x
    group.x = 4096
    assert lib.ls_linear(ctypes.byref(group), None) == 100001  # out_features is 0
    group.items[0].out_features = 8
    assert lib.ls_linear(ctypes.byref(group), None) == 100002  # nowhere to write
    group.items[0].out = 4096
    assert lib.ls_linear_path(ctypes.byref(group)) == kernels.FAST_PATH
    assert 0 < lib.ls_linear(ctypes.byref(group), None) < 1000
    args = kernels.abi.ExpandArgs(n_items=1, tokens=200_000, num_experts=8, top_k=2, dtype=2)
    args.items[0] = kernels.abi.ExpandItem(lora_b=4096, out_features=136, rank=8)
    assert lib.ls_expand_takes(ctypes.byref(args)) == 1
    assert lib.ls_expand(bytes(args), None) == 100002  # no hidden
    args.hidden = args.experts = args.gates = args.items[0].out = 4096
    assert 0 < lib.ls_expand(bytes(args), None) < 1000 and 0 < lib.ls_widen(bytes(args), None) < 1000
    for field, value in (("hidden_stride", -8), ("hidden_stride", 68), ("hidden_stride", 56)):
        other = kernels.abi.ExpandArgs.from_buffer_copy(args)
        setattr(other, field, value)
        assert lib.ls_expand(bytes(other), None) == 100001
    for base, stride, code in (
        (4096, 136, None),
        (4096, 200, None),
        (4096, 128, 100001),
        (4096, 140, 100001),
        (4104, 136, 100001),
    ):
        other = kernels.abi.ExpandArgs.from_buffer_copy(args)
        other.items[0].base, other.items[0].base_stride = base, stride
        refused = lib.ls_expand(bytes(other), None)
        assert 0 < refused < 1000 if code is None else refused == code
    for field, value, widens in (
        ("rank", 24, 1), ("rank", 12, 0), ("rank", 264, 0), ("out_features", 20, 1), ("bias", 4098, 1), ("lora_b", 4104, 0)
    ):  # fmt: skip
        other = kernels.abi.ExpandArgs.from_buffer_copy(args)
        setattr(other.items[0], field, value)
        assert lib.ls_expand_takes(ctypes.byref(other)) == 0 and lib.ls_expand(bytes(other), None) == 100001
        assert lib.ls_widen_takes(ctypes.byref(other)) == widens
    assert lib.ls_router(None, None, None, None, 1, 8, 4, 5, 1, 1.0, 0, 0, 0, None) == 100001  # top_k > num_experts
    assert b"NULL" in lib.ls_error_string(100002)


def test_a_missing_or_broken_library_is_a_reason_not_an_error(tmp_path, monkeypatch):
    for content, reason in ((None, "no compiled kernels"), (b"not a library", "not built by this package")):
        path = tmp_path / "libloraswitch.so"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(kernels.loader, "LIBRARY", path)
        kernels.loader._load.cache_clear()
        kernels.why_not.cache_clear()
        assert reason in kernels.why_not() and not kernels.available()
        with pytest.raises(RuntimeError, match=reason):
            kernels.library()
    monkeypatch.undo()
    kernels.loader._load.cache_clear()
    kernels.why_not.cache_clear()


def test_the_status_report_names_versions_and_the_reason():
    text = fresh("import runpy; runpy.run_module('peft_loraswitch', run_name='__main__')", PEFT_LORASWITCH_KERNELS="0")
    for part in (
        "peft_loraswitch ",
        f"torch {torch.__version__}",
        "GPU",
        "library: not loaded",
        "NOT available: turned off",
    ):
        assert part in text
