"""How the layer gets there: no loop over experts, and the host never waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import adapted, tiny_llama, tokens


class Operations(TorchDispatchMode):
    """Records the name of every operation that reaches a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        """Operations whose result's value or shape the host has to wait for."""
        return [
            n for n in self.names if any(w in n for w in ("_local_scalar_dense", "nonzero", "unique", "masked_select"))
        ]


def training_step(model, labels: bool = True):
    ids = tokens(2, 6)
    output = model(input_ids=ids, labels=ids) if labels else model(input_ids=ids)
    (output.loss if labels else output.logits.sum()).backward()


def number_of_operations(num_experts: int, top_k: int, layers: int = 2) -> int:
    model = adapted(tiny_llama(num_hidden_layers=layers), num_experts=num_experts, top_k=top_k).train()
    with Operations() as operations:
        training_step(model)
    return len(operations.names)


def test_the_number_of_operations_does_not_depend_on_the_number_of_experts():
    assert number_of_operations(4, 2) == number_of_operations(32, 2) == number_of_operations(256, 2)
    # where a token chooses all of them, none has to be left out
    assert number_of_operations(2, 2) < number_of_operations(4, 2)


def test_each_expert_of_a_token_takes_two_operations_of_the_decision_and_none_of_a_layer():
    for layers in (1, 3):
        assert number_of_operations(32, 9, layers) == number_of_operations(32, 2, layers) + 2 * (9 - 2)


def test_the_only_wait_is_the_finite_check_on_a_cpu():
    """One scalar read a forward, however many layers, and none in backward; and it is the one that finds NaN."""
    for layers in (1, 3):
        model = adapted(tiny_llama(num_hidden_layers=layers)).train()
        backbone = tiny_llama(num_hidden_layers=layers).train()
        with Operations() as with_adapter:
            training_step(model)
        with Operations() as without:
            backbone(input_ids=tokens(2, 6), labels=tokens(2, 6))
        assert len(with_adapter.waits) == len(without.waits) + 1


@pytest.mark.parametrize("labels", [True, False], ids=["joined to the loss", "brought by the logits"])
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_nothing_waits_where_waiting_is_impossible(labels, jitter):
    """On the meta device tensors have no values: whoever asks for one gets an exception. (As on a GPU, and unlike on a CPU,
    there is no finite check.) A whole training step, with losses, statistics and dropout."""
    model = adapted(tiny_llama(), lora_dropout=0.1, router_jitter=jitter).train().to("meta")
    ids = torch.zeros((2, 6), dtype=torch.int64, device="meta")
    output = model(input_ids=ids, labels=ids) if labels else model(input_ids=ids)
    (output.loss if labels else output.logits.sum()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "loraswitch_" in n)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(input_ids=ids).logits.sum().item()  # the device does refuse to be waited for
