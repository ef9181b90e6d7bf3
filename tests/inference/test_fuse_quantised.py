"""Groups beside base layers whose weights the ops cannot read: their own forwards, and one launch for all their experts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo
from peft import PeftModel
from torch import nn

import layer_checks
import oracle
from compiling import compiled_whole
from fusing import adapted, as_on_a_gpu, check_as_unfused, close, devices, gradients, ids, layer_of, logits, trainable
from helpers import LAYERS, switch_layers, tiny_llama
from int8_linear import ALL, Int8Linear, launches, quantised
from peft_loraswitch import ops
from peft_loraswitch.inference.fuse import adapted_layers

A_LAYER = [("deltas", 3), ("deltas", 1), ("deltas", 2), ("deltas", 1)]  # q, k, v; o; gate, up; down
BATCHES = ((1, 1), (2, 3), (3, 20))  # the last is more tokens than the ops take
OTHER_SIZES = {"rank_pattern": {"k_proj": 3, "up_proj": 16}, "alpha_pattern": {"v_proj": 50}, "num_experts": 5}


def made(device: str = "cpu", dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ALL, **settings: Any) -> Any:
    """Two layers, k and v with fewer outputs than q, the linears of `names` quantised."""
    base = tiny_llama(attention_bias=True, num_key_value_heads=2)
    return quantised(adapted(base, device, dtype, **settings), names)


def check(model: nn.Module, device: str = "cpu", tolerance: float = 2e-5) -> None:
    """Fused as unfused, for any number of tokens. The model stays fused."""
    check_as_unfused(model, [ids(b, n, device) for b, n in BATCHES], tolerance)


# ----------------------------------------------------------------------------------------------- outputs and launches


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{}, OTHER_SIZES, {"num_shared_experts": 1, "top_k": 1}], ids=["", "odd", "shared"]
)
@pytest.mark.parametrize("shape", BATCHES)
def test_every_linear_is_its_base_layer_and_the_definition(shape, settings, dtype, device):
    model = made(device, dtype, **settings)
    config, tokens = model.peft_config["default"], ids(*shape, device)
    model.fuse_for_inference("fused")
    seen = layer_checks.watch(model)
    logits(model, tokens)
    layers = switch_layers(model.get_base_model())
    assert len(seen) == len(layers) == 7 * LAYERS
    router = layers[next(iter(layers))].loraswitch_router["default"].weight.cpu()
    chosen = oracle.decide(seen[next(iter(layers))][0].cpu(), router, config.top_k, config.normalize_gates)
    decision = oracle.with_shared(chosen, config)
    for name, (x, y) in seen.items():
        base = layers[name].base_layer(x).cpu()
        a, b = (experts["default"].weight.cpu() for experts in (layers[name].loraswitch_A, layers[name].loraswitch_B))
        scaling = oracle.scaling_of(config, name, a.shape[1])
        added = oracle.delta(x.cpu(), a, b, decision, scaling)
        size = base.double().abs() + oracle.delta(x.cpu().abs(), a.abs(), b.abs(), decision, scaling)
        error, bound = (y.cpu().double() - base.double() - added).abs(), 16 * layer_checks.EPS[dtype] * size
        assert y.shape == base.shape and y.dtype == dtype and (error <= bound).all(), name
        assert added.norm() > 0.05 * base.double().norm(), "the experts are there to be missed"


@devices
def test_four_launches_a_layer(device):
    model = made(device, **OTHER_SIZES)
    fusion = model.fuse_for_inference("fused")
    assert [len(group) for group in fusion.groups] == [3, 1, 2, 1] * LAYERS
    for length in (1, 30):
        tokens = ids(1, length, device)
        logits(model, tokens)
        with launches() as of:
            logits(model, tokens)
        assert [one for one in of if one[0] != "route"] == A_LAYER * LAYERS


def test_many_tokens_take_one_shrink_a_group(monkeypatch):
    model = made(**OTHER_SIZES)
    model.fuse_for_inference("fused")
    shrinks, original = [], ops.all_hidden
    monkeypatch.setattr(ops, "all_hidden", lambda x, lora_a: (shrinks.append(len(lora_a)), original(x, lora_a))[1])
    with launches() as of:
        logits(model, ids(3, 20, "cpu"))
    assert shrinks == [3, 1, 2, 1] * LAYERS and not of


@devices
def test_many_tokens_in_16_bits_take_one_launch_of_expand_a_group(device, monkeypatch):
    model = made(device, torch.bfloat16)
    tokens = ids(3, 20, device)
    expected = logits(model, tokens)
    model.fuse_for_inference("fused")
    as_on_a_gpu(model)
    groups, original = [], ops.expand
    monkeypatch.setattr(ops, "expand", lambda *a: (groups.append(len(a[3])), original(*a))[1])
    assert close(logits(model, tokens).float(), expected.float(), 0.02)
    assert groups == [3, 1, 2, 1] * LAYERS


@pytest.mark.parametrize("others", [("q_proj",), ("k_proj",), ("q_proj", "v_proj"), ("up_proj",)])
def test_a_quantised_linear_shares_no_launch_with_a_plain_one(others):
    model = made(names=others)
    check(model)
    with launches() as of:
        logits(model, ids(1, 1, "cpu"))
    assert sum(size for name, size in of if name == "deltas") == len(others) * LAYERS
    assert sum(size for name, size in of if name == "linear") == (7 - len(others)) * LAYERS
    for layer in adapted_layers(model):
        kinds = {type(one.layer.base_layer) for one in layer.fused_group.live}
        assert len(kinds) == 1 and layer.fused_group.plain == (kinds == {nn.Linear})


# --------------------------------------------------------------------------- what base layers may return, and may be


def half(y: torch.Tensor) -> torch.Tensor:
    return y.bfloat16()


def view(y: torch.Tensor) -> torch.Tensor:
    """Of a larger tensor, of other strides."""
    larger = torch.stack([y.transpose(0, -1), y.transpose(0, -1) * 2]).contiguous()
    return larger[0].transpose(0, -1)


class Shared:
    """Views of one tensor, as a product for all of q, k and v would return them."""

    def __init__(self) -> None:
        self.room, self.at = torch.zeros(100_000), 0

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        self.at = 0 if self.at + y.numel() > len(self.room) else self.at
        part = self.room[self.at : self.at + y.numel()].view(y.shape)
        self.at += y.numel()
        return part.copy_(y)


@pytest.mark.parametrize("names", [ALL, ("k_proj", "gate_proj")], ids=["all", "one of a group"])
@pytest.mark.parametrize("finish", [half, view, Shared()], ids=["another dtype", "a view", "parts of one tensor"])
def test_what_a_base_layer_returns(finish, names):
    model, dtypes = made(), set()
    for layer in adapted_layers(model):
        if layer.name.rpartition(".")[2] in names:
            layer.base_layer.finish = finish
            # what comes next takes no other dtype
            layer.register_forward_hook(lambda m, args, out: (dtypes.add(out.dtype), out.to(args[0].dtype))[1])
    check(model, tolerance=2e-2 if finish is half else 2e-5)
    assert dtypes == {torch.bfloat16 if finish is half else torch.float32}
    with launches() as of:
        logits(model, ids(1, 1, "cpu"))
    assert sum(size for name, size in of if name == "deltas") < 7 * LAYERS or finish is not half


@pytest.mark.parametrize("split", ["q_proj", "k_proj"])
def test_a_base_layer_that_several_processes_share_runs_unfused(split):
    model = made()
    for layer in adapted_layers(model):
        if layer.name.endswith(split):
            layer.base_layer.weight = layer.base_layer.rounded
            layer.base_layer.rounded.device_mesh = object()  # as a DTensor has one
    check(model)
    with launches() as of:
        logits(model, ids(1, 1, "cpu"))
    assert [one for one in of if one[0] != "route"] == [("deltas", 2), *A_LAYER[1:]] * LAYERS


def test_a_base_layer_that_becomes_shared_later_runs_unfused():
    model = made()
    check(model)
    layer = layer_of(model, "layers.1.self_attn.v_proj")
    layer.base_layer.weight = layer.base_layer.rounded
    layer.base_layer.rounded.device_mesh = object()
    with launches() as of:
        fused = logits(model, ids(1, 1, "cpu"))
    assert sum(size for name, size in of if name == "deltas") == 7 * LAYERS - 2, "nor does the one that computes for it"
    model.unfuse()
    assert close(fused, logits(model, ids(1, 1, "cpu")))


@pytest.mark.parametrize("changed", [False, True], ids=["", "another input"])
def test_hooks_see_what_they_see_unfused(changed):
    """Each call of their base layer, with its own input, in the same order."""
    model, seen = made(), []
    for layer in adapted_layers(model):
        if layer.name.endswith(("k_proj", "v_proj", "gate_proj")):
            layer.base_layer.register_forward_pre_hook(lambda m, args, n=layer.name: seen.append((n, args[0].clone())))
            layer.base_layer.register_forward_hook(lambda m, args, out: out + 1)
    tokens = ids(1, 2, "cpu")
    model.fuse_for_inference("fused")
    if changed:
        for block in model.base_model.model.model.layers:
            block.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    seen.clear()
    fused, seen_fused = logits(model, tokens), seen.copy()
    model.unfuse()
    seen.clear()
    assert close(fused, logits(model, tokens))
    assert [name for name, _ in seen] == [name for name, _ in seen_fused] and len(seen) == 3 * LAYERS
    assert all(close(one, other) for (_, one), (_, other) in zip(seen, seen_fused, strict=True))


def test_hooks_that_come_and_go():
    model = made()
    tokens = ids(1, 1, "cpu")
    model.fuse_for_inference("fused")
    plain = logits(model, tokens)
    layer = layer_of(model, "layers.0.self_attn.v_proj")
    handle = layer.base_layer.register_forward_hook(lambda m, args, out: out + 1)
    with launches() as of:
        hooked = logits(model, tokens)
    assert [one for one in of if one[0] != "route"] == [("deltas", 2), ("deltas", 1), *A_LAYER[1:], *A_LAYER]
    model.unfuse()
    assert close(hooked, logits(model, tokens)) and not close(hooked, plain, 1e-3)
    model.fuse_for_inference("fused")
    handle.remove()
    assert close(logits(model, tokens), plain)


def test_a_model_without_any_weight_under_that_name_can_be_asked_for_gradients():
    model = made()
    assert not any("weight" in layer.base_layer._parameters for layer in adapted_layers(model))
    trained = trainable(model, "v_proj.loraswitch_A")
    tokens = ids(1, 2, "cpu")
    expected = gradients(model, tokens, trained)
    model.fuse_for_inference("fused")
    assert all(close(*pair, 1e-4) for pair in zip(gradients(model, tokens, trained), expected, strict=True))


# ------------------------------------------------------------------------------------------ what changes, and adapters


@devices
def test_a_linear_of_a_group_with_another_input_computes_for_itself(device):
    model = made(device)
    model.fuse_for_inference("fused")
    model.base_model.model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    batches = [ids(b, n, device) for b, n in BATCHES]
    found = [logits(model, tokens) for tokens in batches]
    model.unfuse()
    for tokens, fused in zip(batches, found, strict=True):
        assert close(fused, logits(model, tokens))


def in_float32(model: nn.Module, names: tuple[str, ...] = ALL) -> nn.Module:
    """The experts, as PEFT keeps those of a 16-bit model."""
    for layer in adapted_layers(model):
        if layer.name.rpartition(".")[2] in names:
            layer.loraswitch_A["default"].float()
            layer.loraswitch_B["default"].float()
    return model


@devices
@pytest.mark.parametrize("names", [ALL, ("k_proj", "up_proj")], ids=["all", "some"])
def test_experts_of_another_dtype_than_the_activations_are_served_from_casts(names, device):
    model = in_float32(made(device, torch.bfloat16), names)
    check(model, device, tolerance=4e-2)  # either forward in bf16 is 2 % from the exact one
    tokens = ids(1, 3, device)
    with launches() as of:
        before = logits(model, tokens)
    assert [one for one in of if one[0] != "route"] == A_LAYER * LAYERS
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.loraswitch_B["default"].weight.mul_(-1)
    after = logits(model, tokens)
    assert all(layer.loraswitch_A["default"].weight.dtype == torch.float32 for layer in adapted_layers(model)[1:2])
    model.unfuse()
    assert close(after.float(), logits(model, tokens).float(), 4e-2) and not close(before.float(), after.float(), 0.2)


def test_a_model_that_is_cast_while_fused_stays_fused():
    model = made()
    model.fuse_for_inference("fused")
    tokens = ids(1, 3, "cpu")
    logits(model, tokens)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        with launches() as of:
            fused = logits(model, tokens)
        assert fused.dtype == dtype and [one for one in of if one[0] != "route"] == A_LAYER * LAYERS
        model.unfuse()
        assert close(fused.float(), logits(model, tokens).float(), 4e-2)
        model.fuse_for_inference("fused")


def test_a_model_whose_activations_are_not_known_is_served_all_the_same():
    """Its forward of one token fails, so no linears are grouped, and experts of another dtype go unfused."""
    model, tokens = in_float32(made(dtype=torch.bfloat16)), ids(1, 3, "cpu")
    expected, forward = logits(model, tokens), model.base_model.model.forward

    def refuses_one_token(input_ids: torch.Tensor, **more: Any) -> Any:
        assert input_ids.shape[1] > 1
        return forward(input_ids=input_ids, **more)

    model.base_model.model.forward = refuses_one_token
    model.fuse_for_inference("fused")
    with launches() as of:
        assert torch.equal(logits(model, tokens), expected)
    assert not any(name == "deltas" for name, _ in of)


def test_several_adapters_on_other_linears():
    model = adapted(tiny_llama(attention_bias=True, num_key_value_heads=2))
    config = copy.deepcopy(model.peft_config["default"])
    config.target_modules, config.r = {"q_proj", "v_proj", "up_proj"}, 4
    model.add_adapter("other", config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "loraswitch_B.other" in name:
            nn.init.normal_(parameter, std=0.3)
    quantised(model).eval().requires_grad_(False)
    tokens = ids(1, 2, "cpu")

    def found() -> list[torch.Tensor]:
        results = []
        for adapters in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(adapters)
            model.eval().requires_grad_(False)
            results.append(logits(model, tokens))
        model.set_adapter("default")
        model.eval().requires_grad_(False)
        results.append(logits(model, tokens.expand(2, -1), adapter_names=["default", "other"]))
        with model.disable_adapter():
            results.append(logits(model, tokens))
        return results

    expected = found()
    model.fuse_for_inference("fused")
    for _ in range(2):
        assert all(close(one, other) for one, other in zip(found(), expected, strict=True))
    model.set_adapter("other")
    model.eval().requires_grad_(False)
    with launches() as of:
        logits(model, tokens)
    assert [one for one in of if one[0] != "route"] == [("deltas", 2), ("deltas", 1)] * LAYERS


def by_attribute(layer: Any, new: nn.Module) -> None:
    layer.base_layer = new


def in_the_dictionary(layer: Any, new: nn.Module) -> None:
    layer._modules["base_layer"] = new


@pytest.mark.parametrize("how", [by_attribute, in_the_dictionary])
@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_another_base_layer_is_seen(how, name):
    model = made()
    tokens = ids(1, 3, "cpu")
    model.fuse_for_inference("fused")
    before = logits(model, tokens)
    layer = layer_of(model, f"layers.1.self_attn.{name}")
    new = copy.deepcopy(layer.base_layer)
    new.scale.mul_(-1)
    how(layer, new)
    after = logits(model, tokens)
    model.unfuse()
    assert close(after, logits(model, tokens)) and not close(before, after, 1e-3)


def test_experts_that_are_written_to_and_a_plain_base_layer_that_is_quantised_later():
    model = made(names=("q_proj", "v_proj"))
    tokens = ids(1, 1, "cpu")
    model.fuse_for_inference("fused")
    before = logits(model, tokens)
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.loraswitch_B["default"].weight.mul_(-1)
    quantised(model, tuple(set(ALL) - {"q_proj", "v_proj"}))
    after = logits(model, tokens)
    assert all(type(layer.base_layer) is Int8Linear for layer in adapted_layers(model))
    model.unfuse()
    assert close(after, logits(model, tokens)) and not close(before, after, 1e-3)


def test_unfused_copied_saved_and_loaded(tmp_path):
    model = made()
    tokens = ids(1, 2, "cpu")
    expected = logits(model, tokens)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with model.fuse_for_inference("fused"):
        fused = logits(model, tokens)
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model, tokens), expected) and close(fused, expected)
    layer_of(model, "layers.0.self_attn.k_proj").base_layer.scale.zero_()  # the copy has base layers of its own
    assert torch.equal(logits(twin, tokens), fused)
    base = tiny_llama(attention_bias=True, num_key_value_heads=2)
    again = (
        quantised(PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)).eval().requires_grad_(False)
    )
    with again.fuse_for_inference("fused"):
        assert close(logits(again, tokens), expected)


# ------------------------------------------------------------------------------------------------------ compiled code


@pytest.mark.parametrize("length", [3, 40])
def test_compiled_whole(length):
    model = quantised(adapted(tiny_llama(num_hidden_layers=1)))
    tokens = ids(1, length, "cpu")
    expected = logits(model, tokens, use_cache=False)
    model.fuse_for_inference("fused")
    compiled, graphs = compiled_whole(model)
    for _ in range(2):
        assert close(logits(compiled, tokens, use_cache=False), expected)
    layer = layer_of(model, "self_attn.k_proj")
    with torch.no_grad():
        layer.loraswitch_B["default"].weight.mul_(2)
        layer.base_layer.scale.mul_(2)
    changed = logits(compiled, tokens, use_cache=False)
    assert len(graphs) == 1 and not close(changed, expected, 1e-3)
    called = [node.target for node in graphs[0].graph.nodes if node.target is ops.deltas]
    assert len(called) == (4 if length == 3 else 0)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.scale.mul_(2)
    after = logits(compiled, tokens, use_cache=False)
    model.unfuse()
    assert close(after, logits(model, tokens, use_cache=False)) and not close(after, changed, 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu(mode):
    """By inductor, in CUDA graphs with the second mode: tokens that differ from replay to replay."""
    model = made("cuda", torch.bfloat16)
    batches = [ids(1, 1, "cuda", seed=seed) for seed in range(4)]
    expected = [logits(model, tokens, use_cache=False) for tokens in batches]
    model.fuse_for_inference("fused")
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(3):
        for tokens, value in zip(batches, expected, strict=True):
            assert close(logits(compiled, tokens, use_cache=False).float(), value.float(), 3e-2)


def test_copies_by_pickle():
    model = made()
    model.fuse_for_inference("fused")
    layer = layer_of(model, "layers.0.self_attn.o_proj")
    layer.base_layer.finish = torch.neg
    x = torch.randn(1, 1, layer.in_features)
    group = pickle.loads(pickle.dumps(layer.fused_group))
    assert torch.equal(group.base_layers()[0](x), layer.base_layer(x))
