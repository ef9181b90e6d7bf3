"""A fused model generates what the unfused one does: continuous batching, quantised backbones, two GPUs, speculation, beams,
left padding, adapters switched between calls, threads. tests/inference/test_fuse.py holds the rest of `fuse_for_inference()`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from helpers import adapted, padded, randomize_adapter, switch_config, switch_layers, tiny_gpt2, tiny_llama, tokens
from peft_loraswitch import LoRASwitchLinear
from peft_loraswitch.inference.fuse import is_fused
from peft_loraswitch.routing.decision import Routing
from quantized import BACKENDS, LINEARS, saved

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])
devices = pytest.mark.parametrize("device", ["cpu", GPU])
NEW = 8


@contextmanager
def unfused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the layers that take the unfused forward inside of the block."""
    names: list[str] = []
    original = LoRASwitchLinear.forward

    def spy(self: LoRASwitchLinear, *args: Any, **kwargs: Any) -> torch.Tensor:
        names.append(self.name)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LoRASwitchLinear, "forward", spy)
        yield names


def llama(device: str, **config: Any) -> PeftModel:
    model = adapted(tiny_llama(num_hidden_layers=3), task_type="CAUSAL_LM", **config)
    return model.requires_grad_(False).to(device)


def generate(model: Any, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(input_ids=prompt, **settings)


@pytest.mark.slow
@devices
@pytest.mark.parametrize("router", [None, "layers.1.self_attn.q_proj"])
def test_continuous_batching(router: str | None, device: str, monkeypatch: pytest.MonkeyPatch):
    """`generate_batch`: forwards of shape (1, tokens), in which requests of any length share the few-token and the dense path."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = llama(device, router_module=router)
    prompts = [tokens(1, length, seed=length).to(device) for length in (5, 40, 3, 12)]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    page = {"page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size": 16}
    batching = ContinuousBatchingConfig(**page, num_blocks=16, max_batch_tokens=48)
    wanted = [generate(model, prompt)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    with model.fuse_for_inference("fused"), unfused_calls(monkeypatch) as unfused:
        out = model.generate_batch(
            [prompt[0].tolist() for prompt in prompts],
            generation_config=settings,
            continuous_batching_config=batching,
            warmup=False,
        )
    assert [result.generated_tokens for result in out.values()] == wanted
    assert not [name for name in unfused if router is None or not name.startswith("model.layers.0")]
    assert all(layer.routing_state.frame is None for layer in switch_layers(model).values())


SPECULATIVE: dict[str, Callable[[str], dict[str, Any]]] = {
    "assistant": lambda device: {"assistant_model": tiny_llama(seed=3).to(device)},
    "good_assistant": lambda device: {"assistant_model": tiny_llama(num_hidden_layers=3).to(device)},
    "fused_assistant": lambda device: {"assistant_model": fused_assistant(device)},
    "prompt_lookup": lambda device: {"prompt_lookup_num_tokens": 3},
}


def fused_assistant(device: str) -> PeftModel:
    model = adapted(tiny_llama(seed=3), task_type="CAUSAL_LM").requires_grad_(False).to(device)
    model.fuse_for_inference("fused")
    return model


@devices
@pytest.mark.parametrize("strategy", ["fused", "merge"])
@pytest.mark.parametrize("how", SPECULATIVE)
def test_speculative_decoding(how: str, strategy: str, device: str):
    """Several tokens at once, then one again: the paths of fused and of merged weights follow each other."""
    model = llama(device)
    prompt = torch.tensor([[7, 8, 9, 11, 7, 8, 9, 11, 7, 8]], device=device)
    wanted = generate(model, prompt, max_new_tokens=14)
    with model.fuse_for_inference(strategy):
        assert torch.equal(generate(model, prompt, max_new_tokens=14, **SPECULATIVE[how](device)), wanted)


@devices
@pytest.mark.parametrize("sample", [False, True])
def test_beams_have_the_scores_of_the_unfused_model(sample: bool, device: str):
    """Beams are reordered with their cache; tokens and scores must stay with the row."""
    model, prompt = llama(device), tokens(2, 5).to(device)
    found = []
    settings = {"num_beams": 4, "num_return_sequences": 3, "do_sample": sample, "output_scores": True}

    def run() -> Any:
        torch.manual_seed(4)
        return generate(model, prompt, **settings, return_dict_in_generate=True)

    found.append(run())
    with model.fuse_for_inference("fused"):
        found.append(run())
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, rtol=1e-4, atol=1e-4)


@devices
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_left_padded_samples_decode_as_they_do_alone(make: Any, device: str):
    model = adapted(make(), task_type="CAUSAL_LM").requires_grad_(False).to(device)
    lengths = [6, 2, 4]
    batch = {name: value.to(device) for name, value in padded(lengths, side="left").items()}
    alone = [generate(model, batch["input_ids"][row : row + 1, -length:]) for row, length in enumerate(lengths)]
    with model.fuse_for_inference("fused"):
        out = generate(model, batch["input_ids"], attention_mask=batch["attention_mask"])
        for row, length in enumerate(lengths):
            assert torch.equal(out[row, -length - NEW :], alone[row][0])


@devices
def test_a_compiled_step_whose_guards_are_skipped(device: str):
    """What the README proposes where the host is the bottleneck; a CPU's step is compiled if asked for."""
    torch._dynamo.reset()
    model, prompts = llama(device), [tokens(1, 5, seed=seed).to(device) for seed in range(3)]
    wanted = [generate(model, prompt) for prompt in prompts]
    compiled = tf.CompileConfig(backend="inductor" if device == "cuda" else "eager", mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    with model.fuse_for_inference("fused"):
        generate(model, prompts[0], **options)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            found = [generate(model, prompt, **options) for prompt in prompts]
    assert graphs and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert all(torch.equal(got, expected) for got, expected in zip(found, wanted, strict=True))


@devices
@pytest.mark.parametrize("static", [False, True])
def test_adapters_are_switched_between_calls(static: bool, device: str):
    """On a GPU a static cache has `generate` compile its step: what it compiled for one adapter must not serve another."""
    model = llama(device)
    model.add_adapter(
        "other", switch_config(r=8, num_experts=6, top_k=1, target_modules=["q_proj", "o_proj", "up_proj"])
    )
    randomize_adapter(model, "other", std=0.3, seed=9)
    model.requires_grad_(False).to(device)
    prompt = tokens(1, 5).to(device)
    options = {"cache_implementation": "static"} if static else {}

    def each() -> list[torch.Tensor]:
        results = []
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            model.requires_grad_(False)
            results.append(generate(model, prompt, **options))
        with model.disable_adapter():
            results.append(generate(model, prompt, **options))
        return results

    wanted = each()
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(wanted[0], wanted[3])
    with model.fuse_for_inference("fused"):
        for got, expected in zip(each(), wanted, strict=True):
            assert torch.equal(got, expected)
    assert all(torch.equal(got, expected) for got, expected in zip(each(), wanted, strict=True))


@devices
def test_threads_generate_at_the_same_time(device: str):
    model = llama(device)
    prompts = [tokens(1 + n % 2, 3 + n, seed=n).to(device) for n in range(4)]
    wanted = [generate(model, prompt, max_new_tokens=20) for prompt in prompts]
    failures: list[str] = []
    together = threading.Barrier(len(prompts))

    def run(n: int) -> None:
        try:
            together.wait(30)
            for _ in range(3):
                if not torch.equal(generate(model, prompts[n], max_new_tokens=20), wanted[n]):
                    failures.append(f"thread {n}: other tokens")
        except Exception as error:
            failures.append(f"thread {n}: {error!r}")

    with model.fuse_for_inference("fused"):
        threads = [threading.Thread(target=run, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


# -------------------------------------------------------------------------------------------------- quantised backbones


def on_cuda(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: make(folder).to("cuda")


def bitsandbytes_on_cuda(**settings: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        config = tf.BitsAndBytesConfig(**settings)
        return tf.AutoModelForCausalLM.from_pretrained(
            saved(folder), quantization_config=config, device_map="cuda"
        ).eval()

    return make


QUANTISED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    f"{name}-cpu": (package, make, "cpu") for name, (package, make, _) in BACKENDS.items() if name != "torchao-direct"
}
QUANTISED |= {
    "torchao-cuda": ("torchao", on_cuda(BACKENDS["torchao"][1]), "cuda"),
    "bnb-4bit-cuda": ("bitsandbytes", bitsandbytes_on_cuda(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "cuda"),
    "bnb-8bit-cuda": ("bitsandbytes", bitsandbytes_on_cuda(load_in_8bit=True), "cuda"),
}
# These round their inputs to 8 bits: a difference in the last bit of one becomes a step of 1/127 now and then.
ROUND_INPUTS = ("torchao-dynamic", "bnb-8bit")
MARKED = [pytest.param(name, marks=[pytest.mark.gpu, CUDA] if name.endswith("cuda") else []) for name in QUANTISED]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MARKED)
def test_quantised_backbones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The backbone's own products, then the experts: for few tokens by the op `deltas`, for many by two dense products."""
    package, make, device = QUANTISED[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    backbone = make(tmp_path / "base")
    model = adapted(backbone, target_modules=LINEARS, task_type="CAUSAL_LM", r=8).requires_grad_(False)
    assert len(switch_layers(model)) == 14
    batches = [tokens(b, n, seed=n).to(device) for b, n in ((1, 1), (2, 3), (1, 33), (3, 40))]
    prompt = tokens(2, 5).to(device)

    @torch.no_grad()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids).logits

    wanted = [logits(ids) for ids in batches]
    with model.disable_adapter():
        plain = logits(batches[1])
    assert (wanted[1] - plain).abs().max() > 0.1, "the adapter is at work"
    generated = generate(model, prompt)
    exact = wanted[0].dtype == torch.float32 and not name.startswith(ROUND_INPUTS)
    with model.fuse_for_inference("fused"):
        assert is_fused(model)
        with unfused_calls(monkeypatch) as unfused:
            for ids, expected in zip(batches, wanted, strict=True):
                got = logits(ids)
                size = float(expected.abs().max())
                torch.testing.assert_close(got, expected, rtol=0, atol=(1e-4 if exact else 5e-2) * size)
        assert not unfused, "nothing fell back to the unfused forward"
        same = generate(model, prompt) == generated
        assert (
            same.all() if exact else same.float().mean() > 0.6
        )  # after a near-tie that falls the other way all differ
    for ids, expected in zip(batches, wanted, strict=True):
        assert torch.equal(logits(ids), expected)
    with pytest.raises(ValueError, match="plain 16/32-bit linears"):
        model.fuse_for_inference("merge")
    assert not is_fused(model)


# -------------------------------------------------------------------------------------------------------- two devices


class TwoPlaces(nn.Module):
    """Two linears, the second on the meta device: shapes and devices as on a second GPU, without data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).to("meta"))


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 40, 16)])
def test_a_decision_is_followed_on_another_device(shape: tuple[int, ...]):
    model = adapted(TwoPlaces(), target_modules=["first", "second"])
    out = model(torch.randn(shape))
    assert out.device.type == "meta" and out.shape == (*shape[:-1], 8)
    routing = Routing(*(torch.rand(3, n) for n in (2, 2, 4)))
    there = routing.on(torch.device("meta"))
    assert there is routing.on(torch.device("meta")) and there.experts.is_meta and there.dense_gates.shape == (3, 4)
    assert routing.on(torch.device("cpu")) is routing


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_map_over_two_gpus(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Layers on the second GPU follow the decision taken on the first."""
    tiny_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    names = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map = {**names, **{f"model.layers.{n}": n // 2 for n in range(4)}}
    backbone = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, dtype=dtype).eval()
    model = adapted(backbone, task_type="CAUSAL_LM", r=8).requires_grad_(False)
    if dtype == torch.bfloat16:
        for name, parameter in model.named_parameters():
            if "loraswitch_" in name and "router" not in name:
                parameter.data = parameter.data.to(dtype)
    used = {layer.get_base_layer().weight.device.index for layer in switch_layers(model).values()}
    assert used == {0, 1}
    exact = adapted(tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), task_type="CAUSAL_LM", r=8)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    batches = [tokens(b, n, seed=n).to("cuda:0") for b, n in ((1, 1), (2, 3), (1, 33), (3, 40))]
    prompt = tokens(2, 5).to("cuda:0")
    with torch.no_grad():
        expected = [exact(input_ids=ids.cpu()).logits for ids in batches]
    norm = float("inf") if dtype == torch.float32 else 2.0  # the largest error; in bfloat16 that one alone says little

    @torch.no_grad()
    def errors() -> list[float]:
        """Of each batch's logits, relative."""
        return [
            float((model(input_ids=ids).logits.cpu() - right).norm(norm) / right.norm(norm))
            for ids, right in zip(batches, expected, strict=True)
        ]

    unfused_errors = errors()
    generated = generate(model, prompt)
    with model.fuse_for_inference("fused") as fusion, unfused_calls(monkeypatch) as unfused:
        assert fusion.reason is None and any(len(group) == 3 for group in fusion.groups)
        fused_errors = errors()
        pairs = zip(fused_errors, unfused_errors, strict=True)
        assert all(mine < 1e-4 + 1.3 * its < 0.1 for mine, its in pairs), (fused_errors, unfused_errors)
        assert not unfused
        again = generate(model, prompt)
    assert again.equal(generated) if dtype == torch.float32 else again.shape == generated.shape
    with torch.no_grad():  # each token is the best, or as good as the best to the rounding of bfloat16
        right = exact(input_ids=again[:, :-1].cpu()).logits[:, prompt.shape[1] - 1 :]
    chosen = right.gather(-1, again[:, prompt.shape[1] :, None].cpu()).squeeze(-1)
    assert (right.amax(-1) - chosen).max() < 0.1 * right.abs().max()
    with pytest.raises(ValueError, match="one device"):
        model.fuse_for_inference("merge")
    assert not is_fused(model)
