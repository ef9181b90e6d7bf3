"""The op of weights in 4 bits: against the float64 oracle, as compilers see it, and what it refuses. The kernel:
`test_linear_4bit_gpu.py`."""

from __future__ import annotations

import pytest
import torch

import kernel_oracle as oracle
from peft_loraswitch import ops

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)
devices = pytest.mark.parametrize("device", ["cpu", GPU])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
LISTS = ("weights", "scales", "biases", "lora_a", "lora_b", "scalings")  # an entry for each linear


def group(
    device="cpu", dtype=torch.float32, tokens=(3,), in_features=128, block=64, outs=(16, 10), ranks=(8, 3), experts=5,
    top_k=2, bias=True, code="nf4",
):  # fmt: skip
    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    ids, gates = oracle.random_ids(int(torch.tensor(tokens).prod()), experts, top_k, device)
    make = oracle.random_int4 if code == "int4" else oracle.random_4bit
    weights, scales = zip(*(make(o, in_features, block, device) for o in outs), strict=True)
    return {
        "x": randn(*tokens, in_features),
        "experts": ids.view(*tokens, top_k),
        "gates": gates.view(*tokens, top_k),
        "weights": list(weights),
        "scales": list(scales),
        "code": None if code == "int4" else torch.tensor(oracle.CODES[code], device=device),
        "biases": [randn(o) if bias else None for o in outs],
        "lora_a": [randn(experts, r, in_features, scale=in_features**-0.5) for r in ranks],
        "lora_b": [randn(experts, o, r, scale=max(r, 1) ** -0.5) for o, r in zip(outs, ranks, strict=True)],
        "scalings": [0.5, 2.0, 1.0][: len(outs)],
    }


def check(g):
    results = ops.linear_4bit(**g)
    flat = [g[k].reshape(-1, g[k].shape[-1]) for k in ("x", "experts", "gates")]
    assert len(results) == len(g["weights"])
    for i, result in enumerate(results):
        w, scales, bias, a, b, s = (g[name][i] for name in LISTS)
        if g["code"] is None:
            weight = oracle.from_int4(w, scales, b.shape[1], flat[0].shape[1])
        else:
            weight = oracle.from_4bit(w, scales, g["code"])
        expected = oracle.linear(*flat, weight, bias, a, b, s)
        # What a result is made of is rounded: where its summands cancel, as they may in one of a single number, it is less exact.
        least = (flat[0].double().square() @ weight.double().square().T).sqrt().norm()
        assert result.shape == (*g["x"].shape[:-1], b.shape[1]) and result.dtype == g["x"].dtype
        assert oracle.relative_error(result.flatten(0, -2), expected, least) < oracle.limit_4bit(result)


@devices
@dtypes
@pytest.mark.parametrize("tokens", [(1,), (1, 1), (2, 3), (32,), (33,), (5, 1, 9)])
@pytest.mark.parametrize("code", ["nf4", "fp4", "int4"])
def test_against_the_oracle(device, dtype, tokens, code):
    check(group(device, dtype, tokens, code=code))


@devices
@dtypes
@pytest.mark.parametrize(("in_features", "block"), [(64, 64), (192, 64), (192, 192), (256, 128), (512, 256)])
@pytest.mark.parametrize("tokens", [(1,), (17,)])
def test_every_width_and_block(device, dtype, in_features, block, tokens):
    check(group(device, dtype, tokens, in_features, block, outs=(33, 1), ranks=(8, 16), bias=False))


@devices
@dtypes
@pytest.mark.parametrize("in_features", [8, 128, 136, 1000, 1024, 1152])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("tokens", [(1,), (17,)])
def test_every_width_and_group_of_int4(device, dtype, in_features, block, tokens):
    check(group(device, dtype, tokens, in_features, block, outs=(33, 8), ranks=(8, 16), bias=False, code="int4"))


@devices
@pytest.mark.parametrize("ranks", [(1, 8), (0, 8), (24, 64), (0, 0)])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 8), (64, 2)])
def test_every_rank_and_number_of_experts(device, ranks, experts, top_k):
    for tokens in ((1,), (9,)):
        check(group(device, torch.bfloat16, tokens, ranks=ranks, experts=experts, top_k=top_k))


@devices
@pytest.mark.parametrize("tokens", [2, 12])
def test_ids_outside_the_experts_add_nothing_whatever_their_gates(device, tokens):
    g = group(device, torch.bfloat16, (tokens,), top_k=3)
    g["experts"] = torch.randint(-2, 7, (tokens, 3), device=device)
    g["experts"][0] = 2  # one expert, three times
    g["experts"][1] = 5  # none
    g["gates"][-1] = 0.0
    g["gates"] = oracle.poison_gates(g["experts"], g["gates"], 5)
    check(g)


@devices
def test_every_bit_counts(device):
    """Each of the 16 values at an even and at an odd feature, and each scale: unit vectors pick them out, exactly."""
    g = group(device, torch.float32, (128,), outs=(16,), ranks=(0,), experts=1, top_k=1, bias=False)
    index = torch.arange(16, dtype=torch.uint8, device=device)
    g["weights"] = [(index * 16 + index.flip(0))[:, None].repeat(1, 64)]
    g["x"] = torch.eye(128, device=device)
    (result,) = ops.linear_4bit(**g)
    expected = oracle.from_4bit(g["weights"][0], g["scales"][0], g["code"])
    assert torch.equal(result.T, expected.float())
    assert torch.equal(expected[:, 0], (g["code"].double() * g["scales"][0][:, 0].double()))
    assert torch.equal(expected[:, 65], (g["code"].double().flip(0) * g["scales"][0][:, 1].double()))


@devices
def test_every_bit_of_int4_counts(device):
    """Each of the 16 values at each of 1,024 features, exactly, by unit vectors."""
    g = group(device, torch.float32, (1024,), 1024, 32, (16,), (0,), 1, 1, False, "int4")
    q = (torch.arange(16, device=device)[:, None] + torch.arange(1024, device=device)) % 16
    g["weights"], g["x"] = [oracle.pack_int4(q)], torch.eye(1024, device=device)
    g["scales"][0][..., 0], g["scales"][0][..., 1] = 0.5, 0.25
    (result,) = ops.linear_4bit(**g)
    assert torch.equal(result.T, (q - 8) * 0.5 + 0.25)


@devices
@pytest.mark.parametrize("code", ["nf4", "int4"])
def test_empty_batch(device, code):
    assert [r.shape for r in ops.linear_4bit(**group(device, tokens=(0,), code=code))] == [(0, 16), (0, 10)]


@devices
@pytest.mark.parametrize("tokens", [(1,), (2, 30)])
def test_opcheck(device, tokens):
    torch.library.opcheck(ops.linear_4bit, tuple(group(device, tokens=tokens).values()))
    torch.library.opcheck(ops.linear_4bit, tuple(group(device, torch.bfloat16, tokens, ranks=(8, 8)).values()))
    torch.library.opcheck(
        ops.linear_4bit, tuple(group(device, torch.bfloat16, tokens, ranks=(8, 8), code="int4").values())
    )


@devices
def test_compiles_with_fullgraph(device):
    torch._dynamo.reset()
    g = group(device, tokens=(2, 1))
    compiled = torch.compile(lambda x: ops.linear_4bit(**{**g, "x": x}), fullgraph=True)
    for result, expected in zip(compiled(g["x"]), ops.linear_4bit(**g), strict=True):
        assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": torch.zeros(3, 2, dtype=torch.int32)}, "experts must be int64"),
        ({"x": torch.randn(3, 127)}, "do not fit"),
        ({"weights": [torch.zeros(16, 64, dtype=torch.uint8)]}, "differ in length"),
        ({"scales": [torch.ones(16, 2)]}, "differ in length"),
        ({"weights": [torch.zeros(16, 128, dtype=torch.uint8)] * 2}, r"a weight must be uint8 \[16, 64\]"),
        ({"weights": [torch.zeros(16, 64), torch.zeros(10, 64)]}, "two features in a byte, not torch.float32"),
        ({"weights": [torch.zeros(16, 64, dtype=torch.uint8, device="meta")] * 2}, "on the device of x"),
        ({"scales": [torch.ones(16, 2, dtype=torch.uint8)] * 2}, "dequantise scales"),
        ({"scales": [torch.ones(16, 2), torch.ones(10, 1)]}, r"scales must be float32 \[10, 2\].*every linear"),
        ({"scales": [torch.ones(16, 4), torch.ones(10, 4)]}, "a multiple of 64"),
        ({"scales": [torch.ones(16, 0), torch.ones(10, 0)]}, "a multiple of 64"),
        ({"code": torch.ones(15)}, r"code must be float32 \[16\]"),
        ({"code": torch.ones(16).double()}, "not torch.float64"),
        ({"biases": [torch.randn(15), None]}, r"linear_4bit: a bias is"),
        ({"scalings": [1.0]}, "differ in length"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_4bit(**{**group(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": [torch.ones(16, 16, 2).bfloat16()]}, "differ in length"),
        ({"scales": [torch.ones(()).bfloat16()] * 2}, "padded to 1024: one must stand for 32, 64, 128, 256"),
        ({"scales": [torch.ones(64, 16, 2).bfloat16()] * 2}, "one must stand for"),
        ({"scales": [torch.ones(16, 16, 2)] * 2}, r"scales must be bfloat16 \[16, 16, 2\]"),
        ({"scales": [torch.ones(16, 16, 2).bfloat16(), torch.ones(8, 16, 2).bfloat16()]}, "every linear"),
        (
            {"weights": [torch.zeros(16, 64, dtype=torch.uint8)] * 2},
            r"without a code a weight must be int32 \[2, 8, 32, 4\]",
        ),
        (
            {"weights": [torch.zeros(2, 1, 32, 4, dtype=torch.int32)] * 2},
            r"torchao's tiles, not torch.int32 \[2, 1, 32, 4\]",
        ),
        ({"code": torch.ones(16)}, "a weight must be uint8"),
        ({"biases": [torch.randn(15), None]}, r"linear_4bit: a bias is"),
    ],
)
def test_refuses_of_int4(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_4bit(**{**group(code="int4"), **changes})
