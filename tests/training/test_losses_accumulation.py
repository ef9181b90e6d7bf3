"""Gradient accumulation: the router's losses of many micro-batches are those of one large batch, however trainers scale.

The load-balance loss is not a mean over tokens, so this is not arithmetic that could be left to the trainer.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import adapted, adapter_gradients, padded, randomize_adapter, switch_config, tiny_llama, without_losses

AUX, Z = 0.5, 0.25  # large on purpose: half the router's gradient is theirs
UNEVEN = [[7, 4], [3], [9, 1, 2]]  # lengths of the samples of each micro-batch
ROUTER = "base_model.model.model.layers.0.self_attn.q_proj.loraswitch_router.default.weight"


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(**config):
    return adapted(tiny_llama(), **{"router_aux_loss_coef": AUX, "router_z_loss_coef": Z, **config}).train()


def micro_batches(lengths=UNEVEN, side: str = "right"):
    batches = [padded(each, side, seed=seed) for seed, each in enumerate(lengths)]
    for batch in batches:  # nothing predicts a first token; behind padding on the left, the padding would
        first = batch["attention_mask"].argmax(-1, keepdim=True)
        batch["labels"].scatter_(1, first, -100)
    return batches


def joined(batches, side: str = "right"):
    """One padded batch of all samples."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def fill_up(tensor: torch.Tensor, value: int) -> torch.Tensor:
        missing = longest - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (missing, 0) if side == "left" else (0, missing), value=value)

    return {key: torch.cat([fill_up(b[key], value) for b in batches]) for key, value in fill.items()}


def predicted(batch) -> int:
    """Tokens that have a label, as the Trainer counts them."""
    return int((batch["labels"][:, 1:] != -100).sum())


def synchronise(last: bool) -> None:
    """What Trainer and `Accelerator.accumulate` do before each micro-batch."""
    GradientState()._set_sync_gradients(last)


def assert_close(actual, expected):
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-4 and (actual[name] - gradient).norm() <= 3e-6 * max(gradient.norm(), 1), name


def losses_gradient(model, batch):
    """Gradient of the router's two losses alone on `batch`, as one batch."""
    with_losses, without = copy.deepcopy(model), without_losses(model)
    synchronise(True)
    gradients = []
    for each in (with_losses, without):
        each.zero_grad()
        each(**batch).loss.backward()
        gradients.append(adapter_gradients(each)[ROUTER])
    return gradients[0] - gradients[1]


# --------------------------------------------------------------------------- the total equals that of one large batch


@pytest.mark.compat
@pytest.mark.parametrize(
    "config", [{}, {"top_k": 1}, {"num_experts": 9, "top_k": 3, "normalize_gates": False}], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_summed_micro_batches(side, config):
    """Trainer with `num_items_in_batch`: each loss is already divided by the tokens of the whole batch, and they are summed."""
    model, batches = trained(**config), micro_batches(side=side)
    large = copy.deepcopy(model)
    whole = joined(batches, side)
    total = sum(predicted(batch) for batch in batches)
    expected = large(**whole, num_items_in_batch=total).loss
    expected.backward()
    value = 0.0
    for i, batch in enumerate(batches):
        synchronise(i == len(batches) - 1)
        loss = model(**batch, num_items_in_batch=torch.tensor(total)).loss
        loss.backward()
        value += loss.item()
    assert_close(adapter_gradients(model), adapter_gradients(large))
    assert value == pytest.approx(expected.item(), rel=1e-6)
    stats, expected_stats = model.router_stats(), large.router_stats()
    assert stats.pop("load") == pytest.approx(expected_stats.pop("load"))
    assert stats.pop("dropped_experts") == expected_stats.pop("dropped_experts")
    assert stats == pytest.approx(expected_stats, rel=1e-5)


@pytest.mark.compat
@pytest.mark.parametrize("count", [1, 2, 3])
def test_averaged_micro_batches(count):
    """A trainer that divides each loss by their number: so it does with the model's own loss, and the router's losses must
    nevertheless be those of all tokens, once."""
    model, batches = trained(), micro_batches()[:count]
    own = without_losses(model)
    expected_losses = losses_gradient(model, joined(batches))
    for i, batch in enumerate(batches):
        synchronise(i == len(batches) - 1)
        (model(**batch).loss / count).backward()
        (own(**batch).loss / count).backward()
    expected = adapter_gradients(own)
    expected[ROUTER] += expected_losses
    assert expected_losses.norm() > 0.01
    assert_close(adapter_gradients(model), expected)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_losses_that_come_with_the_logits(scale):
    """No labels, the trainer's own loss, scaled as it likes: the losses come with weight 1."""
    model, batches = trained(), micro_batches()
    own = without_losses(model)
    expected_losses = losses_gradient(model, joined(batches))
    for i, batch in enumerate(batches):
        synchronise(i == len(batches) - 1)
        for each in (model, own):
            logits = each(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            (scale * logits[batch["attention_mask"].bool()].square().mean()).backward()
    expected = adapter_gradients(own)
    expected[ROUTER] += expected_losses
    assert_close(adapter_gradients(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_bf16_models_accumulate_in_float32(dtype):
    """The sums over micro-batches are float32: the result is one large batch's to a rounding of the bf16 gradient."""
    model, batches = trained().to(dtype), micro_batches([[5, 3]] * 6)
    large = copy.deepcopy(model)
    total = sum(predicted(batch) for batch in batches)
    large(**joined(batches), num_items_in_batch=total).loss.backward()
    for i, batch in enumerate(batches):
        synchronise(i == len(batches) - 1)
        model(**batch, num_items_in_batch=total).loss.backward()
    actual, expected = adapter_gradients(model)[ROUTER].float(), adapter_gradients(large)[ROUTER].float()
    assert (actual - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_no_router_gradient_comes_early():
    """Until the last micro-batch the router has the gradient of the gates only."""
    model, batches = trained(), micro_batches()
    own = without_losses(model)
    for batch in batches[:-1]:
        synchronise(False)
        model(**batch).loss.backward()
        own(**batch).loss.backward()
    assert_close(adapter_gradients(model), adapter_gradients(own))


# -------------------------------------------------------------------------------------- the trainers that people use


@pytest.mark.parametrize("samples, steps", [(6, 3), (5, 3)], ids=["even", "remainder"])
def test_accelerators_accumulate(samples, steps):
    """`accelerator.accumulate`, prepared data loader, `accelerator.backward`, which divides by the number of steps."""
    accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=True)
    model = trained()
    start = copy.deepcopy(model.state_dict())
    data = [{k: v[0] for k, v in padded([length]).items()} for length in [6] * samples]
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    model, loader = accelerator.prepare(model, loader)
    reference = trained()
    reference.load_state_dict(start)
    groups = [data[i : i + steps] for i in range(0, samples, steps)]
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                seen.append(adapter_gradients(model))
                model.zero_grad()
    assert len(seen) == len(groups)
    for actual, group in zip(seen, groups, strict=True):
        # equal lengths: the mean over samples is the mean over tokens; a last, shorter group weighs less in accelerate
        synchronise(True)
        reference.zero_grad()
        whole = {key: torch.stack([sample[key] for sample in group]) for key in group[0]}
        (reference(**whole).loss * len(group) / steps).backward()
        assert_close(actual, adapter_gradients(reference))


class InOrder(Trainer):
    """Takes the samples one after the other."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def collate(samples):
    return joined([{key: value[None] for key, value in sample.items()} for sample in samples])


@pytest.mark.parametrize("items", [True, False], ids=["num_items_in_batch", "divided"])
def test_trainer(tmp_path, items):
    """Ten samples, two epochs, in steps of 6 and 4: one large batch a step, or micro-batches of 2. After four steps of plain
    SGD the weights are equal."""
    # where the trainer divides by the number of micro-batches, its own loss is the large batch's only for equal lengths
    lengths = [9, 2, 5, 5, 3, 8, 1, 6, 4, 7] if items else [6] * 10
    samples = [{k: v[0] for k, v in padded([length], seed=seed).items()} for seed, length in enumerate(lengths)]
    weights = []
    for size, steps in [(6, 1), (2, 3)]:
        model = trained()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = InOrder(model, arguments, train_dataset=samples, data_collator=collate)
        assert trainer.model_accepts_loss_kwargs
        trainer.model_accepts_loss_kwargs = items
        assert trainer.train().global_step == 4
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if "loraswitch_" in n})
    start = dict(trained().named_parameters())
    for name, large in weights[0].items():
        moved = (large - start[name]).norm()
        assert moved > 1e-4 and (weights[1][name] - large).norm() <= 2e-5 * moved + 1e-6, name


# ---------------------------------------------------------------------------------- what happens between micro-batches


def accumulate(model, batches, between=lambda i: None):
    total = sum(predicted(batch) for batch in batches)
    for i, batch in enumerate(batches):
        synchronise(i == len(batches) - 1)
        model(**batch, num_items_in_batch=total).loss.backward()
        between(i)
    return adapter_gradients(model)


def other_forwards(model):
    """Forwards that no loss follows: reference model, evaluation, generation, old log-probabilities."""
    batch = padded([8, 2], seed=9)
    with torch.no_grad():
        model(**batch)
        with model.disable_adapter():
            model(**batch)
        model.eval()(**batch)
        model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=2)
    with model.disable_adapter():
        model(**batch)
    model.train()


def test_forwards_without_a_loss_are_not_counted():
    model = trained()
    expected = accumulate(copy.deepcopy(model), micro_batches())
    assert_close(accumulate(model, micro_batches(), between=lambda i: other_forwards(model)), expected)


def test_the_next_accumulation_starts_from_nothing():
    model = trained()
    first = accumulate(model, micro_batches())
    model.zero_grad()
    assert_close(accumulate(model, micro_batches()), first)
    model.zero_grad()
    synchronise(True)
    model(**joined(micro_batches()), num_items_in_batch=20).loss.backward()
    assert_close(adapter_gradients(model), first)


@pytest.mark.parametrize("aborted_after", [1, 2])
def test_an_aborted_run_leaves_nothing_once_the_weights_have_moved(aborted_after):
    model = trained()
    accumulate_partly(model, aborted_after)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loraswitch_router" in name:
                parameter.mul_(0.5)
    torch.optim.SGD(model.parameters()).zero_grad(set_to_none=False)  # gradients are there, and zero
    reference = trained()  # which has never seen those tokens
    reference.load_state_dict(model.state_dict())
    assert_close(accumulate(model, micro_batches()), accumulate(reference, micro_batches()))


@pytest.mark.parametrize("aborted_after", [1, 2])
def test_an_aborted_run_leaves_nothing_once_its_gradients_are_dropped(aborted_after):
    """Same weights, no optimiser step in between: Trainer.train() begins with zero_grad()."""
    model = trained()
    expected = accumulate(copy.deepcopy(model), micro_batches())
    accumulate_partly(model, aborted_after)
    model.zero_grad()
    assert_close(accumulate(model, micro_batches()), expected)


class Interrupt(TrainerCallback):
    def on_substep_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def interrupted_trainer(model, directory):
    samples = [{k: v[0] for k, v in padded([6], seed=seed).items()} for seed in range(8)]
    arguments = TrainingArguments(
        str(directory), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=5, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=collate, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def interrupted_loop(model, directory):
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    data = [{k: v[0] for k, v in padded([6], seed=seed).items()} for seed in range(8)]
    model, loader = accelerator.prepare(model, torch.utils.data.DataLoader(data, batch_size=1))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
        break
    return accelerator, loader


@pytest.mark.parametrize("is_held", [True, False], ids=["held", "gone"])
@pytest.mark.parametrize("interrupted", [interrupted_trainer, interrupted_loop])
def test_after_an_interrupted_run_nobody_accumulates(interrupted, is_held, tmp_path):
    """`GradientState` still says so, for every model of the process."""
    older, model = trained(), trained()
    run = interrupted(model, tmp_path)
    if not is_held:
        del run
        gc.collect()
    assert not GradientState().sync_gradients
    joins_now = {"the same": model, "a new one": trained()}
    optimizer = torch.optim.SGD(older.parameters(), lr=0.1)
    older(**micro_batches()[0]).loss.backward()  # as the first of a step: nothing tells that it is none
    optimizer.step()
    joins_now["one that was there, from the second step on"] = older
    for name, each in joins_now.items():
        for seed in (3, 4):
            each.zero_grad()
            batch = padded([5, 7], seed=seed)
            loss = each(**batch).loss
            loss.backward()
            plain, twin = without_losses(each)(**batch).loss, copy.deepcopy(each)
            GradientState()._set_sync_gradients(True)
            twin.zero_grad()
            wanted = twin(**batch).loss
            wanted.backward()
            GradientState()._set_sync_gradients(False)
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-6), name
            assert abs(wanted.item() - plain.item()) > 1e-3
            assert_close(adapter_gradients(each), adapter_gradients(twin))
            with torch.no_grad():
                for parameter in each.parameters():
                    if parameter.requires_grad:
                        parameter.sub_(0.1 * parameter.grad)


def test_a_run_after_an_interrupted_one_accumulates(tmp_path):
    model = trained()
    held = interrupted_trainer(model, tmp_path)
    model.zero_grad()
    model(**padded([5, 7])).loss.backward()  # of nobody's accumulation
    reference = copy.deepcopy(model)
    for each in (model, reference):
        each.zero_grad()
    batches = micro_batches()[:2]
    total = sum(predicted(batch) for batch in batches)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    numbers = accelerator.prepare(torch.utils.data.DataLoader(range(2)))
    for number in numbers:
        with accelerator.accumulate(model):
            model(**batches[int(number)], num_items_in_batch=total).loss.backward()
    del held
    synchronise(True)
    reference(**joined(batches), num_items_in_batch=total).loss.backward()
    assert_close(adapter_gradients(model), adapter_gradients(reference))


def test_two_forwards_before_the_first_backward_both_count():
    model = trained()
    batches = micro_batches()
    total = sum(predicted(batch) for batch in batches)
    large = copy.deepcopy(model)
    large(**joined(batches), num_items_in_batch=total).loss.backward()
    synchronise(False)
    losses = [model(**batch, num_items_in_batch=total).loss for batch in batches[:2]]
    sum(losses).backward()
    synchronise(True)
    model(**batches[2], num_items_in_batch=total).loss.backward()
    assert_close(adapter_gradients(model), adapter_gradients(large))


def accumulate_partly(model, count):
    for batch in micro_batches([[6, 6], [2, 5]])[:count]:
        synchronise(False)
        model(**batch).loss.backward()


def test_two_adapters_accumulate_apart():
    model = trained()
    model.add_adapter("other", switch_config(num_experts=3, router_aux_loss_coef=AUX, router_z_loss_coef=Z))
    randomize_adapter(model, "other", seed=5)
    batches = micro_batches()
    total = sum(predicted(batch) for batch in batches)
    expected = {}
    for name in ("default", "other"):
        twin = copy.deepcopy(model)
        twin.set_adapter(name)
        synchronise(True)
        twin(**joined(batches), num_items_in_batch=total).loss.backward()
        expected |= {n: g for n, g in adapter_gradients(twin).items() if f".{name}." in n}
    for i, batch in enumerate(batches):
        synchronise(i == len(batches) - 1)
        for name in ("default", "other"):
            model.set_adapter(name)
            model(**batch, num_items_in_batch=total).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(gradients, expected)


def test_a_copy_taken_in_the_middle_goes_on_by_itself():
    model = trained()
    batches = micro_batches()
    expected = accumulate(copy.deepcopy(model), batches)
    total = sum(predicted(batch) for batch in batches)
    synchronise(False)
    model(**batches[0], num_items_in_batch=total).loss.backward()
    copied = copy.deepcopy(model)
    for parameter, original in zip(copied.parameters(), model.parameters(), strict=True):
        parameter.grad = None if original.grad is None else original.grad.clone()
    for each in (model, copied):
        for i in (1, 2):
            synchronise(i == 2)
            each(**batches[i], num_items_in_batch=total).loss.backward()
    assert_close(adapter_gradients(model), expected)
