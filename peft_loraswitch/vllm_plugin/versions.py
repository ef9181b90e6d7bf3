"""Which versions of vLLM the plugin serves with. Imports nothing of vLLM but its number."""

from __future__ import annotations

import os

from packaging.version import InvalidVersion, Version

OLDEST, NEWEST = "0.27", "0.33"  # both ends were run, of each its .0; patch releases are taken as well
SWITCH = "LORASWITCH_UNTESTED_VLLM"  # 1 in the environment: try others as well; what can be checked still is


class UnsupportedVLLM(RuntimeError):
    """This vLLM cannot serve LoRA-Switch adapters; the message says why."""


def installed() -> str:
    import vllm

    return str(vllm.__version__)


def unsupported(reason: str) -> UnsupportedVLLM:
    return UnsupportedVLLM(
        f"vLLM {installed()} cannot serve LoRA-Switch adapters: {reason}. peft_loraswitch was tested with vLLM {OLDEST} to "
        f"{NEWEST}: install one of these, or another peft_loraswitch. To try all the same, set {SWITCH}=1. To run this vLLM "
        "without the plugin, set VLLM_PLUGINS to the names of the other plugins, or to nothing."
    )


def check_version() -> None:
    """Raise an UnsupportedVLLM if vLLM is older or newer than what was tested, unless `SWITCH` is set."""
    if os.environ.get(SWITCH) == "1":
        return
    try:
        release = Version(installed()).release
    except InvalidVersion as error:
        raise unsupported("its version cannot be read") from error
    if not Version(OLDEST).release <= (*release, 0)[:2] <= Version(NEWEST).release:
        raise unsupported("it is older or newer than what was tested")
