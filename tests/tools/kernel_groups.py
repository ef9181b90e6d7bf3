"""A group of linears with random weights and experts on a GPU, and what the kernels make of it beside the float64 oracle."""

from __future__ import annotations

import torch

import kernel_oracle as oracle
from kernel_oracle import poison_allocator, randn
from peft_loraswitch import kernels


def make_group(outs, in_features, ranks, num_experts, dtype, bias=False, transposed=False, weight=True):
    weights = [
        randn(*((in_features, o) if transposed else (o, in_features)), dtype=dtype, scale=in_features**-0.5)
        for o in outs
    ]
    return {
        "weights": weights if weight else [None] * len(outs),
        "biases": [randn(o, dtype=dtype) if bias else None for o in outs],
        "lora_a": [randn(num_experts, r, in_features, dtype=dtype, scale=in_features**-0.5) for r in ranks],
        "lora_b": [
            randn(num_experts, o, r, dtype=dtype, scale=max(r, 1) ** -0.5) for o, r in zip(outs, ranks, strict=True)
        ],
        "scalings": [0.5 + i for i in range(len(outs))],
        "transposed": transposed,
    }


def check_group(outs, in_features, ranks, num_experts, top_k, tokens, dtype, tuning=0, base=False, ids=None, **kwargs):
    group = make_group(outs, in_features, ranks, num_experts, dtype, **kwargs)
    x = randn(tokens, in_features, dtype=dtype)
    experts, gates = oracle.random_ids(tokens, num_experts, top_k, "cuda")
    if ids is not None:
        experts, gates = ids, oracle.poison_gates(ids, gates, num_experts)
    bases = [randn(tokens, o, dtype=dtype) for o in outs] if base else ()
    packed = kernels.PackedGroup(**group, tuning=tuning)
    poison_allocator()
    results = packed(x, experts, gates, bases)
    for i, result in enumerate(results):
        w, b, a, lb, s = (group[k][i] for k in ("weights", "biases", "lora_a", "lora_b", "scalings"))
        reference = oracle.linear(x, experts, gates, w, b, a, lb, s, group["transposed"], bases[i] if base else None)
        assert result.shape == reference.shape and result.dtype == dtype
        # against the size of what was added up: the sum of a few numbers may come out as nearly nothing
        parts = oracle.linear(x, experts, gates, w, None, torch.zeros_like(a), lb, s, group["transposed"])
        error = oracle.relative_error(result, reference, at_least=max(parts.norm(), (reference - parts).norm()))
        limit = oracle.limit(result)
        assert error < limit, f"linear {i} of {outs} x {in_features}, ranks {ranks}, {tokens} tokens: error {error:.2e}"
    return packed, x, experts


def make_group_4bit(outs, in_features, ranks, num_experts, dtype, block=64, code="nf4", bias=False):
    """The same with weights of 4 bits and their scales."""
    group = make_group(outs, in_features, ranks, num_experts, dtype, bias=bias, weight=False)
    pairs = [oracle.random_4bit(out, in_features, block, "cuda") for out in outs]
    group["weights"], group["scales"] = [weight for weight, _ in pairs], [scales for _, scales in pairs]
    return {**group, "code": torch.tensor(oracle.CODES[code], device="cuda")}


def make_group_int4(outs, in_features, ranks, num_experts, dtype=torch.bfloat16, block=128, bias=False):
    """The same with weights as torchao keeps int4, which have no code."""
    group = make_group(outs, in_features, ranks, num_experts, dtype, bias=bias, weight=False)
    pairs = [oracle.random_int4(out, in_features, block, "cuda") for out in outs]
    return {
        **group,
        "weights": [weight for weight, _ in pairs],
        "scales": [scales for _, scales in pairs],
        "code": None,
    }


def reference_4bit(group, i, x, experts, gates):
    """What linear i is to return, and the part of its weight alone, both float64."""
    bias, a, b, s = (group[name][i] for name in ("biases", "lora_a", "lora_b", "scalings"))
    if group["code"] is None:
        weight = oracle.from_int4(group["weights"][i], group["scales"][i], b.shape[1], x.shape[1])
    else:
        weight = oracle.from_4bit(group["weights"][i], group["scales"][i], group["code"])
    own = x.double() @ weight.T
    return oracle.linear(x, experts, gates, weight, bias, a, b, s), own


def check_group_4bit(
    outs, in_features, ranks, num_experts, top_k, tokens, dtype, tuning=0, ids=None, make=make_group_4bit, **kwargs
):
    group = make(outs, in_features, ranks, num_experts, dtype, **kwargs)
    x = randn(tokens, in_features, dtype=dtype)
    experts, gates = oracle.random_ids(tokens, num_experts, top_k, "cuda")
    if ids is not None:
        experts, gates = ids, oracle.poison_gates(ids, gates, num_experts)
    packed = kernels.PackedGroup(**group, tuning=tuning)
    assert packed.path(x, experts) == kernels.FAST_PATH
    poison_allocator()
    for i, result in enumerate(packed(x, experts, gates)):
        reference, own = reference_4bit(group, i, x, experts, gates)
        assert result.shape == reference.shape and result.dtype == dtype
        error = oracle.relative_error(result, reference, at_least=max(own.norm(), (reference - own).norm()))
        limit = oracle.limit_4bit(result)
        assert error < limit, f"linear {i} of {outs} x {in_features}, ranks {ranks}, {tokens} tokens: error {error:.2e}"


def check_unread_experts(group, tokens):
    """What nobody chose may be anything in lora_a, and for a few tokens in lora_b. `group`: 4 bits, 8 experts, 256 features."""
    x = randn(tokens, 256, dtype=torch.bfloat16)
    experts, gates = oracle.random_ids(tokens, 4, 3, "cuda")
    left_out = torch.rand(tokens, 3, device="cuda") < 0.6
    experts, gates = experts.masked_fill(left_out, 8), gates.masked_fill(left_out, 0.0)
    for tensor in (*group["lora_a"], *(group["lora_b"] if 3 * tokens <= 8 else ())):
        tensor[4:] = float("nan")
    packed = kernels.PackedGroup(**group)
    poison_allocator()
    for i, result in enumerate(packed(x, experts, gates)):
        reference, _ = reference_4bit(group, i, x, experts, gates)
        assert oracle.relative_error(result, reference) < oracle.limit_4bit(result)


def captured(run):
    """A CUDA graph of what `run` launches, and what it returned meanwhile. It runs once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the operands may not be there yet
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = run()
    return graph, results


def check_replayed_chain(packed, num_experts, top_k, tokens, width):
    """A captured chain of dependent launches, a router and groups of two square linears: each replay must wait for its own
    inputs, and never see the last replay's. All that a replay writes is poisoned before.

    Returns the input of the last replay, and what it made: ids, gates, and two results of each group."""
    router = randn(num_experts, width, dtype=torch.bfloat16, scale=width**-0.5)
    x = randn(tokens, width, dtype=torch.bfloat16)

    def chain():
        ids, gates = kernels.router(x, router, top_k, True)
        made, h = [ids, gates], x
        for group in packed:
            h, other = group(h, ids, gates)
            made += [h, other]
        return made

    graph, results = captured(chain)
    for _ in oracle.rounds(50):
        x.copy_(torch.randn_like(x))
        for t in results:
            t.fill_(float("nan") if t.is_floating_point() else 7)
        graph.replay()
        for got, expected in zip(results, chain(), strict=True):
            assert torch.equal(got, expected)
    return x, results


def check_two_streams(packed, tokens, width):
    """Two groups of one linear, with 8 experts, each on a stream of its own: the bits of calls by themselves."""
    xs = [randn(tokens, width, dtype=torch.bfloat16) for _ in packed]
    ids, gates = oracle.random_ids(tokens, 8, 2, "cuda")
    expected = [p(x, ids, gates)[0] for p, x in zip(packed, xs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in packed]
    for _ in oracle.rounds(200):
        results = []
        for p, x, stream in zip(packed, xs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(p(x, ids, gates)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
