"""`python -m peft_loraswitch`: versions, GPU, driver, library, why the kernels are or are not used, whether vLLM serves."""

from __future__ import annotations

import platform
from ctypes import byref, c_int
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, kernels
from .vllm_plugin import report as vllm_report


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _driver() -> str:
    """The newest CUDA that the driver speaks, as the library sees it."""
    number = c_int()
    try:
        code = kernels.library().ls_driver_version(byref(number))
    except RuntimeError:
        return "unknown (the library is not loaded)"
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}" if not code and number.value else "none"


def report() -> str:
    """What `main` prints."""
    lines = [
        f"peft_loraswitch {__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join([f"torch {torch.__version__}", *map(_version, ("peft", "transformers", "accelerate", "trl"))]),
        f"torch's CUDA: {torch.version.cuda or 'none'}; driver: {_driver()}",
    ]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        reason = kernels.why_not(index)
        used = "kernels used" if reason is None else f"kernels NOT used: {reason}"
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}: {used}")
    if count == 0:
        lines.append("GPU: none")
    try:
        lines.append(f"library: {kernels.loader.LIBRARY.name}, {kernels.build_info()}")
    except RuntimeError:
        lines.append("library: not loaded")
    reason = kernels.why_not()
    lines.append("kernels: available" if reason is None else f"kernels: NOT available: {reason}")
    lines.append(vllm_report.report())
    lines.append(f"{kernels.loader.SWITCH}=0 in the environment turns them off")
    return "\n".join(lines)


def main() -> None:
    print(report())


if __name__ == "__main__":
    main()
