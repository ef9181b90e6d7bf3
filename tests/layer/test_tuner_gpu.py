"""The plain PyTorch tuner on a CUDA device: what a CPU cannot show. Autograd runs backward on threads of its own there,
host synchronisation can be forbidden, and compiled code can be captured in CUDA graphs."""

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_loraswitch import LoRASwitchConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def llama(dtype=torch.float32, layers=3):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def adapted(model, **config):
    config = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, LoRASwitchConfig(**config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "loraswitch_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def ids():
    torch.manual_seed(2)
    return torch.randint(0, 97, (3, 11), device="cuda")


def test_forward_equals_the_cpu(ids):
    model = adapted(llama())
    on_cpu = copy.deepcopy(model).cpu()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.cpu(), on_cpu(ids.cpu()).logits, rtol=1e-4, atol=1e-4)


class Plain(nn.Module):
    """Linears only, so that whatever waits for the device is ours."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("config", [{}, {"num_shared_experts": 2, "router_module": "layers.1"}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_no_host_synchronisation(training, config):
    targets = ["layers.0", "layers.1", "layers.2"]
    model = adapted(Plain().cuda(), task_type=None, target_modules=targets, **config).train(training)
    x = torch.randn(4, 7, 32, device="cuda")
    model(x).sum().backward()  # warm up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
        with pytest.raises(RuntimeError, match="synchronizing"):  # the mode does notice
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_broken_router_input_becomes_nan_not_a_wrong_answer():
    model = adapted(Plain().cuda(), task_type=None, target_modules=["layers.0", "layers.1"])
    x = torch.randn(5, 32, device="cuda")
    good = model(x)
    for broken in (float("nan"), float("inf")):
        bad = x.clone()
        bad[2, 3] = broken
        out = model(bad)
        assert out[2].isnan().all()
        torch.testing.assert_close(out[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("router_module", [None, "layers.1.mlp.gate_proj"])
def test_gradient_checkpointing_on_autograd_threads(ids, use_reentrant, router_module):
    model = adapted(llama(), router_module=router_module, router_jitter=0.1, lora_dropout=0.1).train()
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            model(ids.flip(0))
            with model.disable_adapter():
                model(ids)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    got = gradients()
    assert expected.keys() == got.keys() and any("router" in name for name in got)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-4, atol=2e-6, msg=name)


def test_threads_do_not_see_each_others_routing(ids):
    model = adapted(llama())
    inputs = [ids, ids.flip(1), ids[:1], ids[:, :3]]
    with torch.no_grad():
        expected = [model(x).logits for x in inputs]
    failures = []

    def work(index):
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(30):
                if not torch.allclose(model(inputs[index]).logits, expected[index], rtol=1e-4, atol=1e-4):
                    failures.append(index)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_forward_and_training(ids, mode):
    model = adapted(llama())
    with torch.no_grad():
        expected = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(ids).logits.clone(), expected, rtol=1e-3, atol=1e-3)
    model.train()

    def step(run):
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step(model)
    for _ in range(3):
        compiled_loss, compiled_gradients = step(compiled)
        assert abs(compiled_loss - loss) < 1e-3
        assert gradients.keys() == compiled_gradients.keys()
        for name in gradients:
            torch.testing.assert_close(compiled_gradients[name], gradients[name], rtol=1e-2, atol=1e-4, msg=name)


def test_generate_with_static_cache_equals_eager(ids):
    model = adapted(llama(torch.bfloat16))
    mask = torch.ones_like(ids)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(input_ids=ids, **arguments)
    static = model.generate(input_ids=ids, cache_implementation="static", **arguments)
    assert (eager == static).float().mean() > 0.9  # bf16: a near-tie may fall the other way once compiled


def test_mixed_batch_and_autocast(ids):
    model = adapted(llama())
    model.add_adapter("other", LoRASwitchConfig(r=3, num_experts=4, top_k=1, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default", "other", "__base__"]).logits
        alone = model(input_ids=ids[:1]).logits
        torch.testing.assert_close(mixed[:1], alone, rtol=1e-4, atol=1e-4)
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.isfinite(model(input_ids=ids).logits).all()
