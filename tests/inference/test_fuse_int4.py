"""Groups whose base layers are torchao's in int4, packed for tensor cores: one op, or one C call, for few tokens, the library
beyond. On a CPU, with stand-ins for the kernels' library and for torchao's product; `test_fuse_int4_gpu.py`: on a GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from four_bit_linear import FEW, MANY, SIZES, check_layers, same, sizes
from fusing import adapted, fused, gradients, groups, ids, layer_of, logits, trainable
from helpers import LAYERS, tiny_llama
from int4_linear import SHAPE, exact_weight, in_int4, int4_linear, int4_weight, made_int4, product_on_a_cpu
from int8_linear import launches
from peft_loraswitch import kernels, ops
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
        assert not [op for op, _ in of if op not in ("route",)]
        assert products == [tokens.numel()] * 7 * LAYERS
        products.clear()


def test_one_c_call_a_group_without_a_compiler(library):
    model = made_int4(settings={"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"v_proj": 50}})
    batches = [ids(1, 1, "cpu"), FEW, MANY, ids(1, 32, "cpu")]
    expected = [logits(model, tokens) for tokens in batches]
    fused(model)
    for _ in range(2):  # the first of each shape packs, the others find it packed
        for tokens, value in zip(batches, expected, strict=True):
            assert same(logits(model, tokens), value)
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
    with launches() as of:
        assert same(logits(model, FEW), expected)
    assert sizes(of, "deltas") == SIZES and not any(group.four_bit for group in groups(model))
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
    with launches() as of:
        assert same(logits(model, FEW), expected)
    assert sizes(of, "deltas") == SIZES and not any(group.four_bit for group in groups(model))


def test_what_the_library_of_the_kernels_refuses(library):
    library.takes_four_bits = False
    model = made_int4()
    expected = logits(model, FEW)
    fused(model)
    with launches() as of:
        assert same(logits(model, FEW), expected)
    assert sizes(of, "deltas") == SIZES and not any(group.four_bit for group in groups(model))


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


def a_plain_base_layer_in_the_dictionary(layer: Any) -> None:
    new = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16, bias=False)
    layer._modules["base_layer"] = new.requires_grad_(False)


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


def bias_replaced(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(torch.ones(layer.out_features, dtype=torch.bfloat16), requires_grad=False)


def hook(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, out: out * 2)


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
    after = [logits(model, FEW) for _ in range(2)]
    model.unfuse()
    expected = logits(model, FEW)
    assert all(same(one, expected) for one in after) and not same(before, expected, 0.1)


def test_moved_loaded_trained_and_back(library):
    model = fused(made_int4())
    expected = logits(model, FEW)  # by the op, as the first forward of new groups
    model.to("cpu")
    assert torch.equal(logits(model, FEW), expected) and all(group.four_bit for group in groups(model))
    model.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "loraswitch" in name}, strict=False
    )
    model.train()
    model.eval()
    assert same(logits(model, FEW), expected) and all(group.four_bit for group in groups(model))


def test_gradients_are_those_of_the_unfused_model(library):
    """Of what comes after all products: torchao's has no backward."""
    model = made_int4(settings={"target_modules": ["down_proj"], "layers_to_transform": [LAYERS - 1]})
    trained = trainable(model, "down_proj.loraswitch_A")
    expected = gradients(model, FEW, trained)
    fused(model)
    logits(model, FEW)
    assert all(same(*pair) for pair in zip(gradients(model, FEW, trained), expected, strict=True))


def test_copies(library):
    model = fused(made_int4())
    expected = [logits(model, FEW) for _ in range(2)][-1]
    twin = copy.deepcopy(model)
    for layer in adapted_layers(twin):
        tiles_written(layer)
    changed = logits(twin, FEW)
    assert torch.equal(logits(model, FEW), expected) and not same(changed, expected, 0.1)
    twin.unfuse()
    assert same(changed, logits(twin, FEW))
    original = layer_of(model, "layers.0.self_attn.o_proj").fused_group
    group = pickle.loads(pickle.dumps(original))
    x = torch.randn(1, 64).bfloat16()
    routing = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    assert torch.equal(*[ops.linear_4bit(x, *routing, *each.four_bit_parts())[0] for each in (group, original)])


# ------------------------------------------------------------------------------------------------------ compiled code


@pytest.mark.parametrize("length", [3, 40])
def test_compiled_whole(length, library):
    model = made_int4(settings={"target_modules": ["q_proj", "v_proj", "up_proj"]})
    tokens = ids(1, length, "cpu")
    expected = logits(model, tokens, use_cache=False)
    fused(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        assert same(logits(compiled, tokens, use_cache=False), expected)
    assert len(graphs) == 1
    called = [node.target for node in graphs[0].graph.nodes if node.target is ops.linear_4bit]
    assert len(called) == (2 * LAYERS if length == 3 else 0)
    layer = layer_of(model, "layers.1.self_attn.v_proj")
    tiles_written(layer)
    changed = logits(compiled, tokens, use_cache=False)
    assert len(graphs) == 1 and not same(changed, expected, 0.1)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    tiles_written(layer)
    assert same(logits(compiled, tokens, use_cache=False), expected)
