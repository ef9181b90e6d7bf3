"""transformers' Trainer: the router's losses reach its gradient once, whatever the accumulation; checkpoints; precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from helpers import adapted, padded, switch_config, tiny_bert, tiny_llama, tiny_llama_classifier, tokens
from peft_loraswitch import RouterStatsCallback
from trainer_tools import (
    OrderedTrainer,
    RouterInputs,
    adapter_weights,
    arguments,
    auxiliary_gradient,
    collate,
    routers,
    samples,
)

COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
OFF = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


def trained(tmp_path: Any, model: nn.Module, trainer: type = OrderedTrainer, data: Any = None, **overrides: Any) -> Any:
    """A trainer that has trained `model`, over (by default) the samples in their order."""
    kwargs = {key: overrides.pop(key) for key in ("callbacks", "eval_dataset", "compute_loss_func") if key in overrides}
    made = trainer(
        model=model,
        args=arguments(tmp_path, **overrides),
        train_dataset=samples() if data is None else data,
        data_collator=collate,
        **kwargs,
    )
    made.train()
    return made


def update(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: before[name] - after[name] for name in before}


def router_update(
    tmp_path: Any, make: Any, config: dict[str, float], **overrides: Any
) -> tuple[torch.Tensor, RouterInputs]:
    """What one optimiser step of SGD at rate 1 takes off the router's weight: its gradient."""
    model = make(**config)
    inputs = RouterInputs(model)
    before = routers(model)
    trained(tmp_path, model, **overrides)
    (difference,) = update(before, routers(model)).values()
    return difference, inputs


def causal(**config: Any) -> nn.Module:
    return adapted(tiny_llama(), **config)


def classifier(**config: Any) -> nn.Module:
    return adapted(tiny_llama_classifier(), modules_to_save=["score"], **config)


ACCUMULATIONS = pytest.mark.parametrize("batch, accumulation", [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])


@pytest.mark.compat
@ACCUMULATIONS
def test_losses_reach_the_router_once(tmp_path, batch, accumulation):
    """The step with the losses less the step without is the gradient of their definition on all tokens of the step."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    plain, _ = router_update(tmp_path, causal, OFF, **settings)
    joined, inputs = router_update(tmp_path, causal, COEFFICIENTS, **settings)
    expected = auxiliary_gradient(causal(**COEFFICIENTS), inputs.x, 0.5, 0.1)
    assert expected.norm() > 0.05
    torch.testing.assert_close(joined - plain, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulation", [(4, 2), (1, 8)])
def test_accumulation_equals_one_large_batch(tmp_path, batch, accumulation):
    """Every adapter weight, over two steps."""
    weights = []
    for size, steps in ((8, 1), (batch, accumulation)):
        model = causal(**COEFFICIENTS)
        data = samples() if True else None
        trained(
            tmp_path,
            model,
            data=data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            learning_rate=0.1,
        )
        weights.append(adapter_weights(model))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4)])
def test_accumulation_in_a_classifier(tmp_path, batch, accumulation, averaged):
    """With `averaged` the Trainer divides each loss by the number of micro-batches, as with models that take no
    num_items_in_batch. Only what the losses add is compared: the classifier's own loss is the Trainer's business."""

    class Classifying(OrderedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = not averaged

    data = [{"input_ids": row["input_ids"], "labels": index % 3} for index, row in enumerate(samples())]

    def labelled(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([{"input_ids": row["input_ids"]} for row in rows])
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    updates = []
    for config in (OFF, COEFFICIENTS):
        model = classifier(**config)
        inputs, before = RouterInputs(model), routers(model)
        args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        Classifying(model=model, args=args, train_dataset=data, data_collator=labelled).train()
        updates.append(next(iter(update(before, routers(model)).values())))
    expected = auxiliary_gradient(classifier(**COEFFICIENTS), inputs.x, 0.5, 0.1)
    torch.testing.assert_close(updates[1] - updates[0], expected, rtol=1e-3, atol=2e-6)


def cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return (
        torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        / num_items_in_batch
    )


class WithLabels(OrderedTrainer):
    """Its own loss, and the labels are passed to the model as well."""

    def compute_loss(self, model: Any, inputs: dict, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return cross_entropy(model(**inputs), inputs["labels"], num_items_in_batch)


OWN_LOSSES: dict[str, dict[str, Any]] = {
    "compute_loss_func": {"compute_loss_func": cross_entropy},  # the Trainer takes the labels out
    "compute_loss": {"trainer": WithLabels},
    "label smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4)])
@pytest.mark.parametrize("own", OWN_LOSSES)
def test_a_loss_of_the_users_own(tmp_path, own, batch, accumulation):
    """Logits bring the losses, whether the model has computed its own loss as well or not."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **OWN_LOSSES[own]}
    plain, _ = router_update(tmp_path, causal, OFF, **settings)
    joined, inputs = router_update(tmp_path, causal, COEFFICIENTS, **settings)
    expected = auxiliary_gradient(causal(**COEFFICIENTS), inputs.x, 0.5, 0.1)
    torch.testing.assert_close(joined - plain, expected, rtol=1e-3, atol=2e-6)


def test_losses_are_absent_in_eval(tmp_path):
    """The evaluation loss is the language model's alone, also between training steps; statistics count training only."""
    model = causal(**{**COEFFICIENTS, "router_aux_loss_coef": 100.0})
    made = trained(
        tmp_path, model, eval_dataset=samples(seed=1), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8
    )
    reported = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    batch = collate(list(samples(seed=1)))
    with torch.no_grad():
        output = model.eval()(**batch)
        flat = output.logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(flat, batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    assert reported[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    model.train()
    loss = model(**batch).loss
    assert loss.item() > expected.item() + 100  # the balance loss is at least top_k


def test_callback_logs_next_to_the_loss(tmp_path):
    model = causal(**COEFFICIENTS)
    made = trained(
        tmp_path, model, callbacks=[RouterStatsCallback()], max_steps=4, logging_steps=2, eval_dataset=samples(seed=1)
    )
    made.evaluate()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        load = [entry[f"router/load_{expert}"] for expert in range(4)]
        assert sum(load) == pytest.approx(1)
        assert 0 < entry["router/entropy"] < torch.tensor(4.0).log()
        assert entry["router/balance_loss"] > 0 and entry["router/z_loss"] > 0
        assert entry["router/dropped_experts"] == sum(share == 0 for share in load)
    others = [entry for entry in made.state.log_history if "loss" not in entry]
    assert len(others) == 2 and not any("router" in key for entry in others for key in entry)
    # each entry speaks of the steps since the last: nothing is left to count
    assert model.router_stats()["tokens"] == 0


def test_reporters_see_what_the_callback_adds(tmp_path, capsys, monkeypatch):
    """TensorBoard, W&B and the like, which a trainer calls before its user's callbacks; and the printer, after them."""
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    monkeypatch.setitem(transformers.integrations.INTEGRATION_TO_CALLBACK, "recorder", Reporter)
    model = causal(base_expert=True)
    made = trained(
        tmp_path, model, callbacks=[RouterStatsCallback()], report_to=["recorder"], max_steps=2, logging_steps=1
    )
    expected = {"router/entropy", "router/mean_experts", "router/load_3", "router/base_share"}
    assert len(reported) == 3 and all(expected < set(logs) for logs in reported[:2]) and not expected & set(reported[2])
    assert all(expected < set(entry) for entry in made.state.log_history[:2])
    assert "router/base_share" in capsys.readouterr().out


def test_the_callback_may_name_one_adapter_of_two(tmp_path):
    model = causal()
    model.add_adapter("other", switch_config())
    made = trained(tmp_path, model, callbacks=[RouterStatsCallback("default")])
    assert "router/entropy" in made.state.log_history[0]
    with pytest.raises(ValueError, match="'nobody'"):
        trained(tmp_path, model, callbacks=[RouterStatsCallback("nobody")])


def settings_of_a_long_run(**overrides: Any) -> dict[str, Any]:
    return {
        "max_steps": 6,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        **overrides,
    }


def test_resuming_equals_an_uninterrupted_run(tmp_path):
    """From a new model and trainer: weights equal to the last bit, statistics of the loss too."""
    noisy = {**COEFFICIENTS, "router_jitter": 0.1, "lora_dropout": 0.1}
    whole = causal(**noisy)
    trained(tmp_path / "a", whole, **settings_of_a_long_run())
    resumed = adapted(tiny_llama(), seed=9, **noisy)  # other weights: all must come from the checkpoint
    made = OrderedTrainer(
        model=resumed,
        args=arguments(tmp_path / "a", **settings_of_a_long_run()),
        train_dataset=samples(),
        data_collator=collate,
    )
    made.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    expected = adapter_weights(whole)
    for name, weight in adapter_weights(resumed).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_load_best_model_at_end(tmp_path):
    """A rate at which things get worse: the best checkpoint is the first, and its weights are back at the end."""
    model = causal(**COEFFICIENTS)
    made = trained(
        tmp_path,
        model,
        **settings_of_a_long_run(
            learning_rate=3.0,
            optim="sgd",
            max_steps=3,
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_total_limit=3,
        ),
        eval_dataset=samples(seed=1),
        load_best_model_at_end=True,
    )
    from peft import PeftModel

    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert best < 3, losses
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    stored = PeftModel.from_pretrained(tiny_llama(), made.state.best_model_checkpoint)
    expected = adapter_weights(stored)
    for name, weight in adapter_weights(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    assert made.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_through_the_trainer(tmp_path, kwargs):
    plain, _ = router_update(tmp_path, causal, COEFFICIENTS)
    recomputed, _ = router_update(
        tmp_path, causal, COEFFICIENTS, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_bf16_autocast(tmp_path):
    """The losses stay in float32: they give the router the same gradient to the precision of its bf16 input."""
    plain, _ = router_update(tmp_path, causal, OFF, bf16=True)
    joined, inputs = router_update(tmp_path, causal, COEFFICIENTS, bf16=True)
    model = causal(**COEFFICIENTS)
    assert all(weight.dtype == torch.float32 for weight in routers(model).values())
    expected = auxiliary_gradient(model, inputs.x.float(), 0.5, 0.1)
    torch.testing.assert_close(joined - plain, expected, rtol=2e-2, atol=2e-3)


def test_fp16_without_the_models_own_loss_warns():
    """A loss scaler multiplies what comes after the forward: losses with weight 1 would vanish, silently without this."""
    model, batch = causal(**COEFFICIENTS).train(), padded([7, 5])
    del batch["labels"]
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(**batch).logits
    with pytest.warns(UserWarning, match="fp16.*no effect.*Use bf16"):
        logits.float().square().mean().backward()


def test_fp16_scaling_keeps_losses_in_the_models_own_loss():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients = []
    for scaling in (False, True):
        model = causal(**COEFFICIENTS).train()
        loss = model(**padded([7, 5])).loss
        (scaler.scale(loss) if scaling else loss).backward()
        (router,) = [p.grad for n, p in model.named_parameters() if "loraswitch_router" in n]
        gradients.append(router / (1024.0 if scaling else 1.0))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_token_classification(tmp_path):
    from transformers import BertForTokenClassification

    data = [{"input_ids": row["input_ids"]} for row in samples()]

    def labelled(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        return {**batch, "labels": batch["input_ids"].remainder(3).masked_fill(batch["attention_mask"] == 0, -100)}

    gradients = []
    for config in (OFF, COEFFICIENTS):
        model = adapted(tiny_bert(BertForTokenClassification), modules_to_save=["classifier"], **config)
        inputs = RouterInputs(model)
        before = routers(model)
        OrderedTrainer(model=model, args=arguments(tmp_path), train_dataset=data, data_collator=labelled).train()
        gradients.append(next(iter(update(before, routers(model)).values())))
    expected = auxiliary_gradient(adapted(tiny_bert(BertForTokenClassification)), inputs.x, 0.5, 0.1)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-3, atol=2e-6)


def test_two_forwards_in_a_trainers_step(tmp_path):
    """A trainer that runs a second batch through the model before backward."""

    class Twice(OrderedTrainer):
        def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(model, dict(inputs), *args, **kwargs)
            with torch.no_grad():
                model(input_ids=tokens(seed=5))
            return loss

    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    once, _ = router_update(tmp_path, causal, COEFFICIENTS)
    twice, _ = router_update(tmp_path, causal, COEFFICIENTS, trainer=Twice, **settings)
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-6)


def test_a_deep_copy_of_a_trained_model(tmp_path):
    model = causal(**COEFFICIENTS)
    trained(tmp_path, model, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    clone = copy.deepcopy(model).eval()
    torch.testing.assert_close(clone(input_ids=tokens()).logits, model.eval()(input_ids=tokens()).logits)
