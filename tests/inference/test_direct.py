"""A fused layer's call of the kernels without a compiler, on a CPU: a stand-in for the library computes from the struct that
it is given, so a wrong pointer, size or offset is a wrong result here too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from changes_of_weights import (
    CHANGES,
    another_kind_of_base_layer,
    another_parameter,
    another_scaling,
    assigned,
    hook_on_base_layer,
    in_place,
    layer_in_training,
    made,
    moved,
    weight_put_into_a_dictionary,
)
from fusing import adapted, close, gradients, ids, logits, trainable
from helpers import tiny_llama
from int8_linear import launches, quantised
from peft_loraswitch import kernels
from peft_loraswitch.inference import eager_launch
from peft_loraswitch.inference.fuse import adapted_layers
from peft_loraswitch.routing.decision import Routing
from recipes.benchmarks import host, stub_library
from stand_in_library import StandIn


@pytest.fixture
def library() -> Iterator[StandIn]:
    stand_in = StandIn()
    kernels.calls._expansion.cache_clear()  # by address, and another test's library may have answered otherwise
    with stub_library.in_place_of_the_library(stand_in):
        yield stand_in


def fuse(model: nn.Module) -> nn.Module:
    model.fuse_for_inference("fused")
    stub_library.use_kernels(model)
    return model


def test_the_same_logits_by_four_calls_a_block(library):
    model = made(rank_pattern={"k_proj": 4}, alpha_pattern={"v_proj": 50})
    batches = [ids(1, 1, "cpu"), ids(2, 3, "cpu"), ids(1, 1, "cpu", seed=4)]
    expected = [logits(model, tokens) for tokens in batches]
    fuse(model)
    for _ in range(2):  # the first of each shape packs, the others find it packed
        for tokens, value in zip(batches, expected, strict=True):
            assert close(logits(model, tokens), value)
    called = library.calls
    library.calls = []
    assert close(logits(model, batches[0]), expected[0])
    assert library.calls == [(3, 1), (1, 1), (2, 1), (1, 1)] * 2 and called


def in_8_bits(**settings: Any) -> nn.Module:
    return quantised(made(rank_pattern={"k_proj": 4}, alpha_pattern={"v_proj": 50}, **settings))


def strided(y: torch.Tensor) -> torch.Tensor:
    return torch.stack([y, y], -1)[..., 0]


@pytest.mark.parametrize("finish", [torch.positive, strided])
def test_four_calls_a_block_beside_quantised_base_layers(finish, library):
    model = in_8_bits()
    for layer in adapted_layers(model):
        layer.base_layer.finish = finish
    batches = [ids(1, 1, "cpu"), ids(2, 3, "cpu"), ids(1, 1, "cpu", seed=4), ids(1, 40, "cpu")]
    expected = [logits(model, tokens) for tokens in batches]
    fuse(model)
    for _ in range(2):
        for tokens, value in zip(batches, expected, strict=True):
            assert close(logits(model, tokens), value)
    library.calls.clear()
    with launches() as of:
        assert close(logits(model, batches[1]), expected[1])
    called = [(3, 6), (1, 6), (2, 6), (1, 6)] * 2
    assert [size for name, size in of if name == "deltas"] == [size for size, _ in called]
    assert library.calls == ([] if finish is strided else called)  # the kernels do not read those: the op makes copies


def test_a_quantised_linear_with_another_input_calls_for_itself(library):
    model, tokens = in_8_bits(), ids(1, 3, "cpu")
    fuse(model)
    model.base_model.model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    found = []
    for _ in range(3):
        library.calls.clear()
        found.append(logits(model, tokens))
    model.unfuse()
    expected = logits(model, tokens)
    assert all(close(one, expected) for one in found)
    assert library.calls == [(3, 3), (1, 3), (1, 3), (2, 3), (1, 3)] + [(3, 3), (1, 3), (2, 3), (1, 3)]


def experts_loaded(model: nn.Module) -> None:
    model.load_state_dict({n: value * 1.1 for n, value in model.state_dict().items() if "_B" in n}, strict=False)


def another_base(model: nn.Module) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.scale.mul_(2)


CHANGES_BESIDE = [moved, assigned, another_parameter, another_scaling, experts_loaded, another_base, hook_on_base_layer]


@pytest.mark.parametrize("change", [*CHANGES_BESIDE, weight_put_into_a_dictionary])
def test_what_is_changed_beside_a_quantised_base_layer_is_seen(change, library):
    model = in_8_bits()
    for layer in adapted_layers(model):
        layer.base_layer.rounded.data = layer.base_layer.rounded.float()  # a change may multiply all parameters
    tokens = ids(1, 3, "cpu")
    fuse(model)
    before = [logits(model, tokens) for _ in range(2)][-1]
    assert library.calls
    change(model)
    after, again = logits(model, tokens), logits(model, tokens)
    model.unfuse()
    expected = logits(model, tokens)
    assert close(after, expected) and close(again, expected) and not close(before, expected, 1e-4)


@pytest.mark.parametrize("most_ranks", [128, 16, 0])
def test_many_tokens_take_one_call_and_products_of_the_library(library, most_ranks):
    library.most_ranks = most_ranks
    model = made(rank_pattern={"k_proj": 4}, alpha_pattern={"v_proj": 50})
    tokens = ids(3, 20, "cpu")
    expected = logits(model, tokens)
    fuse(model)
    logits(model, ids(1, 2, "cpu"))
    library.calls.clear()
    for _ in range(2):
        library.expanded.clear()
        assert close(logits(model, tokens), expected)
        assert (
            library.expanded == [(n, 60 if most_ranks == 128 else -1) for n in (3, 1, 2, 1)] * 2 and not library.calls
        )


def test_many_tokens_take_one_call_where_there_is_a_kernel_for_them(library):
    library.fewest_tokens = 60
    model = made(rank_pattern={"k_proj": 4}, alpha_pattern={"v_proj": 50})
    tokens, fewer = ids(3, 20, "cpu"), ids(1, 50, "cpu")
    expected = [logits(model, each) for each in (tokens, fewer)]
    fuse(model)
    logits(model, ids(1, 2, "cpu"))
    library.calls.clear()
    for _ in range(2):
        assert close(logits(model, tokens), expected[0])
    assert library.calls == [(3, 60), (1, 60), (2, 60), (1, 60)] * 4 and not library.expanded
    assert close(logits(model, fewer), expected[1])
    assert len(library.calls) == 16 and library.expanded == [(3, 50), (1, 50), (2, 50), (1, 50)] * 2


def test_fewer_tokens_take_products_of_the_library_where_the_host_does_not_wait(library, monkeypatch):
    """From 129 tokens on the kernel takes the GPU longer: in a graph that is all that counts, and with large weights, too."""
    library.fewest_tokens = 33
    model = made()
    expected = {length: logits(model, ids(1, length, "cpu")) for length in (40, 150, 200)}
    fuse(model)
    calls = 2 * 4  # groups of two blocks

    def served(length: int) -> tuple[list[int], list[int]]:
        """tokens of the calls for many tokens; of those beside products of the library"""
        assert close(logits(model, ids(1, length, "cpu")), expected[length])
        library.calls.clear()
        library.expanded.clear()
        assert close(logits(model, ids(1, length, "cpu")), expected[length])
        return [tokens for _, tokens in library.calls], [tokens for _, tokens in library.expanded]

    assert served(150) == ([150] * calls, []) and served(200) == ([200] * calls, [])
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
    assert served(150) == ([], [150] * calls) and served(200) == ([200] * calls, [])
    assert served(40) == ([40] * calls, [])
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
    model.unfuse()
    monkeypatch.setattr(eager_launch, "_FEW_BYTES", 16)
    fuse(model)
    assert served(150) == ([], [150] * calls) and served(200) == ([200] * calls, [])


def test_many_tokens_at_an_odd_address_take_products_of_the_library(library):
    """The kernel for many tokens would not be taken, but the slowest one."""
    library.fewest_tokens = 33
    model = made()
    fuse(model)
    logits(model, ids(1, 2, "cpu"))
    leader = adapted_layers(model)[0]
    group = leader.fused_group.direct
    for tokens in (60, 200):
        x = torch.randn(tokens * leader.in_features + 1)
        routing = Routing(torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2), 8)
        library.calls.clear()
        assert group(x[:-1].view(tokens, -1), routing) is not None and len(library.calls) == 1
        odd = group(x[1:].view(tokens, -1), routing)
        assert (odd is None) == (tokens == 200) and len(library.calls) == 1
        if odd is not None:
            even = group(x[1:].clone().view(tokens, -1), routing)
            assert all(close(one, other) for one, other in zip(odd, even, strict=True))


def weights_streamed(model: nn.Module) -> None:
    """As something does that keeps weights elsewhere and brings those of a block when it is about to run."""
    block = model.base_model.model.model.layers[1]
    for parameter in block.parameters():
        parameter.data *= 1.1
    kept = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}

    def bring(module: nn.Module, args: Any) -> None:
        for name, parameter in block.named_parameters():
            parameter.data = kept[name].clone()

    def take_away(module: nn.Module, args: Any, output: Any) -> None:
        for parameter in block.parameters():
            parameter.data = torch.full_like(parameter, float("nan"))

    block.register_forward_pre_hook(bring)
    block.register_forward_hook(take_away)


@pytest.mark.parametrize("change", [*CHANGES, weight_put_into_a_dictionary, weights_streamed])
@pytest.mark.parametrize("length", [1, 40])
def test_what_is_changed_after_fusing_is_seen(change, length, library):
    model = made()
    tokens = ids(1, length, "cpu")
    fuse(model)
    before = logits(model, tokens)
    change(model)
    after = logits(model, tokens)
    again = logits(model, tokens)
    model.unfuse()
    expected = logits(model, tokens)
    assert close(after, expected) and close(again, expected)
    assert change is layer_in_training or not close(before, expected)


def test_an_input_like_one_that_was_served_goes_unfused_where_the_first_would_have(library):
    model = made(target_modules=["q_proj", "k_proj", "gate_proj", "up_proj"])
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.eval().requires_grad_(False)
    tokens = ids(2, 1, "cpu")
    names = ["default", "other"]

    def found() -> list[torch.Tensor]:
        results = [logits(model, tokens), logits(model, tokens, adapter_names=names)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(logits(model, tokens).float())
        with model.disable_adapter():
            results.append(logits(model, tokens))
        model.set_adapter("other")
        results += [logits(model, tokens), logits(model, tokens)]
        model.set_adapter("default")
        model.eval().requires_grad_(False)
        results += gradients(model, tokens, trainable(model, "layers.0.self_attn.k_proj.loraswitch_B.default"))
        model.requires_grad_(False)
        return results

    expected = found()
    fuse(model)
    for served in (1, 3):  # of the forwards; those that come first make the calls ready
        library.calls.clear()
        for one, other in zip(found(), expected, strict=True):
            assert close(one, other, 1e-4)
        assert len(library.calls) == served * 2 * 2, "two blocks, two groups"


@pytest.mark.parametrize(
    "part", ["router", "v_proj.loraswitch_A", "up_proj.loraswitch_B", "down_proj.base_layer", "embed"]
)
def test_gradients_of_any_part_are_those_of_the_unfused_model(part, library):
    """Where the kernels run. In evaluation: a model in training is not fused."""
    model = made()
    trained = trainable(model, part)
    tokens = ids(1, 1, "cpu")
    expected = gradients(model, tokens, trained)
    fuse(model)
    logits(model, tokens)
    logits(model, tokens)  # by the kernels
    assert library.calls
    found = gradients(model, tokens, trained)
    assert all(close(one, other, 1e-4) for one, other in zip(found, expected, strict=True))


# What a change touches, and others of its group; tracing takes as long as there are adapted linears. q_proj holds the router.
MANY_OF_THEM = ["q_proj", "v_proj", "gate_proj", "up_proj"]


def made_for_compiling(blocks: int = 1, **settings: Any) -> nn.Module:
    return adapted(tiny_llama(attention_bias=True, num_hidden_layers=blocks), target_modules=MANY_OF_THEM, **settings)


IN_ANOTHER_BLOCK = [in_place, another_parameter, another_kind_of_base_layer]  # than the router's; all others in its own


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_fusing_is_seen_by_compiled_code(change):
    blocks = 2 if change in IN_ANOTHER_BLOCK else 1
    model = made_for_compiling(blocks)
    tokens = ids(1, 1, "cpu")
    model.fuse_for_inference("fused")
    before = logits(model, tokens, use_cache=False)
    block = model.base_model.model.model.layers[0]
    compiled, graphs = compiled_steps(model)
    if blocks == 1:  # the block alone, since all that changes is in it: a fifth of the time of the whole model
        block.compile(backend=noted_in(graphs))
        compiled = model
    if change is not hook_on_base_layer:  # dynamo does not look for hooks that come to a compiled model, fused or not
        logits(compiled, tokens, use_cache=False)
    change(model)
    after = logits(compiled, tokens, use_cache=False)
    assert graphs
    block._compiled_call_impl = None
    model.unfuse()
    expected = logits(model, tokens, use_cache=False)
    assert close(after, expected)
    assert change is layer_in_training or not close(before, expected)


def compiled_steps(model: nn.Module) -> tuple[Any, list[Any]]:
    """`model` compiled, and the list that gets its graphs."""
    torch._dynamo.reset()
    graphs: list[Any] = []
    return torch.compile(model, backend=noted_in(graphs)), graphs


def noted_in(graphs: list[Any]) -> Callable[[Any, Any], Any]:
    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    return backend


def test_what_changes_nothing_does_not_compile_again():
    model = made_for_compiling()
    tokens = ids(1, 1, "cpu")
    model.fuse_for_inference("fused")
    compiled, graphs = compiled_steps(model)
    first = logits(compiled, tokens, use_cache=False)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    model.to("cpu")
    model.train()
    model.eval()
    assert close(logits(compiled, tokens, use_cache=False), first) and len(graphs) == 1


@pytest.mark.slow
def test_a_hook_on_a_copy_is_the_copys():
    model = made_for_compiling()
    tokens = ids(1, 1, "cpu")
    model.fuse_for_inference("fused")
    twin = copy.deepcopy(model)
    hook_on_base_layer(twin)
    found = [logits(compiled_steps(each)[0], tokens, use_cache=False) for each in (model, twin)]
    for each, value in zip((model, twin), found, strict=True):
        each.unfuse()
        assert close(value, logits(each, tokens, use_cache=False))
    assert not close(*found)


def test_unfused_layers_are_as_they_were():
    model = made()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model.fuse_for_inference("fused")
    model.unfuse()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.slow
def test_a_fused_linear_costs_few_guards():
    """What dynamo checks at every call of compiled code, on the way to three tensors of a linear. Beyond the tensors' own
    checks it visits two dictionaries: the weights of the base layer, and the scaling."""

    def guards_of_a_block(method: str) -> int:
        found = []
        for layers in (2, 3):
            torch._dynamo.reset()
            bench = host.Bench(host.build(method, "tiny", layers, 8, "cpu"), "cpu")
            bench.time_step()
            bench.generate(True, 3)
            found.append(host.guards_of(bench.backbone))
        return found[1] - found[0]

    backbone, fused = guards_of_a_block("backbone"), guards_of_a_block("fused")
    assert backbone > 50  # they were found
    assert (fused - backbone) / 7 < 25


def test_the_host_is_timed_where_it_calls_the_kernels():
    bench = host.Bench(host.build("fused", "tiny", 3, 8, "cpu"), "cpu")
    stub_library.use_kernels(bench.model)
    library = stub_library.NoKernels()
    with stub_library.in_place_of_the_library(library):
        assert len(bench.forwards(5)) == 5 and library.calls == 5 * 3 * 4, "forwards, blocks, groups"


@pytest.mark.slow
def test_casts_follow_experts_that_are_loaded_or_trained():
    """float32 experts on a bf16 backbone, for compiled code, which does not look whether they have changed."""
    torch._dynamo.reset()
    model = made_for_compiling(dtype=torch.bfloat16)
    experts = {n: p for n, p in model.named_parameters() if "loraswitch_A" in n or "loraswitch_B" in n}
    for parameter in experts.values():
        parameter.data = parameter.data.float()
    model.fuse_for_inference("fused")
    tokens = ids(1, 1, "cpu")
    compiled = torch.compile(model, backend="eager")

    def follows() -> bool:
        fused = logits(compiled, tokens, use_cache=False).float()
        model.unfuse()
        expected = logits(model, tokens, use_cache=False).float()
        model.fuse_for_inference("fused")
        return close(fused, expected, 0.03)

    first = logits(compiled, tokens, use_cache=False)
    assert follows()
    model.load_state_dict({name: value.clone() * 2 for name, value in experts.items()}, strict=False)
    assert follows() and not torch.equal(logits(compiled, tokens, use_cache=False), first)
    model.train()
    for parameter in experts.values():  # as an optimiser that writes to .data does
        parameter.data.mul_(-1)
    model.eval()
    assert follows()


def test_casts_of_a_copy_follow_the_copys_experts():
    model = made(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "loraswitch_A" in name or "loraswitch_B" in name:
            parameter.data = parameter.data.float()
    model.fuse_for_inference("fused")
    tokens = ids(1, 3, "cpu")
    first = logits(model, tokens)
    twin = copy.deepcopy(model)
    twin.train()
    for name, parameter in twin.named_parameters():
        if "loraswitch_B" in name:
            parameter.data.mul_(-3)
    twin.eval()
    after = logits(twin, tokens).float()
    twin.unfuse()
    assert close(after, logits(twin, tokens).float(), 0.03) and not close(after, first.float(), 0.03)
    assert torch.equal(logits(model, tokens), first)


def test_memory_of_a_deleted_adapter_is_given_back(library):
    import weakref

    from peft_loraswitch import LoRASwitchConfig

    model = fuse(made(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", LoRASwitchConfig(r=4, num_experts=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    model.eval().requires_grad_(False)
    logits(model, ids(1, 1, "cpu"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = weakref.ref(layer.loraswitch_A["other"].weight)
    model.set_adapter("default")
    model.delete_adapter("other")
    model.eval().requires_grad_(False)
    logits(model, ids(1, 1, "cpu"))
    assert weight() is None
