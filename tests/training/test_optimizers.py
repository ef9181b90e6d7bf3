"""PEFT's optimizer helpers on LoRA-Switch: the right learning rate for every weight, and the right gradient for every expert."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import peft.optimizers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn

import peft_loraswitch.optimizers
from fresh import LIBRARIES, run_python
from helpers import adapted, randomize_adapter, switch_config, tiny_gpt2, tiny_llama, tokens
from peft_loraswitch.integrations import _take_over_optimizers
from unchanged import unchanged

pytestmark = pytest.mark.compat
create_riemannian_optimizer = getattr(peft.optimizers, "create_riemannian_optimizer", None)
needs_riemannian = pytest.mark.skipif(create_riemannian_optimizer is None, reason="PEFT 0.20 does not have it")
FIELDS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "modules_to_save": ["norm", "lm_head"],
    "trainable_token_indices": {"embed_tokens": [3, 5]},
}


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, option: str) -> dict[str, float]:
    values = {id(p): group[option] for group in optimizer.param_groups for p in group["params"]}
    assert len(values) == sum(len(group["params"]) for group in optimizer.param_groups), "no parameter twice"
    return {name: values[id(p)] for name, p in model.named_parameters() if id(p) in values}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, scale: float = 1.0) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss * scale).backward()
        optimizer.step()


# -------------------------------------------------------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("through", ["peft", "transformers"])
def test_loraplus_gives_every_weight_the_rate_that_it_has_with_lora(through: str):
    """The reference is PEFT's own helper on stock LoRA with the same options."""
    options = {"lr": 0.001, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 0.5}
    models = []
    for config in (switch_config(**FIELDS), LoraConfig(**FIELDS)):
        model = tiny_llama()
        if through == "peft":
            model = get_peft_model(model, config)
        else:
            model.add_adapter(config)
        models.append((model, create_loraplus_optimizer(model, torch.optim.AdamW, **options)))
    (ours, our_optimizer), (lora, lora_optimizer) = models
    assert {type(our_optimizer), type(lora_optimizer)} == {torch.optim.AdamW}
    for option in ("lr", "weight_decay"):
        wanted = by_name(lora, lora_optimizer, option)
        found = by_name(ours, our_optimizer, option)
        assert set(found) == {name for name, p in ours.named_parameters() if p.requires_grad}
        for name, value in found.items():
            if "loraswitch_router" in name:  # as A
                assert value == {"lr": 0.001, "weight_decay": 0.1}[option]
            else:
                assert value == wanted[name.replace("loraswitch_", "lora_")], name
    rates = by_name(ours, our_optimizer, "lr")
    assert {rate for name, rate in rates.items() if "loraswitch_B" in name} == {0.016}
    assert {rate for name, rate in rates.items() if "loraswitch_A" in name} == {0.001}
    train(ours.train(), our_optimizer)


@pytest.mark.parametrize("ratio", [1.0, 4])
def test_loraplus_with_other_optimizers_and_ratios(ratio: float):
    model = get_peft_model(tiny_gpt2(), switch_config(num_shared_experts=1))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=ratio, momentum=0.9)
    rates = by_name(model, optimizer, "lr")
    assert {rate for name, rate in rates.items() if "loraswitch_B" in name} == {0.5 * ratio}
    assert {rate for name, rate in rates.items() if "loraswitch_B" not in name} == {0.5}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_loraplus_of_a_peft_that_forms_other_groups(monkeypatch):
    """Then it is refused: B must not get the rate of A."""

    def other(model: Any, optimizer_cls: Any, *, lr: float, loraplus_lr_ratio: float, **kwargs: Any) -> Any:
        return optimizer_cls([{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}], **kwargs)

    monkeypatch.setattr(create_loraplus_optimizer, "before_loraswitch", other)
    with pytest.raises(ValueError, match="other parameter groups"):
        create_loraplus_optimizer(adapted(tiny_llama()), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)


# ------------------------------------------------------------------------------------------------------------- LoRA-FA


def one_expert_and_lora(**fields: Any) -> tuple[nn.Module, nn.Module]:
    """With one expert LoRA-Switch is LoRA: two models that compute the same, with the same weights."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    ours = get_peft_model(tiny_llama(), switch_config(num_experts=1, top_k=1, **fields))
    randomize_adapter(ours)
    lora = get_peft_model(tiny_llama(), LoraConfig(**fields))
    state = {k.replace("loraswitch_", "lora_"): v for k, v in ours.state_dict().items() if "loraswitch_" in k}
    lora.load_state_dict({k: v.squeeze(0) for k, v in state.items() if "lora_A" in k or "lora_B" in k}, strict=False)
    assert torch.allclose(ours(tokens()).logits, lora(tokens()).logits, atol=1e-5)
    return ours, lora


def assert_same_weights(ours: nn.Module, lora: nn.Module, tolerance: float) -> None:
    wanted = {name: p for name, p in lora.named_parameters() if "lora_" in name}
    found = {name.replace("loraswitch_", "lora_"): p for name, p in ours.named_parameters() if "loraswitch_" in name}
    assert set(wanted) <= set(found)
    for name, p in wanted.items():
        assert torch.allclose(found[name].squeeze(0), p, atol=tolerance), name


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lorafa_with_one_expert_is_that_of_lora(use_rslora: bool):
    """PEFT's own projects in bfloat16; losses are scaled up, so that what its Adam adds to the denominator does not matter."""
    ours, lora = one_expert_and_lora(use_rslora=use_rslora, rank_pattern={"v_proj": 6}, alpha_pattern={"down_proj": 24})
    before = {name: p.clone() for name, p in ours.named_parameters()}
    for model in (ours, lora):
        optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)
        train(model.train(), optimizer, steps=3, scale=1e4)
    assert_same_weights(ours, lora, tolerance=2e-3)
    moved = {name: (p - before[name]).abs().max().item() for name, p in ours.named_parameters()}
    assert all(moved[name] > 0.02 for name in moved if "loraswitch_B" in name)
    assert all(moved[name] == 0 for name in moved if "loraswitch_B" not in name and "router" not in name)


def test_lorafa_projects_the_gradient_of_every_expert(monkeypatch):
    """What the optimizer gets: for each expert alone, the solution of least squares, in float64."""
    model = adapted(tiny_llama(), num_shared_experts=1, r=5, lora_alpha=7, modules_to_save=["lm_head"]).double().train()
    optimizer = create_lorafa_optimizer(model, r=5, lora_alpha=7, lr=0.1, weight_decay=0.01)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "loraswitch_A" in name)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    seen: dict[int, torch.Tensor] = {}

    def look(self: Any, closure: Any = None) -> None:
        seen.update(
            {id(p): p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        )

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    optimizer.step()
    parameters = dict(model.named_parameters())
    checked = 0
    for name, gradient in raw.items():
        found = seen[id(parameters[name])]
        assert torch.equal(parameters[name].grad, gradient), "what the user sees stays"
        if "loraswitch_B" not in name:
            assert torch.equal(found, gradient), name  # the router, the head
            continue
        scale, a = 7 / 5, parameters[name.replace("_B", "_A")]
        for expert in range(5):
            # G_e A_e^T s is the gradient of B_e. The X with s X A_e closest to G_e: s X A_e A_e^T = G_e A_e^T
            full = gradient[expert] / scale
            gram = a[expert] @ a[expert].T + 1e-8 * torch.eye(5, dtype=a.dtype)  # PEFT's damping
            wanted = torch.linalg.solve(gram, full.T).T / scale
            assert torch.allclose(found[expert], wanted, rtol=1e-5, atol=1e-12)
            checked += int(gradient[expert].any())
    assert checked > 40


def test_lorafa_takes_part_in_training():
    """Schedulers, closures, saved states, ranks beyond the features, half precision."""
    model = adapted(tiny_llama(), r=40, num_experts=3, target_modules=["q_proj", "down_proj"]).train()
    optimizer = create_lorafa_optimizer(model, r=40, lora_alpha=8, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())
    state = optimizer.state_dict()
    again = create_lorafa_optimizer(model, r=40, lora_alpha=8, lr=0.01)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]

    half = adapted(tiny_llama()).to(torch.bfloat16).train()
    train(half, create_lorafa_optimizer(half, r=3, lora_alpha=6, lr=0.01))
    assert all(p.isfinite().all() for p in half.parameters())


def test_lorafa_contradicted():
    model = adapted(tiny_llama())
    with pytest.raises(ValueError, match="use_rslora=True is not what the adapter's configuration says"):
        create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.1, use_rslora=True)
    assert all(p.requires_grad for name, p in model.named_parameters() if "loraswitch_A" in name), (
        "nothing is half done"
    )
    with pytest.raises(TypeError, match="lora_alpha"):
        create_lorafa_optimizer(model, r=3, lr=0.1)


# ---------------------------------------------------------------------------------------------------------- Riemannian


@needs_riemannian
def test_riemannian_with_one_expert_is_that_of_lora():
    ours, lora = one_expert_and_lora()
    for model in (ours, lora):
        train(model.train(), create_riemannian_optimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9), steps=3)
    assert_same_weights(ours, lora, tolerance=1e-5)


@needs_riemannian
def test_riemannian_preconditions_every_expert_by_itself():
    model = adapted(tiny_llama(), r=3, num_shared_experts=1).double().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=0.1))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        step = before[name] - p.detach()
        if "loraswitch_router" in name:
            assert torch.allclose(step, p.grad)
            continue
        other = before[name.replace("_A", "_X").replace("_B", "_A").replace("_X", "_B")]
        for expert in range(5):
            gram = other[expert].T @ other[expert] if "_A" in name else other[expert] @ other[expert].T
            inverse = torch.linalg.inv(gram + 0.1 * torch.eye(3, dtype=gram.dtype))
            wanted = inverse @ p.grad[expert] if "_A" in name else p.grad[expert] @ inverse
            assert torch.allclose(step[expert], wanted, atol=1e-10)


@needs_riemannian
def test_riemannian_refusals():
    model = adapted(tiny_llama())
    with pytest.raises(TypeError, match="subclass of torch.optim.Optimizer"):
        create_riemannian_optimizer(model, dict, lr=0.1)
    with pytest.raises(ValueError, match="LBFGS"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
    with pytest.raises(ValueError, match="no adapter that trains"):
        create_riemannian_optimizer(model.requires_grad_(False), torch.optim.SGD, lr=0.1)


# ----------------------------------------------------------------------------------------------------- import, other methods


BEFORE_THE_PACKAGE = """
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.optimizers.loraplus import create_loraplus_optimizer as again
import torch, transformers
import peft_loraswitch
from peft import get_peft_model
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)
settings = peft_loraswitch.LoRASwitchConfig(target_modules=["q_proj"])
model = get_peft_model(transformers.LlamaForCausalLM(config), settings)
for helper in (create_loraplus_optimizer, again):
    optimizer = helper(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for n, p in model.named_parameters() if "_B" in n} == {0.016}
create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3).step()
assert not any(p.requires_grad for n, p in model.named_parameters() if "_A" in n)
print("good")
"""


def test_helpers_imported_before_the_package():
    assert run_python(BEFORE_THE_PACKAGE, libraries=LIBRARIES).strip().endswith("good")


def test_other_methods_get_the_original():
    """And the helpers look as before."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for name in ("create_loraplus_optimizer", "create_lorafa_optimizer"):
        helper = getattr(peft.optimizers, name)
        original = helper.before_loraswitch
        assert inspect.signature(helper) == inspect.signature(original)
        assert list(inspect.signature(helper).parameters)[0] == "model" and "LoRA" in helper.__doc__.replace(
            "Lora", "LoRA"
        )
        options = {"lr": 0.1, "loraplus_lr_ratio": 2} if "plus" in name else {"r": 8, "lora_alpha": 8, "lr": 0.1}
        more = (torch.optim.SGD,) if "plus" in name else ()
        ours, theirs = helper(model, *more, **options), original(model, *more, **options)
        assert type(ours) is type(theirs)
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]] and group["lr"] == other["lr"]


def test_taking_over_twice_changes_nothing():
    original = create_loraplus_optimizer.before_loraswitch
    _take_over_optimizers()
    importlib.reload(peft_loraswitch.integrations)._take_over_optimizers()
    assert create_loraplus_optimizer.before_loraswitch is original
    create_loraplus_optimizer(adapted(tiny_llama()), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2)


# ----------------------------------------------------------------------------------- helpers that have no counterpart here


def _hotswap(model: Any, folder: str) -> None:
    from peft.utils.hotswap import hotswap_adapter

    hotswap_adapter(model, folder, "default")


def _prepare_hotswap(model: Any, folder: str) -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(model, target_rank=16)


def _convert(model: Any, folder: str) -> None:
    from peft.tuners.lora.conversion import convert_to_lora

    convert_to_lora(model, rank=4)


def _intruders(model: Any, folder: str) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    reduce_intruder_dimension(model)


def _eva(model: Any, folder: str) -> None:
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    initialize_lora_eva_weights(model, dataloader=[{"input_ids": tokens()}])


def _rescale(model: Any, folder: str) -> None:
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, 0.5):
        pass


@pytest.mark.parametrize("helper", [_hotswap, _prepare_hotswap, _convert, _intruders, _eva, _rescale])
def test_helpers_for_lora_alone_refuse(helper: Any, tmp_path):
    """By themselves: none of them takes our model for one without an adapter, or changes it."""
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    with unchanged(model), pytest.raises((ValueError, TypeError, AttributeError)) as raised:
        helper(model, str(tmp_path))
    assert any(
        word in str(raised.value) for word in ("LORA", "LoRA", "LoraLayer", "adapter layers", "init_lora_weights")
    )
