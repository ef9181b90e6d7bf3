"""What the training path's products over (token, expert) pairs have to give, on a CPU, on a GPU, or in Triton's interpreter.

TRITON_INTERPRET=1 python tests/tools/pair_checks.py             # the kernels' results, where Triton is installed
python tests/tools/pair_checks.py --compile 90                   # they compile for that GPU, which need not be there
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from compiled_launches import command, compiling
from peft_loraswitch.training import pair_kernels, pair_products
from peft_loraswitch.training.pair_order import TILE, order_of

# tokens, experts, slots
ORDERS = [(0, 3, 2), (1, 1, 1), (5, 4, 2), (70, 3, 3), (200, 9, 2), (129, 40, 1), (64, 2, 2), (300, 5, 4)]
# tokens, experts, slots, linears alike, rank, features
PRODUCTS = [
    (70, 3, 2, 1, 4, 40), (5, 4, 1, 3, 16, 70), (150, 6, 3, 2, 3, 130), (1, 2, 2, 1, 1, 1), (40, 5, 4, 3, 60, 33),
    (130, 1, 1, 1, 128, 64),
]  # fmt: skip


def some_choices(tokens: int, experts: int, slots: int, seed: int) -> Tensor:
    """int64 [tokens, slots]: different experts in a row, here and there the null index, one expert that is hardly used."""
    generator = torch.Generator().manual_seed(seed)
    heights = torch.rand(tokens, max(experts, slots), generator=generator)
    heights[1:, 0] -= 1
    chosen = heights.argsort(dim=1, descending=True)[:, :slots]
    if seed % 2 == 0:
        chosen = chosen.where(torch.rand(tokens, slots, generator=generator) < 0.7, experts)
    return chosen.clamp(max=experts)


def check_order(tokens: int, experts: int, slots: int, device: str, seed: int) -> None:
    chosen = some_choices(tokens, experts, slots, seed)
    order = order_of(chosen.to(device), experts)
    wanted = sorted((e, j, t) for t, row in enumerate(chosen.tolist()) for j, e in enumerate(row))
    assert order.tokens.tolist() == [t for _, _, t in wanted]
    assert order.bounds.tolist() == [sum(e < expert for e, _, _ in wanted) for expert in range(experts + 1)]
    lists = [(order.tiles, None), *((tiles, slot) for slot, tiles in enumerate(order.slot_tiles))]
    for tiles, slot in lists:
        rows = []
        for expert, first, end in tiles.tolist():
            if expert >= 0:
                inside = range(first, min(first + TILE, end))
                assert len(inside) and all(wanted[row][0] == expert for row in inside)
                rows += inside
        assert sorted(rows) == [row for row, (_, j, _) in enumerate(wanted) if slot is None or j == slot]


def check_products(
    tokens: int, experts: int, slots: int, linears: int, rank: int, features: int, dtype: torch.dtype, device: str
) -> None:  # fmt: skip
    """The kernels against the definition in float64, with every layout that the training path has."""
    torch.manual_seed(tokens)
    chosen = some_choices(tokens, experts, slots, tokens)
    order, exact_order = order_of(chosen.to(device), experts), order_of(chosen, experts)
    real = order.bounds[-1].item()

    def random(*shape: int) -> tuple[Tensor, Tensor]:
        each = torch.randn(*shape).to(dtype)
        return each.to(device), each.double()

    def close(actual: Tensor, expected: Tensor) -> None:
        error = (actual.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < 6 * torch.finfo(dtype).eps * max(slots, 2), (error, actual.shape)

    width = linears * rank
    x, exact_x = random(tokens, features)
    w, exact_w = random(linears, experts, rank, features)
    gates = torch.rand(tokens, experts)
    wide, exact_wide = random(tokens * slots, width + 5)
    small, exact_small = wide[:, 2 : 2 + width], exact_wide[:, 2 : 2 + width]  # columns of a wider tensor

    out, exact_out = torch.full_like(wide, torch.nan)[:, :width], exact_small.clone()
    pair_kernels.to_rank(x, w, order, out)
    pair_products.to_rank(exact_x, exact_w, exact_order, exact_out)
    close(out[:real], exact_out[:real])

    # Linears with rows of their own, W as B lies there: [features, experts * rank].
    count = min(linears, pair_kernels.LINEARS)
    widths = [features, 1, 2 * features + 3][:count]
    rows, packed = (
        [random(*shape(n)) for n in widths] for shape in (lambda n: (tokens, n), lambda n: (n, experts, rank))
    )
    xs, exact_xs = ([pair[i] for pair in rows] for i in (0, 1))
    ws, exact_ws = ([pair[i].permute(1, 2, 0).unsqueeze(0) for pair in packed] for i in (0, 1))
    own, exact_own = small[:, : count * rank], exact_small[:, : count * rank]

    d_small, d_gates = (
        torch.full_like(own, torch.nan),
        torch.zeros(count, tokens, experts, device=device),
    )
    exact_d, exact_d_gates = exact_own.clone(), torch.zeros(count, tokens, experts, dtype=torch.float64)
    pair_kernels.to_rank_backward(xs, ws, order, own, gates.to(device), 0.5, d_small, d_gates)
    exact_call = (exact_order, exact_own, gates.double(), 0.5, exact_d, exact_d_gates)
    pair_products.to_rank_backward(exact_xs, exact_ws, *exact_call)
    for each in range(count):
        columns = slice(each * rank, (each + 1) * rank)
        close(d_small[:real, columns], exact_d[:real, columns])
    assert torch.allclose(d_gates.cpu().double(), exact_d_gates, rtol=1e-3, atol=1e-2)

    lines = [random(n) for n in widths]
    of_one = (small, [w], exact_small, [exact_w], [features], [random(features)])
    of_several = (own, ws, exact_own, exact_ws, widths, lines)
    for (part, weights, exact_part, exact_weights, sizes, biases), (biased, add, factors) in itertools.product(
        (of_one, of_several), ((False, False, None), (True, False, gates), (False, True, gates), (False, False, gates))
    ):
        begun = [random(tokens, n) for n in sizes]
        ys, zs = ([pair[i].clone() for pair in begun] for i in (0, 1))
        if not add:
            ys = [torch.full_like(y, torch.nan) for y in ys]
        some, exactly = ([pair[i] if biased else None for pair in biases] for i in (0, 1))
        on_device = () if factors is None else (factors.to(device), 2.0)
        exact_factors = () if factors is None else (factors.double(), 2.0)
        pair_kernels.from_rank(part, weights, order, ys, some, add, *on_device)
        pair_products.from_rank(exact_part, exact_weights, exact_order, zs, exactly, add, *exact_factors)
        for y, z in zip(ys, zs, strict=True):
            close(y, z)

    d_w, exact_d_w = torch.full_like(w, torch.nan, dtype=torch.float32), torch.zeros_like(exact_w)
    pair_kernels.weight_gradient([x], small, order, [d_w], gates.to(device), 2.0)
    pair_products.weight_gradient([exact_x], exact_small, exact_order, [exact_d_w], gates.double(), 2.0)
    close(d_w, exact_d_w)
    d_ws = [torch.full((experts, n, rank), torch.nan, device=device) for n in widths]  # as the gradient of B lies
    exact_d_ws = [torch.zeros(experts, n, rank, dtype=torch.float64) for n in widths]
    turned, exact_turned = ([each.transpose(1, 2).unsqueeze(0) for each in some] for some in (d_ws, exact_d_ws))
    pair_kernels.weight_gradient(xs, own, order, turned, gates.to(device), 2.0)
    pair_products.weight_gradient(exact_xs, exact_own, exact_order, exact_turned, gates.double(), 2.0)
    for each, wanted in zip(d_ws, exact_d_ws, strict=True):
        close(each, wanted)


def compile_all(capability: int) -> int:
    """The number of kernels that compile for a GPU of this capability: each dtype and form, for rows that 16 divides, as large
    models have them, and for others."""
    tokens, experts, linears, rank = 64, 5, 3, 16
    order, gates = order_of(some_choices(tokens, experts, 1, 1), experts), torch.zeros(tokens, experts)
    with compiling(capability) as compiled:
        for dtype in pair_kernels.FLOATS:
            for features in (1024, 1030):
                x, small = torch.zeros(tokens, features, dtype=dtype), torch.zeros(tokens, linears * rank, dtype=dtype)
                w = torch.zeros(linears, experts, rank, features, dtype=dtype)
                pair_kernels.to_rank(x, w, order, small)
                for bias, add, factors in itertools.product((x[0], None), (True, False), (gates, None)):
                    pair_kernels.from_rank(small, [w], order, [x], [bias], add, factors)
                for factors in (gates, None):
                    pair_kernels.weight_gradient([x], small, order, [w.float()], factors)
                lone, line, d_gates = (
                    torch.zeros(tokens, 1, dtype=dtype),
                    x[0, :1].clone(),
                    torch.zeros(linears, tokens, experts),
                )
                for xs, biases in (
                    ([x], [None]),
                    ([x, x, x], [x[0]] * 3),
                    ([lone, x], [line, x[0]]),
                    ([x, lone, x], [None] * 3),
                ):
                    ws = [w[:1]] * len(xs)
                    pair_kernels.to_rank_backward(xs, ws, order, small, gates, 0.5, small, d_gates)
                    pair_kernels.from_rank(small, ws, order, xs, biases, biases[0] is None, gates)
                    pair_kernels.weight_gradient(xs, small, order, [each.float() for each in ws], gates)
    return len(compiled)


def check_all() -> int:
    for case in PRODUCTS:
        for dtype in (torch.float32, torch.float16):
            check_products(*case, dtype=dtype, device="cpu")
    return 2 * len(PRODUCTS)


if __name__ == "__main__":
    command(__doc__, compile_all, check_all, sys.argv[1:])
