"""Groups whose base layers are torchao's in int4, packed for tensor cores: one op, or one C call, for few tokens, the library
beyond. On a CPU, with stand-ins for the kernels' library and for torchao's product; `test_fuse_int4_gpu.py`: on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import four_bit_checks as checks
from changes_of_weights import a_plain_base_layer_in_the_dictionary, bias_replaced, hook
from four_bit_linear import BF16, FEW, MANY, SIZES, check_layers, same, sizes
from fusing import adapted, check_as_unfused, fused, groups, ids, layer_of, logits
from helpers import LAYERS, tiny_llama
from int4_linear import SHAPE, exact_weight, in_int4, int4_linear, int4_weight, made_int4, product_on_a_cpu
from int8_linear import launches
from peft_loraswitch import kernels
from peft_loraswitch.inference.fuse import adapted_layers

torchao = pytest.importorskip("torchao.quantization")


@pytest.fixture(autouse=True)
def products() -> Iterator[list[int]]:
    with product_on_a_cpu() as calls:
        yield calls


# ----------------------------------------------------------------------------------------------- outputs and launches


@pytest.mark.parametrize("way", ["library", "op_alone"])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_every_linear_is_its_weight_and_its_experts(way, group, request):
    request.getfixturevalue(way)
    model = fused(made_int4(group=group, settings={"rank_pattern": {"k_proj": 3, "up_proj": 16}}))
    assert all(group.four_bit for group in groups(model))
    check_layers(model, [FEW[:1, :1], FEW, FEW, MANY], exact_weight)


def test_one_op_a_group_for_few_tokens_and_the_library_for_many(op_alone, products):
    model = fused(made_int4())
    for tokens in (FEW, ids(1, 32, "cpu")):
        products.clear()
        with launches() as of:
            logits(model, tokens)
        assert sizes(of, "linear_4bit") == SIZES and not sizes(of, "deltas") and not products
    for tokens in (ids(1, 33, "cpu"), MANY):
        with launches() as of:
            logits(model, tokens)
        assert [one for one in of if one[0] != "route"] == [("expand", n) for n in SIZES]
        assert products == [tokens.numel()] * 7 * LAYERS
        products.clear()


def test_one_c_call_a_group_without_a_compiler(library):
    model = made_int4(settings={"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"v_proj": 50}})
    batches = [ids(1, 1, "cpu"), FEW, MANY, ids(1, 32, "cpu")]
    check_as_unfused(model, batches, BF16)
    for tokens in (*batches, ids(1, 33, "cpu")):
        library.calls.clear()
        logits(model, tokens)
        few = tokens.numel() <= kernels.FAST_TOKENS
        assert library.calls == ([(size, tokens.numel()) for size in SIZES] if few else [])


def test_without_kernels_the_library_computes(products):
    """On a CPU, and on a GPU that the kernels do not run on."""
    model = made_int4()
    expected = logits(model, FEW)
    fused(model)
    products.clear()
    checks.check_left_to_the_library(model, expected)
    assert len(products) == 7 * LAYERS


def test_weights_are_not_copied_nor_in_the_state_dict(library):
    model = made_int4()
    names = set(model.state_dict())
    fused(model)
    logits(model, FEW)
    for layer in adapted_layers(model):
        kept, weight = layer.fusing.four_bit, layer.base_layer.weight
        assert kept.packed.data_ptr() == weight.qdata.data_ptr() and kept.code is None
        assert kept.scales.data_ptr() == weight.scale_and_zero.data_ptr()
    assert set(model.state_dict()) == names
    model.unfuse()
    assert not any("fusing" in vars(layer) for layer in adapted_layers(model))


# ------------------------------------------------------------------------------------------ what is left to the library


def pre_scaled(layer: Any) -> None:
    layer.base_layer.weight.act_pre_scale = torch.full((layer.in_features,), 2.0, dtype=torch.bfloat16)


def hooked(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, out: out)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def of_a_class_of_its_own(layer: Any) -> None:
    layer.base_layer.__class__ = Doubled


def bias_in_float32(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(torch.ones(layer.out_features), requires_grad=False)


def more_rows_than_outputs(layer: Any) -> None:
    """Packed for other tiles than those of 8 rows."""
    weight = layer.base_layer.weight
    weight.qdata = torch.cat([weight.qdata, weight.qdata[:1]])
    weight.scale_and_zero = torch.cat([weight.scale_and_zero, weight.scale_and_zero[:, :8]], 1)


LEFT = [pre_scaled, hooked, of_a_class_of_its_own, bias_in_float32, more_rows_than_outputs]


@pytest.mark.parametrize("change", LEFT)
def test_layers_that_are_left_to_the_library(change, library):
    model = made_int4()
    for layer in adapted_layers(model):
        change(layer)
    expected = logits(model, FEW)
    fused(model)
    with launches() as of:
        assert same(logits(model, FEW), expected)
    assert not any(group.four_bit for group in groups(model)) and sum(sizes(of, "deltas")) == 7 * LAYERS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_activations_of_another_dtype_are_left_to_the_library(dtype, library):
    """It computes in bf16, whatever they are."""
    model = in_int4(adapted(tiny_llama(**SHAPE), dtype=dtype))
    expected = logits(model, FEW)
    fused(model)
    checks.check_left_to_the_library(model, expected)


def test_what_the_library_of_the_kernels_refuses(library):
    library.takes_four_bits = False
    model = made_int4()
    expected = logits(model, FEW)
    fused(model)
    checks.check_left_to_the_library(model, expected)


@pytest.mark.parametrize("group", [None, 64], ids=["bf16", "another group"])
def test_linears_of_other_formats_share_no_launch(group, library):
    model = made_int4()
    layer = layer_of(model, "layers.0.self_attn.k_proj")
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.base_layer = plain if group is None else int4_linear(plain, group)
    expected = logits(model, FEW)
    fused(model)
    logits(model, FEW)
    library.calls.clear()
    assert same(logits(model, FEW), expected)
    assert sorted(size for size, _ in library.calls) == sorted([2, 1, 1, 2, 1, *SIZES[4:]])


# ------------------------------------------------------------------------------------------------------- what changes


def another_weight(layer: Any) -> None:
    layer.base_layer.weight = int4_weight(torch.randn(layer.out_features, layer.in_features) / 8)


def another_weight_in_the_dictionary(layer: Any) -> None:
    layer.base_layer._parameters["weight"] = int4_weight(torch.randn(layer.out_features, layer.in_features) / 8)


def weight_of_another_group(layer: Any) -> None:
    layer.base_layer._parameters["weight"] = int4_weight(torch.randn(layer.out_features, layer.in_features) / 8, 128)


def another_base_layer(layer: Any) -> None:
    layer.base_layer = int4_linear(nn.Linear(layer.in_features, layer.out_features))


def a_plain_weight_in_the_dictionary(layer: Any) -> None:
    new = torch.randn(layer.out_features, layer.in_features, dtype=torch.bfloat16) / 8
    layer.base_layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)


def tiles_elsewhere(layer: Any) -> None:
    layer.base_layer.weight.qdata = layer.base_layer.weight.qdata ^ 0x77777777


def scales_elsewhere(layer: Any) -> None:
    layer.base_layer.weight.scale_and_zero = layer.base_layer.weight.scale_and_zero * -2


def tiles_written(layer: Any) -> None:
    layer.base_layer.weight.qdata.bitwise_xor_(0x77777777)


def scales_written(layer: Any) -> None:
    layer.base_layer.weight.scale_and_zero.mul_(-2)


def copied_into(layer: Any) -> None:
    layer.base_layer.weight.copy_(int4_weight(torch.randn(layer.out_features, layer.in_features) / 8))


def scaled_before(layer: Any) -> None:
    layer.base_layer.weight.act_pre_scale = torch.full((layer.in_features,), 3.0, dtype=torch.bfloat16)


CHANGES = [
    another_weight, another_weight_in_the_dictionary, weight_of_another_group, another_base_layer,
    a_plain_base_layer_in_the_dictionary, a_plain_weight_in_the_dictionary, tiles_elsewhere, scales_elsewhere, tiles_written,
    scales_written, copied_into, scaled_before, bias_replaced, hook,
]  # fmt: skip


@pytest.mark.parametrize("way", ["library", "op_alone"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])  # the one that computes, and the one that it computes for
def test_what_is_changed_after_fusing_is_seen(change, way, name, request):
    request.getfixturevalue(way)
    model = fused(made_int4(settings={"target_modules": ["q_proj", "gate_proj", "up_proj"]}))
    before = [logits(model, FEW) for _ in range(2)][-1]
    torch.manual_seed(3)
    with torch.no_grad():
        change(layer_of(model, f"layers.1.mlp.{name}"))
    checks.check_change_is_seen(model, before)


def test_moved_loaded_trained_and_back(library):
    model = made_int4()
    expected = checks.check_moved_and_loaded(model)
    assert same(logits(model, FEW), expected) and all(group.four_bit for group in groups(model))


def test_gradients_are_those_of_the_unfused_model(library):
    """Of what comes after all products: torchao's has no backward."""
    model = made_int4(settings={"target_modules": ["down_proj"], "layers_to_transform": [LAYERS - 1]})
    checks.check_gradients(model, "down_proj.loraswitch_A")


def test_copies(library):
    checks.check_copies(made_int4(), tiles_written)


# ------------------------------------------------------------------------------------------------------ compiled code


@pytest.mark.parametrize("length", [3, 40])
def test_compiled_whole(length, library):
    model = made_int4(settings={"target_modules": ["q_proj", "v_proj", "up_proj"]})
    layer = layer_of(model, "layers.1.self_attn.v_proj")
    tokens, calls = ids(1, length, "cpu"), 2 * LAYERS if length == 3 else 0
    checks.check_compiled_whole(model, tokens, calls, layer, tiles_written)
