"""Finds and loads the compiled library, and says why the kernels are not used where they are not.

The library is plain C, loaded with ctypes, so one wheel serves every torch and Python. Loading never needs a GPU.
The one switch: PEFT_LORASWITCH_KERNELS=0 in the environment turns the kernels off (set while installing, it builds none).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from ctypes import byref, c_int
from pathlib import Path

import torch

from .abi import ABI_VERSION, SIGNATURES, WORKSPACE_BYTES
from .library_file import BrokenLibrary, read_seal

logger = logging.getLogger(__name__)

SWITCH = "PEFT_LORASWITCH_KERNELS"
AGAIN = "reinstall the package, or run `python setup.py build_kernels` in the checkout"
LIBRARY = Path(__file__).resolve().parent.parent / "libloraswitch.so"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None) or (None, why not). Needs no GPU."""
    if os.environ.get(SWITCH, "1") == "0":
        return None, f"turned off by {SWITCH}=0"
    if not LIBRARY.exists():
        return None, (
            "this installation has no compiled kernels (a pure-Python wheel or a source checkout): install with nvcc 12.8 "
            "or newer at hand, or run `python setup.py build_kernels` in the checkout"
        )
    try:
        read_seal(LIBRARY)  # loading half a file would crash the process
        library = ctypes.CDLL(str(LIBRARY))
        if (version := library.ls_abi_version()) != ABI_VERSION:
            return None, f"{LIBRARY.name} has ABI {version}, this package needs {ABI_VERSION}: {AGAIN}"
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError, BrokenLibrary) as error:
        return None, f"{LIBRARY.name} does not load: {error}: {AGAIN}"
    return library, None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it cannot be loaded; the message says why.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"The LoRA-Switch kernels are not available: {reason}.")
    return loaded


@functools.cache
def why_not(device: int | None = None) -> str | None:
    """Why the kernels cannot run on CUDA device `device` (default: on any); None if they can."""
    loaded, reason = _load()
    if loaded is None:
        return reason
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "this torch has no CUDA"
        return "torch finds no usable CUDA GPU"
    count = c_int()
    if code := loaded.ls_device_count(byref(count)):
        hint = (
            f" (the library is {build_info()}: an older driver does not run what that nvcc makes)" if code == 35 else ""
        )
        return f"CUDA error {code}: {error_string(code)}{hint}"
    devices = range(torch.cuda.device_count()) if device is None else [device]
    codes = [loaded.ls_device_supported(index) for index in devices]
    if not codes or all(codes):
        return f"the library ({build_info()}) has no code for this GPU: {error_string(codes[0]) if codes else 'none'}"
    return None


def available(device: int | None = None) -> bool:
    """Whether the kernels run on CUDA device `device` (default: on any)."""
    return why_not(device) is None


def build_info() -> str:
    """Compiler and architectures of the loaded library."""
    return library().ls_build_info().decode()


def error_string(code: int) -> str:
    return library().ls_error_string(code).decode()


def check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(
            f"LoRA-Switch kernel {what} failed with error {code}: {error_string(code)}. With {SWITCH}=0 in the environment "
            "plain PyTorch computes the same."
        )


def stream_of(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


_workspaces: dict[int, torch.Tensor] = {}
_workspaces_lock = threading.Lock()


def give_workspace(device: int) -> None:
    """Let groups of linears on CUDA device `device` run as one launch: once per process, 32 MiB for good.

    Not while a CUDA graph is captured or compiled code runs: graphs would take the memory for theirs.
    """
    with _workspaces_lock:
        if device in _workspaces:
            return
        zeroed = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=torch.device("cuda", device))
        torch.cuda.current_stream(device).synchronize()  # launches of any stream will use it
        check(library().ls_set_workspace(device, zeroed.data_ptr(), WORKSPACE_BYTES), "ls_set_workspace")
        _workspaces[device] = zeroed


@functools.cache
def log_once(message: str) -> None:
    logger.warning(message)
