"""What the vLLM plugin's Triton kernels have to give, against PyTorch in float64, on a GPU or in Triton's interpreter.

TRITON_INTERPRET=1 python tests/tools/serving_kernels.py     # where Triton is installed; needs neither PEFT nor pytest
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_loraswitch.routing.options import RoutingOptions
from peft_loraswitch.vllm_plugin.kept_sums import Places
from peft_loraswitch.vllm_plugin.routing_tables import RoutingTables, decide, own_logits, write_mask

POISON = 12345.0
# slots, most choices, max_rank, in_features
SHAPES = [(1, 1, 1, 1), (3, 9, 48, 40), (2, 32, 64, 1030), (4, 33, 320, 8), (1, 130, 130, 3)]
DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.float16)}


def some_options(choose: random.Random, most: int, max_rank: int) -> RoutingOptions:
    base = most > 1 and choose.random() < 0.5
    experts = choose.randint(1, min(most - base, max_rank))
    return RoutingOptions(
        num_experts=experts,
        top_k=choose.choice([1, min(2, experts), experts]),
        normalize_gates=choose.random() < 0.6,
        num_shared_experts=choose.randint(0, 2),
        base_expert=base,
        top_p=choose.choice([1.0, 0.3, 0.7]),
    )


def check_route(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> None:
    """Random settings in each slot; tokens of every slot, of none, and padding; ties, NaN and infinite logits."""
    from peft_loraswitch.vllm_plugin import route_kernel

    slots, most, max_rank, features = shape
    choose = random.Random(seed)
    torch.manual_seed(seed)
    tokens = choose.choice([1, 5, 19])
    tables = RoutingTables(slots, max_rank, most, tokens + 3)
    router = torch.full((slots, most, features), torch.nan)  # behind an adapter's choices: never read
    here = torch.rand(slots) < 0.8
    for slot in range(slots):
        options = some_options(choose, most, max_rank)
        tables.place(slot, options)
        router[slot, : options.num_choices] = torch.randn(options.num_choices, features).mul(4).round().div(4)
    x = torch.randn(tokens, features).mul(4).round().div(4)  # sums are exact, so ties are ties
    if seed % 3 == 1:
        x[::2] = 0  # all choices equal
    elif seed % 3 == 2:
        x[0, 0] = choose.choice([torch.nan, torch.inf])
    x = x.to(dtype)
    token_slots = torch.randint(-1, slots, (tokens + 3,))
    token_slots[-1] = 99
    slots_of = token_slots.tolist()
    for first in (True, False):
        for given in (False, True):
            own = torch.stack([router[max(slots_of[token], 0)] @ row for token, row in enumerate(x.float())])
            arguments = (own, None) if given else (x, router)
            expected, actual = torch.full((2, tokens + 3, max_rank), POISON).unbind()
            write_mask(own.double(), None, here, tables.settings, token_slots, first, expected64 := expected.double())
            actual = actual.to(device)
            source, weights = (None if each is None else each.to(device) for each in arguments)
            route_kernel.route(
                source, weights, here.to(device), tables.settings.to(device), token_slots.to(device), first, actual
            )
            torch.testing.assert_close(actual.cpu().double(), expected64, rtol=2e-6, atol=1e-7, equal_nan=True)


def sums_so_far(logits: Tensor, decay: float) -> Tensor:
    """float64 [tokens, n + 1]: the decayed sums of logits [tokens, n] and of their weights, token by token."""
    sums, rows = torch.zeros(logits.shape[1] + 1, dtype=torch.float64), []
    for row in logits.double():
        sums = decay * sums + torch.cat([row, torch.ones(1, dtype=torch.float64)])
        rows.append(sums)
    return torch.stack(rows)


@dataclass
class Request:
    """text [tokens, features], of which the first `past` tokens were computed before; its adapter's slot; its blocks."""

    slot: int
    text: Tensor
    past: int
    blocks: list[int]


def check_context(
    most: int, device: str, seed: int, lengths: tuple[int, ...] = (1, 1, 2, 7), counts: tuple[int, ...] = (1, 3, 7)
) -> None:
    """Requests in the middle of their text, in blocks anywhere in the cache, some of which others share or compute now; adapters
    of every decay, and none; padding.

    `lengths`: of which the parts are that are computed now; `counts`: of requests. Without routers the logits are given."""
    from peft_loraswitch.vllm_plugin import context_kernel, route_kernel

    choose = random.Random(seed)
    torch.manual_seed(seed)
    slots, features, max_rank, size, padding = 4, 24, 32, 4, 3
    decays = [choose.choice([0.0, 0.5, 0.98, 1.0]) for _ in range(slots)]
    here = torch.tensor([True, True, True, False])  # the last routes elsewhere
    requests: list[Request] = []
    blocks_used = 0
    for _ in range(choose.choice(counts)):
        new, parent = choose.choice(lengths), choose.choice(requests) if requests and choose.random() < 0.5 else None
        past = choose.choice([0, 1, size - 1, size, 2 * size, 9])
        slot, text, blocks = choose.randrange(-1, slots), torch.randn(past + new, features), []
        if parent is not None:  # shares full blocks with one that may compute them now
            past = choose.randint(0, len(parent.blocks) * size - 1) // size * size
            past = min(past, len(parent.text) // size * size)
            slot, text = parent.slot, torch.cat([parent.text[:past], text[:new]])
            blocks = parent.blocks[: past // size]
        more = -(-(past + new) // size) - len(blocks)
        requests.append(Request(slot, text, past, [*blocks, *range(blocks_used, blocks_used + more)]))
        blocks_used += more
    choose.shuffle(requests)
    renamed = torch.randperm(blocks_used + 2).tolist()
    tokens = sum(len(request.text) - request.past for request in requests)

    tables = RoutingTables(slots, max_rank, most, tokens + padding)
    router = torch.randn(slots, most, features)
    for slot in range(slots):
        tables.place(slot, replace(some_options(choose, most, max_rank), decay=decays[slot]))
    sums = torch.full(((blocks_used + 2) * size, most + 1), torch.nan)
    starts = torch.full((len(requests) + 3,), tokens, dtype=torch.int32)
    blocks_of = torch.full((len(requests) + 2, 32 + max(lengths)), 2**30, dtype=torch.int32)
    positions, cache_slots = torch.zeros(tokens + padding, dtype=torch.long), torch.full((tokens + padding,), -1)
    token_slots = torch.zeros(tokens + padding, dtype=torch.long)
    x = torch.randn(tokens + padding, features)
    expected_sums, expected = sums.double(), torch.zeros(tokens, max_rank, dtype=torch.float64)
    begin = 0
    for number, request in enumerate(requests):
        slot, past, length = request.slot, request.past, len(request.text)
        end = begin + length - past
        starts[number] = begin
        blocks_of[number, : len(request.blocks)] = torch.tensor([renamed[block] for block in request.blocks])
        places = torch.tensor([renamed[request.blocks[p // size]] * size + p % size for p in range(length)])
        positions[begin:end], cache_slots[begin:end] = torch.arange(past, length), places[past:]
        token_slots[begin:end], x[begin:end] = slot, request.text[past:]
        if slot >= 0:
            logits, routed = request.text @ router[slot].T, bool(here[slot])
            if routed and decays[slot]:
                so_far = sums_so_far(logits, decays[slot])
                sums[places[:past]] = so_far[:past].float()
                expected_sums[places] = so_far
                logits = so_far[:, :-1] / so_far[:, -1:]
            settings = tables.settings[slot].expand(end - begin, -1)
            expected[begin:end] = decide(logits[past:].double(), settings, max_rank) if routed else 1.0
        begin = end
    sums[cache_slots[cache_slots >= 0]] = torch.nan  # what is computed now is not there yet
    choices = tables.settings[:, 0]
    shape = {
        "rtol": 2e-5,
        "atol": 1e-6 * (5 + max(lengths)),
    }  # of sums; gates are compared where no two choices are that near
    where = Places(starts, positions, cache_slots, blocks_of, size)
    for given in (False, True):
        logits = own_logits(x, router, token_slots.clamp(min=0))
        source, weights = (logits, None) if given else (x, router)
        moved = [None if each is None else each.to(device) for each in (source, weights, here)]
        settings, token_slots_there = tables.settings.to(device), token_slots.to(device)
        kept = RoutingTables(slots, max_rank, most, tokens + padding, device).kept
        kept.allocate(len(sums))
        assert kept.sums is not None
        for on_kernels in (False, True):
            if not on_kernels and device != "cpu":
                continue
            kept.sums.copy_(sums)
            kept.own = torch.full((tokens + padding, most), torch.nan, device=device)
            there = Places(*(each.to(device) for each in where[:4]), size)
            kept.places = lambda there=there: there  # type: ignore[misc]
            mask = torch.full((tokens + padding, max_rank), POISON, device=device)
            if on_kernels:
                route_kernel.route(*moved, settings, token_slots_there, True, mask, kept.own)
                context_kernel.route(tokens + padding, moved[2], settings, token_slots_there, mask, kept, there)
            else:
                write_mask(*moved, settings, token_slots_there, True, mask, kept)
            torch.testing.assert_close(mask[:tokens].cpu().double(), expected, rtol=1e-3, atol=1e-4)
            for place in range(len(sums)):  # beyond an adapter's choices nobody reads
                found, wanted = kept.sums[place].cpu().double(), expected_sums[place]
                (token,) = (cache_slots == place).nonzero().flatten().tolist() or [None]
                columns = [*range(int(choices[token_slots[token]]) if token is not None else most), most]
                torch.testing.assert_close(found[columns], wanted[columns], equal_nan=True, **shape)


def check_padded_rows(device: str) -> None:
    """Rows of x and of the mask that are longer than what is read of them."""
    from peft_loraswitch.vllm_plugin import route_kernel

    tables = RoutingTables(1, 12, 4, 6)
    tables.place(0, RoutingOptions(4, 2, True))
    x, router, slots = torch.randn(6, 16), torch.randn(1, 4, 8), torch.zeros(6, dtype=torch.long)
    here, wide = torch.ones(1, dtype=torch.bool), torch.full((6, 20), POISON)
    write_mask(x[:, :8], router, here, tables.settings, slots, True, tables.mask)
    actual = wide.to(device)
    moved = [each.to(device) for each in (x, router, here, tables.settings, slots)]
    route_kernel.route(moved[0][:, :8], *moved[1:], True, actual[:, :12])
    torch.testing.assert_close(actual[:, :12].cpu(), tables.mask)
    assert (actual[:, 12:] == POISON).all()


def grouped(token_slots: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, counts, starts and ids as vLLM makes them."""
    order = torch.sort(token_slots, stable=True).indices.int()
    found, sizes = torch.unique(token_slots, sorted=True, return_counts=True)
    ids, counts = torch.full((slots + 1,), -1, dtype=torch.int32), torch.zeros(slots + 1, dtype=torch.int32)
    starts = torch.zeros(slots + 2, dtype=torch.int32)
    ids[: len(found)], counts[: len(found)] = found.int(), sizes.int()
    starts[1 : len(found) + 1] = sizes.cumsum(0)
    return order, counts, starts, ids


def check_expand(
    tokens: int, rank: int, widths: tuple[int, ...], dtype: torch.dtype, device: str, add_inputs: bool = True
) -> None:
    """Packed linears of 1 to 6 parts; tokens of every slot and of none; outputs beside those parts stay."""
    from peft_loraswitch.vllm_plugin import expand_kernel

    torch.manual_seed(tokens + rank)
    slots, offset = 3, 5
    token_slots = torch.randint(-1, slots, (tokens,))
    hidden, mask = (
        torch.randn(len(widths), tokens, rank),
        torch.rand(tokens + 2, rank) * (torch.rand(tokens + 2, rank) < 0.4),
    )
    lora_b = [torch.randn(slots, 1, width, rank).to(dtype) for width in widths]
    out = torch.randn(tokens, offset + sum(widths) + 3).to(dtype)
    expected, begin = out.double(), offset
    magnitude = expected.abs()  # of the summands: rounding errors are of their size, also where they cancel
    for part, b in enumerate(lora_b):
        value = (hidden[part] * mask[:tokens]).to(dtype).double()
        for token, slot in enumerate(token_slots.tolist()):
            if slot >= 0:
                added = b[slot, 0].double() @ value[token]
                columns = slice(begin, begin + b.shape[2])
                here = expected[token, columns]
                here.copy_(here + added if add_inputs else added)
                magnitude[token, columns] += b[slot, 0].double().abs() @ value[token].abs()
        begin += b.shape[2]
    actual = out.to(device)
    order, counts, starts, ids = (each.to(device) for each in grouped(token_slots, slots))
    expand_kernel.expand(
        hidden.to(device), [b.to(device) for b in lora_b], mask.to(device), actual, order, counts, starts, ids, slots + 1,
        offset, add_inputs,
    )  # fmt: skip
    untouched = torch.ones(actual.shape[1], dtype=torch.bool)
    untouched[offset:begin] = False
    assert torch.equal(actual.cpu()[:, untouched], out[:, untouched])
    assert torch.equal(actual.cpu()[token_slots == -1], out[token_slots == -1])
    eps = torch.finfo(dtype).eps
    assert ((actual.cpu().double() - expected).abs() <= 4 * eps * magnitude + torch.finfo(dtype).tiny).all()


def check_cuda_graph(tokens: int) -> None:
    """Both ops, compiled and captured, then replayed for other adapters and tokens: as in vLLM."""
    from peft_loraswitch.vllm_plugin import custom_ops
    from peft_loraswitch.vllm_plugin.routing_site import RoutingSite

    slots, rank, features, outputs = 2, 64, 96, 40
    tables = RoutingTables(slots, rank, 32, 128, "cuda")
    site = RoutingSite(tables, features, first=True)
    x, hidden = torch.randn(tokens, features, device="cuda"), torch.randn(1, tokens, rank, device="cuda")
    lora_b, y = torch.randn(slots, 1, outputs, rank, device="cuda"), torch.zeros(tokens, outputs, device="cuda")
    token_slots = torch.zeros(128, dtype=torch.long, device="cuda")
    no_lora, number = torch.tensor([False]), torch.tensor([slots + 1])
    meta = [each.cuda() for each in grouped(token_slots[:tokens].cpu(), slots)]

    def step(x: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
        site.route(x, token_slots, no_lora)
        y = y * 0
        custom_ops.expand(hidden, [lora_b], tables.mask, y, *meta, no_lora, number, 0, True)
        return y * 1

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    for _ in range(3):
        compiled(x, hidden, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compiled(x, hidden, y)
    for seed in range(4):
        torch.manual_seed(seed)
        choose = random.Random(seed)
        for slot in range(slots):
            options = some_options(choose, 32, rank)
            tables.place(slot, options)
            site.place(slot, torch.randn(options.num_choices, features))
        x.normal_()
        hidden.normal_()
        now = torch.randint(-1, slots, (tokens,))
        token_slots[:tokens] = now.cuda()
        for place, each in zip(meta, grouped(now, slots), strict=True):
            place.copy_(each)
        tables.mask.fill_(torch.nan)
        graph.replay()
        mask = torch.zeros(tokens, rank, dtype=torch.float64)
        cpu = [each.cpu() for each in (site.here, tables.settings)]
        write_mask(x.cpu(), site.router.cpu(), *cpu, now, True, mask)
        for token, slot in enumerate(now.tolist()):
            wanted = lora_b[slot, 0].cpu().double() @ (hidden[0, token].cpu() * mask[token]) * (slot >= 0)
            torch.testing.assert_close(result[token].cpu().double(), wanted, rtol=1e-4, atol=1e-4)


def check_context_while_decoding(device: str) -> None:
    """Two requests, token by token. On a GPU in a CUDA graph that was captured before any adapter with a decay came, and before
    there was room for sums; as in vLLM."""
    from peft_loraswitch.vllm_plugin.routing_site import RoutingSite

    torch.manual_seed(0)
    steps, features, rank, size, options = 9, 24, 16, 4, RoutingOptions(4, 2, True, decay=0.9)
    tables = RoutingTables(1, rank, 8, 4, device)
    site = RoutingSite(tables, features, first=True)
    text, router, no_lora = torch.randn(steps, 2, features), torch.randn(4, features), torch.tensor([False])
    x, token_slots = torch.zeros(2, features, device=device), torch.zeros(2, dtype=torch.long, device=device)
    starts, positions = torch.tensor([0, 1, 2, 2]).int().to(device), torch.zeros(2, dtype=torch.long, device=device)
    slots = torch.full((2,), -1, device=device)
    blocks = torch.tensor([[3, 0, 5], [1, 4, 2]]).int().to(device)
    places = Places(starts, positions, slots, blocks, size)
    tables.kept.places = lambda: places

    def step() -> None:
        site.route(x, token_slots, no_lora)

    run = step
    if device != "cpu":
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    tables.kept.allocate(6 * size)
    tables.place(0, options)
    site.place(0, router)
    for now in range(steps):
        x.copy_(text[now])
        positions.fill_(now)
        slots.copy_(blocks[:, now // size] * size + now % size)
        run()
        for request in range(2):
            so_far = sums_so_far(text[: now + 1, request] @ router.T, options.decay)[-1:]
            wanted = decide(so_far[:, :-1] / so_far[:, -1:], tables.settings.cpu(), rank)
            torch.testing.assert_close(tables.mask[request : request + 1].cpu().double(), wanted, rtol=1e-4, atol=1e-5)


EXPANDS = [
    (1, 64, (130,)), (7, 16, (64, 33, 17)), (17, 48, (200, 200)), (70, 8, (5,)), (3, 320, (70, 20, 20)), (2, 1, (9,)),
    (5, 64, (8, 9, 10, 11, 12, 13)), (130, 64, (129,)), (130, 128, (129,)), (200, 320, (256, 64)),
]  # fmt: skip


def check_all(device: str, route_seeds: int = 6) -> int:
    checks = 0
    for dtype in DTYPES[device]:
        for shape in SHAPES:
            for seed in range(route_seeds):
                check_route(shape, dtype, device, seed)
                checks += 1
        for tokens, rank, widths in EXPANDS:
            for add_inputs in (True, False):
                check_expand(tokens, rank, widths, dtype, device, add_inputs)
                checks += 1
    for seed in range(2 * route_seeds):
        check_context((1, 9, 33)[seed % 3], device, seed)
        checks += 1
    check_context(5, device, 3, lengths=(66,), counts=(1,))
    check_context_while_decoding(device)
    check_padded_rows(device)
    return checks + 3


if __name__ == "__main__":
    print(check_all("cpu"), "checks passed")
