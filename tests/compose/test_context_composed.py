"""router_decay and experts that come and go: the field is carried over, and the decision stays by context."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers import router_layer, tiny_llama, tokens
from loras import save_lora
from oracle import Oracle
from peft_loraswitch import add_expert, export_expert, from_loras, remove_expert

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def logits(model: torch.nn.Module, **inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), **inputs).logits


@pytest.fixture
def folders(tmp_path):
    return [save_lora(tmp_path / str(seed), tiny_llama(), seed) for seed in range(3)]


@pytest.fixture
def model(folders):
    model = from_loras(tiny_llama(), folders[:2], router_decay=0.7, top_k=1, normalize_gates=True, trainable="router")
    torch.nn.init.normal_(router_layer(model).loraswitch_router["default"].weight, std=1.0)
    return model.eval()


def check(model):
    torch.testing.assert_close(logits(model).double(), Oracle(model)(input_ids=tokens()).logits, **CLOSE)
    assert model.peft_config["default"].router_decay == 0.7


def test_imported_grown_and_shrunk(model, folders):
    check(model)
    add_expert(model, folders[2])
    check(model)
    remove_expert(model, 0)
    check(model)


def test_a_cache_from_before_an_expert_came_is_refused(model, folders):
    with torch.no_grad():
        past = model(input_ids=tokens(), use_cache=True).past_key_values
    add_expert(model, folders[2])
    with pytest.raises(ValueError, match="another setting of it"):
        logits(model, past_key_values=past)


def test_saved_and_exported(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    export_expert(model, 1, tmp_path / "lora")
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").peft_config["default"].peft_type == "LORA"


def test_the_router_alone_trains_by_context(model):
    model.train()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients and all("loraswitch_router" in name for name in gradients)
