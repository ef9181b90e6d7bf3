"""What the training path's products over (token, expert) pairs have to give, on a CPU, on a GPU, or in Triton's interpreter.

TRITON_INTERPRET=1 python tests/tools/pair_checks.py             # the kernels' results, where Triton is installed
python tests/tools/pair_checks.py --compile 90                   # they compile for that GPU, which need not be there
"""

from __future__ import annotations

import argparse
import itertools
import sys
from contextlib import nullcontext

import torch
from torch import Tensor

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
    assert order.gate_places.tolist() == [t * (experts + 1) + e for e, _, t in wanted]
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
    packed = w[0].permute(2, 0, 1).contiguous().permute(1, 2, 0).unsqueeze(0)  # as B lies: [features, experts * rank]

    out, exact_out = torch.full_like(wide, torch.nan)[:, :width], exact_small.clone()
    pair_kernels.to_rank(x, w, order, out)
    pair_products.to_rank(exact_x, exact_w, exact_order, exact_out)
    close(out[:real], exact_out[:real])

    d_small, d_gates = (
        torch.full_like(out[:, :rank], torch.nan),
        torch.full((tokens * slots,), torch.nan, device=device),
    )
    exact_d, exact_d_gates = exact_small[:, :rank].clone(), torch.zeros(tokens * slots, dtype=torch.float64)
    call = (order, small[:, :rank], gates.to(device), 0.5, d_small, d_gates)
    pair_kernels.to_rank_backward(x, packed, *call)
    exact_call = (exact_order, exact_small[:, :rank], gates.double(), 0.5, exact_d, exact_d_gates)
    pair_products.to_rank_backward(exact_x, exact_w[:1], *exact_call)
    close(d_small[:real], exact_d[:real])
    assert torch.allclose(d_gates[:real].cpu().double(), exact_d_gates[:real], rtol=1e-3, atol=1e-2)

    for bias, add, factors in ((False, False, None), (True, False, gates), (False, True, gates)):
        begun, exact_begun = random(tokens, features)
        y, z = (begun.clone(), exact_begun.clone()) if add else (torch.full_like(begun, torch.nan), exact_begun.clone())
        line, exact_line = random(features)
        on_device = () if factors is None else (factors.to(device), 2.0)
        exactly = () if factors is None else (factors.double(), 2.0)
        pair_kernels.from_rank(small, w, order, y, line if bias else None, add, *on_device)
        pair_products.from_rank(exact_small, exact_w, exact_order, z, exact_line if bias else None, add, *exactly)
        close(y, z)

    for turned in (False, True):
        d_w, exact_d_w = torch.full_like(w, torch.nan, dtype=torch.float32), torch.zeros_like(exact_w)
        if turned:  # as the gradient of B lies
            d_w = d_w.transpose(2, 3).contiguous().transpose(2, 3)
        pair_kernels.weight_gradient(x, small, order, d_w, gates.to(device), 2.0)
        pair_products.weight_gradient(exact_x, exact_small, exact_order, exact_d_w, gates.double(), 2.0)
        close(d_w, exact_d_w)


def compile_all(capability: int) -> int:
    """The number of kernels that compile for a GPU of this capability: each dtype and form, for rows that 16 divides, as large
    models have them, and for others."""
    from compiled_launches import compiling

    tokens, experts, linears, rank = 64, 5, 3, 16
    order, gates = order_of(some_choices(tokens, experts, 1, 1), experts), torch.zeros(tokens, experts)
    with compiling(capability) as compiled:
        for dtype in pair_kernels.FLOATS:
            for features in (1024, 1030):
                x, small = torch.zeros(tokens, features, dtype=dtype), torch.zeros(tokens, linears * rank, dtype=dtype)
                w = torch.zeros(linears, experts, rank, features, dtype=dtype)
                pair_kernels.to_rank(x, w, order, small)
                d_gates = torch.zeros(tokens)
                pair_kernels.to_rank_backward(x, w[:1], order, small[:, :rank], gates, 0.5, small[:, :rank], d_gates)
                for bias, add, factors in itertools.product((x[0], None), (True, False), (gates, None)):
                    pair_kernels.from_rank(small, w, order, x, bias, add, factors)
                for factors in (gates, None):
                    pair_kernels.weight_gradient(x, small, order, w.float(), factors)
    return len(compiled)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, metavar="CAPABILITY")
    options = parser.parse_args(argv)
    pair_kernels._on = lambda each: nullcontext()  # there is no GPU whose turn it is
    if options.compile:
        print(compile_all(options.compile), "kernels compiled")
        return
    for case in PRODUCTS:
        for dtype in (torch.float32, torch.float16):
            check_products(*case, dtype=dtype, device="cpu")
    print(2 * len(PRODUCTS), "checks passed")


if __name__ == "__main__":
    main(sys.argv[1:])
