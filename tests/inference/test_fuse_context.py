"""router_decay in a fused model: prefill and decoding are those of the unfused one.

On a CPU the groups decide by the op's definition, as they do by the kernel on a GPU; everything else is as it is there.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from fusing import GPU, MAKERS, adapted, close, ids
from helpers import padded, tiny_llama
from peft_loraswitch import ops
from peft_loraswitch.inference.fused_group import FusedGroup

DECAY = 0.9
devices = pytest.mark.parametrize("device", ["cpu", GPU])


@pytest.fixture(autouse=True)
def deciding_by_ops(monkeypatch):
    """On a CPU, too. Returns the number of calls of the op with context."""
    original, calls = FusedGroup._decide, []
    route_context = ops.route_context

    def decide(self, *args):
        kernels, self.kernels = self.kernels, True
        try:
            return original(self, *args)
        finally:
            self.kernels = kernels

    def counted(*args):
        calls.append(len(args))  # not the tensors: a CUDA graph's must not be held from step to step
        return route_context(*args)

    monkeypatch.setattr(FusedGroup, "_decide", decide)
    monkeypatch.setattr(ops, "route_context", counted)
    return calls


def pair(make, device, **config):
    plain = adapted(make(), device, router_decay=DECAY, **config)
    fused = copy.deepcopy(plain)
    fused.fuse_for_inference(strategy="fused")
    return plain, fused


@torch.no_grad()
def in_parts(model, tokens, lengths, past, **inputs):
    found = []
    for part in tokens.split(lengths, 1):
        found.append(model(input_ids=part, past_key_values=past, **inputs).logits)
    return torch.cat(found, 1)


@devices
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_experts": 5, "top_k": 3},
        {"base_expert": True, "top_k": 1, "normalize_gates": True},
        {"num_shared_experts": 1},
    ],
    ids=["default", "5 experts", "base expert", "shared expert"],
)
@pytest.mark.parametrize("static", [False, True])
def test_prefill_and_decoding(device, make, config, static, deciding_by_ops):
    plain, fused = pair(make, device, **config)
    tokens = ids(2, 11, device)
    with torch.no_grad():
        expected = plain(input_ids=tokens, use_cache=False).logits
        assert close(fused(input_ids=tokens, use_cache=False).logits, expected)
    assert not deciding_by_ops
    for lengths in ([5, 1, 1, 4], [1] * 11):
        past = StaticCache(plain.config, 16) if static else DynamicCache(config=plain.config)
        assert close(in_parts(fused, tokens, lengths, past), expected)
    assert len(deciding_by_ops) == 2 + 10


@devices
def test_padding(device):
    plain, fused = pair(tiny_llama, device)
    batch = {key: value.to(device) for key, value in padded([7, 4], side="left").items()}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for cache in ("dynamic", "static"):
        prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        more = {"cache_implementation": cache, **({"disable_compile": True} if cache == "static" else {})}
        expected = plain.generate(**prompt, **settings, **more)
        assert torch.equal(fused.generate(**prompt, **settings, **more), expected)
        alone = plain.generate(input_ids=batch["input_ids"][1:, 3:], **settings)
        assert torch.equal(expected[1:, 7:], alone[:, 4:])


@devices
def test_a_step_that_is_padding(device):
    """A batch whose samples end at different steps, with a mask that says so."""
    plain, fused = pair(tiny_llama, device)
    tokens = ids(2, 9, device)
    mask = torch.ones_like(tokens)
    mask[0, 5:7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = plain(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        past, found = DynamicCache(config=plain.config), []
        for t in range(9):
            inputs = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
            found.append(fused(input_ids=tokens[:, t : t + 1], past_key_values=past, **inputs).logits)
    assert close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()])


@devices
@pytest.mark.parametrize("static", [False, True])
def test_padding_in_the_middle(device, static):
    """A second turn in a batch whose answers are of different lengths: each as it is alone."""
    plain, fused = pair(tiny_llama, device)
    tokens, gap = ids(2, 12, device), 3
    mask = torch.ones_like(tokens)
    mask[0, 5 : 5 + gap] = 0
    positions = mask.cumsum(-1) - 1
    past = StaticCache(plain.config, 16) if static else DynamicCache(config=plain.config)
    found, end = [], 0
    with torch.no_grad():
        for part in tokens.split([8, 1, 2, 1], 1):
            start, end = end, end + part.shape[1]
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            found.append(fused(input_ids=part, past_key_values=past, **inputs).logits)
        for row, real in enumerate(mask.bool()):
            alone = plain(input_ids=tokens[row : row + 1, real], use_cache=False).logits[0]
            assert close(torch.cat(found, 1)[row, real], alone)


@devices
def test_beams(device):
    plain, fused = pair(tiny_llama, device)
    settings = {"max_new_tokens": 6, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    prompt = ids(2, 5, device)
    assert torch.equal(fused.generate(input_ids=prompt, **settings), plain.generate(input_ids=prompt, **settings))


@devices
def test_fused_goes_on_with_an_unfused_cache(device):
    plain, fused = pair(tiny_llama, device)
    tokens, past = ids(2, 9, device), DynamicCache(config=plain.config)
    with torch.no_grad():
        expected = plain(input_ids=tokens, use_cache=False).logits
        found = [
            (fused if t % 2 else plain)(input_ids=tokens[:, t : t + 1], past_key_values=past).logits for t in range(9)
        ]
    assert close(torch.cat(found, 1), expected)


@devices
def test_unseen_tokens_are_refused(device):
    _, fused = pair(tiny_llama, device)
    past = DynamicCache(config=fused.config)
    with torch.no_grad():
        with fused.disable_adapter():
            fused(input_ids=ids(1, 4, device), past_key_values=past)
        with pytest.raises(ValueError, match="has not seen"):
            fused(input_ids=ids(1, 1, device), past_key_values=past)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_compiled_static_steps(dtype):
    """CUDA graphs: `generate` compiles its static steps with mode="reduce-overhead"."""
    torch._dynamo.reset()
    plain = adapted(tiny_llama(), "cuda", dtype, router_decay=DECAY)
    prompt = ids(2, 9, "cuda")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    plain.fuse_for_inference()
    for _ in range(2):
        found = plain.generate(input_ids=prompt, cache_implementation="static", **settings)
        with torch.no_grad():
            full = plain(input_ids=found.sequences, use_cache=False).logits[:, 8:-1]
        assert close(torch.stack(found.logits, 1), full.float(), 1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_is_one_graph_with_one_call_of_the_op(monkeypatch):
    monkeypatch.undo()  # what is compiled here decides by ops without help
    plain = adapted(tiny_llama(num_hidden_layers=1), router_decay=DECAY, target_modules=["q_proj", "down_proj"])
    fused = copy.deepcopy(plain)
    fused.fuse_for_inference(strategy="fused")
    tokens, past, graphs = ids(2, 9, "cpu"), StaticCache(plain.config, 16), []

    def backend(graph, inputs):
        graphs.append(sum("route_context" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    with torch.no_grad():
        expected = plain(input_ids=tokens, use_cache=False).logits
        found = [fused(input_ids=tokens[:, :4], past_key_values=past).logits]
        for module in fused.modules():
            if getattr(module, "fused_group", None) is not None:
                module.fused_group.kernels = True
        step = torch.compile(fused, fullgraph=True, backend=backend)
        found += [step(input_ids=tokens[:, t : t + 1], past_key_values=past).logits for t in range(4, 9)]
    assert graphs == [1]
    assert close(torch.cat(found, 1), expected)
