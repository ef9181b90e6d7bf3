"""Copies of an adapted model, and its dtypes."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers import adapted, randomize_adapter, switch_config, switch_layers, tiny_llama, tokens

pytestmark = pytest.mark.compat


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def copies(model: PeftModel) -> dict[str, PeftModel]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("trained", [False, True])
def test_copies_are_independent(trained: bool):
    model = adapted(tiny_llama())
    if trained:  # after a training forward, whose graph is still alive
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
    made = copies(model)
    model.eval()
    wanted = logits(model)
    for how, other in made.items():
        assert torch.equal(logits(other.eval()), wanted), how
    states = {id(layer.routing_state) for m in (model, *made.values()) for layer in switch_layers(m).values()}
    assert len(states) == 4
    for other in made.values():
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert torch.equal(logits(model.eval()), wanted)
    if trained:
        assert model.router_stats()["tokens"] == tokens().numel(), "the copies' forwards are not counted here"
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_backbone(autocast_adapter_dtype: bool, dtype: torch.dtype, tmp_path: Path):
    def base() -> torch.nn.Module:
        return tiny_llama().to(dtype)

    model = get_peft_model(base(), switch_config(), autocast_adapter_dtype=autocast_adapter_dtype)
    randomize_adapter(model)
    wanted = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for n, p in model.named_parameters() if "loraswitch_" in n} == {wanted}
    out = model.train()(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert all(p.grad.dtype == wanted and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    assert torch.equal(logits(reloaded), logits(model))
    # and it computes the same as in float32, as well as this precision can
    full = adapted(tiny_llama().to(dtype).float())
    full.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    error = (logits(model).float() - logits(full)).abs()
    assert error.mean() < (0.05 if dtype is torch.bfloat16 else 0.006) * logits(full).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_model_to_dtype(dtype: torch.dtype):
    model = adapted(tiny_llama())
    wanted = logits(model)
    model.train()(input_ids=tokens(), labels=tokens())
    model.eval().to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype
    assert (logits(model).float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert model.router_stats()["tokens"] == 2 * tokens().numel(), "counters stay exact in any dtype"


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_same_decisions(amp: torch.dtype):
    model = adapted(tiny_llama())
    with model.record_routing() as plain:
        logits(model)
    with model.record_routing() as mixed, torch.autocast("cpu", dtype=amp):
        out = logits(model)
    assert out.dtype == amp
    assert mixed.summary()["load"] == plain.summary()["load"]
    assert mixed.summary()["z_loss"] == pytest.approx(plain.summary()["z_loss"], rel=1e-6)
