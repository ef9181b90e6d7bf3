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
