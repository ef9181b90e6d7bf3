"""Groups whose base layers are bitsandbytes' in 4 bits: one op, or one C call, for few tokens, the library beyond. On a CPU,
with a stand-in for the kernels' library; `test_fuse_four_bit_gpu.py` is the same on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

import four_bit_checks as checks
from changes_of_weights import a_plain_base_layer_in_the_dictionary, bias_replaced, hook
from four_bit_linear import BF16, FEW, MANY, SHAPE, SIZES, check_layers, in_4_bits, linear_4bit, made_4bit, same, sizes
from fusing import adapted, check_as_unfused, close, fused, groups, ids, layer_of, logits, randomize
from helpers import LAYERS, tiny_llama
from int8_linear import launches
from peft_loraswitch import LoRASwitchConfig, kernels
from peft_loraswitch.inference import group_outputs
from peft_loraswitch.inference.fuse import adapted_layers, refresh_fused

bnb = pytest.importorskip("bitsandbytes")


# ----------------------------------------------------------------------------------------------- outputs and launches


@pytest.mark.parametrize("way", ["library", "op_alone"])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"quant_type": "fp4"},
        {"double": True},
        {"quant_type": "fp4", "double": True, "storage": torch.bfloat16},
        {"storage": torch.float32},
        {"compute_dtype": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_linear_is_its_weight_and_its_experts(way, kind, dtype, request):
    request.getfixturevalue(way)
    model = fused(made_4bit(dtype=dtype, **kind, settings={"rank_pattern": {"k_proj": 3, "up_proj": 16}}))
    assert all(group.four_bit for group in groups(model))
    check_layers(model, [FEW[:1, :1], FEW, FEW, MANY])


def test_one_op_a_group_for_few_tokens_and_the_library_for_many(op_alone):
    model = fused(made_4bit())
    for tokens, op, other in ((FEW, "linear_4bit", "deltas"), (ids(1, 32, "cpu"), "linear_4bit", "deltas")):
        with launches() as of:
            logits(model, tokens)
        assert sizes(of, op) == SIZES and not sizes(of, other) and not op_alone.calls
    for tokens in (ids(1, 33, "cpu"), MANY):
        with launches() as of:
            logits(model, tokens)
        assert [one for one in of if one[0] != "route"] == [("expand", n) for n in SIZES] and not op_alone.calls


def test_one_c_call_a_group_without_a_compiler(library):
    model = made_4bit(settings={"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"v_proj": 50}})
    batches = [ids(1, 1, "cpu"), FEW, ids(1, 1, "cpu", seed=4), MANY, ids(1, 32, "cpu")]
    check_as_unfused(model, batches, BF16)
    for tokens in (*batches, ids(1, 33, "cpu")):
        library.calls.clear()
        with launches() as of:
            logits(model, tokens)
        few = tokens.numel() <= kernels.FAST_TOKENS
        assert library.calls == ([(size, tokens.numel()) for size in SIZES] if few else [])
        assert not sizes(of, "linear_4bit") and not sizes(of, "deltas")


def test_an_input_at_an_odd_address_goes_by_the_op(library):
    model = fused(made_4bit())
    logits(model, FEW)
    layer = layer_of(model, "layers.0.self_attn.q_proj")
    group = layer.fused_group
    x = torch.randn(2 * layer.in_features + 1).bfloat16()[1:].view(2, -1)
    routing = group_outputs.Routing(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2), 4)
    assert group.direct(x, routing) is None and group.direct(x.clone(), routing) is not None
    assert close(group_outputs.compute(layer, group, x, routing), group.direct(x.clone(), routing)[0], 2e-2)


def test_without_kernels_the_library_computes():
    model = made_4bit()
    expected = logits(model, FEW)
    fused(model)
    checks.check_left_to_the_library(model, expected)


def test_a_model_from_transformers(library, tmp_path):
    """Double quantisation, and experts that PEFT keeps in float32."""
    tiny_llama(**SHAPE).save_pretrained(tmp_path)
    config = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
    )  # fmt: skip
    base = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model = get_peft_model(base, LoRASwitchConfig(r=8, num_experts=4, target_modules="all-linear"))
    randomize(model)
    model.eval().requires_grad_(False)
    assert adapted_layers(model)[0].loraswitch_A["default"].weight.dtype == torch.float32
    expected = logits(model, FEW)
    fused(model)
    with launches() as of:
        assert same(logits(model, FEW), expected)
    assert sizes(of, "linear") == SIZES or sizes(of, "linear_4bit") == SIZES
    assert all(group.four_bit for group in groups(model))


# ------------------------------------------------------------------------------------------ what is left to the library


def not_quantised(model: nn.Module) -> None:
    """A weight that has its own dtype until the layer goes to a device."""
    for layer in adapted_layers(model):
        linear, new = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16), layer.base_layer
        new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, module=new)
        new.quant_state = None


def packed_for_a_cpu(model: nn.Module) -> None:
    for layer in adapted_layers(model):
        layer.base_layer.weight.quant_state.packing_format_for_cpu = True


def bias_in_float32(model: nn.Module) -> None:
    for layer in adapted_layers(model):
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.data = layer.base_layer.bias.data.float()


def hooked(model: nn.Module) -> None:
    for layer in adapted_layers(model):
        layer.base_layer.register_forward_hook(lambda module, args, out: out)


class Doubled(bnb.nn.Linear4bit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def of_a_class_of_its_own(model: nn.Module) -> None:
    for layer in adapted_layers(model):
        layer.base_layer.__class__ = Doubled


@pytest.mark.parametrize(
    "kind",
    [
        {"compute_dtype": torch.float32},
        {"compute_dtype": torch.float16},
        {"blocksize": 32},
        {"blocksize": 128},  # 64 features share their scale with those of another output
        {"dtype": torch.float32},
    ],
    ids=str,
)
def test_formats_that_the_kernel_does_not_take(kind, library):
    model = made_4bit(**kind)
    expected = logits(model, FEW)
    fused(model)
    wide = [group for group in groups(model) if group.live[0].layer.in_features == 128]
    served = set(wide) if kind == {"blocksize": 128} else set()
    assert {group for group in groups(model) if group.four_bit} == served
    with launches() as of:
        assert same(logits(model, FEW), expected)
    assert sum(sizes(of, "deltas")) == 7 * LAYERS - len(wide) * bool(served)


@pytest.mark.parametrize("change", [not_quantised, packed_for_a_cpu, bias_in_float32, hooked, of_a_class_of_its_own])
def test_layers_that_are_left_to_the_library(change, library):
    model = made_4bit()
    watched = fused(model)
    assert all(group.four_bit for group in groups(watched))
    model.unfuse()
    change(model)
    # the forward by which fusing finds groups would cast a bias, and fails on what is not quantised
    for layer in adapted_layers(model):
        layer.base_layer.forward = lambda x, base=layer.base_layer: x.new_zeros(*x.shape[:-1], base.out_features)
    fused(model)
    biased = {layer.name for layer in adapted_layers(model) if layer.base_layer.bias is not None}
    for layer in adapted_layers(model):
        left = change is not bias_in_float32 or layer.name in biased
        assert not (left and layer.fused_groups["default"].four_bit)
        assert left or layer.fused_groups["default"].four_bit


def test_what_the_library_of_the_kernels_refuses(library):
    library.takes_four_bits = False
    model = made_4bit()
    expected = logits(model, FEW)
    fused(model)
    for _ in range(2):
        checks.check_left_to_the_library(model, expected)


@pytest.mark.parametrize("others", [("q_proj",), ("k_proj",), ("up_proj",)])
def test_linears_of_4_and_of_16_bits_share_no_launch(others, library):
    model = adapted(tiny_llama(**SHAPE), dtype=torch.bfloat16)
    in_4_bits(model, others)
    expected = logits(model, FEW)
    fused(model)
    assert same(logits(model, FEW), expected)
    for layer in adapted_layers(model):
        kinds = {type(one.layer.base_layer) for one in layer.fused_group.live}
        assert len(kinds) == 1 and layer.fused_group.four_bit == (kinds == {bnb.nn.Linear4bit})


def test_nf4_and_fp4_share_no_launch(library):
    model = adapted(tiny_llama(**SHAPE), dtype=torch.bfloat16)
    in_4_bits(model)
    layer = layer_of(model, "layers.0.self_attn.k_proj")
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
    layer.base_layer = linear_4bit(plain, quant_type="fp4")
    expected = logits(model, FEW)
    fused(model)
    logits(model, FEW)
    library.calls.clear()
    assert same(logits(model, FEW), expected)
    assert [size for size, _ in library.calls] == [2, 1, 1, 2, 1, *SIZES[4:]]


# ------------------------------------------------------------------------------------------------------------ memory


def test_weights_are_not_copied_and_dequantised_scales_are_kept_once(library):
    for double in (False, True):
        model = made_4bit(double=double)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.eval().requires_grad_(False)
        fused(model)
        logits(model, FEW)
        for layer in adapted_layers(model):
            kept, state = layer.fusing.four_bit, layer.base_layer.weight.quant_state
            assert kept.packed.data_ptr() == layer.base_layer.weight.data_ptr() and type(kept.packed) is torch.Tensor
            assert kept.code.data_ptr() == state.code.data_ptr()
            assert (kept.scales.data_ptr() == state.absmax.data_ptr()) != double
            members = layer.fusing.leader.fusing.members
            for adapter in ("default", "other"):
                assert layer.fused_groups[adapter].scales0 is kept.scales
                group = members[0].fused_groups[adapter]
                assert getattr(group, f"scales{members.index(layer)}") is kept.scales
        model.unfuse()
        assert not any("fusing" in vars(layer) for layer in adapted_layers(model))


# ------------------------------------------------------------------------------------------------------- what changes


def another_weight(layer: Any) -> None:
    new = linear_4bit(nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16), double=layer.double)
    layer.base_layer.weight = new.weight


def another_weight_in_the_dictionary(layer: Any) -> None:
    new = linear_4bit(nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16), double=layer.double)
    layer.base_layer._parameters["weight"] = new.weight


def another_base_layer(layer: Any) -> None:
    layer.base_layer = linear_4bit(nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16))


def another_base_layer_in_the_dictionary(layer: Any) -> None:
    new = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16)
    layer._modules["base_layer"] = linear_4bit(new, quant_type="fp4")


def a_plain_base_layer(layer: Any) -> None:
    layer.base_layer = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16, bias=False)


def the_same_weight_in_another_layer(layer: Any) -> None:
    new = Doubled(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16)
    new.weight, new.support_avx512bf16_for_cpu = layer.base_layer.weight, False
    layer._modules["base_layer"] = new.eval()


def bytes_elsewhere(layer: Any) -> None:
    layer.base_layer.weight.data = layer.base_layer.weight.data ^ 0x7F


def scales_elsewhere(layer: Any) -> None:
    state = layer.base_layer.weight.quant_state
    (state.state2 if state.nested else state).absmax = (state.state2 if state.nested else state).absmax * -2


def another_state(layer: Any) -> None:
    weight = layer.base_layer.weight
    state = copy.deepcopy(weight.quant_state)
    if state.nested:
        state.offset = state.offset * 3
    else:
        state.absmax = state.absmax * 3
    weight.quant_state = layer.base_layer.quant_state = state


def bytes_written(layer: Any) -> None:
    layer.base_layer.weight.data.bitwise_xor_(0x7F)


def scales_written(layer: Any) -> None:
    state = layer.base_layer.weight.quant_state
    (state.state2.absmax if state.nested else state.absmax).mul_(-2)


def offset_written(layer: Any) -> None:
    state = layer.base_layer.weight.quant_state
    (state.offset if state.nested else state.absmax).add_(1.0)


CHANGES = [
    another_weight, another_weight_in_the_dictionary, another_base_layer, another_base_layer_in_the_dictionary,
    a_plain_base_layer, a_plain_base_layer_in_the_dictionary, the_same_weight_in_another_layer, bytes_elsewhere,
    scales_elsewhere, another_state, bytes_written, scales_written, offset_written,
    bias_replaced, hook,
]  # fmt: skip


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("way", ["library", "op_alone"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])  # the one that computes, and the one that it computes for
def test_what_is_changed_after_fusing_is_seen(change, way, double, name, request):
    request.getfixturevalue(way)
    model = made_4bit(double=double, settings={"target_modules": ["q_proj", "gate_proj", "up_proj"]})
    fused(model)
    before = [logits(model, FEW) for _ in range(2)][-1]
    layer = layer_of(model, f"layers.1.mlp.{name}")
    layer.double = double
    with torch.no_grad():
        change(layer)
    checks.check_change_is_seen(model, before)


def test_another_compute_dtype_is_left_to_the_library(library):
    model = fused(made_4bit())
    before = [logits(model, FEW) for _ in range(2)][-1]
    layer_of(model, "layers.1.mlp.up_proj").base_layer.compute_dtype = torch.float32
    for _ in range(2):
        with launches() as of:
            assert same(logits(model, FEW), before)
    assert sizes(of, "deltas") == [1] and sizes(of, "linear") == [3, 1, 2, 1, 3, 1, 1, 1]


def test_what_shows_nowhere_is_taken_up_when_asked(library):
    model = fused(made_4bit(double=True))
    before = logits(model, FEW)
    for layer in adapted_layers(model):
        layer.base_layer.weight.quant_state.absmax.data.copy_(
            torch.flip(layer.base_layer.weight.quant_state.absmax, [0])
        )
    refresh_fused(model)
    kept = [layer.fusing.four_bit.scales.data_ptr() for layer in adapted_layers(model)]
    after = logits(model, FEW)
    refresh_fused(model)
    assert [layer.fusing.four_bit.scales.data_ptr() for layer in adapted_layers(model)] == kept
    model.unfuse()
    assert same(after, logits(model, FEW)) and not same(before, after, 0.1)


def test_moved_and_loaded(library):
    model = made_4bit(double=True)
    expected = checks.check_moved_and_loaded(model)
    assert torch.equal(logits(model, FEW), expected)


def test_gradients_are_those_of_the_unfused_model(library):
    checks.check_gradients(made_4bit(), "v_proj.loraswitch_A")


def test_copies(library):
    checks.check_copies(made_4bit(double=True), bytes_written)


# ------------------------------------------------------------------------------------------------------ compiled code


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("length", [3, 40])
def test_compiled_whole(length, double, library):
    model = made_4bit(double=double, settings={"target_modules": ["q_proj", "v_proj", "up_proj"]})
    layer = layer_of(model, "layers.1.self_attn.v_proj")
    tokens, calls = ids(1, length, "cpu"), 2 * LAYERS if length == 3 else 0
    compiled, changed = checks.check_compiled_whole(model, tokens, calls, layer, bytes_written)
    scales_written(layer)
    model.refresh_fused()
    after = logits(compiled, tokens, use_cache=False)
    model.unfuse()
    assert same(after, logits(model, tokens, use_cache=False)) and not same(after, changed, 0.05)
