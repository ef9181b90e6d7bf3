"""What is checked of fused models whose base layers are in 4 bits, by whichever library: on a CPU first, then on a GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import nn

from compiling import compiled_whole
from four_bit_linear import BF16, FEW, SIZES, same, sizes
from fusing import check_as_unfused, close, fused, gradients, groups, ids, layer_of, logits, trainable
from int8_linear import launches
from peft_loraswitch import kernels, ops
from peft_loraswitch.inference.fuse import adapted_layers


def check_left_to_the_library(model: nn.Module, expected: torch.Tensor) -> None:
    """A fused model gives `expected` for `FEW`: the library computes the products, an op for each group its experts."""
    with launches() as of:
        assert same(logits(model, FEW), expected)
    assert sizes(of, "deltas") == SIZES and not any(group.four_bit for group in groups(model))


def check_change_is_seen(model: nn.Module, before: torch.Tensor) -> None:
    """A fused model that gave `before` gives what it now gives unfused, which is something else."""
    after = [logits(model, FEW) for _ in range(2)]
    model.unfuse()
    expected = logits(model, FEW)
    assert all(same(one, expected) for one in after) and not same(before, expected, 0.1)


def check_moved_and_loaded(model: nn.Module) -> torch.Tensor:
    """Moved to the CPU, where it is, a fused model gives the same bits. Returns them, its adapter then loaded again."""
    fused(model)
    expected = logits(model, FEW)  # by the op, as the first forward of new groups
    model.to("cpu")
    assert torch.equal(logits(model, FEW), expected) and all(group.four_bit for group in groups(model))
    model.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "loraswitch" in name}, strict=False
    )
    model.train()
    model.eval()
    return expected


def check_gradients(model: nn.Module, part: str) -> None:
    """Those of the parameters with `part` in their names are the unfused model's."""
    trained = trainable(model, part)
    expected = gradients(model, FEW, trained)
    fused(model)
    logits(model, FEW)
    assert all(same(*pair) for pair in zip(gradients(model, FEW, trained), expected, strict=True))


def check_copies(model: nn.Module, write: Callable[[Any], None]) -> None:
    """A copy of a fused model has weights of its own, and a group that was pickled computes the same.

    Args:
        write: to the weight of a layer.
    """
    fused(model)
    expected = [logits(model, FEW) for _ in range(2)][-1]
    twin = copy.deepcopy(model)
    for layer in adapted_layers(twin):
        write(layer)
    changed = logits(twin, FEW)
    assert torch.equal(logits(model, FEW), expected) and not same(changed, expected, 0.1)
    twin.unfuse()
    assert same(changed, logits(twin, FEW))
    original = layer_of(model, "layers.0.self_attn.o_proj").fused_group
    group = pickle.loads(pickle.dumps(original))
    x = torch.randn(1, 64).bfloat16()
    routing = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    assert torch.equal(*[ops.linear_4bit(x, *routing, *each.four_bit_parts())[0] for each in (group, original)])


def check_compiled_whole(
    model: nn.Module, tokens: torch.Tensor, calls: int, layer: Any, write: Callable[[Any], None]
) -> tuple[Any, torch.Tensor]:
    """One graph, with as many calls of the op, gives what the unfused model does, and sees that a weight is written to.
    Returns the compiled model, and what it gave when that had been done once.

    Args:
        write: to the weight of `layer`; the second time undoes the first.
    """
    expected = logits(model, tokens, use_cache=False)
    fused(model)
    compiled, graphs = compiled_whole(model)
    for _ in range(2):
        assert same(logits(compiled, tokens, use_cache=False), expected)
    assert len(graphs) == 1
    called = [node.target for node in graphs[0].graph.nodes if node.target is ops.linear_4bit]
    assert len(called) == calls
    write(layer)
    changed = logits(compiled, tokens, use_cache=False)
    assert len(graphs) == 1 and not same(changed, expected, 0.1)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    write(layer)
    assert same(logits(compiled, tokens, use_cache=False), expected)
    return compiled, changed


# ------------------------------------------------------------------------------------------------------------ on a GPU

Served = Callable[[nn.Module], bool]  # does the kernel for 4 bits compute all of it?


def check_few_and_many_tokens(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """Fused as unfused: one launch a group for few tokens, none of this package's for many. Unfused again, bit for bit."""
    expected = check_as_unfused(model, batches, BF16)
    for tokens in batches:
        with launches() as of:
            logits(model, tokens)
        few = tokens.numel() <= kernels.FAST_TOKENS
        assert sizes(of, "linear") == (SIZES if few else [])
        assert not any(name in ("linear_4bit", "deltas") for name, _ in of)
    model.unfuse()
    for tokens, value in zip(batches, expected, strict=True):
        assert torch.equal(logits(model, tokens), value)


def check_compiled(
    model: nn.Module, mode: str, batch: int, served: Served, change: Callable[[nn.Module], None], tolerance: float
) -> None:
    """By inductor, as unfused: tokens that differ from replay to replay, then weights that do.

    Args:
        change: writes other weights in place.
        tolerance: before that.
    """
    batches = [ids(batch, 1, "cuda", seed=seed) for seed in range(4)]
    expected = [logits(model, tokens, use_cache=False) for tokens in batches]
    model.fuse_for_inference("fused")
    assert served(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(3):
        for tokens, value in zip(batches, expected, strict=True):
            assert close(logits(compiled, tokens, use_cache=False).float(), value.float(), tolerance)
    change(model)
    changed = [logits(compiled, tokens, use_cache=False).clone() for tokens in batches]
    model.unfuse()
    for tokens, value, before in zip(batches, changed, expected, strict=True):
        assert close(value.float(), logits(model, tokens, use_cache=False).float(), BF16)
        assert not close(value.float(), before.float(), 0.1)


def check_generates_as_unfused(model: Any, batch: int, cache: str, served: Served) -> None:
    """Nearly all tokens are those that the unfused model generates."""
    prompt = ids(batch, 5, "cuda")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(input_ids=prompt, **settings)
    torch._dynamo.reset()
    with model.fuse_for_inference("fused"):
        assert served(model)
        for _ in range(2):
            found = model.generate(input_ids=prompt, cache_implementation=cache, **settings)
            assert found.shape == wanted.shape
            # after a near-tie that falls the other way all differ
            assert (found == wanted).float().mean() > 0.6


def check_experts_in_float32(model: nn.Module, served: Served) -> None:
    """Experts that are cast to float32 before fusing are served all the same, as unfused."""
    for layer in adapted_layers(model):
        layer.loraswitch_A["default"].float()
        layer.loraswitch_B["default"].float()
    tokens = ids(2, 3, "cuda")
    expected = logits(model, tokens)
    model.fuse_for_inference("fused")
    assert served(model) and close(logits(model, tokens).float(), expected.float(), BF16)


def check_to_the_cpu_and_back(model: nn.Module, served: Served) -> None:
    """A fused model is not served on the CPU, and is again, as unfused, when it is back on the GPU."""
    tokens = ids(2, 3, "cuda")
    expected = logits(model, tokens)
    model.fuse_for_inference("fused")
    model.to("cpu")
    assert not served(model)
    model.to("cuda")
    assert served(model) and close(logits(model, tokens).float(), expected.float(), BF16)


def memory_of_fusing(model: nn.Module) -> int:
    """How many more bytes of the GPU are taken once a model has been fused and run. It stays fused."""
    logits(model, ids(1, 1, "cuda"))
    kernels.give_workspace(torch.cuda.current_device())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model.fuse_for_inference("fused")
    logits(model, ids(1, 1, "cuda"))
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before
