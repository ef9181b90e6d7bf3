"""Which versions of vLLM the plugin takes. Needs no vLLM."""

from __future__ import annotations

import pytest

from peft_loraswitch.vllm_plugin import versions


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("0.27.0", True), ("0.27.0+cpu", True), ("0.30.2", True), ("0.33.0", True), ("0.33.1", True), ("0.33.1.dev7+g1", True),
        ("0.26.9", False), ("0.34.0rc1", False), ("0.34.0", False), ("1.0", False), ("dev", False),
    ],
)  # fmt: skip
def test_taken(version, taken, monkeypatch):
    monkeypatch.delenv(versions.SWITCH, raising=False)
    monkeypatch.setattr(versions, "installed", lambda: version)
    if taken:
        versions.check_version()
    else:
        with pytest.raises(versions.UnsupportedVLLM, match="vLLM 0.27 to 0.33: install one of these"):
            versions.check_version()
    monkeypatch.setenv(versions.SWITCH, "1")
    versions.check_version()
