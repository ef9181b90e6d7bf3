"""Whether vLLM is here and serves LoRA-Switch adapters, in a line for `python -m peft_loraswitch`."""

from __future__ import annotations

import contextlib
import io
import os
from importlib.metadata import entry_points
from importlib.util import find_spec

from . import check
from .versions import UnsupportedVLLM, installed


def report() -> str:
    if find_spec("vllm") is None:
        return "vllm: not installed"
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # vLLM says a lot when it is imported
        problem = _problem()
    served = "LoRA-Switch adapters are served" if problem is None else f"LoRA-Switch adapters are NOT served: {problem}"
    return f"vllm {installed()}: {served}"


def _problem() -> str | None:
    """Why the plugin does not serve, or None."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "loraswitch" not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed} leaves the plugin out"
    if not entry_points(group="vllm.general_plugins", name="loraswitch"):
        return "peft_loraswitch is not installed here (pip install), so vLLM does not find the plugin"
    try:
        check()
    except UnsupportedVLLM as error:
        return str(error)
    return None
