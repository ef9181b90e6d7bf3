"""Servers live in `torch.inference_mode()`: what is loaded, fused or changed within it serves outside, and back."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import adapted, randomize_adapter, switch_config, tiny_llama, tokens

pytestmark = pytest.mark.compat
MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
STRATEGIES = {"fused": ("fused", False), "merge": ("merge", False), "in place": ("merge", True)}
strategies = pytest.mark.parametrize("strategy", STRATEGIES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Made and fused in the same mode, and in different ones. Strategies take turns, so that each meets both modes in both places.
MADE_AND_FUSED = (
    [("inference", "inference"), ("no_grad", "no_grad")],
    [("inference", "no_grad"), ("no_grad", "inference")],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    found = []
    for seed in (1, 2):
        found.append(tmp_path_factory.mktemp("adapter"))
        adapted(tiny_llama(), seed=seed, r=2 + seed).save_pretrained(found[-1])
    return found[0], found[1]


@pytest.fixture(scope="module")
def folder_of_a_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of three linears of a single block: tracing takes as long as there are."""
    found = tmp_path_factory.mktemp("adapter")
    adapted(tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "v_proj", "up_proj"]).save_pretrained(found)
    return found


def within(mode: str) -> AbstractContextManager[Any]:
    return MODES[mode]()


def logits(model: nn.Module, mode: str, *shape: int) -> torch.Tensor:
    with within(mode):
        return model(input_ids=tokens(*(shape or (1, 1)))).logits.clone()


def served(model: nn.Module, mode: str) -> list[torch.Tensor]:
    return [logits(model, mode), logits(model, mode, 2, 3), logits(model, mode)]


def alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Experts of a bf16 model are float32: the unfused model computes with those, the fused one with casts."""
    tolerance = 1e-4 if found[0].dtype == torch.float32 else 0.04
    return all(
        (a.float() - b.float()).norm() <= tolerance * b.float().norm() for a, b in zip(found, expected, strict=True)
    )


def servers() -> list[tuple[str, str, str, str, str]]:
    """Every strategy with every three modes, in one of the two dtypes: each dtype meets each strategy, and each two modes."""
    found = []
    for index, strategy in enumerate(STRATEGIES):
        for three in itertools.product(MODES, repeat=3):
            dtype = list(DTYPES)[(index + three.count("inference")) % 2]
            found.append((*three, strategy, dtype))
    return found


@pytest.mark.parametrize("made, fused, run, strategy, dtype", servers())
def test_a_server(made, fused, run, strategy, dtype, folders):
    """Each step in its mode; the reference does the same under no_grad and is never fused."""
    reference = PeftModel.from_pretrained(tiny_llama().to(DTYPES[dtype]), folders[0])
    with within(made):
        model = PeftModel.from_pretrained(tiny_llama().to(DTYPES[dtype]), folders[0])
    with within(fused):
        model.fuse_for_inference(*STRATEGIES[strategy])
    assert alike(served(model, run), served(reference, "no_grad"))

    with within(made):
        model.load_adapter(folders[1], "other")
    reference.load_adapter(folders[1], "other")
    with within(fused):
        model.set_adapter("other")
    reference.set_adapter("other")
    assert alike(served(model, run), served(reference, "no_grad"))

    changed = [served(model, run)]
    for mode in (made, fused):
        for each, how in ((model, mode), (reference, "no_grad")):
            with within(how):
                for name, parameter in each.named_parameters():
                    if "loraswitch_B.other" in name:
                        parameter.mul_(-1.5)
                    if "loraswitch_A.other" in name:
                        parameter.data.mul_(1.1)
        changed.append(served(model, run))
        assert alike(changed[-1], served(reference, "no_grad")) and not alike(changed[-1], changed[-2])

    with within(fused):
        model.set_adapter("default")
        model.delete_adapter("other")
    reference.set_adapter("default")
    assert alike(served(model, run), served(reference, "no_grad"))
    with within(made):
        model.unfuse()
    assert all(torch.equal(a, b) for a, b in zip(served(model, run), served(reference, "no_grad"), strict=True))


@pytest.mark.parametrize("fused", MODES)
@strategies
def test_saved_and_generated(fused, strategy, folders, tmp_path):
    reference = PeftModel.from_pretrained(tiny_llama(), folders[0])
    with torch.inference_mode():
        model = PeftModel.from_pretrained(tiny_llama(), folders[0])
        options: Any = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with within(fused):
        model.fuse_for_inference(*STRATEGIES[strategy])
    expected = reference.generate(input_ids=tokens(1, 4), **options)
    assert torch.equal(model.generate(input_ids=tokens(1, 4), **options), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(input_ids=tokens(1, 4), **options), expected)
        model.save_pretrained(tmp_path)
        model.unfuse()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, "no_grad"), logits(reference, "no_grad"))


@pytest.mark.parametrize(
    "made, fused, strategy",
    [(made, fused, strategy) for index, strategy in enumerate(STRATEGIES) for made, fused in MADE_AND_FUSED[index % 2]],
)
def test_compiled(made, fused, strategy, folder_of_a_block):
    """One compiled model called in both modes, in both orders; changed in between."""
    torch._dynamo.reset()
    reference = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), folder_of_a_block)
    with within(made):
        model = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), folder_of_a_block)
    with within(fused):
        model.fuse_for_inference(*STRATEGIES[strategy])
    compiled = torch.compile(model, backend="eager")
    for factor, run in ((1.0, "no_grad"), (1.3, "inference"), (0.7, "no_grad")):
        for each in (model, reference):
            with torch.inference_mode():
                for name, parameter in each.named_parameters():
                    if "loraswitch_B" in name:
                        parameter.mul_(factor)
        served(model, run)  # compiled code of strategy "merge" does not look
        with within(run):
            found = compiled(input_ids=tokens(1, 1), use_cache=False).logits.clone()
        assert alike([found], [logits(reference, "no_grad")])


@pytest.mark.parametrize("adapter", ["new", "loaded"])
def test_what_is_made_within_it_can_be_trained_and_moved_outside(adapter, folders):
    base = tiny_llama()
    with torch.inference_mode():
        if adapter == "new":
            model: Any = adapted(base)
        else:
            model = PeftModel.from_pretrained(base, folders[0])
            model.load_adapter(folders[1], "other")
            model.set_adapter("other")
    experts = [(name, parameter) for name, parameter in model.named_parameters() if "loraswitch_" in name]
    assert experts and not any(parameter.is_inference() for _, parameter in experts)
    model.set_adapter("default")
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD([p for _, p in experts if p.grad is not None], lr=0.1).step()
    with torch.inference_mode():
        model.to(torch.bfloat16)
    assert not any(p.is_inference() for n, p in model.named_parameters() if "loraswitch_" in n)
    assert model.router_stats("default")["tokens"] == 14
    model.float()(input_ids=tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize("opened, used", list(itertools.product(MODES, repeat=2)))
def test_statistics(opened, used):
    model = adapted(tiny_llama())
    with within(opened):
        recording = model.record_routing()
        recorded = recording.__enter__()
    for mode in (used, opened):
        with within(mode):
            model(input_ids=tokens(2, 3))
    recording.__exit__(None, None, None)
    assert recorded.summary()["tokens"] == 12


def test_two_adapters_switched_within_inference_mode_train_outside():
    model = adapted(tiny_llama())
    with torch.inference_mode():
        model.add_adapter("b", switch_config(num_experts=3))
        randomize_adapter(model, "b")
        model.set_adapter("b")
    model.fuse_for_inference("fused")
    model.set_adapter("b")
    model.eval()
    model(input_ids=tokens(1, 2)).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "loraswitch_A.b" in n)
