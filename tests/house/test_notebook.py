"""The notebook runs from top to bottom, and what it says about itself at its end holds."""

from __future__ import annotations

import json

import pytest
import torch

from paths import ROOT

NOTEBOOK = ROOT / "docs" / "first_adapter.ipynb"


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    monkeypatch.chdir(tmp_path)  # it writes into ./outputs
    threads, names = torch.get_num_threads(), {"__name__": "notebook"}
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    finally:
        torch.set_num_threads(threads)
    assert set(names["load"]) == {"digits", "letters"}
