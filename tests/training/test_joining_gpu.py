"""The router's losses on a CUDA device: backward has threads of its own there, and nothing in it may wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from helpers import padded, without_losses
from joining_tools import AUX, Objective, Z, assert_share, checkpointed, plain, router, seen_by_router, trained
from trainer_tools import auxiliary_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OBJECTIVES: dict[str, tuple[Objective, float]] = {
    "loss": (lambda output: 0.5 * output.loss, 0.5),
    "logits": (lambda output: output.logits.float().square().mean(), 1.0),
    "logits, in place": (lambda output: output.logits.div_(0.7).float().square().mean(), 1.0),
    "hidden states": (lambda output: output.hidden_states[-1].float().square().mean(), 1.0),
    "both": (lambda output: 0.25 * output.loss + output.logits.float().square().mean(), 0.25),
}


@contextmanager
def no_waiting(forbidden: bool) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu() -> tuple[Any, Any, dict[str, Any], torch.Tensor]:
    """(model, twin without losses, batch, the definition of the losses' gradient)"""
    model = trained().cuda()
    batch: dict[str, Any] = {name: tensor.cuda() for name, tensor in padded([7, 4, 6]).items()}
    expected = auxiliary_gradient(model, seen_by_router(model, batch), AUX, Z)
    return model, without_losses(model), {**batch, "output_hidden_states": True}, expected


@pytest.mark.parametrize("prepare", [plain, checkpointed(False), checkpointed(True)], ids=["plain", "not", "reentrant"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_output_brings_the_losses(objective, prepare):
    model, twin, batch, expected = on_gpu()
    compute, scale = OBJECTIVES[objective]
    for each in (prepare(model), prepare(twin)):
        value = compute(each(**batch))
        with no_waiting(prepare is plain):  # checkpoints save and restore random states
            value.backward(retain_graph=True)
    assert_share(router(model).grad, router(twin).grad, scale * expected)
    if scale == 1.0:  # a second call, which brings nothing more
        for each in (model, twin):
            output = each(**batch)
            each.zero_grad()
            for _ in range(2):
                output.hidden_states[-1].square().mean().backward(retain_graph=True)
        assert_share(router(model).grad, router(twin).grad, expected)


@pytest.mark.parametrize("objective", ["loss", "logits", "both"])
def test_bf16_autocast(objective):
    """The losses are float32: what autocast rounds is in the twin's gradient too."""
    model, twin, batch, _ = on_gpu()
    compute, scale = OBJECTIVES[objective]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        x = seen_by_router(model, {name: batch[name] for name in ("input_ids", "attention_mask")})
    for each in (model, twin):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = each(**batch)
        compute(output).backward()
    error = (router(model).grad - router(twin).grad - scale * auxiliary_gradient(model, x, AUX, Z)).norm()
    assert error <= 1e-2 * router(model).grad.norm()


def test_fp16_and_a_loss_scaler():
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    model, twin, batch, expected = on_gpu()
    for each in (model, twin):
        with torch.autocast("cuda", dtype=torch.float16):
            output = each(**batch)
        scaler.scale(0.5 * output.loss + output.logits.float().square().mean()).backward()
    error = (router(model).grad - router(twin).grad) / 1024.0 - 0.5 * expected
    assert error.norm() <= 2e-2 * expected.norm()
    with torch.autocast("cuda", dtype=torch.float16):
        logits = model(**batch).logits
    model.zero_grad()
    with pytest.warns(UserWarning, match="fp16.*no effect.*Use bf16"):
        scaler.scale(logits.float().square().mean()).backward()


def by_layer(model: Any) -> Any:
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True)
    return model


COMPILED: dict[str, Callable[[Any], Any]] = {
    "whole": lambda model: torch.compile(model, fullgraph=True),
    "cuda graphs": lambda model: torch.compile(model, fullgraph=True, mode="reduce-overhead"),
    "by layer": by_layer,
}


@pytest.mark.slow
@pytest.mark.parametrize("prepare", COMPILED)
def test_compiled(prepare):
    model, twin, batch, expected = on_gpu()
    del batch["output_hidden_states"]  # Transformers cannot be compiled with it
    torch._dynamo.reset()
    step = COMPILED[prepare](model)
    for objective in ("loss", "logits", "both"):
        compute, scale = OBJECTIVES[objective]
        for _ in range(3):  # CUDA graphs are recorded in the second
            for each, run in ((model, step), (twin, twin)):
                each.zero_grad(set_to_none=True)
                torch.compiler.cudagraph_mark_step_begin()
                compute(run(**batch, use_cache=False)).backward()
            error = (router(model).grad - router(twin).grad - scale * expected).norm()
            assert error <= 1e-4 * max(expected.norm(), router(twin).grad.norm())
