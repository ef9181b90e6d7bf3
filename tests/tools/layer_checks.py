"""A model and its adapted linears compared with the float64 oracle: outputs to within a few roundings, and gradients."""

from __future__ import annotations

import torch
from torch import nn

import oracle
from helpers import (
    adapter_gradients,
    padded,
    switch_layers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
)
from oracle import Oracle

NO_LOSSES = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


EPS = {d: torch.finfo(d).eps for d in (torch.float32, torch.bfloat16, torch.float16)}


def watch(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Fills with (input, output) of every adapted linear, in the order they run."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, layer in switch_layers(model.get_base_model()).items():
        layer.register_forward_hook(lambda _, args, out, n=name: seen.__setitem__(n, (args[0].detach(), out.detach())))
    return seen


def assert_layers_equal_oracle(model, run) -> None:
    """Every adapted linear, given the very input it got, within a few roundings of the oracle.

    The bound is the textbook one: eps times the sum of the absolute values of everything that is added up.
    """
    seen = watch(model)
    with torch.no_grad():
        run()
    config = model.peft_config["default"]
    layers = switch_layers(model.get_base_model())
    assert list(seen) and set(seen) == set(layers)
    router = next(name for name, layer in layers.items() if "default" in layer.loraswitch_router)
    weight = layers[router].loraswitch_router["default"].weight
    chosen = oracle.decide(seen[router][0], weight, config.top_k, config.normalize_gates, config.top_p)
    before = list(layers)[: list(layers).index(router)] if config.router_module else []
    for name, (x, y) in seen.items():
        layer = layers[name]
        decision = oracle.with_shared(chosen, config, routed=name not in before)
        a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
        s = oracle.scaling_of(config, name, a.shape[1])
        base = layer.get_base_layer()
        delta = oracle.delta(x, a, b, decision, s)
        expected = oracle.base_output(base, x) + delta
        size = oracle.base_output(base, x, absolute=True) + oracle.delta(x.abs(), a.abs(), b.abs(), decision, s)
        assert y.dtype == x.dtype and y.shape == expected.shape
        # float32: the router's exp and sums of up to 48 terms; 16 bits: six roundings of half an eps each
        roundings = 16 if y.dtype == torch.float32 else 3
        error, bound = (y.double() - expected).abs(), roundings * EPS[y.dtype] * size
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} times the bound"
        if x.numel():
            assert delta.abs().max() > 100 * bound.max() or y.dtype != torch.float32  # the delta is there to be missed


MODELS = {
    "llama": tiny_llama,
    "gpt2-conv1d": tiny_gpt2,
    "opt": tiny_opt,
    "bert": tiny_bert,
    "llama-classifier": tiny_llama_classifier,
}


def check_model_gradients(model) -> None:
    reference = Oracle(model)
    batch = padded([7, 4, 1])
    output, expected = model.train()(**batch), reference(**batch)
    real = batch["attention_mask"].bool()
    assert torch.allclose(output.logits[real].double(), expected.logits[real], rtol=0, atol=5e-5)
    output.loss.backward()
    expected.loss.backward()
    gradients, exact = adapter_gradients(model), reference.gradients()
    assert set(gradients) == set(exact)
    for name, gradient in gradients.items():
        if "router" in name and model.peft_config["default"].num_experts == 1:
            assert not gradient.any()  # softmax over one expert is 1, whatever the router says
            continue
        assert exact[name].norm() > 1e-4  # else the next line compares nothing
        assert (gradient.double() - exact[name]).norm() <= 2e-5 * exact[name].norm(), name
