"""Experts trained in one pass are those of as many runs of PEFT's LoRA, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from helpers import switch_layers, tiny_llama, tokens
from peft_loraswitch import ExpertCollator, ExpertLoss, LoRASwitchConfig, add_expert, remove_expert, use_experts
from trainer_tools import InOrder, OrderedTrainer, adapter_weights, arguments, collate, tokenizer
from two_processes import on_two

Dataset = pytest.importorskip("datasets").Dataset

NAMES = ["maths", "code", "law"]
STEPS, EACH = 6, 2  # samples of an expert in a batch
LENGTHS = [9, 4, 7, 5, 8, 6, 3, 9, 5, 4, 8, 7]  # padding differs between an expert's batch and the common one
FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
ADAMW: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": STEPS}


def rows(expert: int) -> list[dict[str, Any]]:
    lengths = LENGTHS[expert:] + LENGTHS[:expert]
    ids = tokens(STEPS * EACH, max(lengths), seed=expert + 10).tolist()
    return [{"input_ids": row[:n], "expert": NAMES[expert]} for row, n in zip(ids, lengths, strict=True)]


def together() -> Dataset:
    each = [rows(e) for e in range(len(NAMES))]
    order = [(e, step * EACH + i) for step in range(STEPS) for i in range(EACH) for e in range(len(NAMES))]
    return Dataset.from_list([each[e][row] for e, row in order])


def loras() -> list[Any]:
    models = []
    for e in range(len(NAMES)):
        torch.manual_seed(100 + e)
        models.append(get_peft_model(tiny_llama(), LoraConfig(**FIELDS)))
    return models


def switch_of(models: list[Any], **fields: Any) -> Any:
    """An adapter whose experts begin as these LoRAs do."""
    config = {"num_experts": len(models), "top_k": 1, "expert_names": NAMES, **FIELDS, **fields}
    model = get_peft_model(tiny_llama(), LoRASwitchConfig(**config))
    for name, layer in switch_layers(model).items():
        for e, lora in enumerate(models):
            theirs = lora.get_submodule(name)
            layer.loraswitch_A["default"].weight.data[e] = theirs.lora_A["default"].weight.data
            layer.loraswitch_B["default"].weight.data[e] = theirs.lora_B["default"].weight.data
    return model


def check_equal(model: Any, models: list[Any]) -> None:
    for name, layer in switch_layers(model).items():
        for e, lora in enumerate(models):
            theirs = lora.get_submodule(name)
            for ours, wanted in ((layer.loraswitch_A, theirs.lora_A), (layer.loraswitch_B, theirs.lora_B)):
                torch.testing.assert_close(
                    ours["default"].weight[e],
                    wanted["default"].weight,
                    rtol=1e-3,
                    atol=2e-5,
                    msg=lambda m, at=(name, e): f"{at}: {m}",
                )


def drop(samples: list[dict[str, Any]]) -> Any:
    return collate([{"input_ids": sample["input_ids"]} for sample in samples])


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.slow
def test_equals_runs_of_lora(clip, tmp_path):
    runs = loras()
    model = switch_of(runs, router_aux_loss_coef=0.5)
    history = []
    for e, lora in enumerate(runs):
        args = arguments(tmp_path, per_device_train_batch_size=EACH, max_grad_norm=clip or 0.0, **ADAMW)
        trainer = OrderedTrainer(model=lora, args=args, train_dataset=Dataset.from_list(rows(e)), data_collator=drop)
        trainer.train()
        history.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    loss = ExpertLoss(model, max_grad_norm=clip)
    args = arguments(tmp_path, per_device_train_batch_size=EACH * len(NAMES), remove_unused_columns=False, **ADAMW)
    trainer = OrderedTrainer(
        model=model, args=args, train_dataset=together(), data_collator=ExpertCollator(collate, model),
        compute_loss_func=loss, callbacks=[loss],
    )  # fmt: skip
    before = model.state_dict()[
        "base_model.model.model.layers.0.self_attn.q_proj.loraswitch_router.default.weight"
    ].clone()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for e, name in enumerate(NAMES):
        found = [entry[f"expert_loss/{name}"] for entry in logs]
        assert found == pytest.approx(history[e], rel=1e-4)
        assert found[-1] != found[0]
    assert [entry["loss"] for entry in logs] == pytest.approx(
        [sum(each) for each in zip(*history, strict=True)], rel=1e-4
    )
    check_equal(model, runs)
    after = model.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.loraswitch_router.default.weight"]
    assert torch.equal(before, after)


def test_in_a_loop_of_ones_own():
    runs = loras()
    model = switch_of(runs).train()
    loss, collator = ExpertLoss(model), ExpertCollator(collate, model)
    batch = collator(list(together())[: EACH * len(NAMES)])
    assert batch["experts"].tolist() == [0, 1, 2] * EACH
    total = loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])
    total.backward()
    for e, lora in enumerate(runs):
        single = lora(**drop(rows(e)[:EACH])).loss
        single.backward()
        assert float(loss.losses[e]) == pytest.approx(float(single.detach()), rel=1e-5)
        for name, layer in switch_layers(model).items():
            wanted = lora.get_submodule(name).lora_B["default"].weight.grad
            torch.testing.assert_close(layer.loraswitch_B["default"].weight.grad[e], wanted, rtol=1e-3, atol=1e-6)
    norms = loss.clip(0.01)
    assert (norms > 0.01).all()
    again = loss.clip(0.01)
    torch.testing.assert_close(again, torch.full_like(again, 0.01), rtol=1e-3, atol=0)


def test_micro_batches_of_ones_own_loop_count_equally():
    wanted, found = (switch_of(loras()).train() for _ in range(2))
    for model, count in ((wanted, 1), (found, 2)):
        loss, collator = ExpertLoss(model, gradient_accumulation_steps=count), ExpertCollator(collate, model)
        batch = collator(list(together())[: EACH * len(NAMES)])
        for _ in range(count):
            loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]).backward()
    for (name, parameter), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_one_adapter_of_two_and_a_column_of_another_name():
    model = switch_of(loras())
    with pytest.raises(ValueError, match="'second'"):
        ExpertLoss(model, adapter_name="second")
    other = LoRASwitchConfig(num_experts=3, top_k=1, expert_names=NAMES[::-1], **FIELDS)
    model.add_adapter("second", other)
    model.set_adapter("second")
    with pytest.raises(ValueError, match="adapter_name"):
        ExpertLoss(model)
    loss = ExpertLoss(model.train(), adapter_name="second")
    collator = ExpertCollator(collate, model, column="domain", adapter_name="second")
    batch = collator([{"input_ids": [3, 4, 5], "domain": name} for name in NAMES])
    assert batch["experts"].tolist() == [2, 1, 0]
    loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]).backward()
    assert not loss.losses.isnan().any()
    trained = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert trained and all(".second." in name for name in trained)


def test_experts_come_and_go_between_losses():
    """What was kept of the experts before is not logged under the names of those after; an adapter that is gone is named."""
    model = switch_of(loras()).train()
    loss, collator = ExpertLoss(model), ExpertCollator(collate, model)

    def forward(*names):
        batch = collator([{"input_ids": [3, 4, 5], "expert": name} for name in names])
        loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    forward(*NAMES)
    remove_expert(model, "code")
    forward("maths", "law")
    assert set(loss.entries(model)) == {"expert_loss/maths", "expert_loss/law"}
    forward("maths", "law")
    remove_expert(model, "maths")
    add_expert(model, name="new")
    forward("law", "new")
    assert set(loss.entries(model)) == {"expert_loss/law", "expert_loss/new"} and not loss.entries(model)
    backbone = tiny_llama()
    backbone.add_adapter(LoRASwitchConfig(num_experts=3, top_k=1, expert_names=NAMES, **FIELDS), "x")
    collator = ExpertCollator(collate, backbone)
    collator.configs.clear()
    with pytest.raises(ValueError, match="'x' is not in the model any more"):
        collator([{"input_ids": [3], "expert": "law"}])


def same_batches(count: int) -> Dataset:
    """The same two samples of each expert again and again: however many of these batches make a step, it is that of one."""
    batch = list(together())[: EACH * len(NAMES)]
    return Dataset.from_list(batch * count)


def update(directory: Any, batches: int, **overrides: Any) -> dict[str, torch.Tensor]:
    """What training on `batches` of them changes in the adapter."""
    model = switch_of(loras())
    loss = ExpertLoss(model)
    before = adapter_weights(model)
    fields = {"per_device_train_batch_size": EACH * len(NAMES), "remove_unused_columns": False, "learning_rate": 0.5}
    trainer = OrderedTrainer(
        model=model, args=arguments(directory, **{**fields, **overrides}), train_dataset=same_batches(batches),
        data_collator=ExpertCollator(collate, model), compute_loss_func=loss, callbacks=[loss],
    )  # fmt: skip
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"logged": torch.tensor(logged), **{n: w - before[n] for n, w in adapter_weights(model).items()}}


def check_same_update(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert wanted["logged"] > 1 and max(change.abs().max() for name, change in wanted.items()) > 1e-2
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_counts_once_however_many_micro_batches_it_has(tmp_path):
    """Also in the last step of an epoch, which has fewer than it was told."""
    wanted = update(tmp_path, 1)
    check_same_update(update(tmp_path, 4, gradient_accumulation_steps=4), wanted)
    check_same_update(update(tmp_path, 3, gradient_accumulation_steps=4), wanted)


def updates_of_a_process(rank: int, directory: str) -> list[dict[str, torch.Tensor]]:
    """The trainer multiplies the loss by the number of processes, or does not."""
    return [
        update(directory, 2 * steps, average_tokens_across_devices=average, gradient_accumulation_steps=steps)
        for average in (True, False)
        for steps in (1, 2)
    ]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no processes here")
def test_a_step_counts_once_however_many_processes_there_are(tmp_path):
    wanted = update(tmp_path, 1)
    for found in on_two(updates_of_a_process, tmp_path):
        for each in found:
            check_same_update(each, wanted)


def test_the_argument_is_that_of_use_experts():
    model = switch_of(loras(), init_weights=False)
    for layer in switch_layers(model).values():
        layer.loraswitch_B["default"].weight.data.normal_()
    ids = tokens(3)
    with torch.no_grad(), use_experts(model, [2, 0, 1]):
        wanted = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, experts=["law", "maths", "code"]).logits, wanted)
    with model.disable_adapter():
        backbone = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, experts=[0, 0, 0]).logits, backbone)
    with pytest.raises(ValueError, match="2 samples, but the batch has 3"):
        model(input_ids=ids, experts=[0, 1])
    with pytest.raises(ValueError, match="expert 'x' is unknown"):
        model(input_ids=ids, experts=["x", 0, 0])
    with pytest.raises(ValueError, match="indices from 0 to 3"):
        model(input_ids=ids, experts=torch.tensor([0, 3, 1]))
    assert torch.equal(model(input_ids=ids, experts=torch.tensor([2, 0, 1])).logits, wanted)


def test_refused(tmp_path):
    model = switch_of(loras())
    loss = ExpertLoss(model)
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=together(), data_collator=ExpertCollator(collate, model),
        compute_loss_func=loss,
    )  # fmt: skip
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()
    fresh = switch_of(loras())
    with pytest.raises(ValueError, match="wrap the data collator in an ExpertCollator"):
        ExpertLoss(fresh)(fresh(input_ids=tokens()), tokens())


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")

    class Ordered(InOrder, trl.SFTTrainer):
        pass

    model = switch_of(loras())
    loss = ExpertLoss(model)
    args = arguments(
        tmp_path, trl.SFTConfig, per_device_train_batch_size=EACH * len(NAMES), remove_unused_columns=False, **ADAMW
    )
    trainer = Ordered(
        model=model, args=args, train_dataset=together(), data_collator=ExpertCollator(collate, model),
        processing_class=tokenizer(), compute_loss_func=loss, callbacks=[loss],
    )  # fmt: skip
    trainer.train()
    twin = switch_of(loras())
    again = ExpertLoss(twin)
    plain = arguments(tmp_path, per_device_train_batch_size=EACH * len(NAMES), remove_unused_columns=False, **ADAMW)
    OrderedTrainer(
        model=twin, args=plain, train_dataset=together(), data_collator=ExpertCollator(collate, twin),
        compute_loss_func=again,
    ).train()  # fmt: skip
    wanted = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-5)
