"""`linear_split_k_sm90.cu`, for up to 128 tokens, against the float64 oracle: on a GPU of capability 9.0."""

from __future__ import annotations

import pytest
import torch

import kernel_oracle as oracle
from kernel_groups import check_group, make_group
from kernel_oracle import HALVES, randn
from peft_loraswitch import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("kernels_must_be_there"),
]


# Its blocks wait for each other's part of the hidden, or, as when these do not come, compute all of it.
WAITS = [kernels.TUNING_SPLIT_K, kernels.TUNING_SPLIT_K | kernels.TUNING_IMPATIENT]


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("linear_split_k_sm90.cu is for compute capability 9.0")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tuning", WAITS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128])
def test_every_number_of_tokens(dtype, tuning, tokens):
    packed, x, experts = check_group([512, 104, 8], 520, [8, 24, 64], 8, 2, tokens, dtype, tuning=tuning, bias=True)
    assert packed.path(x, experts) == kernels.SM90_PATH


@pytest.mark.parametrize("tuning", WAITS)
@pytest.mark.parametrize("rank", [0, 8, 16, 24, 32, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_every_rank(tuning, rank, num_experts):
    ranks = [rank, 8, rank, 0]
    for tokens in (5, 70, 128):
        check_group([136, 256, 264, 40], 256, ranks, num_experts, 1, tokens, torch.bfloat16, tuning=tuning)


@pytest.mark.parametrize("tuning", WAITS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 8), (64, 3), (256, 8), (200, 7)])
def test_experts_and_top_k(tuning, num_experts, top_k):
    for tokens in (1, 4, 32, 60, 100):
        check_group([264], 320, [8], num_experts, top_k, tokens, torch.bfloat16, tuning=tuning)
        check_group([264, 72], 320, [16, 0], num_experts, top_k, tokens, torch.float16, tuning=tuning)


@pytest.mark.parametrize("tuning", WAITS)
@pytest.mark.parametrize("in_features", [8, 24, 56, 64, 72, 128, 1000, 4104])
def test_odd_input_widths(tuning, in_features):
    for tokens in (16, 40, 120):
        check_group([264, 16], in_features, [8, 16], 4, 2, tokens, torch.bfloat16, tuning=tuning, bias=True)


@pytest.mark.parametrize("tuning", WAITS)
def test_full_size(tuning):
    """More tiles than blocks, and fewer: a block has parts of several, a tile is of several blocks."""
    for outs, in_features in (([4096] * 3, 4096), ([4096, 1024, 1024], 4096), ([4096], 11008), ([11008] * 2, 4096)):
        for rank, tokens in ((8, 64), (64, 24), (64, 128), (16, 128)):
            check_group(outs, in_features, [rank] * len(outs), 8, 2, tokens, torch.bfloat16, tuning=tuning)
        check_group(outs, in_features, [16] * len(outs), 64, 2, 32, torch.bfloat16, tuning=tuning)


@pytest.mark.parametrize("tuning", WAITS)
def test_more_parts_of_the_shrink_than_blocks(tuning):
    """A block has several, one after the other: with few steps in all, or many experts of high rank."""
    for tokens in (8, 60, 120):
        check_group([8], 64, [8], 256, 4, tokens, torch.bfloat16, tuning=tuning)
        check_group([1024] * 3, 1024, [128] * 3, 64, 2, tokens, torch.bfloat16, tuning=tuning)


@pytest.mark.parametrize("tuning", WAITS)
def test_few_of_many_experts(tuning):
    """None, one, the last, some, all."""
    for chosen in ([], [0], [63], [0, 63], list(range(0, 64, 5)), list(range(9)), list(range(64))):
        for rank in (8, 16, 24, 64, 72, 256):
            for tokens in (5, 30, 90):
                picks = torch.tensor(chosen or [-1], device="cuda")
                ids = picks[torch.randint(len(picks), (tokens, 3), device="cuda")]
                check_group([520, 72], 448, [rank, 8], 64, 3, tokens, torch.bfloat16, ids=ids, tuning=tuning)


def test_ids_outside_the_experts_add_nothing_and_repeated_ids_add_twice():
    ids = torch.randint(-2, 12, (90, 3), device="cuda")
    ids[0] = torch.tensor([4, 4, -1], device="cuda")
    for num_experts in (8, 7, 5):  # with 7 and 5, hidden columns are left that are of no expert
        for ranks in ([8, 24], [64, 40], [256, 256]):
            for tuning in WAITS:
                check_group([128, 64], 256, ranks, num_experts, 3, 90, torch.bfloat16, ids=ids, tuning=tuning)


@pytest.mark.parametrize("rank", [0, 8, 256])
@pytest.mark.parametrize("tokens", [8, 32, 64, 128])
def test_replays_of_a_graph_have_the_bits_of_a_call(rank, tokens):
    """Each of four calls in a row takes what a kernel of PyTorch's or the call before it has just written."""
    width, dtype = 1024, torch.bfloat16
    groups = [
        kernels.PackedGroup(**make_group([width, width], width, [rank, rank], 8, dtype), tuning=kernels.TUNING_SPLIT_K)
        for _ in range(4)
    ]
    source, (experts, gates) = randn(tokens, width, dtype=dtype), oracle.random_ids(tokens, 8, 2, "cuda")

    def run():
        results, x = [], source * 0.5
        for i, group in enumerate(groups):
            results += group(x, experts, gates)
            x = results[-1] if i % 2 else results[-1] + 0.25
        return results

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = run()
    for _ in oracle.rounds(20):
        source.copy_(randn(tokens, width, dtype=dtype))
        new_experts, new_gates = oracle.random_ids(tokens, 8, 2, "cuda")
        experts.copy_(new_experts), gates.copy_(new_gates)
        for result in kept:
            result.fill_(float("nan"))
        graph.replay()
        graph.replay()
        for replayed, called in zip(kept, run(), strict=True):
            # Near and other bits are of a block that has not waited for the hidden; far off is wrong.
            oracle.assert_same(replayed, called)


def test_ranks_that_a_step_holds_several_experts_of_and_not_all():
    """Of 8, 16 and 32 a step copies whole experts: the last step of a linear may have fewer than it has room for."""
    for rank in (8, 16, 32):
        for num_experts in (1, 2, 3, 5, 9, 17):
            for outs in ([8], [120, 136], [1000]):
                check_group(
                    outs, 192, [rank] * len(outs), num_experts, 1, 40, torch.bfloat16, tuning=kernels.TUNING_SPLIT_K
                )


def test_wide_experts_of_few_tokens_take_it_by_themselves():
    for num_experts, rank, tokens in ((8, 128, 8), (64, 16, 32), (8, 64, 4)):
        packed, x, experts = check_group([512, 264], 512, [rank] * 2, num_experts, 2, tokens, torch.bfloat16)
        assert packed.path(x, experts) == kernels.SM90_PATH
    packed, x, experts = check_group(
        [512], 512, [16], 64, 2, 8, torch.bfloat16
    )  # 16 choices of 64: others read only those
    assert packed.path(x, experts) == kernels.FAST_PATH


def test_large_groups_of_17_to_32_tokens_take_it_by_themselves():
    for outs, tokens, path in (
        ([4096] * 3, 17, kernels.SM90_PATH),
        ([11008] * 2, 32, kernels.SM90_PATH),
        ([4096] * 3, 16, kernels.FAST_PATH),
        ([4096], 32, kernels.FAST_PATH),  # 32 MiB
    ):
        packed, x, experts = check_group(outs, 4096, [8] * len(outs), 8, 2, tokens, torch.bfloat16)
        assert packed.path(x, experts) == path
    packed, x, experts = check_group([4096] * 3, 4096, [8] * 3, 32, 1, 32, torch.bfloat16)  # reads only those chosen
    assert packed.path(x, experts) == kernels.FAST_PATH


@pytest.mark.parametrize(("rank", "tokens"), [(8, 64), (128, 8), (8, 120)])
def test_graphs_on_two_streams_at_once(rank, tokens):
    """Neither launch has all multiprocessors, so blocks of each may wait for some that cannot begin."""
    outs, dtype = [2048, 2048], torch.bfloat16
    operands = [make_group(outs, 4096, [rank] * 2, 8, dtype) for _ in range(2)]
    groups = [kernels.PackedGroup(**each, tuning=kernels.TUNING_SPLIT_K) for each in operands]
    x, (experts, gates) = randn(tokens, 4096, dtype=dtype), oracle.random_ids(tokens, 8, 2, "cuda")
    alone = [group(x, experts, gates) for group in groups]
    streams, graphs, kept = [torch.cuda.Stream() for _ in groups], [], []
    for group, stream in zip(groups, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            group(x, experts, gates)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                kept.append([group(x, experts, gates) for _ in oracle.rounds(20)])
            graphs.append(graph)
    for _ in oracle.rounds(20):
        for result in (each for results in kept for each in sum(results, [])):
            result.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for results, expected in zip(kept, alone, strict=True):
            for each in results:
                for got, want in zip(each, expected, strict=True):
                    assert oracle.relative_error(got, want.double()) < oracle.limit(got)
