"""The benchmarks of the kernels alone, where there is no GPU: they say so at once."""

from __future__ import annotations

import sys

import pytest
import torch

from recipes.benchmarks import linears, merge


@pytest.mark.parametrize("benchmark", [linears, merge], ids=lambda module: module.__name__.rpartition(".")[2])
def test_without_a_gpu_it_says_what_it_needs(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2 and "needs a CUDA GPU and the kernels" in capsys.readouterr().err
