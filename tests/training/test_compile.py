"""torch.compile(fullgraph=True): graphs, breaks and graph outputs are those of stock LoRA, results those of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from compiling import (
    TARGETS,
    Graphs,
    checkpointing,
    compiled,
    graphs_of,
    lora,
    one_layer,
    run_cached_decoding,
    run_checkpointed,
    run_eval,
    run_lengths,
    run_switching,
    run_training,
    run_training_without_labels,
    same_training,
    switch,
    two_layers,
)
from helpers import adapter_gradients, padded, randomize_adapter, switch_config, tiny_gpt2, tiny_llama, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


@pytest.mark.parametrize(
    "run",
    [
        run_training,
        run_training_without_labels,
        run_checkpointed,
        run_lengths,
        run_cached_decoding,
        run_switching,  # holds what run_eval does
    ],
)
@pytest.mark.slow
def test_graphs_and_outputs_equal_those_of_lora(run):
    expected, actual = graphs_of(run, two_layers if run is run_checkpointed else one_layer)
    assert actual == expected


@pytest.mark.slow
@pytest.mark.parametrize("run", [run_eval, run_training])
def test_graphs_of_gpt2(run):
    expected, actual = graphs_of(run, lambda: tiny_gpt2(n_layer=1))
    assert actual == expected


@pytest.mark.slow
def test_each_layer_compiled_by_itself():
    """Regional compilation: as many graphs; only the layer that decides has more outputs, the decision."""

    def run(model: nn.Module, graphs: Graphs) -> None:
        for layer in model.base_model.model.model.layers:
            layer.compile(fullgraph=True, backend=graphs)
        for seed in range(3):
            model.train()(**padded([7, 5], seed=seed)).loss.backward()

    expected, actual = graphs_of(run, two_layers)
    assert len(actual) == len(expected)
    assert actual[1:] == expected[1:]


@pytest.mark.slow
def test_accumulation_needs_one_graph_for_each_kind_of_micro_batch():
    """First ever (allocates), in between, last, first: what each does differs, and none recompiles for its number."""
    from accelerate.state import GradientState

    def run(model: nn.Module, graphs: Graphs) -> None:
        step = compiled(model.train(), graphs)
        for seed in range(15):
            GradientState()._set_sync_gradients(seed % 5 == 4)
            step(**padded([7, 5], seed=seed)).loss.backward()

    expected, actual = graphs_of(run)
    assert len(actual) == 4
    assert actual[1:] == expected * 3


# ------------------------------------------------------------------------------------------------------------- results

CONFIGS = {
    "default": {},
    "top_1, deep_router": {"top_k": 1, "router_module": "layers.0.mlp.down_proj"},
    "all_experts, large_losses": {"top_k": 4, "router_aux_loss_coef": 2.0, "router_z_loss_coef": 0.5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_equals_eager(name):
    plain = switch(one_layer(), **CONFIGS[name]).train()
    model = copy.deepcopy(plain)
    same_training(plain, compiled(model, "aot_eager"), model, [padded([7, 5], seed=seed) for seed in range(2)])


@pytest.mark.slow
def test_checkpointed_training_equals_eager_and_is_checkpointed():
    plain = switch(tiny_llama(num_hidden_layers=3), router_module="layers.1.self_attn.q_proj").train()
    model = checkpointing(copy.deepcopy(plain))
    counted: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable:
        nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
        counted.append(len(nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    batches = [padded([7, 5], seed=seed) for seed in range(2)]
    same_training(plain, compiled(model, backend), model, batches, use_cache=False)
    assert counted == [2]  # all blocks but the one that decides
    assert all(layer.gradient_checkpointing for layer in model.base_model.model.model.layers)  # put back


def test_checkpointed_training_of_single_layers_equals_eager():
    plain = switch(two_layers()).train()
    model = checkpointing(copy.deepcopy(plain))
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    same_training(plain, model, model, [padded([7, 5], seed=seed) for seed in range(2)], use_cache=False)


def break_in(module: nn.Module) -> None:
    """Have its forward be nothing that dynamo puts into one graph with what is around it."""
    forward = module.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    module.forward = broken


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.0.mlp", "model.norm"])
@pytest.mark.parametrize("settings", [{}, {"router_decay": 0.9, "num_shared_experts": 1}])
def test_training_with_a_graph_break_equals_eager(where, settings):
    """What a break leaves between two graphs, the second one finds: the decision, and what the end of the forward needs."""
    plain = switch(tiny_llama(), **settings).train()
    model = copy.deepcopy(plain)
    break_in(model.get_base_model().get_submodule(where))
    batches = [padded([7, 5], seed=seed) for seed in range(2)]
    same_training(plain, torch.compile(model, backend="aot_eager"), model, batches)


@pytest.mark.parametrize("objective", ["logits", "loss", "loss and logits", "hidden states"])
def test_the_losses_join_behind_a_graph_break(objective):
    """Also where a `loss` is made that nobody uses, as TRL's trainers do, whose fused heads break the graph."""
    objectives: dict[str, Callable[[Any], torch.Tensor]] = {
        "logits": lambda output: output.logits.square().mean(),
        "loss": lambda output: 3 * output.loss,
        "loss and logits": lambda output: 3 * output.loss + output.logits.square().mean(),
        "hidden states": lambda output: output.hidden_states[1].square().mean(),
    }
    plain = switch(tiny_llama(), router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    model = copy.deepcopy(plain)
    break_in(model.get_base_model().lm_head)
    step, batch = torch.compile(model, backend="aot_eager"), padded([7, 5]) | {"output_hidden_states": True}
    for each in (plain, step):
        objectives[objective](each(**batch)).backward()
    (router,) = (name for name in adapter_gradients(plain) if "router" in name)
    expected, found = adapter_gradients(plain)[router], adapter_gradients(model)[router]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    without = switch(tiny_llama(), router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()
    objectives[objective](without(**batch)).backward()
    assert (adapter_gradients(without)[router] - expected).norm() > 1e-3, "the losses are too small to be seen here"


@pytest.mark.parametrize("disabled", [False, True])
def test_checkpointed_training_behind_a_compiled_forward_without_gradients(disabled):
    """A reference model's pass, or KTO's batch of other answers."""
    plain, model = (switch(tiny_llama()).train() for _ in range(2))  # a deep copy would not show it
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.enable_input_require_grads()
    step, other = torch.compile(model, backend="aot_eager"), {**padded([6, 6], seed=3), "use_cache": False}
    for _ in range(2):
        with torch.no_grad(), model.disable_adapter() if disabled else nullcontext():
            step(**other)
        same_training(plain, step, model, [{**padded([7, 5]), "use_cache": False}])


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_trainer_compiles_a_checkpointed_model(reentrant, tmp_path):
    """Transformers breaks the graph itself there."""
    first, losses = get_peft_model(tiny_llama(), switch_config()), []
    randomize_adapter(first)
    for compiles in (False, True):
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], logging_steps=1,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}, torch_compile=compiles,
            **({"torch_compile_backend": "aot_eager"} if compiles else {}),
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
        trainer = Trainer(model=copy.deepcopy(first), args=args, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_eager_and_compiled_forwards_take_turns():
    plain = switch(two_layers()).train()
    model = checkpointing(copy.deepcopy(plain))
    step = compiled(model, "eager")
    for seed in range(3):
        batch = padded([7, 5], seed=seed)
        plain(**batch, use_cache=False).loss.backward()
        (model if seed % 2 else step)(**batch, use_cache=False).loss.backward()
    for name, gradient in adapter_gradients(plain).items():
        torch.testing.assert_close(adapter_gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accumulation_equals_one_batch():
    """Two micro-batches, compiled, give the router the gradient of both in one batch."""
    from accelerate.state import GradientState

    halves = [{"input_ids": tokens(2, 7, seed=seed), "labels": tokens(2, 7, seed=seed)} for seed in range(2)]
    plain = switch(one_layer(), router_aux_loss_coef=1.0).train()
    model = copy.deepcopy(plain)
    plain(**{key: torch.cat([half[key] for half in halves]) for key in halves[0]}).loss.backward()
    step = compiled(model, "aot_eager")
    for index, half in enumerate(halves):
        GradientState()._set_sync_gradients(index == 1)
        (step(**half).loss / 2).backward()
    for name, gradient in adapter_gradients(plain).items():
        torch.testing.assert_close(adapter_gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


def whole(model: nn.Module) -> Any:
    return compiled(model, "aot_eager")


def by_layer(model: nn.Module) -> nn.Module:
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    return model


def without_head(model: nn.Module) -> nn.Module:
    model.base_model.model.model.compile(fullgraph=True, backend="aot_eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(  # where the model's outputs are made outside of the graph, labels are none of its business
    "prepare, labels", [(whole, True), (whole, False), (by_layer, True), (without_head, True)]
)
def test_every_output_brings_the_losses(prepare, labels):
    """The router's losses come with the weight of `loss`, or with 1 where that has no part; outputs may be changed in place."""
    objectives: dict[str, Callable[[Any], torch.Tensor]] = {
        "logits": lambda output: output.logits.square().mean(),
        "logits, in place": lambda output: output.logits.div_(0.7).square().mean(),
        "cache": lambda output: output.past_key_values.layers[1].values.square().mean(),
        "loss": lambda output: 0.5 * output.loss,
        "loss and logits": lambda output: 0.25 * output.loss + output.logits.square().mean(),
    }
    plain = switch(two_layers(), router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    model = copy.deepcopy(plain)
    step = prepare(model)
    batch = padded([7, 5])
    if not labels:
        del batch["labels"]
    for name, objective in objectives.items():
        if "loss" in name and not labels:
            continue
        for each in (plain, model):
            each.zero_grad()
        objective(plain(**batch)).backward()
        objective(step(**batch)).backward()
        expected = adapter_gradients(plain)
        for key, gradient in adapter_gradients(model).items():
            wanted = expected.get(key, torch.zeros_like(gradient))  # a compiled backward has zeros for the unused
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.slow
def test_switching_adapters_after_compilation():
    model = switch(one_layer())
    torch.manual_seed(5)
    model.add_adapter("other", switch_config(num_experts=3, top_k=1, r=5, target_modules=TARGETS))
    randomize_adapter(model, "other", seed=7)
    step = compiled(model.eval(), "eager")
    with torch.no_grad():
        for adapter in ("default", "other", "default"):
            model.set_adapter(adapter)
            torch.testing.assert_close(step(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
        with model.disable_adapter():
            bare = step(input_ids=tokens()).logits
        torch.testing.assert_close(bare, one_layer()(input_ids=tokens()).logits)


def test_mixed_batch():
    model = switch(one_layer())
    torch.manual_seed(5)
    model.add_adapter("other", switch_config(num_experts=3, top_k=1, r=5, target_modules=TARGETS))
    randomize_adapter(model, "other", seed=7)
    names = ["other", "default", "__base__"]
    step = compiled(model.eval(), "eager")
    with torch.no_grad():
        expected = model(input_ids=tokens(3), adapter_names=names).logits
        torch.testing.assert_close(step(input_ids=tokens(3), adapter_names=names).logits, expected)


def test_recording_a_compiled_model():
    model = switch(one_layer()).eval()
    step = compiled(model, "eager")
    with torch.no_grad():
        step(input_ids=tokens())
        with model.record_routing() as expected:
            model(input_ids=tokens(seed=1))
        for _ in range(2):
            with model.record_routing() as recorded:
                step(input_ids=tokens(seed=1))
            assert recorded.summary()["load"] == expected.summary()["load"]
            assert recorded.summary()["entropy"] == pytest.approx(expected.summary()["entropy"])
        step(input_ids=tokens())
    assert recorded.summary()["tokens"] == tokens().numel()  # nothing was counted after the block


@pytest.mark.parametrize("sampling", [False, True])
def test_generate_with_a_static_cache_compiles_the_decode_step(sampling):
    """What transformers does by itself on a GPU, asked for on the CPU."""
    from transformers import CompileConfig

    results, outputs = [], []
    for adapt in (lora, switch):
        torch._dynamo.reset()
        graphs = Graphs()
        backend = lambda *args, graphs=graphs: graphs(*args)  # noqa: E731  (a function, because generate() copies the config)
        config = CompileConfig(fullgraph=True, backend=backend, mode=None)
        config._compile_all_devices = True
        model = adapt(one_layer()).eval()
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": sampling, "eos_token_id": None, "pad_token_id": 0}
        batch = padded([5, 3], side="left")
        del batch["labels"]
        for static in ({}, {"cache_implementation": "static", "compile_config": config}):
            torch.manual_seed(0)
            results.append(model.generate(**batch, **settings, **static))
        outputs.append(graphs.outputs)
    assert torch.equal(results[2], results[3])
    assert outputs[0] and outputs[1] == outputs[0]


@pytest.mark.slow
def test_inductor():
    """The default backend, forward and backward; on two linears, because its C++ takes long to compile."""
    torch.manual_seed(0)
    plain = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), switch_config(target_modules=["0", "1"]))
    randomize_adapter(plain).train()
    model, x = copy.deepcopy(plain), torch.randn(2, 5, 8)
    plain(x).square().mean().backward()
    torch.compile(model, fullgraph=True)(x).square().mean().backward()
    for name, gradient in adapter_gradients(plain).items():
        torch.testing.assert_close(adapter_gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_product_on_a_gpu_starts_from_a_copy_of_the_base_layers_result():
    """Inductor copies what an `addmm` adds to, a pass over all activations, and joins a plain sum with what comes next."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    products = []

    def look(graph, _):
        products.extend(node.target for node in graph.graph.nodes if "mm" in str(node.target))
        return make_boxed_func(graph)

    model = get_peft_model(tiny_llama(), switch_config()).to("cuda", torch.bfloat16)
    randomize_adapter(model)
    batch = {key: value.to("cuda") for key, value in padded([6, 4]).items()}
    torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True)(**batch).loss.backward()
    assert torch.ops.aten.mm.default in products
    assert torch.ops.aten.addmm.default not in products


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["base_model.model", "base_model.model.model"], ids=["backbone", "decoder"])
def test_a_backbone_that_is_compiled_in_place_has_the_losses_in_its_own(inner):
    """They are in `output.loss`, and scale with it."""
    model = get_peft_model(tiny_llama(), switch_config(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)).train()
    randomize_adapter(model)
    batch, eager = padded([5, 7]), copy.deepcopy(model)
    model.get_submodule(inner).compile(backend="aot_eager")
    losses = []
    for each in (eager, model):
        losses.append(each(**batch).loss)
        (2 * losses[-1]).backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    expected = adapter_gradients(eager)
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
