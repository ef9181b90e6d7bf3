"""router_decay under torch.compile: graphs as without it, results as in eager mode."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import StaticCache

from compiling import Graphs, compiled, one_layer, run_cached_decoding, run_eval, run_training, same_training, switch
from helpers import padded, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("run", [run_eval, run_training])
@pytest.mark.slow
def test_graphs_are_those_without_it(run):
    found = []
    for decay in (0.0, 0.8):
        torch._dynamo.reset()
        graphs = Graphs()
        run(switch(one_layer(), router_decay=decay), graphs)
        found.append(graphs.outputs)
    # the sums become a layer of the cache that is returned: its keys, and its values of width 0
    assert found[1] == [outputs + 2 for outputs in found[0]]


def test_training_equals_eager():
    plain = switch(one_layer(), router_decay=0.8).train()
    model = copy.deepcopy(plain)
    same_training(plain, compiled(model, "aot_eager"), model, [padded([7, 5], seed=seed) for seed in range(2)])


@pytest.mark.slow
def test_cached_decoding_is_one_graph():
    graphs = Graphs()
    run_cached_decoding(switch(one_layer(), router_decay=0.8), graphs)
    without = Graphs()
    torch._dynamo.reset()
    run_cached_decoding(switch(one_layer()), without)
    assert len(graphs.outputs) == len(without.outputs) > 0


@pytest.mark.parametrize("whole", [True, False])
def test_static_decoding_is_one_graph_and_equals_eager(whole):
    """`whole`: the prefill is compiled as well."""
    model = switch(one_layer(), router_decay=0.9)
    ids, graphs = tokens(2, 10), Graphs()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        step = torch.compile(model, fullgraph=True, backend=graphs)
        past = StaticCache(config=model.config, max_cache_len=16)
        found = [(step if whole else model)(input_ids=ids[:, :4], past_key_values=past).logits]
        for t in range(4, 10):
            found.append(step(input_ids=ids[:, t : t + 1], past_key_values=past).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)
    assert len(graphs.outputs) == 1 + whole


@pytest.mark.slow
def test_generate_compiles_its_static_steps(monkeypatch):
    """As on a GPU, where `generate(cache_implementation="static")` compiles each step."""
    model = switch(one_layer(), router_decay=0.9)
    expected = model.generate(input_ids=tokens(2, 5), max_new_tokens=6, do_sample=False, eos_token_id=None)
    backbone, graphs = model.get_base_model(), Graphs()
    monkeypatch.setattr(type(backbone), "_valid_auto_compile_criteria", lambda *args, **kwargs: True)
    monkeypatch.setattr(
        type(backbone),
        "get_compiled_call",
        lambda self, config: torch.compile(self.__call__, fullgraph=True, backend=graphs),
    )
    found = model.generate(
        input_ids=tokens(2, 5), max_new_tokens=6, do_sample=False, eos_token_id=None, cache_implementation="static"
    )
    assert torch.equal(found, expected)
    assert graphs.outputs
