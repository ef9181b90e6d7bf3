"""`training/four_bit_kernels.py` with functions that compute, on the host, from the addresses that they are given, in place of
bitsandbytes' kernels: a wrong address or size is a wrong weight. `test_four_bit_training_gpu.py` has the real ones."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fast_linear_checks import NO_LOSSES, step
from four_bit_linear import linear_4bit
from four_bit_training import KINDS, LINEARS, MODES, agree, model_of
from helpers import adapter_gradients, padded
from peft_loraswitch.training import four_bit_kernels
from peft_loraswitch.training.four_bit_weights import four_bit_weights
from stand_in_library import view

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STREAM = 7


class Kernels:
    """For weights (of one format and dtype) and for scales, as `_functions` has them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.wrong = False

    def functions(self, quant_type: str, dtype: torch.dtype) -> tuple[Any, Any]:
        from bitsandbytes.backends.utils import _get_4bit_code

        table = _get_4bit_code(quant_type, torch.device("cpu"))

        def of_weights(code: Any, packed: int, scales: int, result: int, block: int, numbers: int, stream: int) -> None:
            assert code is None and stream == STREAM
            self.calls.append("weight")
            nibbles = view(packed, numbers // 2, dtype=torch.uint8).long()
            values = table[torch.stack((nibbles // 16, nibbles % 16), dim=1).flatten()]
            each = view(scales, -(-numbers // block)).repeat_interleave(block)[:numbers]
            view(result, numbers, dtype=dtype).copy_(values * each * (2 if self.wrong else 1))

        def of_scales(code: int, codes: int, scales: int, result: int, block: int, numbers: int, stream: int) -> None:
            assert stream == STREAM
            self.calls.append("scales")
            each = view(scales, -(-numbers // block)).repeat_interleave(block)[:numbers]
            view(result, numbers).copy_(view(code, 256)[view(codes, numbers, dtype=torch.uint8).long()] * each)

        return of_weights, of_scales


@pytest.fixture
def kernels(monkeypatch) -> Kernels:
    found = Kernels()
    monkeypatch.setattr(four_bit_kernels, "_stream", lambda packed: STREAM)
    monkeypatch.setattr(four_bit_kernels, "_functions", found.functions)
    monkeypatch.setattr(four_bit_kernels, "_alike", {})
    return found


def base_of(kind: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return linear_4bit(nn.Linear(256, 320), **kind)


def made(base: Any, dtype: torch.dtype) -> torch.Tensor:
    (weight,) = four_bit_weights([base.weight], False)
    return weight.to(dtype)


def expected(base: Any, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(base.weight.quant_state)
    state.dtype = dtype
    return dequantize_4bit(base.weight.detach(), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_bits_of_the_public_function(kind, dtype, kernels):
    base = base_of(kind)
    once = ["scales", "weight"] if base.weight.quant_state.nested else ["weight"]
    for calls in (2 * once, once):  # the first weight is compared
        kernels.calls.clear()
        weight = made(base, dtype)
        assert kernels.calls == calls and weight.dtype == dtype and weight.is_contiguous()
        assert torch.equal(weight, expected(base, dtype))


@pytest.mark.parametrize("double", [False, True])
def test_what_the_layer_holds_now_counts(double, kernels):
    """Bytes and scales that were written to, replaced, or that belong to another weight."""
    base, other = base_of({"double": double}), base_of({"double": double})
    made(base, torch.bfloat16)
    state = base.weight.quant_state

    def replaced() -> None:
        base.weight.quant_state = copy.deepcopy(other.weight.quant_state)

    def quantised_again() -> None:
        base.weight = linear_4bit(nn.Linear(256, 320), "fp4", not double, 128).weight

    changes: list[Callable[[], Any]] = [
        lambda: base.weight.data.fill_(0x35),
        lambda: setattr(base.weight, "data", base.weight.data.flip(0)),
        lambda: state.absmax.copy_(state.absmax.flip(0)),
        lambda: setattr(state, "absmax", state.absmax.flip(0).clone()),
        lambda: base.to("cpu"),
        replaced,
        quantised_again,
    ]
    if double:
        changes[4:4] = [
            lambda: state.offset.mul_(2),
            lambda: state.state2.absmax.mul_(2),
            lambda: state.state2.code.neg_(),
        ]
    for change in changes:
        change()
        kernels.calls.clear()
        assert torch.equal(made(base, torch.bfloat16), expected(base, torch.bfloat16)) and kernels.calls


def test_a_weight_that_was_noted_down_before_a_change_follows_it(kernels):
    """So backward does, whose weights are those of its forward."""
    base = base_of({})
    (weight,) = four_bit_weights([base.weight], False)
    weight.to(torch.bfloat16)
    base.weight.quant_state.absmax.mul_(3)
    assert torch.equal(weight.to(torch.bfloat16), expected(base, torch.bfloat16))


def test_other_bits_than_the_public_functions_are_not_taken(kernels, caplog):
    kernels.wrong = True
    base = base_of({})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(made(base, torch.bfloat16), expected(base, torch.bfloat16))
    assert kernels.calls == ["weight"] and caplog.text.count("dequantize_4bit") == 1
    kernels.wrong = False
    made(base, torch.float16)  # another kind is compared by itself
    assert kernels.calls == ["weight"] * 3


def scales_in_float16(base: Any) -> None:
    base.weight.quant_state.absmax = base.weight.quant_state.absmax.half()


def with_gaps(base: Any) -> None:
    base.weight.data = torch.stack((base.weight.data, base.weight.data), dim=1)[:, 0]


def quantised_scales_with_gaps(base: Any) -> None:
    state = base.weight.quant_state
    state.absmax = torch.stack((state.absmax, state.absmax), dim=1)[:, 0]


@pytest.mark.parametrize("change", [scales_in_float16, with_gaps, quantised_scales_with_gaps])
def test_what_lies_otherwise_is_left_to_the_library(change, kernels):
    base = base_of({"double": True} if change is quantised_scales_with_gaps else {})
    change(base)
    assert torch.equal(made(base, torch.float32), expected(base, torch.float32)) and not kernels.calls


def test_a_cpu_and_another_version_of_the_library(monkeypatch):
    import bitsandbytes.cextension

    class Function:
        argtypes: Any = None

        def __call__(self, *args: Any) -> None:
            raise AssertionError("arguments that are not known")

    class Library:
        cdequantize_blockwise_bf16_nf4 = cdequantize_blockwise_fp32 = Function()

    class OfAnotherKind:  # of device, which has an index as a GPU of CUDA has
        is_cuda = False

        def get_device(self) -> int:
            return 0

    base = base_of({})
    assert four_bit_kernels._stream(base.weight.detach()) is None
    assert four_bit_kernels._stream(OfAnotherKind()) is None  # type: ignore[arg-type]
    monkeypatch.setattr(four_bit_kernels, "_stream", lambda packed: STREAM)
    monkeypatch.setattr(bitsandbytes.cextension, "lib", Library())
    four_bit_kernels._functions.cache_clear()
    try:
        assert torch.equal(made(base, torch.bfloat16), expected(base, torch.bfloat16))
        four_bit_kernels._functions.cache_clear()
        Function.argtypes = four_bit_kernels.ARGUMENTS
        with pytest.raises(AssertionError, match="not known"):
            made(base, torch.bfloat16)
        assert torch.equal(made(base, torch.float16), expected(base, torch.float16))  # a name that is not there
    finally:
        four_bit_kernels._functions.cache_clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("double", [False, True])
def test_models_train_alike(double, mode, kernels, monkeypatch):
    """A checkpointed block's second run leaves the scales to backward; it does not come to the last linear, one of each block."""
    model = model_of(mode=mode, kind={"double": double}, **NO_LOSSES)
    for _ in range(2):
        step(model, padded([7, 4]))
    kernels.calls.clear()
    _, gradients = step(model, padded([7, 4]))
    weights = (LINEARS - 3 if mode == MODES[0] else LINEARS) + LINEARS  # backward, of all whose input asks; forward
    scales = weights
    if mode != MODES[0]:
        weights += LINEARS - (2 if mode == "non-reentrant" else 0)
    assert kernels.calls.count("weight") == weights and kernels.calls.count("scales") == (scales if double else 0)
    monkeypatch.setattr(four_bit_kernels, "_stream", lambda packed: None)
    agree(gradients, step(model, padded([7, 4]))[1], 1e-6)


def test_scales_are_gone_after_backward(kernels):
    model = model_of(mode="non-reentrant", kind={"double": True}, **NO_LOSSES)
    alive = weakref.WeakSet()
    of_scales = torch.empty_like

    def noted(*args: Any, **settings: Any) -> torch.Tensor:
        made = of_scales(*args, **settings)
        alive.add(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", noted)
        loss = None
        for _ in range(2):
            loss = model(**padded([7, 4])).loss
            assert not any(each.dtype == torch.float32 and each.ndim == 1 for each in alive)
            loss.backward()
    assert kernels.calls and not any(each.ndim == 1 for each in alive)


def test_a_second_backward_is_the_first_again(kernels):
    model = model_of(mode="non-reentrant", kind={"double": True}, **NO_LOSSES)
    step(model, padded([7, 4]))
    model.zero_grad()
    loss = model(**padded([7, 4])).loss
    loss.backward(retain_graph=True)
    first = adapter_gradients(model)
    model.zero_grad()
    loss.backward()
    agree(adapter_gradients(model), first, 1e-6)
