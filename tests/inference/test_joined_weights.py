"""Weights that `fuse_for_inference(join_weights=True)` moves into one matrix stay the weights that they were."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils import prune

from fusing import (
    GPU,
    MAKERS,
    adapted,
    as_on_a_gpu,
    close,
    devices,
    ids,
    join_anywhere,
    layer_of,
    load_that_fails,
    logits,
)
from helpers import tiny_gpt2, tiny_llama
from peft_loraswitch import LoRASwitchConfig, kernels
from peft_loraswitch.inference import group_outputs, joined_weights
from peft_loraswitch.inference.fuse import adapted_layers
from peft_loraswitch.inference.fused_group import JOINED_TOKENS
from peft_loraswitch.inference.fused_layer import FusedLinear


@pytest.fixture(autouse=True)
def _join(monkeypatch: pytest.MonkeyPatch) -> None:
    join_anywhere(monkeypatch)


def matrices(model: nn.Module) -> list[torch.Tensor]:
    return [m for layer in adapted_layers(model) for m in layer.fusing.joined.values()]


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {layer.name: layer.get_base_layer().weight for layer in adapted_layers(model)}


def joined(base: nn.Module, device: str = "cpu", dtype=torch.bfloat16, **settings) -> nn.Module:
    model = adapted(base, device, dtype, **settings)
    fusion = model.fuse_for_inference("fused", join_weights=True)
    assert fusion.joined == fusion.groups and len(matrices(model)) == len(fusion.groups)
    return model


def compiled(model: nn.Module, batch: int, device: str) -> torch.Tensor:
    as_on_a_gpu(model)
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="aot_eager", fullgraph=True)(ids(batch, 1, device)).logits


@devices
@pytest.mark.parametrize("experts", [torch.bfloat16, torch.float32])
def test_compiled_batches_multiply_once_for_a_group(device, experts, monkeypatch):
    model = adapted(tiny_llama(), device, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "loraswitch_" in name:
            parameter.data = parameter.data.to(experts)
    want = logits(model, ids(200, 1, device)).double()
    model.fuse_for_inference("fused", join_weights=True)
    products = []
    linear = group_outputs.F.linear
    monkeypatch.setattr(group_outputs.F, "linear", lambda *a: (products.append(a[1].shape), linear(*a))[1])
    got = compiled(model, 200, device).double()
    found = matrices(model)
    products = products[:-1]  # without lm_head
    assert [shape for shape in products if any(shape == m.shape for m in found)] == [m.shape for m in found]
    assert (got - want).norm() < 0.03 * want.norm()


def test_who_compiles_large_batches_is_told(monkeypatch):
    said = []
    monkeypatch.setattr("peft_loraswitch.kernels.log_once", said.append)
    for join in (True, False):
        model = adapted(tiny_llama(), "cpu", torch.bfloat16)
        model.fuse_for_inference("fused", join_weights=join)
        compiled(model, 150, "cpu")
        assert bool(said) != join
    assert all("join_weights=True" in text for text in said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fewer_tokens_go_by_the_fused_op():
    model = joined(tiny_llama(), "cuda")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    most = {
        g.compiled_tokens
        for layer in adapted_layers(model)
        for g in layer.fused_groups.values()
        if g.matrix is not None
    }
    assert most == ({JOINED_TOKENS} if hopper else {kernels.FAST_TOKENS})


def apart(model: nn.Module) -> bool:
    return all(weight.untyped_storage().nbytes() == weight.nbytes for weight in base_weights(model).values())


@devices
@pytest.mark.parametrize("name", ["llama", "opt"])  # OPT lists k and v before q, and calls q first
def test_weights_keep_their_values_and_have_memory_of_their_own_again(name, device):
    model = adapted(MAKERS[name](), device, torch.bfloat16)
    before = {name: (value, value.clone()) for name, value in model.named_parameters()}
    want = logits(model, ids(2, 5, device))
    model.fuse_for_inference("fused", join_weights=True)
    for name, weight in base_weights(model).items():
        assert weight.untyped_storage().data_ptr() in {m.untyped_storage().data_ptr() for m in matrices(model)}, name
    for name, value in model.named_parameters():
        assert value is before[name][0] and torch.equal(value, before[name][1]) and value.is_contiguous()
    assert close(logits(model, ids(2, 5, device)).float(), want.float(), 0.02)
    model.unfuse()
    for name, value in model.named_parameters():
        assert value is before[name][0] and torch.equal(value, before[name][1])
    assert apart(model)
    assert torch.equal(logits(model, ids(2, 5, device)), want)
    assert model.fuse_for_inference("fused", join_weights=True).joined  # and again


@devices
def test_written_experts_and_weights_are_seen(device):
    model = joined(tiny_llama(), device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loraswitch_A" in name or "loraswitch_B" in name or "q_proj.base_layer" in name:
                parameter.mul_(1.5)
    plain = copy.deepcopy(model)
    plain.unfuse()
    want = logits(plain, ids(100, 1, device)).double()
    assert close(logits(model, ids(100, 1, device)).double(), want, 0.02)  # copies are brought up to date
    assert (compiled(model, 100, device).double() - want).norm() < 0.03 * want.norm()
    assert all(
        layer.fused_groups["default"].matrix is not None for layer in adapted_layers(model) if layer.fusing.joined
    )


LEAVING = {
    "cast": lambda model: model.to(torch.float32),
    "assigned": lambda model: setattr(
        layer_of(model, "q_proj").get_base_layer(),
        "weight",
        nn.Parameter(layer_of(model, "q_proj").get_base_layer().weight.clone() * 2),
    ),
    "data": lambda model: setattr(
        layer_of(model, "up_proj").get_base_layer().weight,
        "data",
        layer_of(model, "up_proj").get_base_layer().weight.data.clone() * 2,
    ),
    "loaded": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
}


@pytest.mark.parametrize("how", LEAVING)
def test_weights_that_leave_the_matrix_are_multiplied_by_themselves(how):
    model = joined(tiny_llama(), target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    gone = [weakref.ref(m) for m in matrices(model)]
    LEAVING[how](model)
    plain = copy.deepcopy(model)
    plain.unfuse()
    want = logits(plain, ids(100, 1, "cpu")).double()
    for _ in range(2):
        assert close(logits(model, ids(100, 1, "cpu")).double(), want, 0.02)
    if how not in ("assigned", "data"):  # where one has left one matrix, the others stay
        gc.collect()
        assert not matrices(model) and not any(ref() is not None for ref in gone)
    assert (compiled(model, 100, "cpu").double() - want).norm() < 0.03 * want.norm()


def swapped(model: nn.Module) -> None:
    """As one does to try averaged weights: others for one forward, then the old memory again."""
    kept = {name: weight.data for name, weight in base_weights(model).items()}
    for weight in base_weights(model).values():
        weight.data = weight.data * 2
    logits(model, ids(2, 5, "cpu"))
    for name, weight in base_weights(model).items():
        weight.data = kept[name]


def called_with_others(model: nn.Module) -> None:
    others = {name: value * 2 for name, value in model.named_parameters() if "base_layer" in name}
    with torch.no_grad():
        torch.func.functional_call(model, others, (), {"input_ids": ids(2, 5, "cpu")})


def pruned(model: nn.Module) -> None:
    for layer in adapted_layers(model):
        prune.identity(layer.get_base_layer(), "weight")


@pytest.mark.parametrize("how", [swapped, called_with_others])
def test_weights_that_were_somewhere_else_for_a_while_have_memory_of_their_own_again(how):
    model = adapted(tiny_llama(), "cpu", torch.bfloat16)
    want = logits(model, ids(2, 5, "cpu"))
    fusion = model.fuse_for_inference("fused", join_weights=True)
    how(model)
    assert close(logits(model, ids(2, 5, "cpu")).float(), want.float(), 0.02)
    model.unfuse()
    assert apart(model) and torch.equal(logits(model, ids(2, 5, "cpu")), want)
    assert model.fuse_for_inference("fused", join_weights=True).joined == fusion.joined


def test_weights_under_another_name_have_memory_of_their_own_again():
    model = joined(tiny_llama())
    pruned(model)
    model.unfuse()
    originals = [p for layer in adapted_layers(model) for p in layer.get_base_layer().parameters() if p.dim() == 2]
    assert originals and all(p.untyped_storage().nbytes() == p.nbytes for p in originals)


def test_experts_that_are_cast_while_joined():
    model = joined(tiny_llama())
    for name, parameter in model.named_parameters():
        if "loraswitch_" in name:
            parameter.data = parameter.data.float()
    plain = copy.deepcopy(model)
    plain.unfuse()
    for batch in (2, 100):
        assert close(logits(model, ids(batch, 1, "cpu")).float(), logits(plain, ids(batch, 1, "cpu")).float(), 0.02)
    want = logits(plain, ids(100, 1, "cpu")).double()
    assert (compiled(model, 100, "cpu").double() - want).norm() < 0.03 * want.norm()
    for name, parameter in model.named_parameters():
        if "loraswitch_" in name:
            parameter.data = parameter.data.bfloat16() * 1.5
    plain = copy.deepcopy(model)
    plain.unfuse()
    assert close(logits(model, ids(100, 1, "cpu")).float(), logits(plain, ids(100, 1, "cpu")).float(), 0.02)


@devices
def test_compiled_code_sees_a_weight_that_is_assigned(device):
    model = joined(tiny_llama(), device)
    as_on_a_gpu(model)
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        step(ids(100, 1, device))
        base = layer_of(model, "q_proj").get_base_layer()
        base.weight = nn.Parameter(base.weight * 3, requires_grad=False)
        got = step(ids(100, 1, device)).logits.double()
    plain = copy.deepcopy(model)
    plain.unfuse()
    want = logits(plain, ids(100, 1, device)).double()
    assert (got - want).norm() < 0.03 * want.norm()


def test_a_load_that_fails_late(tmp_path, monkeypatch):
    model = adapted(tiny_llama(), "cpu", torch.bfloat16, target_modules=["q_proj", "v_proj"])
    want = logits(model, ids(2, 5, "cpu"))
    model.fuse_for_inference("fused", join_weights=True)
    load_that_fails(model, tmp_path, monkeypatch)
    assert close(logits(model, ids(2, 5, "cpu")).float(), want.float(), 0.02)
    assert close(compiled(model, 2, "cpu")[:, -1].float(), logits(model, ids(2, 1, "cpu"))[:, -1].float(), 0.02)
    model.unfuse()
    assert apart(model) and torch.equal(logits(model, ids(2, 5, "cpu")), want)
    assert model.fuse_for_inference("fused", join_weights=True).joined


def test_other_adapters_come_and_go(tmp_path):
    model = joined(tiny_llama())
    options = {"r": 8, "num_experts": 4, "top_k": 1, "target_modules": "all-linear"}
    model.add_adapter("other", LoRASwitchConfig(**options))
    for name, parameter in model.named_parameters():
        if "loraswitch_B.other" in name:
            nn.init.normal_(parameter, std=0.3)
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        model.eval().requires_grad_(False)
        plain = copy.deepcopy(model)
        plain.unfuse()
        want = logits(plain, ids(100, 1, "cpu")).double()
        assert close(logits(model, ids(100, 1, "cpu")).double(), want, 0.02)
        assert (compiled(model, 100, "cpu").double() - want).norm() < 0.03 * want.norm()
    other = copy.deepcopy(model)
    other.delete_adapter("default")
    assert not matrices(other)
    other.unfuse()
    model.delete_adapter("default")
    assert not matrices(model)
    model.unfuse()
    assert apart(model)
    assert close(logits(model, ids(100, 1, "cpu")).double(), want, 0.02)


def test_what_is_saved_is_as_large_as_without(tmp_path):
    model = adapted(tiny_llama(), "cpu", torch.bfloat16)
    sizes = {}
    for name in ("apart", "joined"):
        if name == "joined":
            model.fuse_for_inference("fused", join_weights=True)
        model.save_pretrained(tmp_path / name)
        model.get_base_model().save_pretrained(tmp_path / name / "base")
        files = [f for f in (tmp_path / name).rglob("*") if f.suffix in (".safetensors", ".bin")]
        sizes[name] = {str(f.relative_to(tmp_path / name)): f.stat().st_size for f in files}
    assert len(sizes["apart"]) == 2 and sizes["apart"].keys() == sizes["joined"].keys()
    for file, size in sizes["apart"].items():
        assert sizes["joined"][file] < 1.1 * size + 2048, file
    base = tiny_llama().to(torch.bfloat16)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "joined", autocast_adapter_dtype=False)
    model.unfuse()
    assert torch.equal(logits(reloaded, ids(2, 5, "cpu")), logits(model, ids(2, 5, "cpu")))


def test_copies_of_a_model_have_weights_of_their_own():
    model = joined(tiny_llama())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in base_weights(other).values():
            weight.zero_()
    want = logits(model, ids(100, 1, "cpu")).double()
    assert (compiled(model, 100, "cpu").double() - want).norm() < 0.03 * want.norm()
    assert logits(other, ids(100, 1, "cpu")).isfinite().all() and not matrices(other)


def test_new_layers_are_joined_too():
    model = adapted(tiny_llama(), "cpu", torch.bfloat16, target_modules=["q_proj", "v_proj"])
    model.fuse_for_inference("fused", join_weights=True)
    model.add_adapter("other", LoRASwitchConfig(r=8, num_experts=4, top_k=2, target_modules="all-linear"))
    assert all(isinstance(layer, FusedLinear) for layer in adapted_layers(model)) and matrices(model)
    model.eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    plain.unfuse()
    assert close(logits(model, ids(2, 5, "cpu")).float(), logits(plain, ids(2, 5, "cpu")).float(), 0.02)


def test_what_cannot_be_joined_stays_and_is_said(caplog, monkeypatch):
    shared = tiny_llama()
    flat = nn.Parameter(torch.cat([shared.model.layers[0].self_attn.q_proj.weight.data, torch.zeros(1, 32)]))
    shared.model.layers[0].self_attn.q_proj.weight.data = flat.data[:-1]
    shared.model.layers[1].self_attn.k_proj.weight.data = shared.model.layers[1].self_attn.v_proj.weight.data
    across = tiny_llama()
    across.model.layers[0].self_attn.o_proj.weight.data = across.model.layers[1].self_attn.o_proj.weight.data
    hooked = tiny_llama()
    hooked.model.layers[0].mlp.down_proj.register_forward_hook(lambda *a: None)
    for base, messages, left in (
        (tiny_gpt2(), ("plain nn.Linear",), None),
        (shared, ("part of a larger tensor", "shares its memory"), 2),
        (across, ("shares its memory",), 2),
        (hooked, ("plain nn.Linear",), 1),
    ):
        model = adapted(base)
        want = logits(model, ids(2, 5, "cpu"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            fusion = model.fuse_for_inference("fused", join_weights=True)
        assert all(message in caplog.text for message in messages)
        assert not fusion.joined if left is None else len(fusion.joined) == len(fusion.groups) - left
        assert close(logits(model, ids(2, 5, "cpu")), want)
        model.unfuse()
        assert torch.equal(logits(model, ids(2, 5, "cpu")), want)
    assert shared.model.layers[0].self_attn.q_proj.base_layer.weight.untyped_storage().nbytes() == flat.nbytes
    first, second = (layer.self_attn.o_proj.base_layer.weight for layer in across.model.layers)
    assert first.data_ptr() == second.data_ptr()


def test_several_active_adapters(caplog):
    model = adapted(tiny_llama())
    model.add_adapter("other", LoRASwitchConfig(r=8, num_experts=4, top_k=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    with caplog.at_level(logging.WARNING):
        assert not model.fuse_for_inference("fused", join_weights=True).joined
    assert "one active adapter" in caplog.text


def test_without_kernels_nothing_is_joined(caplog, monkeypatch):
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there are kernels here")
    model = adapted(tiny_llama(), "cpu", torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert not model.fuse_for_inference(join_weights=True).joined
    assert "where the CUDA kernels run" in caplog.text
    model.unfuse()
    with pytest.raises(ValueError, match="join_weights=True belongs to strategy='fused'"):
        model.fuse_for_inference("merge", join_weights=True)


def test_too_little_memory_for_the_experts(monkeypatch):
    model = adapted(tiny_llama(), "cpu", torch.bfloat16)
    real, calls = joined_weights._keep_copy, []

    def keep(*arguments):
        calls.append(1)
        if len(calls) == 3:  # of v, when q and k have theirs
            raise torch.OutOfMemoryError("no")
        real(*arguments)

    monkeypatch.setattr(joined_weights, "_keep_copy", keep)
    fusion = model.fuse_for_inference("fused", join_weights=True)
    assert not fusion.joined and not matrices(model) and "joined" not in repr(fusion)
    assert not any(casts.joined for layer in adapted_layers(model) for casts in layer.fusing.casts.values())


def test_too_little_memory(caplog, monkeypatch):
    model = adapted(tiny_llama(), "cpu", torch.bfloat16)
    want = logits(model, ids(2, 5, "cpu"))
    real, calls = joined_weights.join, []

    def join(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no")
        real(*arguments)

    monkeypatch.setattr("peft_loraswitch.inference.fuse.join", join)
    with caplog.at_level(logging.WARNING):
        assert len(model.fuse_for_inference("fused", join_weights=True).joined) == 2
    assert "too little memory for one group's weights" in caplog.text
    assert len(matrices(model)) == 2
    assert close(logits(model, ids(2, 5, "cpu")).float(), want.float(), 0.02)
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    model.unfuse()
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    assert torch.equal(logits(model, ids(2, 5, "cpu")), want)


@pytest.mark.parametrize("device", [GPU])
def test_cuda_graphs_read_the_matrix_in_place(device):
    model = joined(tiny_llama(), device)
    torch._dynamo.reset()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        tokens = ids(150, 1, device, seed)
        want = logits(model, tokens).double()
        with torch.no_grad():
            got = step(tokens).logits.double()
        assert (got - want).norm() < 0.03 * want.norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    want = logits(model, tokens).double()  # what brings copies up to date
    with torch.no_grad():
        got = step(tokens).logits.double()
    assert (got - want).norm() < 0.03 * want.norm()
