"""`python -m peft_loraswitch`: versions, GPU, driver, library, why the kernels are or are not used, whether vLLM serves.

`python -m peft_loraswitch route ADAPTER --text "..."`: which expert each token of a text gets.
"""

from __future__ import annotations

import argparse
import platform
from ctypes import byref, c_int
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from . import __version__, kernels
from .vllm_plugin import report as vllm_report

HAS_PEFT = find_spec("peft") is not None  # vLLM's environment has none, and asks for versions all the same
if HAS_PEFT:
    from .reporting import route_command


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
    """What `main` prints if it is asked for nothing else."""
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


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m peft_loraswitch", description="Without a command: versions and kernels."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    if HAS_PEFT:
        route = commands.add_parser("route", help="show which expert each token of a text gets")
        route_command.add_arguments(route)
    arguments = parser.parse_args()
    if arguments.command == "route":
        return route_command.run(arguments)
    print(report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
