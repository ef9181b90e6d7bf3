"""A backbone whose weights two processes share (tensor parallel): forward, generation, training, saving and loading are those
of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers import adapter_gradients, padded, randomize_adapter, switch_config, tiny_llama
from two_processes import LOSSES, on_two

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"target_modules": "all-linear"},
    "shared": {"target_modules": "all-linear", "num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj"},
    "router-at-row-wise": {"target_modules": ["o_proj", "down_proj"]},
}
SHAPE = {"num_key_value_heads": 2, "intermediate_size": 48}


def parallel(directory: str) -> Any:
    """The backbone, split over both processes."""
    from transformers import AutoModelForCausalLM

    try:
        from transformers.distributed import DistributedConfig
    except ImportError:  # before transformers 5.13
        return AutoModelForCausalLM.from_pretrained(f"{directory}/base", tp_plan="auto")
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(f"{directory}/base", distributed_config=config)


def results(model: Any) -> dict[str, Any]:
    batch = padded([7, 5])
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.5)
    losses, gradients = [], {}
    for seed in range(3):
        loss = model(**padded([7, 5], seed=seed)).loss
        loss.backward()
        gradients = gradients or {name: g.clone() for name, g in adapter_gradients(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"logits": logits, "tokens": tokens, "losses": losses, "gradients": gradients}


def job(rank: int, directory: str) -> dict[str, Any]:
    model = PeftModel.from_pretrained(parallel(directory), f"{directory}/adapter", is_trainable=True)
    split = [weight for weight in model.parameters() if hasattr(weight, "to_local")]
    assert len(split) >= 14 and all(weight.to_local().numel() * 2 == weight.numel() for weight in split)
    found = results(model)
    model.save_pretrained(f"{directory}/saved{rank}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_two_processes_equal_one(config, tmp_path):
    tiny_llama(**SHAPE).save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_llama(**SHAPE), switch_config(**config))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = results(model)
    for rank, found in enumerate(on_two(job, tmp_path)):
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(found["tokens"], expected["tokens"])
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            error = (found["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < 1e-4, name
        saved = PeftModel.from_pretrained(tiny_llama(**SHAPE), tmp_path / f"saved{rank}")
        trained = {name: p for name, p in model.named_parameters() if "loraswitch_" in name}
        for name, parameter in saved.named_parameters():
            if "loraswitch_" in name:
                torch.testing.assert_close(parameter, trained[name].detach(), rtol=1e-3, atol=1e-4)


def summed_loss(model: Any) -> dict[str, Any]:
    """Of a trainer that gives the number of labels: it multiplies by how many batches are computed at once, here one."""
    loss = model.train()(**padded([7, 5]), num_items_in_batch=torch.tensor(10)).loss
    loss.backward()
    return {"loss": loss.detach(), **adapter_gradients(model)}


def summed_loss_of_a_process(rank: int, directory: str) -> dict[str, Any]:
    model = PeftModel.from_pretrained(parallel(directory), f"{directory}/adapter", is_trainable=True)
    return summed_loss(model)


@pytest.mark.slow
def test_the_routers_losses_count_once(tmp_path):
    """Both processes see the same batch."""
    tiny_llama(**SHAPE).save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_llama(**SHAPE), switch_config(**CONFIGS["default"], **LOSSES))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = summed_loss(model)
    for found in on_two(summed_loss_of_a_process, tmp_path):
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-5, msg=name)
