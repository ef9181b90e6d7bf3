"""Quantised backbones, through PEFT's own resolver: the adapter adds to whatever the quantised linear returns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training

import oracle
from helpers import adapted, switch_layers, tiny_llama, tokens
from paths import ROOT
from quantized import BACKENDS, LINEARS, SHAPE


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[Callable[[Path], Any], str]:
    package, make, name = BACKENDS[request.param]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return make, name


def test_what_the_development_environment_holds_is_not_skipped():
    pinned = (ROOT / "requirements-dev.txt").read_text()
    missing = [
        package for package in ("torchao", "bitsandbytes") if f"{package}==" in pinned and not find_spec(package)
    ]
    assert not missing, "pinned, but not installed here: the cases below would be skipped"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.filterwarnings("ignore")
def test_quantised_backbone(backend: tuple[Callable[[Path], Any], str], tmp_path: Path):
    make, backend_name = backend
    backbone = make(tmp_path / "base")
    quantised = logits(backbone)
    plain = logits(tiny_llama(**SHAPE))
    assert 0 < (quantised - plain).abs().mean() < 0.5 * plain.abs().mean(), "the backbone is quantised"
    model = adapted(backbone, target_modules=LINEARS, task_type="CAUSAL_LM")
    layers = switch_layers(model)
    assert len(layers) == 14
    assert {layer.quantization_backend.backend_name for layer in layers.values()} == {backend_name}

    # each linear: quantised linear + the definition, on what it really received
    calls: dict[str, tuple] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
    with_adapter = logits(model)
    first = next(iter(layers))
    router = layers[first].loraswitch_router["default"].weight
    decision = oracle.decide(calls[first][0], router, 2, True)
    for name, layer in layers.items():
        x, out = calls[name]
        with torch.no_grad():
            base = layer.base_layer(x)
        a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
        wanted = base.double() + oracle.delta(x, a, b, decision, layer.scaling["default"])
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), quantised)
    assert (with_adapter - quantised).abs().max() > 0.1

    # decoding with a cache
    prompt = tokens(1, 5)
    out = model.generate(
        prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        full = model(input_ids=out.sequences).logits[:, 4:-1]
    # bitsandbytes' 8 bit and dynamic quantisation round a batch of tokens otherwise than one token
    torch.testing.assert_close(torch.stack(out.logits, 1), full, rtol=0, atol=0.1 * float(full.abs().max()))

    # a training step moves the adapter, and only the adapter
    before = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("loraswitch_" in n and not torch.equal(p, before[n]) for n, p in trainable.items())

    # saved without the backbone, loaded on a freshly quantised one
    trained = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(make(tmp_path / "again"), tmp_path / "adapter").eval()
    assert torch.equal(logits(reloaded), trained)

    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    unloaded = model.unload()
    assert not switch_layers(unloaded) and torch.equal(logits(unloaded), quantised)


@pytest.mark.filterwarnings("ignore")
def test_qlora_recipe(backend: tuple[Callable[[Path], Any], str], tmp_path: Path):
    """`prepare_model_for_kbit_training`, bf16 autocast: gradients with gradient checkpointing equal those without."""
    make, _ = backend
    gradients = {}
    for kind in ("none", "non-reentrant", "reentrant"):
        settings = {"use_reentrant": kind == "reentrant"}
        backbone = prepare_model_for_kbit_training(
            make(tmp_path / kind), use_gradient_checkpointing=kind != "none", gradient_checkpointing_kwargs=settings
        )
        if kind != "none" and not backbone.is_gradient_checkpointing:  # only backbones that say they are quantised
            backbone.gradient_checkpointing_enable(settings)
            backbone.enable_input_require_grads()
        model = adapted(backbone, target_modules=LINEARS, task_type="CAUSAL_LM").train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients[kind] = {n: p.grad for n, p in model.named_parameters() if "loraswitch_" in n}
    assert len(gradients["none"]) == 2 * 14 + 1
    for name, plain in gradients.pop("none").items():
        assert plain.any()
        for kind, others in gradients.items():
            tolerance = 1e-2 * float(plain.abs().max())
            torch.testing.assert_close(others[name], plain, rtol=1e-2, atol=tolerance, msg=f"{kind}: {name}")


@pytest.mark.filterwarnings("ignore")
def test_copies(backend: tuple[Callable[[Path], Any], str], tmp_path: Path):
    make, _ = backend
    model = adapted(make(tmp_path / "base"), target_modules=LINEARS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
