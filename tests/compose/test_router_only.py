"""`trainable="router"`: the experts stay as they are, cost no memory, and the router gets the gradient that it gets anyway."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import oracle
from helpers import (
    adapted,
    adapter_gradients,
    padded,
    randomize_adapter,
    router_layer,
    switch_config,
    switch_layers,
    tiny_gpt2,
    tiny_llama,
    tokens,
    without_losses,
)
from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.inference.fuse import fuse
from trainer_tools import OrderedTrainer, arguments, collate, samples, sentence, tokenizer
from unchanged import unchanged

BATCH = {"input_ids": tokens(), "labels": tokens()}
ROUTER = {"trainable": "router"}


def training(model: nn.Module) -> set[str]:
    """The kinds of adapter weights that train, by adapter: 'default A', ..."""
    kinds = [name.split(".loraswitch_")[1].split(".")[:2] for name, p in model.named_parameters()
             if p.requires_grad and ".loraswitch_" in name]  # fmt: skip
    return {f"{adapter} {kind}" for kind, adapter in kinds}


def same_experts(model: nn.Module, **overrides: Any) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights: one trains everything, one its router."""
    twin = copy.deepcopy(model)
    return adapted(model, **overrides).train(), adapted(twin, **overrides, **ROUTER).train()


# ----------------------------------------------------------------------------------------------------- the configuration


def test_the_word_is_saved_only_where_it_says_something(tmp_path):
    for word in ("all", "router"):
        config = LoRASwitchConfig(trainable=word)
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved.get("trainable", "absent") == ("absent" if word == "all" else word)
        for again in (LoRASwitchConfig.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config))):
            assert again.trainable == word


@pytest.mark.parametrize("word", ["", "experts", None, True, ["router"], "Router"])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match="trainable=.* is not one of all, router"):
        LoRASwitchConfig(trainable=word)


def test_a_word_that_is_wrong_later_changes_nothing():
    model = adapted(tiny_llama(), **ROUTER)
    model.peft_config["default"].trainable = "rooter"
    for call in (
        lambda: model.set_adapter("default"),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.base_model.set_requires_grad("default"),
    ):
        with unchanged(model), pytest.raises(ValueError, match="trainable='rooter'"):
            call()


# ------------------------------------------------------------------------------------------------------ what trains, when


def peft_model() -> nn.Module:
    return get_peft_model(tiny_llama(), switch_config(**ROUTER))


def transformers_model() -> nn.Module:
    model = tiny_llama()
    model.add_adapter(switch_config(**ROUTER), "default")
    return model


def switch_away_and_back(model: nn.Module, name: str) -> None:
    model.add_adapter(*((name, switch_config()) if isinstance(model, PeftModel) else (switch_config(), name)))
    model.set_adapter(name)
    assert training(model) == {f"{name} A", f"{name} B", f"{name} router"}
    model.set_adapter("default")


def off_and_on(model: nn.Module) -> None:
    target = model.base_model if isinstance(model, PeftModel) else model
    (target.disable_adapter_layers if isinstance(model, PeftModel) else target.disable_adapters)()
    assert training(model) == set()
    (target.enable_adapter_layers if isinstance(model, PeftModel) else target.enable_adapters)()


def delete_another(model: nn.Module) -> None:
    """The router-only adapter is active in the place of one that is deleted, and trains as that one did."""
    switch_away_and_back(model, "other")
    model.set_adapter("other")
    model.delete_adapter("other")


CHANGES = {
    "nothing": lambda model: None,
    "set_adapter": lambda model: model.set_adapter("default"),
    "another adapter": lambda model: switch_away_and_back(model, "other"),
    "off and on": off_and_on,
    "deleted another": delete_another,
    "float64": lambda model: model.double(),
    "training mode": lambda model: model.train(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("made", [peft_model, transformers_model], ids=["peft", "transformers"])
def test_only_the_router_trains_whatever_happens(made, change):
    model = made()
    CHANGES[change](model)
    assert training(model) == {"default router"}


@pytest.mark.parametrize("change", ["context", "requires_grad", "deepcopy", "pickle", "fused and back"])
def test_only_the_router_trains_after_this(change):
    model = peft_model()
    if change == "context":
        with model.disable_adapter():
            assert training(model) == set()
    elif change == "requires_grad":
        model.set_requires_grad("default", False)
        assert training(model) == set()
        model.set_requires_grad("default", True)
    elif change == "deepcopy":
        model = copy.deepcopy(model)
        model.set_adapter("default")
        assert switch_layers(model) and all(
            layer.adapter_config["default"] is model.peft_config["default"] for layer in switch_layers(model).values()
        ), "the copy follows its own configuration"
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
        model.set_adapter("default")
    else:
        model.eval()
        with fuse(model.get_base_model()):
            model.set_adapter("default")
            assert training(model) == {"default router"}
        model.train()
    assert training(model) == {"default router"}


def test_an_additional_adapter_can_be_the_one_whose_router_trains():
    model = adapted(tiny_llama())
    model.add_adapter("router", switch_config(**ROUTER))
    assert training(model) == {"default A", "default B", "default router"}
    model.set_adapter("router")
    assert training(model) == {"router router"}
    model.base_model.set_adapter(["router", "default"])
    assert training(model) == {"router router", "default A", "default B", "default router"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading(low_cpu_mem_usage, tmp_path):
    model = adapted(tiny_llama(), **ROUTER)
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    frozen = PeftModel.from_pretrained(tiny_llama(), tmp_path, **options)
    assert training(frozen) == set()
    trained = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True, **options)
    assert training(trained) == {"default router"}
    trained.load_adapter(tmp_path, adapter_name="second", is_trainable=True, **options)
    assert training(trained) == {"default router", "second router"}
    trained.set_adapter("second")
    assert training(trained) == {"second router"}
    torch.testing.assert_close(trained(**BATCH).logits, model(**BATCH).logits)


def test_the_router_first_and_then_all(tmp_path):
    """As documented, on a loaded adapter; both ways."""
    adapted(tiny_llama(), **ROUTER).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    model.peft_config["default"].trainable = "all"
    model.set_adapter("default")
    assert training(model) == {"default A", "default B", "default router"}
    model.save_pretrained(tmp_path)
    assert "trainable" not in json.loads((tmp_path / "adapter_config.json").read_text())
    model.peft_config["default"].trainable = "router"
    model.set_adapter("default")
    assert training(model) == {"default router"}


def loaded_by_peft(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)


def loaded_into_peft(folder: Path) -> nn.Module:
    model = get_peft_model(tiny_llama(), switch_config(), adapter_name="first")
    model.load_adapter(folder, "default", is_trainable=True)
    return model


def loaded_by_transformers(folder: Path) -> nn.Module:
    model = tiny_llama()
    model.load_adapter(str(folder), "default")
    return model


def loaded_auto(folder: Path) -> nn.Module:
    import transformers

    tiny_llama().save_pretrained(folder / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder / "base")}))
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", [loaded_by_peft, loaded_into_peft, loaded_by_transformers, loaded_auto])
def test_the_word_counts_whoever_has_loaded_the_adapter(load, tmp_path):
    adapted(tiny_llama()).save_pretrained(tmp_path)
    model = load(tmp_path)
    for word, expected in (("router", {"default router"}), ("all", {"default A", "default B", "default router"})):
        model.peft_config["default"].trainable = word
        model.set_adapter("default")
        assert training(model) == expected


@pytest.mark.parametrize("shared", [False, True])
def test_print_trainable_parameters(shared, capsys):
    fields = {"num_shared_experts": 1, "router_module": "layers.1.self_attn.q_proj"} if shared else {}
    model = get_peft_model(tiny_llama(), switch_config(**ROUTER, **fields))
    model.print_trainable_parameters()
    assert "trainable params: 128 ||" in capsys.readouterr().out  # 4 experts times 32 features


def test_what_else_the_adapter_trains_trains():
    model = get_peft_model(
        tiny_llama(),
        switch_config(**ROUTER, modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3]}),
    )
    others = {name for name, p in model.named_parameters() if p.requires_grad and ".loraswitch_" not in name}
    assert len(others) == 2, others
    assert training(model) == {"default router"}


# -------------------------------------------------------------------------------------------------------------- gradients


KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "top-1": {"top_k": 1},
    "raw gates": {"top_k": 3, "normalize_gates": False},
    "shared": {"num_shared_experts": 2, "router_module": "layers.1.self_attn.q_proj"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", [tiny_llama, tiny_gpt2])
def test_the_router_gets_the_gradient_that_it_gets_anyway(backbone, kind):
    """Bit for bit, through the experts' outputs and from the losses; nothing else has one."""
    fields = dict(KINDS[kind])
    if "router_module" in fields and backbone is tiny_gpt2:
        fields["router_module"] = "h.1.attn.c_attn"
    both, alone = same_experts(backbone(), **fields, router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    for model in (both, alone):
        model(**padded([7, 5])).loss.backward()
    found = adapter_gradients(alone)
    (name,) = found
    assert "loraswitch_router" in name and found[name].norm() > 1e-4
    torch.testing.assert_close(found[name], adapter_gradients(both)[name], rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for n, p in alone.named_parameters() if n != name)


def test_the_gradient_is_the_oracles():
    model = without_losses(adapted(tiny_llama(), **ROUTER)).train()
    exact = oracle.Oracle(model)
    model(**BATCH).loss.backward()
    exact(**BATCH).loss.backward()
    ((name, gradient),) = adapter_gradients(model).items()
    torch.testing.assert_close(gradient.double(), exact.gradients()[name], rtol=1e-4, atol=1e-6)


def saved_by_backward(model: nn.Module, layer: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What a forward keeps for backward, and the input of the adapted linear `layer`."""
    kept: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(**BATCH)
    handle.remove()
    return kept, inputs[0]


def test_nothing_is_kept_that_only_the_experts_gradients_need():
    """The input of an adapted linear and the gated hidden of its experts are needed for the gradients of A and B alone."""
    layer = "base_model.model.model.layers.1.mlp.down_proj"
    both, alone = same_experts(tiny_llama(), top_k=4)
    hidden: list[torch.Tensor] = []
    for model in (both, alone):
        model.get_submodule(layer).loraswitch_B["default"].register_forward_pre_hook(
            lambda module, args: hidden.append(args[0])
        )
    for model, expected in ((both, True), (alone, False)):
        hidden.clear()
        kept, x = saved_by_backward(model, layer)
        # hold on to all of them: a freed tensor's memory would be another's
        addresses = {tensor.untyped_storage().data_ptr() for tensor in kept}
        assert (x.untyped_storage().data_ptr() in addresses) is expected
        assert (hidden[0].untyped_storage().data_ptr() in addresses) is expected


def test_the_router_learns_from_experts_that_exist():
    """The smallest task: of two experts, one does what is wanted."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model = get_peft_model(
        model,
        LoRASwitchConfig(
            r=4,
            num_experts=2,
            top_k=1,
            target_modules=["0"],
            trainable="router",
            router_aux_loss_coef=0.0,
            router_z_loss_coef=0.0,
        ),  # fmt: skip
    )
    randomize_adapter(model, std=1.0)
    layer = router_layer(model)
    experts = {n: p.detach().clone() for n, p in model.named_parameters() if "router" not in n}
    x = torch.randn(64, 4)
    x[:, 0] = x[:, 0].abs() + 0.5  # so that a router without bias can send every token the same way
    base, a, b = (
        each.weight.detach()
        for each in (layer.base_layer, layer.loraswitch_A["default"], layer.loraswitch_B["default"])
    )
    target = x @ base.T + layer.scaling["default"] * (x @ a[1].T @ b[1].T)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    model.eval()
    with model.record_routing() as recorded:
        model(x)
    assert recorded.summary()["load"][1] > 0.9
    assert all(torch.equal(p, experts[n]) for n, p in model.named_parameters() if "router" not in n)


def test_experts_that_are_empty_are_told_of_once():
    """A router above experts that add nothing gets no gradient through them."""
    model = get_peft_model(tiny_llama(), switch_config(**ROUTER))
    with pytest.warns(UserWarning, match="trainable='router', but its experts add nothing"):
        model(**BATCH)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*its experts add nothing")
        model(**BATCH)
        adapted(tiny_llama(), **ROUTER).train()(**BATCH)
        get_peft_model(tiny_llama(), switch_config()).train()(**BATCH)
        get_peft_model(tiny_llama(), switch_config(**ROUTER)).eval()(**BATCH)


# ------------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind, reentrant):
    plain = adapted(tiny_llama(num_hidden_layers=3), **KINDS[kind], **ROUTER).train()
    checked = copy.deepcopy(plain)
    checked.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checked.enable_input_require_grads()
    for model in (plain, checked):
        model(**padded([7, 5])).loss.backward()
    expected, found = adapter_gradients(plain), adapter_gradients(checked)
    (name,) = expected
    assert found.keys() == expected.keys() and expected[name].norm() > 1e-4
    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_that_would_lose_the_gradient_is_refused():
    model = adapted(tiny_llama(num_hidden_layers=3), **ROUTER).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for name in (
        "_require_grads_hook",
        "_require_grads_hooks",
    ):  # what PEFT or Transformers may have done by themselves
        hooks = getattr(model.get_base_model(), name, None)
        for hook in hooks if isinstance(hooks, list) else [hooks] if hooks is not None else []:
            hook.remove()
    with pytest.raises(RuntimeError, match="enable_input_require_grads"):
        model(**padded([7, 5]))


# --------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
def test_compiled_training_step():
    model = adapted(tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"], **ROUTER).train()
    eager = copy.deepcopy(model)
    eager(**BATCH).loss.backward()
    torch.compile(model, backend="aot_eager")(**BATCH).loss.backward()
    expected, found = adapter_gradients(eager), adapter_gradients(model)
    assert found.keys() == expected.keys() and len(found) == 1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradients", [False, True])
def test_fused_layers_leave_training_to_pytorch(gradients):
    model = adapted(tiny_llama(), **ROUTER)
    expected = model(**BATCH)
    fused = copy.deepcopy(model)
    fused.fuse_for_inference()
    with torch.set_grad_enabled(gradients):
        found = fused(**BATCH)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    if gradients:
        for each in (found, expected):
            each.loss.backward()
        ours, theirs = adapter_gradients(fused), adapter_gradients(model)
        assert ours.keys() == theirs.keys() and len(ours) == 1
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- trainers


def weights(model: nn.Module, word: str) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if f"loraswitch_{word}" in n}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def trained(model: nn.Module, tmp_path: Any, resume: Any = None, **overrides: Any) -> OrderedTrainer:
    trainer = OrderedTrainer(
        model=model, args=arguments(tmp_path, **overrides), train_dataset=samples(), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_trainer(checkpointing, tmp_path):
    model = adapted(tiny_llama(), **ROUTER)
    experts, router = {**weights(model, "A"), **weights(model, "B")}, weights(model, "router")
    options: dict[str, Any] = {"max_steps": 2}
    if checkpointing is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = trained(model, tmp_path, **options)
    assert not moved(experts, {**weights(model, "A"), **weights(model, "B")})
    assert moved(router, weights(model, "router"))
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 1


@pytest.mark.slow
def test_resuming_from_a_checkpoint(tmp_path):
    """Four steps at once are two, a new process' model, and two more; the experts stay."""
    options = {"optim": "adamw_torch", "learning_rate": 0.1}
    whole = adapted(tiny_llama(), **ROUTER)
    trained(whole, tmp_path / "whole", max_steps=4, **options)
    first = adapted(tiny_llama(), **ROUTER)
    experts = {**weights(first, "A"), **weights(first, "B")}
    trained(first, tmp_path / "parts", max_steps=2, save_strategy="steps", save_steps=2, **options)
    second = get_peft_model(tiny_llama(), switch_config(**ROUTER))
    trained(second, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2"), max_steps=4, **options)
    assert training(second) == {"default router"}
    assert not moved(experts, {**weights(second, "A"), **weights(second, "B")})
    for name, weight in weights(whole, "router").items():
        torch.testing.assert_close(weights(second, "router")[name], weight, rtol=1e-5, atol=1e-6)


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is an optional dependency")
    from datasets import Dataset

    data = Dataset.from_list([{"text": sentence(seed, 6)} for seed in range(8)])
    adapted(tiny_llama(), **ROUTER).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    experts, router = {**weights(model, "A"), **weights(model, "B")}, weights(model, "router")
    args = arguments(tmp_path / "run", trl.SFTConfig, max_length=64, max_steps=2)
    trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer()).train()
    assert training(model) == {"default router"}
    assert not moved(experts, {**weights(model, "A"), **weights(model, "B")}) and moved(
        router, weights(model, "router")
    )


# ------------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("helper", ["loraplus", "lorafa", "riemannian"])
def test_optimizer_helpers(helper):
    import peft.optimizers

    create = getattr(peft.optimizers, f"create_{helper}_optimizer", None)
    if create is None:
        pytest.skip("PEFT 0.20 does not have it")
    model = adapted(tiny_llama(), **ROUTER).train()
    experts, router = {**weights(model, "A"), **weights(model, "B")}, weights(model, "router")
    if helper == "loraplus":
        optimizer = create(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0)
    elif helper == "lorafa":
        optimizer = create(model, r=3, lora_alpha=6, lr=0.01)
    else:
        optimizer = create(model, torch.optim.SGD, lr=0.01)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 1 and held[0] is router_layer(model).loraswitch_router["default"].weight
    model(**BATCH).loss.backward()
    optimizer.step()
    assert not moved(experts, {**weights(model, "A"), **weights(model, "B")}) and moved(
        router, weights(model, "router")
    )


# ------------------------------------------------------------------------------------------------------------ distributed


def ddp_gradients(rank: int, directory: str) -> dict[str, torch.Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for kind in ("plain", "non-reentrant", "reentrant"):
        model = adapted(tiny_llama(), **ROUTER).train()
        if kind != "plain":
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
        wrapped = DistributedDataParallel(model, static_graph=kind == "reentrant")
        for _ in range(2):  # a parameter that is not used is reported in the second step
            model.zero_grad()
            wrapped(**padded([7, 5], seed=rank)).loss.backward()
        ((_, found[kind]),) = adapter_gradients(model).items()
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo here"
)
def test_ddp_averages_the_routers_gradient(tmp_path):
    from two_processes import on_two

    alone = []
    for rank in range(2):
        model = adapted(tiny_llama(), **ROUTER).train()
        model(**padded([7, 5], seed=rank)).loss.backward()
        ((_, gradient),) = adapter_gradients(model).items()
        alone.append(gradient)
    for found in on_two(ddp_gradients, tmp_path):
        for kind, gradient in found.items():
            torch.testing.assert_close(gradient, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-7, msg=kind)
