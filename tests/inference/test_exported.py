"""A routed model that is traced or exported computes what it computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import adapted, tiny_llama, tokens

SETTINGS = {
    "usual": {},
    "top_p": {"top_p": 0.5, "num_shared_experts": 1},
    "base expert": {"base_expert": True},
    "hard": {"top_k": 1, "normalize_gates": True},
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def module_of(**settings):
    return Logits(adapted(tiny_llama(), **settings)).eval()


@pytest.mark.parametrize("name", SETTINGS)
def test_traced(name):
    module = module_of(**SETTINGS[name])
    with torch.no_grad():
        traced = torch.jit.trace(module, tokens(), check_trace=False)
        for ids in (tokens(), tokens(*tokens().shape, seed=3)):
            torch.testing.assert_close(traced(ids), module(ids))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [{}, {"router_decay": 0.9}, SETTINGS["top_p"]], ids=str)
def test_exported(settings, fused):
    module = module_of(**settings)
    if fused:
        module.model.fuse_for_inference()
    program = torch.export.export(module, (tokens(),)).module()
    for ids in (tokens(), tokens(*tokens().shape, seed=3)):
        torch.testing.assert_close(program(ids), module(ids))
