"""Router statistics: `router_stats()` and `record_routing()` against a direct count."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from helpers import adapted, padded, router_layer, switch_config, tiny_llama, tokens
from peft_loraswitch import record_routing, router_stats


def trained(**config):
    return adapted(tiny_llama(), **config).train()


def run(model, **batch):
    """(output, logits float32 [..., E] of the router, recomputed from what its linear received)"""
    layer, seen = router_layer(model), []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    output = model(**batch)
    handle.remove()
    return output, seen[0].float() @ layer.loraswitch_router["default"].weight.float().T


@pytest.mark.compat
@pytest.mark.parametrize("top_k", [1, 2])
def test_statistics_equal_a_direct_count(top_k):
    model = trained(num_experts=6, top_k=top_k)
    counts, probabilities, entropies, squares = [0] * 6, [0.0] * 6, [], []
    for seed in range(3):  # over several forwards, of different sizes
        batch = padded([5 + seed, 2], seed=seed)
        _, logits = run(model, **batch)
        for token in logits[batch["attention_mask"].bool()].detach().double():
            p = token.softmax(-1).tolist()
            for expert in sorted(range(6), key=lambda e, p=p: -p[e])[:top_k]:
                counts[expert] += 1
            probabilities = [total + each for total, each in zip(probabilities, p, strict=True)]
            entropies.append(-sum(each * math.log(each) for each in p))
            squares.append(token.logsumexp(-1).item() ** 2)
    n = len(entropies)
    stats = model.router_stats()
    assert stats["tokens"] == n == 24
    assert stats["load"] == pytest.approx([c / (n * top_k) for c in counts], abs=1e-7) and sum(
        stats["load"]
    ) == pytest.approx(1)
    assert stats["dropped_experts"] == [e for e in range(6) if counts[e] == 0]
    assert stats["entropy"] == pytest.approx(sum(entropies) / n, rel=1e-5)
    assert stats["balance_loss"] == pytest.approx(
        6 * sum(c / n * p / n for c, p in zip(counts, probabilities, strict=True)), rel=1e-5
    )
    assert stats["z_loss"] == pytest.approx(sum(squares) / n, rel=1e-5)
    assert router_stats(model.get_base_model()) == stats  # and without PEFT around
    assert model.router_stats(reset=True) == stats
    assert model.router_stats()["tokens"] == 0 and sum(model.router_stats()["load"]) == 0


def test_an_expert_that_nobody_picks_is_dropped():
    model = trained(num_experts=4, top_k=1, target_modules=["q_proj"])
    router = router_layer(model).loraswitch_router["default"].weight.data
    router_layer(model).register_forward_pre_hook(lambda _, args: (args[0].abs(),))
    router[:] = torch.tensor([[1.0], [-1.0], [-2.0], [0.5]])  # on positive input: expert 0, always
    model(input_ids=tokens())
    assert model.router_stats()["dropped_experts"] == [1, 2, 3]
    assert model.router_stats()["load"] == [1.0, 0.0, 0.0, 0.0]
    assert model.router_stats()["entropy"] < math.log(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_survive_a_cast_of_the_model(dtype):
    """70,001 tokens: bf16 would make 70,144 of it, fp16 infinity."""
    model = trained(target_modules=["q_proj"])
    record = router_layer(model).loraswitch_record["default"]
    record.tokens += 70_001
    record.counts += 35_003
    record.entropy += 70_001.5
    before = model.router_stats()
    model.to(dtype)
    assert model.router_stats() == before and before["tokens"] == 70_001
    model(input_ids=tokens(1, 7))
    assert model.router_stats()["tokens"] == 70_008


def test_statistics_count_on_where_float32_stops():
    model = trained(target_modules=["q_proj"])
    router_layer(model).loraswitch_record["default"].tokens += 2**24
    model(input_ids=tokens(1, 1))
    assert model.router_stats()["tokens"] == 2**24 + 1


def test_statistics_follow_the_model_through_meta_and_are_not_saved():
    model = trained()
    model(input_ids=tokens())
    assert not any("record" in name for name in model.state_dict())
    twin = copy.deepcopy(model)
    assert twin.router_stats() == model.router_stats()
    twin.to("meta").to_empty(device="cpu")
    assert twin.router_stats()["tokens"] == 0


def test_statistics_of_training_and_of_a_recording_are_apart():
    model = trained()
    with record_routing(model) as outer:
        model(input_ids=tokens(1, 3))
        with record_routing(model) as inner, torch.no_grad():
            model.eval()(input_ids=tokens(1, 4))
            assert inner.summary()["tokens"] == 4
        model.train()(input_ids=tokens(1, 5))
    model(input_ids=tokens(1, 6))
    assert (outer.summary()["tokens"], inner.summary()["tokens"]) == (12, 4)
    assert model.router_stats()["tokens"] == 14  # training forwards only


def test_a_recording_counts_adapters_that_come_within_it():
    model = adapted(tiny_llama()).eval()
    model.add_adapter("other", switch_config(num_experts=2))
    with record_routing(model) as recorded, torch.no_grad():
        model(input_ids=tokens(1, 3))
        model.add_adapter("new", switch_config(num_experts=3))
        model.delete_adapter("other")
        model.add_adapter("other", switch_config(num_experts=6))
        for name, length in (("new", 4), ("other", 5)):
            model.set_adapter(name)
            model.eval()(input_ids=tokens(1, length))
    counted = {name: recorded.summary(name) for name in ("default", "new", "other")}
    assert {name: (of["tokens"], len(of["load"])) for name, of in counted.items()} == {
        "default": (3, 4),
        "new": (4, 3),
        "other": (5, 6),
    }


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_padding_is_not_counted_whatever_the_cache(cache):
    """A static cache brings a mask over places that hold no token yet."""
    model = adapted(tiny_llama()).eval()
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5, **cache}
    with record_routing(model) as recorded, torch.no_grad():
        model.generate(input_ids=ids, attention_mask=mask, **options)
    assert recorded.summary()["tokens"] == 4 + 7 + 2 * 4


def test_a_module_that_holds_two_adapted_models_is_refused():
    """The first one's statistics would be taken for those of both."""
    pair = torch.nn.ModuleDict({"text": trained(), "other": trained()})
    with pytest.raises(ValueError, match="ModuleDict holds 2 models with LoRA-Switch adapters.*give one of them"):
        router_stats(pair)
    with pytest.raises(ValueError, match="give one of them"), record_routing(pair):
        pass
    run(pair["other"], **padded([4, 3]))
    assert router_stats(pair["text"])["tokens"] == 0 < router_stats(pair["other"])["tokens"]
