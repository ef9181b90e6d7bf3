"""TRL's trainers compute their loss from other outputs than the model's loss: the router's losses join all the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import adapted, adapter_gradients, switch_config, tiny_llama
from trainer_tools import (
    InOrder,
    RouterInputs,
    adapter_weights,
    arguments,
    auxiliary_gradient,
    routers,
    samples,
    sentence,
    tokenizer,
)

trl = pytest.importorskip("trl", reason="TRL is an optional dependency")
Dataset = pytest.importorskip("datasets").Dataset

COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
OFF = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


class SFT(InOrder, trl.SFTTrainer):
    pass


class DPO(InOrder, trl.DPOTrainer):
    pass


def sft(tmp_path: Any, model: nn.Module, data: Any = None, **overrides: Any) -> trl.SFTTrainer:
    peft_config = overrides.pop("peft_config", None)
    settings = {"max_length": 64, "per_device_train_batch_size": 8, **overrides}
    trainer = SFT(
        model=model,
        args=arguments(tmp_path, trl.SFTConfig, **settings),
        train_dataset=samples() if data is None else data,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def model_of(**config: Any) -> nn.Module:
    return adapted(tiny_llama(), **config)


def sft_update(tmp_path: Any, config: dict[str, float], **overrides: Any) -> tuple[torch.Tensor, RouterInputs]:
    model = model_of(**config)
    inputs, before = RouterInputs(model), routers(model)
    sft(tmp_path, model, **overrides)
    (name,) = before
    return before[name] - routers(model)[name], inputs


def check_joined(updates: list[tuple[torch.Tensor, RouterInputs]], tokens: int | None = None) -> None:
    """What the losses add to one step is the gradient of their definition over that step's real tokens."""
    (plain, _), (joined, inputs) = updates
    if tokens is not None:
        assert len(inputs.x) == tokens
    expected = auxiliary_gradient(model_of(**COEFFICIENTS), inputs.x, 0.5, 0.1)
    assert expected.norm() > 0.05
    torch.testing.assert_close(joined - plain, expected, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(tmp_path, loss_type, batch, accumulation):
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "loss_type": loss_type,
    }
    check_joined(
        [sft_update(tmp_path, config, **settings) for config in (OFF, COEFFICIENTS)], sum([9, 4, 7, 5, 8, 6, 3, 9])
    )


def test_sft_accumulation_equals_one_large_batch(tmp_path):
    """TRL's default loss, all adapter weights, over two steps."""
    weights = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = model_of(**COEFFICIENTS)
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        sft(tmp_path, model, max_steps=2, learning_rate=0.1, **settings)
        weights.append(adapter_weights(model))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_sft_packing(tmp_path, strategy):
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 16, "per_device_train_batch_size": 2}
    check_joined([sft_update(tmp_path, config, **settings) for config in (OFF, COEFFICIENTS)])


def test_sft_padding_free(tmp_path):
    """All samples in one row without padding: every token is real."""
    settings = {"padding_free": True, "max_length": None}
    check_joined(
        [sft_update(tmp_path, config, **settings) for config in (OFF, COEFFICIENTS)], sum([9, 4, 7, 5, 8, 6, 3, 9])
    )


def conversations() -> Dataset:
    rows = []
    for seed, (question, answer) in enumerate([(4, 3), (2, 5), (6, 2), (3, 4)]):
        user = {"role": "user", "content": sentence(seed, question)}
        rows.append({"messages": [user, {"role": "assistant", "content": sentence(seed + 50, answer)}]})
    return Dataset.from_list(rows)


def test_sft_assistant_only_loss(tmp_path):
    """The loss is on the answers; the router works for all real tokens, so its losses are over all of them."""
    settings = {"assistant_only_loss": True, "data": conversations(), "per_device_train_batch_size": 4}
    updates = [sft_update(tmp_path, config, **settings) for config in (OFF, COEFFICIENTS)]
    check_joined(updates, tokens=(4 + 2 + 6 + 3) + 4 + (3 + 5 + 2 + 4) + 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_sft_gradient_checkpointing(tmp_path, reentrant):
    plain = sft_update(tmp_path, COEFFICIENTS)[0]
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    torch.testing.assert_close(sft_update(tmp_path, COEFFICIENTS, **kwargs)[0], plain, rtol=1e-4, atol=1e-6)


def test_sft_makes_the_adapter(tmp_path):
    """`peft_config=`, TRL's own defaults (gradient checkpointing on), save, load."""
    torch.manual_seed(0)
    trainer = sft(
        tmp_path,
        tiny_llama(),
        peft_config=switch_config(task_type="CAUSAL_LM", **COEFFICIENTS),
        max_steps=4,
        learning_rate=0.05,
        gradient_checkpointing=True,
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_sft_eval_loss_is_the_language_models_alone(tmp_path):
    losses = []
    for aux in (0.0, 100.0):
        trainer = SFT(
            model=model_of(router_aux_loss_coef=aux),
            args=arguments(tmp_path, trl.SFTConfig, max_length=64),
            train_dataset=samples(),
            eval_dataset=samples(seed=1),
            processing_class=tokenizer(),
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------------------- DPO


def preferences() -> Dataset:
    rows = []
    for seed, (prompt, chosen, rejected) in enumerate([(4, 3, 5), (2, 5, 2), (6, 2, 4), (3, 4, 3)]):
        row = {"prompt": sentence(seed, prompt), "chosen": " " + sentence(seed + 50, chosen)}
        rows.append({**row, "rejected": " " + sentence(seed + 90, rejected)})
    return Dataset.from_list(rows)


def dpo(tmp_path: Any, model: nn.Module, **overrides: Any) -> trl.DPOTrainer:
    peft_config = overrides.pop("peft_config", None)
    trainer = DPO(
        model=model,
        args=arguments(tmp_path, trl.DPOConfig, **{"per_device_train_batch_size": 4, **overrides}),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def first_loss(trainer: Any) -> float:
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_starts_at_ln_2(tmp_path, precompute, checkpointing):
    """A fresh adapter: policy and reference (the adapter disabled, or log-probabilities computed before) are equal."""
    trainer = dpo(
        tmp_path,
        tiny_llama(),
        peft_config=switch_config(task_type="CAUSAL_LM"),
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=checkpointing,
    )
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_dpo_from_a_trained_adapter(tmp_path, checkpointing):
    """TRL makes the reference by copying weights whose names contain ".default.": it must be equal at the start."""
    kwargs = {"gradient_checkpointing": checkpointing is not None}
    if checkpointing is not None:
        kwargs["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    model = model_of(**COEFFICIENTS)
    start = adapter_weights(model)
    trainer = dpo(tmp_path, model, max_steps=2, learning_rate=0.5, **kwargs)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)
    reference = {name: weight for name, weight in adapter_weights(model).items() if ".ref." in name}
    assert len(reference) == len(start)
    for name, weight in reference.items():
        torch.testing.assert_close(weight, start[name.replace(".ref.", ".default.")], rtol=0, atol=0)
    moved = [
        name for name, weight in adapter_weights(model).items() if ".default." in name and not weight.equal(start[name])
    ]
    assert len(moved) == len(start)


def dpo_update(tmp_path: Any, config: dict[str, float], **overrides: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(router's step, what the router saw of the policy's real tokens)"""
    model = model_of(**config)
    seen: list[torch.Tensor] = []
    base = model.base_model.model
    masks: list[torch.Tensor] = []
    base.register_forward_pre_hook(lambda m, a, kw: masks.append(kw["attention_mask"]), with_kwargs=True)

    def note(module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            seen.append(args[0].detach()[masks[-1].bool()])

    base.model.layers[0].self_attn.q_proj.register_forward_pre_hook(note)
    before = routers(model)
    dpo(tmp_path, model, **overrides)
    (name,) = before
    return before[name] - routers(model)[name], torch.cat(seen)


@pytest.mark.parametrize("batch, accumulation", [(4, 1), (2, 2)])
def test_dpo_losses_reach_the_router(tmp_path, batch, accumulation):
    """Of the policy's tokens only: the reference's forward has no part in it."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    plain, _ = dpo_update(tmp_path, OFF, **settings)
    joined, x = dpo_update(tmp_path, COEFFICIENTS, **settings)
    expected = auxiliary_gradient(model_of(**COEFFICIENTS), x, 0.5, 0.1)
    torch.testing.assert_close(joined - plain, expected, rtol=1e-3, atol=3e-6)


# ----------------------------------------------------------------------------------------------------------- compiled


def kto(tmp_path: Any, model: nn.Module, **overrides: Any) -> Any:
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in preferences()
        for side in ("chosen", "rejected")
    ]
    trainer = trl.KTOTrainer(
        model=model,
        args=arguments(tmp_path, trl.KTOConfig, **{"per_device_train_batch_size": 4, **overrides}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def check_compiled(of_router: Callable[..., torch.Tensor]) -> None:
    """What the router gets is the same compiled, with the losses and without; `of_router(config, **settings)` trains a step."""
    plain, plain_compiled, joined, joined_compiled = (
        of_router(config, **settings)
        for config in (OFF, COEFFICIENTS)
        for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    )
    assert (joined - plain).norm() > 0.05
    torch.testing.assert_close(plain_compiled, plain, rtol=1e-3, atol=3e-6)
    torch.testing.assert_close(joined_compiled, joined, rtol=1e-3, atol=3e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_compiled(tmp_path, kind, checkpointing):
    """TRL's fused heads break the graph, and their loss is not `output.loss`, which they ask for all the same."""
    train = {"sft": sft, "dpo": dpo, "kto": kto}[kind]

    def update(config: dict[str, float], **settings: Any) -> torch.Tensor:
        model = model_of(**config)
        before = routers(model)
        train(tmp_path, model, gradient_checkpointing=checkpointing, **settings)
        (name,) = before
        return before[name] - routers(model)[name]

    check_compiled(update)


# --------------------------------------------------------------------------------------------------------------- GRPO


def reward(completions: list, **kwargs: Any) -> list[float]:
    return [float(index % 3) for index in range(len(completions))]


def grpo(tmp_path: Any, model: nn.Module, **overrides: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """(gradients at the optimiser's step, trainer)"""
    gradients: dict[str, torch.Tensor] = {}
    trainer = trl.GRPOTrainer(
        model=model,
        args=arguments(
            tmp_path,
            trl.GRPOConfig,
            **{
                "per_device_train_batch_size": 4,
                "num_generations": 4,
                "max_completion_length": 4,
                "learning_rate": 1e-3,
                **overrides,
            },
        ),
        train_dataset=Dataset.from_list([{"prompt": sentence(seed, 4)} for seed in range(10, 14)]),
        processing_class=tokenizer(),
        reward_funcs=reward,
        peft_config=None if isinstance(model, PeftModel) else switch_config(task_type="CAUSAL_LM"),
    )
    step = trainer.create_optimizer().step

    def noting(*args: Any, **kwargs: Any) -> Any:
        gradients.update(adapter_gradients(trainer.model))
        return step(*args, **kwargs)

    trainer.optimizer.step = noting
    trainer.train()
    return gradients, trainer


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_grpo_compiled(tmp_path):
    def gradient(config: dict[str, float], **settings: Any) -> torch.Tensor:
        torch.manual_seed(0)
        gradients, _ = grpo(tmp_path, model_of(**config), **settings)
        return next(each.clone() for name, each in gradients.items() if "router" in name)

    check_compiled(gradient)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(tmp_path, beta):
    """The losses are in the router's gradient and nowhere else; with a KL term the reference runs before backward."""
    found = []
    for config in (OFF, COEFFICIENTS):
        model = model_of(**config)
        inputs = RouterInputs(model)
        torch.manual_seed(0)
        gradients, _ = grpo(tmp_path, model, beta=beta)
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        if "router" in name:
            expected = auxiliary_gradient(model_of(**COEFFICIENTS), inputs.x, 0.5, 0.1)
            torch.testing.assert_close(found[1][name] - gradient, expected, rtol=1e-3, atol=3e-6)
        else:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_grpo_makes_the_adapter(tmp_path):
    _, trainer = grpo(tmp_path, tiny_llama(), max_steps=2, gradient_checkpointing=True)
    assert isinstance(trainer.model, PeftModel) and trainer.state.global_step == 2
