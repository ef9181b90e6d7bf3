"""Transformers' continuous batching, `generate_batch`, with several adapters in one model: as one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from helpers import tiny_llama
from peft_loraswitch import LoRASwitchConfig

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21], [30] * 7]
NEW = 6


def some_adapter(seed: int, **settings) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoRASwitchConfig(r=4, num_experts=4, target_modules="all-linear", init_weights=False, **settings)
        model = get_peft_model(tiny_llama(), config)
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.data.normal_()
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PeftModel:
    """An adapter that routes at once and one that routes deeper, with shared experts."""
    folder = tmp_path_factory.mktemp("adapters")
    some_adapter(1).save_pretrained(folder / "first")
    deeper = some_adapter(2, num_shared_experts=1, router_module="layers.1.self_attn.q_proj")
    deeper.save_pretrained(folder / "second")
    model = PeftModel.from_pretrained(tiny_llama(), folder / "first", adapter_name="first")
    model.load_adapter(folder / "second", adapter_name="second")
    return model.eval()


def one_by_one(model) -> list[list[int]]:
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(made[0, len(prompt) :].tolist())
    return outputs


def all_at_once(model) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = ContinuousBatchingConfig(num_blocks=8, page_size=32, max_batch_tokens=16)  # by default: most of the memory
    outputs = model.generate_batch(inputs=PROMPTS, generation_config=config, continuous_batching_config=cache)
    return [outputs[key].generated_tokens for key in sorted(outputs, key=lambda key: int(key.split("_")[-1]))]


@pytest.mark.parametrize("order", [["first", "second", "first"], ["second", "first"]])
@pytest.mark.slow
def test_each_adapter_by_itself(model, order):
    seen = {}
    for name in order:
        model.set_adapter(name)
        seen[name] = all_at_once(model)
        assert seen[name] == one_by_one(model)
    with model.disable_adapter():
        seen["backbone"] = all_at_once(model)
        assert seen["backbone"] == one_by_one(model)
    assert len({str(tokens) for tokens in seen.values()}) == 3, "an adapter does nothing"
