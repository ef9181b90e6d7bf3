"""`trainable=[...]`: some experts train, and the others stay the same to the bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from helpers import adapted, randomize_adapter, switch_layers, tiny_llama, tokens
from peft_loraswitch import ExpertCollator, ExpertLoss, LoRASwitchConfig, add_expert, remove_expert, use_experts
from trainer_tools import OrderedTrainer, arguments, collate, samples

Dataset = pytest.importorskip("datasets").Dataset

NAMES = ["maths", "code"]
FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}


def model_of(trainable: Any = None, **fields: Any) -> Any:
    """Two experts that are good already, and a new one."""
    model = adapted(tiny_llama(), num_experts=2, top_k=1, expert_names=NAMES, **FIELDS, **fields)
    torch.manual_seed(9)
    add_expert(model, name="law")
    if trainable is not None:
        model.peft_config["default"].trainable = trainable
        model.set_adapter("default")
    return model


def experts_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in model.state_dict().items() if "loraswitch_" in n}


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def steps_of(model: Any, number: int = 20, **given: Any) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(number):
        ids = tokens(2, 8, seed=step)
        loss = model(input_ids=ids, labels=ids, **given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def check_only(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], index: int) -> None:
    assert before.keys() == after.keys()
    for name, value in after.items():
        if "router" in name:
            assert torch.equal(value, before[name])
            continue
        others = [e for e in range(len(value)) if e != index]
        assert torch.equal(value[others], before[name][others])
        assert not torch.equal(value[index], before[name][index])


def test_equals_a_lora_trained_alone():
    model = model_of(["law"]).train()
    lora = get_peft_model(tiny_llama(), LoraConfig(**FIELDS)).train()
    for name, layer in switch_layers(model).items():
        theirs = lora.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.loraswitch_A["default"].weight[2])
        theirs.lora_B["default"].weight.data.copy_(layer.loraswitch_B["default"].weight[2])
    before = experts_of(model)
    found, wanted = steps_of(model, experts=["law", "law"]), steps_of(lora)
    assert found == pytest.approx(wanted, rel=1e-4) and found[0] != found[-1]
    check_only(before, experts_of(model), 2)


def test_routed_and_dense_paths():
    """Also where the router decides, and where experts are given otherwise than per sample."""
    model = model_of(["law"]).train()
    before = experts_of(model)
    with use_experts(model, "law"):
        steps_of(model, 3)
    check_only(before, experts_of(model), 2)
    model = model_of([0]).train()
    before = experts_of(model)
    steps_of(model, 3)
    check_only(before, experts_of(model), 0)


def test_gradients_are_those_of_the_whole_stack():
    some, every = model_of(["law", 0]).train(), model_of("all").train()
    for model in (some, every):
        model(input_ids=tokens(3), labels=tokens(3), experts=["law", "code", "maths"]).loss.backward()
    wanted = {name: layer.loraswitch_B["default"].weight.grad for name, layer in switch_layers(every).items()}
    for name, layer in switch_layers(some).items():
        experts = layer.loraswitch_B["default"]
        assert experts.weight.grad is None and [index for index, _ in experts.own()] == [0, 2]
        for index, parameter in experts.own():
            torch.testing.assert_close(parameter.grad, wanted[name][index])


def test_the_words_come_and_go():
    model = model_of(["law"])
    kept = trained(model)
    assert all(p.dim() == 2 for p in kept) and len(kept) == 2 * len(switch_layers(model))
    model.set_adapter("default")
    assert [id(p) for p in trained(model)] == [id(p) for p in kept]  # an optimizer may hold them
    for word, routers, experts in (("router", 1, False), ("all", 1, True)):
        model.peft_config["default"].trainable = word
        model.set_adapter("default")
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert sum("router" in n for n in names) == routers and any("loraswitch_A" in n for n in names) == experts
        assert not any("expert_" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "to", "load"])
def test_one_memory(how, tmp_path):
    """Copied, cast or loaded, an expert that trains is still a part of its stack."""
    model = model_of(["law"])
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        for layer in switch_layers(model).values():
            for experts in (layer.loraswitch_A, layer.loraswitch_B):
                experts["default"] = pickle.loads(pickle.dumps(experts["default"]))
    elif how == "to":
        model = model.double().float()
    else:
        model.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors")
        assert not any("expert_" in key for key in keys)
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
        assert model.peft_config["default"].trainable == ["law"]
    before = experts_of(model)
    steps_of(model.train(), 2, experts=["law", "law"])
    check_only(before, experts_of(model), 2)


def test_memory_taken_apart_is_refused():
    model = model_of(["law"]).train()
    experts = next(iter(switch_layers(model).values())).loraswitch_A["default"]
    experts.expert_2.data = experts.expert_2.data.clone()
    with pytest.raises(RuntimeError, match="Expert 2 trains alone, and its memory"):
        model(input_ids=tokens(), experts=["law", "law"])


def test_trainer_resumes(tmp_path):
    def run(steps: int, folder: Any, resume: Any = None) -> Any:
        model = model_of(["law"])
        loss = ExpertLoss(model, max_grad_norm=0.1)
        data = Dataset.from_list([{**row, "expert": "law"} for row in samples()])
        args = arguments(
            folder, optim="adamw_torch", learning_rate=1e-2, weight_decay=0.1, max_steps=steps, save_strategy="steps",
            save_steps=2, remove_unused_columns=False,
        )  # fmt: skip
        OrderedTrainer(
            model=model, args=args, train_dataset=data, data_collator=ExpertCollator(collate, model),
            compute_loss_func=loss, callbacks=[loss],
        ).train(resume_from_checkpoint=resume)  # fmt: skip
        return model

    whole = run(4, tmp_path / "a")
    again = run(4, tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    for name, value in experts_of(whole).items():
        torch.testing.assert_close(experts_of(again)[name], value, rtol=1e-5, atol=1e-7)
    check_only(experts_of(model_of()), experts_of(whole), 2)


def test_experts_come_and_go():
    model = model_of(["law"])
    add_expert(model, name="news")
    assert [i for i, _ in next(iter(switch_layers(model).values())).loraswitch_A["default"].own()] == [2]
    remove_expert(model, "maths")
    assert model.peft_config["default"].trainable == ["law"]
    before = experts_of(model)
    steps_of(model.train(), 2, experts=["law", "law"])
    check_only(before, experts_of(model), 1)
    with pytest.raises(ValueError, match="is the one that trains"):
        remove_expert(model, "law")


def test_fused_sees_what_was_trained():
    model = model_of(["law"])
    randomize_adapter(model)
    steps_of(model.train(), 2, experts=["law", "law"])
    model.eval()
    with torch.no_grad(), use_experts(model, "law"):
        wanted = model(input_ids=tokens()).logits
        model.fuse_for_inference("fused")
        torch.testing.assert_close(model(input_ids=tokens()).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("word", [[], ["x"], [0, 0], ["a", 0], [5], [True], "experts", None, [["a"]]])
def test_refused(word):
    with pytest.raises(ValueError, match="trainable="):
        LoRASwitchConfig(num_experts=2, expert_names=["a", "b"], trainable=word)
