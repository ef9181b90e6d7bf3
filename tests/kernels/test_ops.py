"""The ops' contracts: against the float64 oracle, opcheck, fullgraph compilation, and what they refuse."""

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


def group(
    device="cpu",
    dtype=torch.float32,
    tokens=(3,),
    in_features=24,
    outs=(16, 10),
    ranks=(8, 3),
    experts=5,
    top_k=2,
    bias=True,
    transposed=False,
):
    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    ids, gates = oracle.random_ids(int(torch.tensor(tokens).prod()), experts, top_k, device)
    return {
        "x": randn(*tokens, in_features),
        "experts": ids.view(*tokens, top_k),
        "gates": gates.view(*tokens, top_k),
        "weights": [
            randn(*((in_features, o) if transposed else (o, in_features)), scale=in_features**-0.5) for o in outs
        ],
        "biases": [randn(o) if bias else None for o in outs],
        "lora_a": [randn(experts, r, in_features, scale=in_features**-0.5) for r in ranks],
        "lora_b": [randn(experts, o, r, scale=r**-0.5) for o, r in zip(outs, ranks, strict=True)],
        "scalings": [0.5, 2.0][: len(outs)],
        "transposed": transposed,
    }


def deltas_arguments(g):
    x = g["x"]
    bases = [torch.randn(*x.shape[:-1], b.shape[1], device=x.device).to(x.dtype) for b in g["lora_b"]]
    return bases, x, g["experts"], g["gates"], g["lora_a"], g["lora_b"], g["scalings"]


def expand_arguments(g):
    x, experts, gates = (g[k].reshape(-1, g[k].shape[-1]) for k in ("x", "experts", "gates"))
    hidden = ops.all_hidden(x, g["lora_a"])
    bases = [torch.randn(len(x), b.shape[1], device=x.device).to(x.dtype) for b in g["lora_b"]]
    return hidden, experts, gates, bases, g["biases"], g["lora_b"], g["scalings"]


def merge_arguments(g, in_place=False):
    sources = [w.clone() for w in g["weights"]]
    weights = sources if in_place else [torch.full_like(w, float("nan")) for w in sources]
    ids, gates = oracle.random_ids(1, g["lora_a"][0].shape[0], 2, g["x"].device)
    flags = [g["transposed"]] * len(sources)
    return weights, sources, g["lora_a"], g["lora_b"], g["scalings"], flags, ids[0], gates[0]


@devices
@dtypes
@pytest.mark.parametrize("tokens", [(1,), (1, 1), (2, 3), (40,), (5, 1, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_against_the_oracle(device, dtype, tokens, transposed):
    g = group(device, dtype, tokens, transposed=transposed)
    results = ops.linear(**g)
    flat = [g[k].reshape(-1, g[k].shape[-1]) for k in ("x", "experts", "gates")]
    for i, result in enumerate(results):
        w, b, a, lb, s = (g[k][i] for k in ("weights", "biases", "lora_a", "lora_b", "scalings"))
        expected = oracle.linear(*flat, w, b, a, lb, s, transposed)
        assert result.shape == (*tokens, lb.shape[1]) and result.dtype == dtype
        assert oracle.relative_error(result.flatten(0, -2), expected) < 1.6 * oracle.limit(result) + 1e-6


@devices
@dtypes
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (40,)])
@pytest.mark.parametrize("views", [False, True])  # of another layout
def test_deltas_against_the_oracle(device, dtype, tokens, views):
    g = group(device, dtype, tokens)
    bases, *chosen, lora_a, lora_b, scalings = deltas_arguments(g)
    if views:
        bases = [base.transpose(0, -1).contiguous().transpose(0, -1) for base in bases]
    before = [base.clone() for base in bases]
    results = ops.deltas(bases, *chosen, lora_a, lora_b, scalings)
    assert all(torch.equal(base, was) for base, was in zip(bases, before, strict=True))
    flat = [t.reshape(-1, t.shape[-1]) for t in chosen]
    for result, base, *experts in zip(results, bases, lora_a, lora_b, scalings, strict=True):
        expected = base.reshape(-1, base.shape[-1]).double() + oracle.delta(*flat, *experts)
        assert result.shape == base.shape and result.dtype == dtype and result.is_contiguous()
        assert oracle.relative_error(result.flatten(0, -2), expected) < 1.6 * oracle.limit(result) + 1e-6


@devices
@dtypes
@pytest.mark.parametrize("tokens", [1, 40, 130])
@pytest.mark.parametrize(
    "ranks", [(8, 3), (8, 16), (8, 64), (64, 64)]
)  # one kernel takes (8, 16), another those with 64
@pytest.mark.parametrize("gap", [None, 0, 8, 3])  # parts of one matrix so much wider, its rows so aligned or not
def test_expand_against_the_oracle(device, dtype, tokens, ranks, gap):
    g = group(device, dtype, (tokens,), outs=(16, 136), ranks=ranks)
    g["biases"][1] = None
    g["experts"][0] = torch.tensor([4, 4])
    g["experts"][-1] = torch.tensor([-1, 5])
    hidden, experts, gates, bases, *lists = expand_arguments(g)
    if gap is not None:
        matrix = torch.cat([*bases, hidden, hidden.new_full((tokens, gap), float("nan"))], dim=1)
        *bases, hidden, _ = matrix.split([16, 136, hidden.shape[1], gap], dim=1)
    if gap == 8:  # the same row for each token, in a stride of 0
        bases, hidden = [base[:1].expand(tokens, -1) for base in bases], hidden[:1].expand(tokens, -1)
    parts = hidden.split([5 * r for r in ranks], dim=1)
    results = ops.expand(hidden, experts, gates, bases, *lists)
    for h, result, base, bias, b, s in zip(parts, results, bases, *lists, strict=True):
        expected = base.double() + oracle.expand(h, experts, gates, bias, b, s)
        assert result.shape == (tokens, b.shape[1]) and result.dtype == dtype and result.is_contiguous()
        # against the size of what was added up: a token without experts has its bias only
        assert oracle.relative_error(result, expected, at_least=1e-3) < 2 * oracle.limit(result) + 1e-6


@devices
def test_shrink_and_expand_are_what_linear_does(device):
    g = group(device, tokens=(40,))
    arguments = list(expand_arguments(g))
    arguments[3] = [g["x"] @ w.T for w in g["weights"]]
    for result, expected in zip(ops.expand(*arguments), ops.linear(**g), strict=True):
        assert torch.allclose(result, expected, atol=1e-4)


@devices
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_route_against_the_oracle(device, normalize, shape):
    x, router = torch.randn(*shape, 32, device=device), torch.randn(9, 32, device=device)
    experts, gates = ops.route(x, router, 3, normalize)
    expected_ids, expected = oracle.route(x.reshape(-1, 32), router, 3, normalize)
    assert torch.equal(experts.view(-1, 3), expected_ids) and experts.shape == (*shape, 3)
    assert torch.allclose(gates.view(-1, 3).double(), expected, rtol=1e-5, atol=1e-7)


@devices
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("context", [False, True])
def test_top_p_against_the_oracle(device, normalize, context):
    """Of what is not taken the id is that of no expert, and the gate 0."""
    x, router, previous, decay, *_, real = context_arguments(device, shape=(300,), real=context)
    arguments = (x, router, previous, decay, 5, normalize, real) if context else (x, router, 5, normalize)
    op, reference = (ops.route_context, oracle.route_context) if context else (ops.route, oracle.route)
    for top_p in (1e-6, 0.3, 0.6, 0.999):
        experts, gates = op(*arguments, top_p)[:2]
        expected_ids, expected = reference(*arguments, top_p=top_p)[:2]
        assert torch.equal(experts, expected_ids)
        assert torch.allclose(gates.double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(experts == 9, gates == 0)
        left = (experts < 9).sum(1)
        assert left.min() >= 1 and (top_p > 0.01 or (left == 1).all())
        if normalize:
            assert (gates[left == 1, 0] == 1).all()
    assert torch.equal(op(*arguments, 1.0)[0], op(*arguments)[0])
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="top_p"):
            op(*arguments, top_p)


@devices
def test_top_p_keeps_broken_tokens_visible(device):
    x, router = torch.randn(3, 32, device=device), torch.randn(9, 32, device=device)
    x[1] = float("nan")
    experts, gates = ops.route(x, router, 3, True, 0.1)
    assert gates[1].isnan().all() and (experts[1] < 9).all()
    assert gates[::2].isfinite().all()


def context_arguments(device="cpu", dtype=torch.float32, shape=(6,), experts=9, real=True):
    tokens = int(torch.tensor(shape).prod())
    x, router = torch.randn(*shape, 32, device=device).to(dtype), torch.randn(experts, 32, device=device)
    previous = torch.randn(tokens, experts + 1, device=device)
    previous[:, -1] = torch.rand(tokens, device=device) * 4
    previous[0] = 0
    mask = torch.rand(tokens, device=device) < 0.5 if real else None
    if real:
        mask[0] = False  # no real token at all: its own logits
    return x, router, previous, 0.8, 3, True, mask


@devices
@dtypes
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("shape", [(1,), (6,), (2, 1, 3)])
def test_route_context_against_the_oracle(device, dtype, shape, real):
    arguments = context_arguments(device, dtype, shape, real=real)
    experts, gates, sums = ops.route_context(*arguments)
    x, *rest = arguments
    expected_ids, expected, expected_sums = oracle.route_context(x.reshape(-1, 32), *rest)
    assert experts.shape == gates.shape == (*shape, 3) and sums.shape == arguments[2].shape
    assert torch.equal(experts.view(-1, 3), expected_ids)
    assert torch.allclose(gates.view(-1, 3).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(sums.double(), expected_sums, rtol=1e-5, atol=1e-5)


@devices
def test_route_context_keeps_a_broken_past_visible(device):
    x, router, previous, *rest = context_arguments(device, real=False)
    previous[2] = float("nan")  # another adapter's row of a mixed batch
    experts, gates, sums = ops.route_context(x, router, previous, *rest[:-1])
    assert ((experts >= 0) & (experts < 9)).all()
    assert gates.isnan().any(-1).tolist() == sums.isnan().any(-1).tolist() == [row == 2 for row in range(6)]


def test_route_context_refuses():
    x, router, previous, decay, top_k, normalize, real = context_arguments()
    for arguments, message in (
        ((x, router, previous[:, :-1], decay, top_k, normalize), r"previous must be float32 \[6, 10\]"),
        ((x, router, previous.double(), decay, top_k, normalize), "previous must be float32"),
        ((x, router, previous, 1.5, top_k, normalize), "decay=1.5"),
        ((x, router, previous, decay, 10, normalize), "top_k=10"),
        ((x, router, previous, decay, top_k, normalize, real[:3]), r"real must be bool \[6\]"),
        ((x, router, previous, decay, top_k, normalize, real.float()), "real must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.route_context(*arguments)


@devices
@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_and_taking_out_again(device, dtype, transposed):
    g = group(device, dtype, transposed=transposed)
    *lists, ids, gates = merge_arguments(g, in_place=True)
    weights = lists[0]
    pristine = [w.clone() for w in weights]
    ops.merge(*lists, ids, gates)
    for i, w in enumerate(weights):
        update = (
            sum(
                v.double() * (g["lora_b"][i][e].double() @ g["lora_a"][i][e].double())
                for e, v in zip(ids, gates, strict=True)
            )
            * g["scalings"][i]
        )
        expected = pristine[i].double() + (update.T if transposed else update)
        assert oracle.relative_error(w, expected) < 1.6 * oracle.limit(w) + 1e-6
    ops.merge(*lists, torch.full_like(ids, -1), torch.zeros_like(gates), ids, gates)
    for w, p in zip(weights, pristine, strict=True):
        assert oracle.relative_error(w, p.double()) < 6 * oracle.limit(w) + 1e-6


@devices
def test_ids_outside_the_experts_add_nothing_and_repeated_ones_add_twice(device):
    for tokens in (2, 40):  # both ways the PyTorch implementation goes
        g = group(device, tokens=(tokens,), top_k=3)
        g["experts"] = torch.randint(-3, 8, (tokens, 3), device=device)
        g["experts"][0] = 2
        g["gates"] = oracle.poison_gates(g["experts"], g["gates"], g["lora_a"][0].shape[0])
        for i, result in enumerate(ops.linear(**g)):
            w, b, a, lb, s = (g[k][i] for k in ("weights", "biases", "lora_a", "lora_b", "scalings"))
            expected = oracle.linear(g["x"], g["experts"], g["gates"], w, b, a, lb, s)
            assert oracle.relative_error(result, expected) < 1e-5


@devices
@pytest.mark.parametrize("tokens", [(1,), (2, 30)])
def test_opcheck(device, tokens):
    g = group(device, tokens=tokens)
    torch.library.opcheck(ops.linear, tuple(g.values()))
    bases, *rest = deltas_arguments(g)
    torch.library.opcheck(ops.deltas, (bases, *rest))
    torch.library.opcheck(ops.deltas, ([base.transpose(0, -1).clone().transpose(0, -1) for base in bases], *rest))
    torch.library.opcheck(ops.expand, expand_arguments(g))
    torch.library.opcheck(ops.route, (g["x"], torch.randn(5, 24, device=device), 2, True))
    torch.library.opcheck(ops.route, (g["x"], torch.randn(5, 24, device=device), 2, True, 0.5))
    torch.library.opcheck(ops.route_context, context_arguments(device))
    torch.library.opcheck(ops.route_context, (*context_arguments(device), 0.5))
    torch.library.opcheck(ops.merge, merge_arguments(g))


@devices
def test_all_ops_compile_with_fullgraph(device):
    torch._dynamo.reset()
    g = group(device, tokens=(2, 1))
    router = torch.randn(5, 24, device=device)

    def run(x, weights, sources):
        experts, gates = ops.route(x, router, 2, True)
        a, b = ops.linear(**{**g, "x": x, "experts": experts, "gates": gates})
        ops.merge(weights, sources, g["lora_a"], g["lora_b"], g["scalings"], [False] * 2, experts[0, 0], gates[0, 0])
        return *ops.deltas([a, b], x, experts, gates, g["lora_a"], g["lora_b"], [1.0, 3.0]), weights[0] + 1

    sources = [w.clone() for w in g["weights"]]
    expected = run(g["x"], [torch.empty_like(w) for w in sources], sources)
    result = torch.compile(run, fullgraph=True)(g["x"], [torch.empty_like(w) for w in sources], sources)
    assert all(torch.allclose(r, e, atol=1e-5) for r, e in zip(result, expected, strict=True))


@devices
def test_empty_batch(device):
    g = group(device, tokens=(0,))
    assert [r.shape for r in ops.linear(**g)] == [(0, 16), (0, 10)]
    assert [r.shape for r in ops.expand(*expand_arguments(g))] == [(0, 16), (0, 10)]
    assert [r.shape for r in ops.deltas(*deltas_arguments(g))] == [(0, 16), (0, 10)]


def change(g, **changes):
    return {**g, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": torch.zeros(3, 2, dtype=torch.int32)}, "experts must be int64"),
        ({"gates": torch.ones(3, 2, dtype=torch.float16)}, "gates float32"),
        ({"gates": torch.ones(3, 1)}, "differ in shape"),
        ({"experts": torch.zeros(4, 2, dtype=torch.int64), "gates": torch.ones(4, 2)}, "number of tokens"),
        ({"experts": torch.zeros(3, 9, dtype=torch.int64), "gates": torch.ones(3, 9)}, "top_k=9"),
        ({"x": torch.randn(3, 23)}, "do not fit"),
        ({"x": torch.randn(3, 24).bfloat16()}, "must be one of"),
        ({"x": torch.randn(3, 24).double()}, "must be one of"),
        ({"weights": [torch.randn(16, 24)]}, "differ in length"),
        ({"weights": [torch.randn(16, 24), torch.randn(11, 24)]}, "the experts ask for"),
        ({"biases": [torch.randn(15), None]}, r"bias is \[15\], must be \[16\]"),
        ({"biases": [torch.randn(16).bfloat16(), None]}, "bias is torch.bfloat16 on cpu, x torch.float32 on cpu"),
        ({"biases": [torch.randn(16, device="meta"), None]}, "bias is torch.float32 on meta, x torch.float32 on cpu"),
        ({"weights": [torch.randn(16, 24, device="meta"), torch.randn(10, 24)]}, "weight is torch.float32 on meta"),
        ({"lora_a": [torch.randn(5, 8, 24), torch.randn(4, 3, 24)]}, "do not fit"),
        (
            {
                "lora_a": [torch.randn(5, 257, 24), torch.randn(5, 3, 24)],
                "lora_b": [torch.randn(5, 16, 257), torch.randn(5, 10, 3)],
            },
            "256",
        ),
    ],
)  # fmt: skip
def test_linear_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.linear(**change(group(), **changes))


def refused(op, arguments, place, value, message):
    """`op` says so of these arguments with `value` at `place`."""
    arguments = list(arguments)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        op(*arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(3, 54), "54 columns, the experts have 55"),
        (0, torch.randn(3, 55).double(), "must be one of"),
        (0, torch.randn(3, 55).bfloat16(), "lora_b is torch.float32 on cpu, hidden torch.bfloat16"),
        (1, torch.zeros(3, 2, dtype=torch.int32), "experts must be int64"),
        (2, torch.ones(3, 2, dtype=torch.float16), "gates float32"),
        (2, torch.ones(3, 1), r"not \[\[3, 55\], \[3, 2\], \[3, 1\]\]"),
        (3, [torch.randn(3, 16)], "differ in length"),
        (3, [torch.randn(3, 16), torch.randn(3, 11)], r"a base must be \[3, 10\]"),
        (3, [torch.randn(3, 16).double(), torch.randn(3, 10)], "in the dtype of hidden"),
        (4, [None], "differ in length"),
        (4, [torch.randn(15), None], r"bias is \[15\]"),
        (4, [torch.randn(16, device="meta"), None], "bias is torch.float32 on meta"),
        (5, [torch.randn(5, 16, 8), torch.randn(4, 10, 3)], "same number of experts"),
        (5, [torch.randn(5, 16, 257), torch.randn(5, 10, 3)], "rank 257"),
        (5, [torch.randn(257, 16, 8), torch.randn(257, 10, 3)], "257 experts"),
        (5, [], "1 to 8 linears"),
    ],
)  # fmt: skip
def test_expand_refuses(place, value, message):
    refused(ops.expand, expand_arguments(group()), place, value, message)


def test_expand_refuses_too_many_experts_for_a_token():
    arguments = list(expand_arguments(group()))
    arguments[1:3] = torch.zeros(3, 9, dtype=torch.int64), torch.ones(3, 9)
    with pytest.raises(ValueError, match="top_k=9"):
        ops.expand(*arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, [torch.randn(3, 16)], "differ in length"),
        (0, [torch.randn(3, 16), torch.randn(3, 9)], r"a base \[3, 9\] does not fit"),
        (0, [torch.randn(3, 16), torch.randn(3, 10).bfloat16()], "base is torch.bfloat16"),
        (0, [torch.randn(3, 16), torch.randn(3, 10, device="meta")], "base is torch.float32 on meta, x torch.float32"),
        (1, torch.randn(3, 23), "do not fit"),
        (4, [torch.randn(5, 8, 24), torch.randn(4, 3, 24)], "do not fit"),
        (4, [], "1 to 8 linears"),
        (6, [0.5], "differ in length"),
    ],
)  # fmt: skip
def test_deltas_refuses(place, value, message):
    refused(ops.deltas, deltas_arguments(group()), place, value, message)


def test_a_group_has_one_number_of_experts():
    g, other = group(), group(experts=4, outs=(16,), ranks=(8,))
    for key in ("lora_a", "lora_b"):
        g[key] = [g[key][0], other[key][0]]
    g["weights"][1] = other["weights"][0]
    g["biases"][1] = other["biases"][0]
    for op, arguments in ((ops.linear, tuple(g.values())), (ops.deltas, deltas_arguments(g))):
        with pytest.raises(ValueError, match="same number of experts"):
            op(*arguments)


def test_the_others_refuse():
    x, router = torch.randn(3, 24), torch.randn(5, 24)
    for arguments, message in (
        ((x, router, 6, True), "top_k=6"),
        ((x, router[:, :20], 2, True), "24 features"),
        ((x.double(), router, 2, True), "float32 or 16-bit"),
        ((x, torch.randn(300, 24), 2, True), "300 experts"),
        ((x, router.to("meta"), 2, True), "x is on cpu, router on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.route(*arguments)
    weight = [torch.randn(16, 24, device="meta"), torch.randn(10, 24)]
    arguments = merge_arguments(group())
    for place, value, message in (
        (7, torch.ones(3), "of one token"),
        (0, weight, "a weight is torch.float32 on meta"),
        (1, weight, "a source is torch.float32 on meta"),
    ):
        refused(ops.merge, arguments, place, value, message)
    ids, gates = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    for old, message in (
        ((ids, None), "go together"),
        ((torch.zeros(7, dtype=torch.int64), gates), r"must be \[2\]"),
        ((ids, torch.ones(3)), r"must be \[2\]"),
        ((ids.float(), gates), "old_experts is torch.float32"),
        ((ids, gates.to("meta")), "old_gates is torch.float32 on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.merge(*arguments, *old)
