"""`use_experts`: every sample follows the expert that it is given, on every path."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

from helpers import (
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    switch_layers,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from peft_loraswitch import use_experts

NAMES = ["maths", "code", "law", "news"]
KINDS: dict[str, dict[str, Any]] = {
    "top-2": {},
    "hard": {"top_k": 1, "normalize_gates": True},
    "base": {"base_expert": True},
    "shared": {"num_shared_experts": 2},
    "shared, deep": {"num_shared_experts": 1, "router_module": "layers.1.mlp.up_proj", "base_expert": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)
IDS = tokens(4, 6)


def model_of(kind: str = "top-2", backbone: Any = None, **overrides: Any) -> Any:
    settings = {"expert_names": NAMES, **KINDS[kind], **overrides}
    return adapted(tiny_llama() if backbone is None else backbone, **settings)


def alone(model: Any, expert: int | None, adapter: str = "default") -> Any:
    """A copy whose experts other than `expert` and the shared ones are gone (B is zero), at equal gates: what is left is the
    expert's own with gate 1, by another way: all experts at work, each with gate 1."""
    twin = copy.deepcopy(model)
    for layer in switch_layers(twin).values():
        routed = layer.routing_options[adapter].num_experts
        weight = layer.loraswitch_B[adapter].weight.data
        for e in range(routed):
            if e != expert:
                weight[e] = 0
        weight[routed:] /= layer.routing_options[adapter].top_k
        layer.forward = _all_of(layer, adapter)
    return twin


def _all_of(layer: Any, adapter: str) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        a, b = layer.loraswitch_A[adapter].weight, layer.loraswitch_B[adapter].weight
        delta = torch.einsum("eor,eri,...i->...o", b.double(), a.double(), x.double())
        return (layer.base_layer(x).double() + layer.scaling[adapter] * delta).to(x.dtype)

    return forward


def expected(model: Any, experts: list[int], ids: torch.Tensor = IDS) -> torch.Tensor:
    rows = [alone(model, e)(input_ids=ids[i : i + 1]).logits for i, e in enumerate(experts)]
    return torch.cat(rows)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@kinds
@torch.no_grad()
def test_each_sample_follows_its_own(kind):
    model = model_of(kind)
    last = 4 if KINDS[kind].get("base_expert") else 0
    experts = [2, 0, 3, last]
    wanted = expected(model, experts)
    router_layer(model).loraswitch_router["default"].register_forward_hook(_never)
    named: list[Any] = ["law", 0, "news", "base" if last else 0]
    for given in (experts, named, torch.tensor(experts), torch.tensor(experts).unsqueeze(-1).expand(4, 6)):
        with use_experts(model, given):
            close(model(input_ids=IDS).logits, wanted)
    with use_experts(model, "law"):
        close(model(input_ids=IDS).logits, expected(model, [2] * 4))


def _never(*args: Any) -> None:
    raise AssertionError("the router was asked")


@torch.no_grad()
def test_tokens_and_nesting():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    layer, x = router_layer(model), torch.randn(2, 3, 6)
    given = torch.tensor([[0, 1, 2], [3, 0, 1]])
    a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
    delta = torch.einsum("nsor,nsri,nsi->nso", b[given], a[given], x)
    before = model(x)
    with use_experts(model, 1):
        inner = model(x)
        with use_experts(model, given):
            close(model(x), layer.base_layer(x) + layer.scaling["default"] * delta)
        assert torch.equal(model(x), inner)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_the_base_expert_is_the_backbone():
    model = model_of("base")
    with model.disable_adapter():
        backbone = model(input_ids=IDS).logits
    with use_experts(model, "base"):
        assert torch.equal(model(input_ids=IDS).logits, backbone)


@pytest.mark.parametrize("how", ["plain", "non-reentrant", "reentrant"])
def test_gradients(how):
    """Of each expert those of its own samples; of the router none."""
    model = model_of("top-2", tiny_llama(num_hidden_layers=3), router_aux_loss_coef=0.5).train()
    wanted = {}
    batch = padded([7, 5, 6])
    for i, e in enumerate([2, 0, 2]):
        single = alone(model, e)
        row = {key: value[i : i + 1] for key, value in batch.items()}
        (single(**row).logits.square() * row["attention_mask"].unsqueeze(-1)).sum().backward()
        for name, gradient in adapter_gradients(single).items():
            total = wanted.setdefault(name, torch.zeros_like(gradient))
            total[e] += gradient[e]
    if how != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    with use_experts(model, ["law", "maths", "law"]):
        logits = model(**batch).logits
    logits.square().mul(batch["attention_mask"].unsqueeze(-1)).sum().backward()
    found = adapter_gradients(model)
    assert not any("router" in name for name in found)
    for name, gradient in wanted.items():
        if "router" not in name:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-7)


def test_no_losses_of_the_router():
    model = model_of(router_aux_loss_coef=0.5, router_z_loss_coef=0.5).train()
    with use_experts(model, 1):
        found = model(input_ids=IDS, labels=IDS).loss
        model.eval()
        assert torch.equal(found, model(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("fused", [None, "fused", "merge"])
def test_generate(beams, fused):
    model = model_of()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    wanted = [alone(model, e).generate(input_ids=IDS[i : i + 1], **options) for i, e in enumerate([2, 0])]
    if fused:
        model.fuse_for_inference(fused)
    with use_experts(model, ["law", "maths"]):
        found = model.generate(input_ids=IDS[:2], **options)
    for i, rows in enumerate(wanted):
        assert torch.equal(found[i, : rows.shape[1]], rows[0])


@kinds
@torch.no_grad()
@pytest.mark.parametrize("backbone", [tiny_llama, tiny_gpt2])
def test_fused(kind, backbone):
    if "router_module" in KINDS[kind] and backbone is tiny_gpt2:
        kind = "shared"
    model = model_of(kind, backbone())
    given = [3, 1, 0, 3]
    with use_experts(model, given):
        wanted = model(input_ids=IDS).logits
        model.fuse_for_inference("fused")
        close(model(input_ids=IDS).logits, wanted)


def test_the_named_adapter_alone():
    model = model_of()
    model.add_adapter("other", switch_config())
    randomize_adapter(model, "other", seed=4)
    model.set_adapter("other")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with pytest.raises(ValueError, match="adapter_name must be one of default, other"), use_experts(model, 0):
            pass
        with use_experts(model, "law", "default"):
            assert torch.equal(model(input_ids=IDS).logits, before)
        with use_experts(model, 2, "other"):
            assert not torch.equal(model(input_ids=IDS).logits, before)


def test_other_threads_ask_the_router():
    model, seen = model_of(), []
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with use_experts(model, 0):
            thread = threading.Thread(target=lambda: seen.append(model(input_ids=IDS).logits.detach()))
            thread.start()
            thread.join()
    assert torch.equal(seen[0], before)


@pytest.mark.parametrize("kind", ["top-2", "base"])
def test_counted(kind):
    model = model_of(kind)
    given: list[Any] = [0, 3, 3, "base" if kind == "base" else 1]
    with torch.no_grad(), model.record_routing() as routed, use_experts(model, given):
        model(input_ids=IDS)
    summary = routed.summary()
    assert summary["tokens"] == IDS.numel()
    assert summary["load"] == [0.25, 0.0 if kind == "base" else 0.25, 0, 0.5]
    assert summary.get("base_share", 0.25) == 0.25


def test_refused():
    model = model_of()
    for given, message in [
        ("medicine", "expert 'medicine' is unknown: the adapter has the names maths"),
        (4, "expert 4 is unknown"),
        ("base", "expert 'base' is unknown"),
        ([0, True], "expert True is unknown"),
        (torch.tensor([0, 4]), "from 0 to 4; the adapter has 0 to 3"),
        (torch.tensor([0.0]), "must hold whole numbers"),
        (None, "experts=None must be the name or index of an expert"),
    ]:
        with pytest.raises(ValueError, match=message), use_experts(model, given):
            pass
    with pytest.raises(ValueError, match="adapter_name='none' is unknown"), use_experts(model, 0, "none"):
        pass
    with pytest.raises(ValueError, match="carries no LoRA-Switch adapter"), use_experts(tiny_llama(), 0):
        pass
    for given in ([0, 1], [0] * 5, []):
        with use_experts(model, given), pytest.raises(ValueError, match="samples, but the batch has 4"):
            model(input_ids=IDS)
        with use_experts(model, given), pytest.raises(ValueError, match="samples, but the batch has 4"):
            model.generate(input_ids=IDS)
    with use_experts(model, torch.zeros(4, 5).long()), pytest.raises(ValueError, match="for tokens of shape"):
        model(input_ids=IDS)


def test_another_adapter_of_the_name():
    """The indices were those of the one before."""
    model = model_of()
    model.add_adapter("other", switch_config(num_experts=3))
    with use_experts(model, 2, "other"):
        model.delete_adapter("other")
        model.add_adapter("other", switch_config(num_experts=2))
        model.set_adapter("other")
        with pytest.raises(ValueError, match="'other' with 3 choices; the one of that name has 2 now"):
            model(input_ids=IDS)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled(training):
    torch._dynamo.reset()
    model = model_of("top-2", tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"]).train(training)
    compiled = torch.compile(model, backend="eager")
    for given in (None, [0, 1, 2, 3], [3, 3, 0, 1]):
        if given is None:
            close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)
            continue
        with use_experts(model, given):
            close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)
    close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)
    torch._dynamo.reset()
