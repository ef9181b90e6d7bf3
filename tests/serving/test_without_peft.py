"""The package where PEFT is not installed, as in vLLM's environment."""

from __future__ import annotations

from fresh import run_python

WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # neither found nor importable
import peft_loraswitch
import peft_loraswitch.vllm_plugin
import peft_loraswitch.vllm_plugin.adapter_folder
import peft_loraswitch.vllm_plugin.routing_tables
from peft_loraswitch.__main__ import report
print(peft_loraswitch.__version__)
for name in ("from_loras", "LoRASwitchConfig", "spelled_wrong"):
    try:
        getattr(peft_loraswitch, name)
    except Exception as error:
        print(type(error).__name__, error)
print(report())
"""


def test_the_plugin_needs_no_peft():
    out = run_python(WITHOUT_PEFT)
    assert out.startswith(
        "0.1.0\nImportError peft_loraswitch.from_loras needs PEFT, which is not installed: pip install peft\n"
    )
    assert "ImportError peft_loraswitch.LoRASwitchConfig needs PEFT" in out
    assert "AttributeError module 'peft_loraswitch' has no attribute 'spelled_wrong'" in out
    assert "\nvllm: not installed\n" in out
