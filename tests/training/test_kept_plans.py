"""What the fused training path keeps about a group of linears (`group_plans.Plan`): after a change of anything that it depends
on, the next step is the plain form's, and what can still be fused is. Each case changes a model that has trained two steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from helpers import adapted, adapter_gradients, padded, randomize_adapter, switch_config, tiny_llama
from peft_loraswitch import add_expert, remove_expert, use_experts
from peft_loraswitch.training import fast_linears

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
CONFIG = {"num_experts": 4, "top_k": 2, "target_modules": "all-linear"}
Change = Callable[[Any], Any]  # may return what the step runs within
ALL = 14  # linears


@pytest.fixture
def counted(monkeypatch) -> Iterator[list[int]]:
    """How many linears each call of the autograd function computes."""
    calls: list[int] = []
    run = fast_linears.run
    monkeypatch.setattr(fast_linears, "run", lambda spec, *args: (calls.append(spec.size), run(spec, *args))[1])
    yield calls


@pytest.fixture
def planned(monkeypatch) -> Iterator[list[str]]:
    """Names of the linears whose plans were made."""
    names: list[str] = []
    make = fast_linears.make_plan
    monkeypatch.setattr(
        fast_linears, "make_plan", lambda layer, *args: (names.append(layer.name), make(layer, *args))[1]
    )
    yield names


@functools.cache
def untrained() -> Any:
    """Copied by whoever takes it."""
    model = adapted(tiny_llama(attention_bias=True), **CONFIG).train()
    for name, settings in {"other": {"r": 3, "num_experts": 3, "rank_pattern": {"up_proj": 5}}, "third": {}}.items():
        model.add_adapter(name, switch_config(**{**CONFIG, **settings}))
        randomize_adapter(model, name, seed=len(name))
    return model


def trained(checkpointed: bool) -> Any:
    model = copy.deepcopy(untrained())
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    for _ in range(2):
        step(model)
    return model


def step(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**padded([7, 4]), **inputs)
    if output.loss.requires_grad:
        output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().float(), gradients


def attention(model: Any, layer: int = 1) -> Any:
    return model.base_model.model.model.layers[layer].self_attn


def mlp(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].mlp


def linears(model: Any) -> list[Any]:
    return [
        layer
        for i in range(2)
        for m in (attention(model, i), mlp(model, i))
        for layer in m.children()
        if hasattr(layer, "name")
    ]


# ------------------------------------------------------------------------------------------------------------- the changes


def delete_the_active_one(model: Any) -> None:
    model.set_adapter("third")
    step(model)
    model.delete_adapter("third")


def add_one(model: Any) -> None:
    model.add_adapter("new", switch_config(**{**CONFIG, "r": 1, "rank_pattern": {"q_proj": 4}}))
    randomize_adapter(model, "new", seed=9)
    model.set_adapter("new")


def others_rank(model: Any) -> None:
    """Another adapter of the same name."""
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", switch_config(**{**CONFIG, "r": 7, "num_experts": 2, "lora_alpha": 3}))
    randomize_adapter(model, "default", seed=4)
    model.set_adapter("default")


def scaling(model: Any) -> None:
    attention(model).v_proj.scaling["default"] *= 3


def scalings(model: Any) -> None:
    layer = mlp(model).up_proj
    layer.scaling = {name: value * 3 for name, value in layer.scaling.items()}


def one_disabled(model: Any) -> None:
    attention(model).v_proj.enable_adapters(False)


def one_switched(model: Any) -> None:
    attention(model).v_proj.set_adapter("third")


def freeze_a(model: Any) -> None:
    attention(model).v_proj.loraswitch_A["default"].requires_grad_(False)


def freeze_experts(model: Any) -> None:
    for layer in linears(model):
        layer.loraswitch_A["default"].requires_grad_(False)
        layer.loraswitch_B["default"].requires_grad_(False)


def train_alone(model: Any) -> None:
    for layer in linears(model):
        layer.loraswitch_A["default"].train_alone([1, 2])
        layer.loraswitch_B["default"].train_alone([1])


def train_base(model: Any) -> None:
    mlp(model).up_proj.base_layer.weight.requires_grad_()


def train_bias(model: Any) -> None:
    attention(model).q_proj.base_layer.bias.requires_grad_()


def to_float64(model: Any) -> None:
    model.double()


def to_bfloat16_and_back(model: Any) -> None:
    model.bfloat16()
    step(model)
    model.float()


def base_to_bfloat16_under_autocast(model: Any) -> Any:
    for layer in linears(model):
        layer.base_layer.bfloat16()
    return torch.autocast("cpu", torch.bfloat16)


def moved(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1


def assigned(model: Any) -> None:
    model.load_state_dict({name: value.detach() * 1.1 for name, value in model.state_dict().items()}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("loraswitch" in name and "default" in name)


def hook_on_base(model: Any) -> None:
    attention(model).v_proj.base_layer.register_forward_hook(lambda m, a, out: out * 2)


def hook_that_is_gone(model: Any) -> None:
    handle = attention(model).v_proj.base_layer.register_forward_hook(lambda m, a, out: out * 2)
    step(model)
    handle.remove()


def hook_on_experts(model: Any) -> None:
    attention(model).k_proj.loraswitch_B["default"].register_forward_hook(lambda m, a, out: out * 2)


def backward_hook_on_base(model: Any) -> None:
    mlp(model).up_proj.base_layer.register_full_backward_hook(lambda m, d_in, d_out: tuple(d * 2 for d in d_in))


class HookOnAll:
    """On all modules, while a step runs."""

    def __enter__(self) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return output * 2 if type(module) is nn.Linear else None

        self.handle = nn.modules.module.register_module_forward_hook(hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class Given:
    """Experts, while a step runs."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.within = use_experts(self.model, 2, "default")
        self.within.__enter__()

    def __exit__(self, *_: object) -> None:
        self.within.__exit__(None, None, None)


def hook_on_all(model: Any) -> Any:
    return HookOnAll()


def patched_forward(model: Any) -> None:
    base = mlp(model).gate_proj.base_layer
    forward = base.forward
    base.forward = lambda x: forward(x) * 2


def patched_linear(model: Any) -> None:
    layer = mlp(model).up_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


def another_base(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = mlp(model).up_proj
    doubled = Doubled(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
    doubled.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = doubled


def first_bias(model: Any) -> None:
    base = mlp(model).up_proj.base_layer
    base.bias = nn.Parameter(torch.ones(base.out_features), requires_grad=False)


def dropout(model: Any) -> None:
    attention(model).k_proj.loraswitch_dropout["default"] = nn.Dropout(0.5)


def no_casting(model: Any) -> None:
    mlp(model).gate_proj.cast_input_dtype_enabled = False


def marked_by_deepspeed(model: Any) -> None:
    mlp(model).gate_proj.base_layer.weight.ds_id = 3


def evaluated(model: Any) -> None:
    model.eval()
    step(model)
    model.train()


def within_autocast(model: Any) -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def after_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        step(model)


def fused_for_a_while(model: Any) -> None:
    model.fuse_for_inference("fused")
    model.unfuse()


def disabled_for_a_while(model: Any) -> None:
    """What was disabled for a while."""
    with model.disable_adapter():
        step(model)


# with how many of the 14 linears are still computed by the autograd function
CHANGES: dict[str, tuple[Change, int]] = {
    "switched": (lambda model: model.set_adapter("other"), ALL),
    "added": (add_one, ALL),
    "deleted": (delete_the_active_one, ALL),
    "another of that name": (others_rank, ALL),
    "two at once": (lambda model: model.base_model.set_adapter(["default", "other"]), 2 * ALL),
    "one disabled": (one_disabled, ALL - 1),
    "one switched": (one_switched, ALL),
    "disabled for a while": (disabled_for_a_while, ALL),
    "scaling": (scaling, ALL),
    "scalings": (scalings, ALL),
    "frozen A": (freeze_a, ALL),
    "frozen experts": (freeze_experts, ALL),
    "some alone": (train_alone, ALL),
    "base trains": (train_base, ALL),
    "bias trains": (train_bias, ALL),
    "float64": (to_float64, ALL),
    "bfloat16 and back": (to_bfloat16_and_back, ALL),
    "bfloat16 base": (base_to_bfloat16_under_autocast, ALL),
    "other memory": (moved, ALL),
    "other parameters": (assigned, ALL),
    "hook on base": (hook_on_base, ALL),
    "hook gone": (hook_that_is_gone, ALL),
    "hook on experts": (hook_on_experts, ALL - 1),
    "backward hook": (backward_hook_on_base, ALL),
    "hook on all": (hook_on_all, 0),
    "patched base": (patched_forward, ALL),
    "patched linear": (patched_linear, ALL),
    "another base": (another_base, ALL),
    "first bias": (first_bias, ALL),
    "dropout": (dropout, ALL - 1),
    "no casting": (no_casting, ALL - 1),
    "DeepSpeed": (marked_by_deepspeed, ALL),
    "evaluated": (evaluated, ALL),
    "autocast": (within_autocast, ALL),
    "after autocast": (after_autocast, ALL),
    "fused": (fused_for_a_while, ALL),
    "expert added": (lambda model: add_expert(model, adapter_name="default"), ALL),
    "expert removed": (lambda model: remove_expert(model, 1, "default"), ALL),
    "experts given": (Given, 0),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_step_after_a_change_is_the_plain_forms(change, checkpointed, counted):
    model = trained(checkpointed)
    apply, expected_linears = CHANGES[change]
    within = apply(model)
    results = []
    for form in (nullcontext(), nullcontext(), fast_linears.plain()):
        counted.clear()
        torch.manual_seed(0)
        with form, _fresh(within):
            results.append(step(model))
        if form is not None and len(results) < 3:
            assert sum(counted) == expected_linears * (2 if checkpointed else 1), counted
    tolerance = 0.05 if any(p.dtype == torch.bfloat16 for p in model.parameters()) or "autocast" == change else 1e-5
    for logits, gradients in results[:2]:
        assert gradients.keys() == results[2][1].keys() and gradients
        assert _relative(logits, results[2][0]) < tolerance
        for name, exact in results[2][1].items():
            assert _relative(gradients[name], exact) < 3 * tolerance, name


def _fresh(within: Any) -> Any:
    return copy.copy(within) if hasattr(within, "__enter__") else nullcontext()


def _relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_plans_are_kept(checkpointed, planned):
    model = trained(checkpointed)
    step(model)
    planned.clear()
    for _ in range(2):
        step(model)
    assert not planned
    scaling(model)  # of one linear: its group alone is looked up again
    step(model)
    assert planned == [attention(model).q_proj.name]


def test_a_forward_looks_no_further_than_the_first_adapted_linear(monkeypatch):
    model = trained(False)
    modules, looked_at = nn.Module.modules, []

    def counting(module: nn.Module) -> Iterator[nn.Module]:
        for each in modules(module):
            looked_at.append(each)
            yield each

    monkeypatch.setattr(nn.Module, "modules", counting)
    model(**padded([7, 4]))
    assert 0 < len(looked_at) < 12


def test_mixed_batches_in_between(counted):
    model = trained(False)
    counted.clear()
    model.eval()
    step(model, adapter_names=["default", "other"])
    assert not counted
    model.train()
    fast = step(model)
    with fast_linears.plain():
        exact = step(model)
    assert sum(counted) == ALL
    for name, gradient in exact[1].items():
        assert _relative(fast[1][name], gradient) < 1e-5


def test_what_is_deleted_is_let_go_of():
    import gc
    import weakref

    model = trained(False)
    model.set_adapter("other")
    step(model)
    weights = [weakref.ref(layer.loraswitch_A["other"].weight) for layer in linears(model)]
    model.set_adapter("default")
    model.delete_adapter("other")
    model.zero_grad()
    gc.collect()
    assert not any(weight() is not None for weight in weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_device(counted):
    model = trained(True)
    for device in ("cuda", "cpu"):
        model.to(device)
        batch = {key: value.to(device) for key, value in padded([7, 4]).items()}
        counted.clear()
        results = []
        for form in (nullcontext(), fast_linears.plain()):
            model.zero_grad()
            with form:
                model(**batch).loss.backward()
            results.append({name: g.clone() for name, g in adapter_gradients(model).items()})
        assert sum(counted) == 2 * ALL
        assert all(_relative(results[0][name], results[1][name]) < 1e-4 for name in results[1])
