"""fuse_for_inference(): the same outputs, one graph, state never half-swapped. On a CPU, and again on a GPU if there is one."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn

from fusing import MAKERS, adapted, close, devices, gradients, ids, logits, randomize, trainable
from helpers import LAYERS, tiny_bert, tiny_llama
from peft_loraswitch import LoRASwitchConfig, LoRASwitchLinear, record_routing
from peft_loraswitch.inference import fuse as fusing
from peft_loraswitch.inference import shared_inputs
from peft_loraswitch.inference.fuse import is_fused
from peft_loraswitch.inference.fused_layer import FusedLeader


@devices
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("strategy", ["fused", "merge"])
def test_same_logits_for_any_number_of_tokens(name, strategy, device):
    model = adapted(MAKERS[name](), device)
    batches = [ids(b, n, device) for b, n in ((1, 1), (1, 3), (2, 4), (3, 7), (5, 8))]
    before = [logits(model, tokens) for tokens in batches]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with model.fuse_for_inference(strategy=strategy) as fusion:
        assert is_fused(model) and fusion.strategy == strategy
        for tokens, expected in zip(batches, before, strict=True):
            assert close(logits(model, tokens), expected)
        assert model.state_dict().keys() == state.keys()
    assert not is_fused(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(logits(model, t), e) for t, e in zip(batches, before, strict=True))


@devices
def test_encoder_with_classifier(device):
    model = adapted(
        tiny_bert(), device, target_modules=["query", "key", "value", "dense"], exclude_modules=".*pooler.*"
    )
    tokens = ids(2, 6, device)
    before = logits(model, tokens)
    with model.fuse_for_inference("fused"):
        assert close(logits(model, tokens), before)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_no_larger_than_the_unfused_models(dtype, device):
    reference_model = adapted(tiny_llama(), "cpu")
    model = copy.deepcopy(reference_model).to(dtype).to(device)
    reference_model.load_state_dict(model.state_dict())  # the rounded weights, computed with in float32
    for batch, length in ((1, 1), (1, 9), (3, 8), (4, 16)):
        tokens = ids(batch, length, "cpu")
        expected = logits(reference_model, tokens)
        unfused = logits(model, tokens.to(device)).float().cpu()
        with model.fuse_for_inference("fused"):
            fused = logits(model, tokens.to(device)).float().cpu()
        assert (fused - expected).norm() <= 1.3 * (unfused - expected).norm() + 1e-3 * expected.norm()


@devices
@pytest.mark.parametrize("shared", [0, 1])
def test_many_tokens_beside_a_base_layer_with_hooks(shared, device):
    model = adapted(tiny_llama(), device, num_experts=5, num_shared_experts=shared)
    layers = [module for module in model.modules() if isinstance(module, LoRASwitchLinear)]
    for layer in layers:
        layer.get_base_layer().register_forward_hook(lambda module, args, output: output + 1)
    tokens = ids(5, 8, device)
    expected = logits(model, tokens)
    with model.fuse_for_inference("fused"):
        assert close(logits(model, tokens), expected)


@devices
def test_groups_are_found_by_tensor_not_by_name(device):
    fusion = adapted(tiny_llama(), device).fuse_for_inference("fused")
    assert [[name.rsplit(".", 1)[1] for name in group] for group in fusion.groups] == LAYERS * [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip


@devices
def test_a_linear_of_a_group_with_another_input_computes_for_itself(device):
    model = adapted(tiny_llama(), device)
    attention = model.base_model.model.model.layers[0].self_attn
    tokens = ids(1, 2, device)
    model.fuse_for_inference("fused")
    attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))  # now another tensor than q's
    fused = logits(model, tokens)
    model.unfuse()
    assert close(fused, logits(model, tokens))


@devices
def test_layers_with_other_ranks_alphas_and_unadapted_ones(device):
    model = adapted(
        tiny_llama(), device, target_modules=["q_proj", "v_proj", "up_proj"], rank_pattern={"v_proj": 3, "up_proj": 16},
        alpha_pattern={"q_proj": 40}, num_experts=5, top_k=3, use_rslora=True,
    )  # fmt: skip
    tokens = [ids(1, 1, device), ids(2, 9, device)]
    before = [logits(model, t) for t in tokens]
    for strategy in ("fused", "merge"):
        with model.fuse_for_inference(strategy):
            assert all(close(logits(model, t), e) for t, e in zip(tokens, before, strict=True))


@devices
@pytest.mark.parametrize("strategy", ["fused", "merge"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}, {"do_sample": True}],
    ids=["dynamic", "static", "beams", "sampling"],
)
def test_generate_gives_the_same_tokens(options, strategy, device):
    model = adapted(tiny_llama(), device)
    tokens = ids(2, 5, device)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # left padding

    def run():
        torch.manual_seed(0)
        defaults = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
        return model.generate(input_ids=tokens, attention_mask=mask, **{**defaults, **options})

    expected = run()
    with model.fuse_for_inference(strategy):
        assert torch.equal(run(), expected)


@devices
def test_256_greedy_tokens_in_float32_equal_the_unfused_models(device):
    model = adapted(tiny_llama(max_position_embeddings=320), device)
    options = {"max_new_tokens": 256, "min_new_tokens": 256, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids(1, 4, device), **options)
    for strategy in ("fused", "merge"):
        with model.fuse_for_inference(strategy):
            assert torch.equal(model.generate(input_ids=ids(1, 4, device), **options), expected)


@devices
def test_assisted_decoding(device):
    model, assistant = adapted(tiny_llama(), device), tiny_llama(seed=5).to(device)
    options = {"max_new_tokens": 10, "do_sample": False, "assistant_model": assistant, "pad_token_id": 0}
    expected = model.generate(input_ids=ids(1, 4, device), **options)
    with model.fuse_for_inference("fused"):
        assert torch.equal(model.generate(input_ids=ids(1, 4, device), **options), expected)


@pytest.mark.slow
@devices
def test_one_graph_one_output_and_no_recompilation_from_token_to_token(device):
    from transformers import StaticCache

    def graphs(fused: bool):
        torch._dynamo.reset()
        model = adapted(tiny_llama(num_hidden_layers=1), device)
        if fused:
            model.fuse_for_inference("fused")
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(input_ids=ids(1, 4, device), past_key_values=cache, use_cache=True)
        seen: list[torch.fx.GraphModule] = []

        def backend(graph, _):
            seen.append(graph)
            return graph

        @torch.compile(fullgraph=True, backend=backend)
        def step(token, position):
            out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
            return out.logits[:, -1:].argmax(-1)

        token, produced = ids(1, 1, device), []
        with torch.no_grad():
            for n in range(6):
                token = step(token, torch.full((1, 1), 4 + n, device=device))
                produced.append(int(token))
        outputs = [len(next(n for n in g.graph.nodes if n.op == "output").args[0]) for g in seen]
        targets = {str(n.target) for g in seen for n in g.graph.nodes if n.op == "call_function"}
        return outputs, produced, targets

    outputs, produced, targets = graphs(fused=True)
    unfused_outputs, expected, _ = graphs(fused=False)
    assert outputs == unfused_outputs == [1]
    assert produced == expected
    assert "loraswitch.linear.default" in targets


@pytest.mark.slow
@devices
@pytest.mark.parametrize("strategy", ["fused", "merge"])
def test_inductor_gives_the_same_logits(strategy, device):
    torch._dynamo.reset()
    model = adapted(tiny_llama(num_hidden_layers=1), device)  # one block: a C++ compiler takes seconds for each
    expected = [logits(model, ids(1, 1, device, seed), use_cache=False) for seed in range(4)]
    with model.fuse_for_inference(strategy):
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead" if device == "cuda" else "default")
        for seed, value in enumerate(expected):
            assert close(logits(compiled, ids(1, 1, device, seed), use_cache=False).clone(), value)


@devices
def test_two_adapters_switched(device):
    model = adapted(tiny_llama(), device)
    model.add_adapter("other", LoRASwitchConfig(r=4, num_experts=6, top_k=1, target_modules=["q_proj", "o_proj"]))
    randomize(model)
    model.eval().requires_grad_(False).to(device)
    tokens = [ids(1, 1, device), ids(2, 20, device)]

    def both():
        results = []
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            results += [logits(model.eval().requires_grad_(False), t) for t in tokens]
        with model.disable_adapter():
            return [*results, logits(model, tokens[0])]

    expected = both()
    with model.fuse_for_inference("fused"):
        assert all(close(a, b) for a, b in zip(both(), expected, strict=True))


@devices
def test_an_adapter_loaded_into_a_fused_model(device, tmp_path):
    torch.manual_seed(0)
    model = adapted(tiny_llama(), device)
    model.fuse_for_inference("fused")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    tokens = ids(1, 3, device)
    expected = logits(model, tokens)
    model.set_adapter("again")
    assert close(logits(model.eval().requires_grad_(False), tokens), expected)
    # new values into the same memory are seen at once
    state = {k: v * 1.5 for k, v in model.state_dict().items() if "loraswitch_A.again" in k}
    model.load_state_dict(state, strict=False)
    changed = logits(model, tokens)
    model.unfuse()
    assert close(changed, logits(model, tokens)) and not close(changed, expected)


@devices
def test_training_a_fused_model_takes_the_unfused_path_and_later_sees_the_new_weights(device):
    model = get_peft_model(tiny_llama(), LoRASwitchConfig(r=4, num_experts=4, target_modules="all-linear")).to(device)
    model.base_model.model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():  # float32 experts on a bf16 backbone: fused from casts
        if "loraswitch_" in name:
            parameter.data = parameter.data.float()
    randomize(model)
    model.fuse_for_inference("fused")
    tokens = ids(1, 4, device)
    model.eval()
    before = logits(model, tokens)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "loraswitch_" in n and p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)
    optimizer.step()
    model.eval()
    after = logits(model, tokens)
    assert not torch.equal(after, before)
    model.unfuse()
    assert close(after.float(), logits(model, tokens).float(), 2e-2)


@devices
def test_gradients_in_eval_mode(device):
    model = adapted(tiny_llama(), device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("loraswitch_" in name)
    tokens = ids(1, 2, device)
    model.fuse_for_inference("fused")
    model(input_ids=tokens)[0].sum().backward()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.loraswitch_B["default"].weight.grad.abs().sum() > 0


@devices
def test_moving_to_another_dtype_after_fusing(device):
    model = adapted(tiny_llama(), device)
    tokens = ids(1, 1, device)
    model.fuse_for_inference("fused")
    logits(model, tokens)
    model.to(torch.bfloat16)
    fused = logits(model, tokens)
    model.unfuse()
    assert close(fused.float(), logits(model, tokens).float(), 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_moving_to_another_device_after_fusing():
    model = adapted(tiny_llama(), "cuda")
    model.fuse_for_inference("fused")
    expected = logits(model, ids(1, 1, "cuda")).cpu()
    assert close(logits(model.to("cpu"), ids(1, 1, "cpu")), expected, 1e-4)
    assert close(logits(model.to("cuda"), ids(1, 1, "cuda")).cpu(), expected, 1e-4)


@devices
def test_two_threads(device):
    model = adapted(tiny_llama(), device)
    inputs = [ids(1, 1 + n, device, seed=n) for n in range(2)]
    expected = [logits(model, tokens) for tokens in inputs]
    failures: list[int] = []
    with model.fuse_for_inference("fused"):

        def run(n: int) -> None:
            for _ in range(30):
                if not close(logits(model, inputs[n]), expected[n]):
                    failures.append(n)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@devices
def test_deepcopy_of_a_fused_model_is_its_own(device):
    model = adapted(tiny_llama(), device)
    tokens = ids(1, 1, device)
    model.fuse_for_inference("fused")
    expected = logits(model, tokens)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert is_fused(twin) and close(logits(twin, tokens), expected)


@devices
def test_mixed_batches_take_the_unfused_path(device):
    model = adapted(tiny_llama(), device)
    tokens = ids(2, 3, device)
    with torch.no_grad():
        expected = model(input_ids=tokens, adapter_names=["default", "__base__"])[0]
        with model.fuse_for_inference("fused"):
            assert torch.equal(model(input_ids=tokens, adapter_names=["default", "__base__"])[0], expected)


@devices
def test_router_statistics_of_a_fused_model(device):
    model = adapted(tiny_llama(), device)
    with model.fuse_for_inference("fused"), model.record_routing() as recorded:
        logits(model, ids(2, 5, device))
    assert recorded.summary()["tokens"] == 10


@devices
def test_linears_that_are_not_plain_run_their_own_forward(device):
    """A base layer with hooks stands for every quantised one: its own forward, then the experts added."""
    model = adapted(tiny_llama(), device)
    for layer in fusing.adapted_layers(model):
        layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.0)
    tokens = [ids(1, 1, device), ids(3, 20, device)]
    expected = [logits(model, t) for t in tokens]
    with model.fuse_for_inference("fused"):
        assert not any(layer.fused_groups["default"].plain for layer in fusing.adapted_layers(model))
        assert all(close(logits(model, t), e) for t, e in zip(tokens, expected, strict=True))


@devices
@pytest.mark.parametrize("strategy", ["fused", "merge"])
@pytest.mark.parametrize("part", ["router", "v_proj.loraswitch_A", "up_proj.loraswitch_B", "down_proj.base_layer"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients_of_any_part_are_those_of_the_unfused_model(part, strategy, tokens, device):
    model = adapted(tiny_llama(), device)
    trained = trainable(model, part)
    inputs = ids(1, tokens, device)
    expected = gradients(model, inputs, trained)
    with model.fuse_for_inference(strategy):
        logits(model, inputs)  # without gradients
        found = gradients(model, inputs, trained)
    assert all(close(one, other, 1e-4) for one, other in zip(found, expected, strict=True))


@devices
def test_merge_in_place_gives_the_weights_back_bit_for_bit(device):
    model = adapted(tiny_llama(), device, torch.bfloat16)
    base = model.base_model.model.model.layers[1].mlp.up_proj.base_layer
    pristine, address = base.weight.clone(), base.weight.data_ptr()
    prompt = ids(1, 6, device)
    expected = [logits(model, prompt[:, i : i + 1]) for i in range(6)]
    with model.fuse_for_inference("merge", in_place=True):
        for i in range(6):
            assert close(logits(model, prompt[:, i : i + 1]).float(), expected[i].float(), 0.05)
            assert not torch.equal(base.weight, pristine)
        logits(model, prompt)  # more tokens: the experts are taken out again
        assert close(base.weight.float(), pristine.float(), 0.02)
    assert torch.equal(base.weight, pristine) and base.weight.data_ptr() == address


def test_merge_refuses_what_it_cannot_serve():
    model = adapted(tiny_llama())
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda m, a, o: o)
    with pytest.raises(ValueError, match="plain 16/32-bit linears"):
        model.fuse_for_inference("merge")
    assert not is_fused(model)


@pytest.mark.parametrize(("module", "step"), [(fusing, "put_on"), (fusing, "resolve"), (shared_inputs, "facts_of")])
def test_an_error_while_fusing_leaves_the_model_unfused(module, step, monkeypatch):
    model = adapted(tiny_llama())
    expected = logits(model, ids(1, 2, "cpu"))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    original, calls = getattr(module, step), []

    def fail(*args):
        calls.append(args)
        if len(calls) > 5:
            raise RuntimeError("out of memory, say")
        return original(*args)

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.fuse_for_inference("fused")
    assert not is_fused(model) and torch.equal(logits(model, ids(1, 2, "cpu")), expected)
    assert all(module.__dict__.keys() == before[name].keys() for name, module in model.named_modules())
    monkeypatch.undo()
    with model.fuse_for_inference("fused"):
        assert close(logits(model, ids(1, 2, "cpu")), expected)


def test_a_model_that_takes_no_input_ids_is_served_without_groups(caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = get_peft_model(Odd(), LoRASwitchConfig(r=4, num_experts=4, target_modules=["first", "second"]))
    randomize(model)
    model.eval().requires_grad_(False)
    x = torch.randn(2, 3, 16)
    expected = model(x)
    with model.fuse_for_inference("fused"):
        assert close(model(x), expected)
    assert "not grouped" in caplog.text


def test_auto_on_a_cpu_fuses_and_says_what_that_is_good_for(caplog):
    model = adapted(tiny_llama())
    with caplog.at_level("INFO"):
        fusion = model.fuse_for_inference()
    assert fusion.strategy == "fused" and is_fused(model) and fusion.reason == "the model is on a CPU"
    assert "single tokens read only the experts that they chose" in caplog.text
    model.unfuse()


def test_auto_elsewhere_says_plainly_that_it_changes_nothing(caplog):
    model = adapted(tiny_llama()).to("meta")
    fusion = model.fuse_for_inference()
    assert (
        fusion.strategy == "none" and not is_fused(model) and "changes nothing: the model is on a meta" in caplog.text
    )
    model.unfuse()  # harmless


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_token_on_a_cpu_reads_the_chosen_experts_alone(dtype):
    """NaN in all others, of A and of B."""
    model = adapted(tiny_llama(), dtype=dtype, num_experts=6)
    token = ids(1, 1, "cpu")
    expected = logits(model, token)
    with record_routing(model) as recorded:
        logits(model, token)
    unused = recorded.summary()["dropped_experts"]
    assert len(unused) == 4
    for name, parameter in model.named_parameters():
        if "loraswitch_A" in name or "loraswitch_B" in name:
            parameter[unused] = float("nan")
    with model.fuse_for_inference():
        assert close(logits(model, token).float(), expected.float(), 2e-5 if dtype == torch.float32 else 2e-2)


def test_refusals():
    model = adapted(tiny_llama())
    with pytest.raises(ValueError, match="strategy='quick'"):
        model.fuse_for_inference("quick")
    with pytest.raises(ValueError, match="in_place"):
        model.fuse_for_inference("fused", in_place=True)
    with pytest.raises(ValueError, match="no LoRA-Switch adapter"):
        fusing.fuse(tiny_llama())
    model.fuse_for_inference("fused")
    with pytest.raises(RuntimeError, match="fused already"):
        model.fuse_for_inference("fused")


def test_unload_of_a_fused_model_gives_the_backbone_back():
    base = tiny_llama()
    expected = logits(base, ids(1, 3, "cpu"))
    model = adapted(base)
    model.fuse_for_inference("fused")
    backbone = model.unload()
    assert not any(isinstance(m, LoRASwitchLinear) for m in backbone.modules())
    assert torch.equal(logits(backbone, ids(1, 3, "cpu")), expected)


@pytest.mark.parametrize("hooked", ["base layers", "layers"])
def test_hooks_by_which_accelerate_spreads_a_model_over_devices(hooked):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = adapted(tiny_llama())
    expected = [logits(model, ids(1, n, "cpu")) for n in (1, 40)]
    for layer in fusing.adapted_layers(model):
        add_hook_to_module(layer.base_layer if hooked == "base layers" else layer, AlignDevicesHook("cpu"))
    with model.fuse_for_inference("fused"):
        assert all(layer.fused_groups["default"].plain for layer in fusing.adapted_layers(model))
        ran = []
        handle = fusing.adapted_layers(model)[3].register_forward_hook(lambda module, *_: ran.append(type(module)))
        assert all(close(logits(model, ids(1, n, "cpu")), e) for n, e in zip((1, 40), expected, strict=True))
        assert ran == [FusedLeader] * 2
        handle.remove()
        calls = []
        attention = model.base_model.model.model.layers[0].self_attn
        attention.q_proj.base_layer.register_forward_hook(lambda *_: calls.append("the base layer's own forward"))
        assert close(logits(model, ids(1, 1, "cpu")), expected[0]) and calls
    assert all(torch.equal(logits(model, ids(1, n, "cpu")), e) for n, e in zip((1, 40), expected, strict=True))
    for layer in fusing.adapted_layers(model):
        remove_hook_from_module(layer, recurse=True)
    assert torch.equal(logits(model, ids(1, 1, "cpu")), expected[0])
