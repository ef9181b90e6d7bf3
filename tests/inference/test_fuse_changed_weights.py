"""Experts that are written to after fusing, where fused layers hold copies of them (float32 experts on a bf16 backbone, merged
weights): seen whatever way PyTorch offers to write; what it offers to write behind its own back is taken up when told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from helpers import adapted, tiny_llama, tokens
from peft_loraswitch.inference.counted_writes import CountedParameter

pytestmark = pytest.mark.compat
STRATEGIES = {"fused": ("fused", False), "merge": ("merge", False), "in place": ("merge", True)}
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


FEW = ["q_proj", "up_proj", "down_proj"]  # for compiled code: tracing takes as long as there are adapted linears


def made(**settings: Any) -> nn.Module:
    model = adapted(tiny_llama(num_hidden_layers=1) if settings else tiny_llama(), **settings)
    model.base_model.model.to(torch.bfloat16)
    for _, experts in experts_of(model):
        experts.data = experts.data.float()
    return model.requires_grad_(False)


def experts_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in model.named_parameters() if "loraswitch_A" in n or "loraswitch_B" in n]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens(1, 1), use_cache=False).logits.float()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 0.04 * b.norm())


# Each gets the experts of one linear; all multiply B by -2, or fill it with what is far from before.


def in_place(p: nn.Parameter) -> None:
    p.mul_(-2)


def by_data(p: nn.Parameter) -> None:
    p.data.mul_(-2)


def by_a_part_of_data(p: nn.Parameter) -> None:
    p.data[:, 1:].mul_(-2)


def copied_into_data(p: nn.Parameter) -> None:
    p.data.copy_(p.data * -2)


def by_data_that_was_kept(p: nn.Parameter) -> None:
    data = p.data
    logits_between.append(1)
    data.view(-1).mul_(-2)


def by_detach(p: nn.Parameter) -> None:
    p.detach().mul_(-2)


def within_inference_mode(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p.data.mul_(-2)


def new_data(p: nn.Parameter) -> None:
    p.data = p.data * -2


def new_data_at_the_old_address(p: nn.Parameter) -> None:
    """As offloading does: away, and back into memory that is given out again."""
    values, address = (p * -2).clone(), p.data_ptr()
    p.data = torch.empty(0)
    tries = []
    while not tries or (tries[-1].data_ptr() != address and len(tries) < 1000):
        tries.append(torch.empty_like(values))
    p.data = tries[-1].copy_(values)


def by_a_vector(p: nn.Parameter) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector([p]) * -2, [p])


def by_init(p: nn.Parameter) -> None:
    nn.init.constant_(p, 0.3)


def by_foreach(p: nn.Parameter) -> None:
    torch._foreach_mul_([p], -2)


def by_set(p: nn.Parameter) -> None:
    p.set_((p * -2).detach())


def swapped(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(p * -2, False))


def optimized(make: Any, **options: Any) -> Any:
    def step(p: nn.Parameter) -> None:
        p.requires_grad_(True)
        p.grad = torch.ones_like(p)
        make([p], lr=0.3, **options).step()
        p.requires_grad_(False)
        p.grad = None

    step.__name__ = f"{make.__name__}_{'_'.join(options)}"
    return step


SEEN = [
    in_place, by_data, by_a_part_of_data, copied_into_data, by_data_that_was_kept, by_detach, within_inference_mode, new_data,
    new_data_at_the_old_address, by_a_vector, by_init, by_foreach, by_set, swapped,
    *(optimized(make, **options) for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad)
      for options in ({"foreach": True}, {"foreach": False}, {"fused": True})),
]  # fmt: skip


def by_numpy(p: nn.Parameter, earlier: torch.Tensor) -> None:
    p.detach().numpy()[:] *= -2


def by_dlpack(p: nn.Parameter, earlier: torch.Tensor) -> None:
    torch.from_dlpack(p.detach()).mul_(-2)


def by_data_taken_before_fusing(p: nn.Parameter, earlier: torch.Tensor) -> None:
    earlier.mul_(-2)


def by_the_buffer_that_it_is_part_of(p: nn.Parameter, earlier: torch.Tensor) -> None:
    flat = p.detach().flatten().clone()
    p.data = flat.view_as(p)
    logits_between.append(1)
    flat.mul_(-2)


UNSEEN = [by_numpy, by_dlpack, by_data_taken_before_fusing, by_the_buffer_that_it_is_part_of]
logits_between: list[int] = []


@strategies
@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_seen(change, strategy):
    model = made()
    model.fuse_for_inference(*STRATEGIES[strategy])
    before = logits(model)
    with torch.no_grad():
        for name, parameter in experts_of(model):
            if "loraswitch_B" in name:
                change(parameter)
    after = logits(model)
    model.unfuse()
    expected = logits(model)
    assert close(after, expected) and not close(before, expected)
    assert not any(isinstance(parameter, CountedParameter) for parameter in model.parameters())


@strategies
@pytest.mark.parametrize("tell", ["refresh_fused", "eval", "train"])
@pytest.mark.parametrize("change", UNSEEN, ids=lambda change: change.__name__)
def test_taken_up_when_told(change, tell, strategy):
    model = made()
    earlier = {name: parameter.data for name, parameter in experts_of(model)}
    model.fuse_for_inference(*STRATEGIES[strategy])
    before = logits(model)
    with torch.no_grad():
        for name, parameter in experts_of(model):
            if "loraswitch_B" in name:
                change(parameter, earlier[name])
    if tell == "train":
        model.train()
        model.eval()
    elif tell == "eval" and strategy == "fused":
        model.eval()
    else:
        model.refresh_fused()
    after = logits(model)
    model.unfuse()
    expected = logits(model)
    assert close(after, expected) and not close(before, expected)


@pytest.mark.parametrize("tell", ["a prompt", "refresh_fused", "eval"])
def test_compiled_code_sees_it_after(tell):
    """It does not look itself."""
    torch._dynamo.reset()
    model = made(target_modules=FEW)
    model.fuse_for_inference("fused")
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled)
    with torch.no_grad():
        for name, parameter in experts_of(model):
            if "loraswitch_B" in name:
                parameter.data.mul_(-2)
    if tell == "a prompt":
        with torch.no_grad():
            model(input_ids=tokens(1, 5))
    else:
        getattr(model, tell)()
    after = logits(compiled)
    model.unfuse()
    expected = logits(model)
    assert close(after, expected) and not close(before, expected)


def test_experts_on_the_meta_device_are_seen_when_they_are_loaded(tmp_path):
    model = adapted(tiny_llama().to(torch.bfloat16), seed=3)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    other = adapted(tiny_llama().to(torch.bfloat16), target_modules=["q_proj"])
    other.fuse_for_inference("fused")
    other.load_adapter(tmp_path, "b", low_cpu_mem_usage=True)
    other.set_adapter("b")
    assert close(logits(other), expected)


@pytest.mark.slow
def test_a_load_that_fails_late_leaves_compiled_code_with_the_old_weights(tmp_path, monkeypatch):
    from peft import PeftModel, peft_model

    torch._dynamo.reset()
    model = made(target_modules=FEW)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in experts_of(model):
            if "loraswitch_B" in name:
                parameter.mul_(-2)
    model.fuse_for_inference("fused")
    compiled = torch.compile(model, backend="eager")
    expected = logits(compiled)
    load = peft_model.set_peft_model_state_dict

    def fail(*args: Any, **kwargs: Any) -> Any:
        load(*args, **kwargs)
        raise RuntimeError("the disk, say")

    monkeypatch.setattr(peft_model, "set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="the disk"):
        PeftModel.load_adapter(model, tmp_path, "default")
    assert close(logits(compiled), expected)


def test_counted_parameters_are_copied_saved_and_trained_like_others(tmp_path):
    model = made()
    model.fuse_for_inference("fused")
    name, parameter = experts_of(model)[0]
    assert isinstance(parameter, CountedParameter) and type(copy.deepcopy(parameter)) is CountedParameter
    assert type(model.state_dict()[name]) is torch.Tensor
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert torch.equal(torch.load(tmp_path / "weights.pt", weights_only=True)[name], parameter)
    parameter.requires_grad_(True)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert parameter.grad is not None and parameter.data.requires_grad is False
    compiled = torch.compile(lambda: parameter.square().sum(), backend="aot_eager", fullgraph=True)
    compiled().backward()
