"""`add_expert` and `remove_expert`: the other experts stay what they are, to the bit, and what does not fit is refused."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers import adapted, randomize_adapter, router_layer, switch_config, switch_layers, tiny_llama, tokens
from loaders import configure
from loras import CONFIG, LINEARS, alone, logits_of, lora_oracle, peft_logits, save_lora
from oracle import Oracle
from peft_loraswitch import add_expert, export_expert, from_loras, remove_expert, router_from_texts, use_experts
from trainer_tools import OrderedTrainer, arguments, collate, samples, tokenizer
from unchanged import unchanged

pytestmark = pytest.mark.compat
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("loras")
    settings = {
        "a": {},
        "b": {"r": 3, "lora_alpha": 6},
        "big": {"r": 9, "lora_alpha": 5},
        "c": {"target_modules": ["q_proj"]},
    }
    return {name: save_lora(folder / name, tiny_llama(), i, **s) for i, (name, s) in enumerate(settings.items())}


def routed(folders: dict[str, str], *names: str, **options) -> PeftModel:
    return randomize_router(from_loras(tiny_llama(), [folders[name] for name in names], **options))


def randomize_router(model: PeftModel) -> PeftModel:
    torch.nn.init.normal_(router_layer(model).loraswitch_router["default"].weight, std=1.0)
    return model


def experts_of(model: PeftModel, adapter: str = "default") -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Copies of every expert's A and B, by linear."""
    return {
        name: [
            (a.clone(), b.clone())
            for a, b in zip(
                layer.loraswitch_A[adapter].weight.detach(), layer.loraswitch_B[adapter].weight.detach(), strict=True
            )
        ]
        for name, layer in switch_layers(model).items()
        if adapter in layer.loraswitch_A
    }


def check_same_experts(before: list, after: list) -> None:
    """Equal to the bit; the longer of two ranks ends in zeros."""
    for (a, b), (new_a, new_b) in zip(before, after, strict=True):
        rank = min(a.shape[0], new_a.shape[0])
        assert torch.equal(a[:rank], new_a[:rank]) and torch.equal(b[:, :rank], new_b[:, :rank])
        assert not a[rank:].any() and not new_a[rank:].any() and not b[:, rank:].any() and not new_b[:, rank:].any()


def test_a_lora_of_a_backbone_with_another_name(folders, tmp_path):
    shutil.copytree(folders["b"], tmp_path / "b")
    configure(base_model_name_or_path="you/two")(tmp_path / "b")
    model = routed(folders, "a", "c")
    model.get_base_model().name_or_path = "you/one"
    with pytest.raises(ValueError, match="'you/two'.*'you/one'.*ignore_base_name=True"):
        add_expert(model, tmp_path / "b")
    assert model.peft_config["default"].num_experts == 2
    assert add_expert(model, tmp_path / "b", ignore_base_name=True) == 2


def test_a_configuration_given_twice_is_two(folders, tmp_path):
    """To two adapters of a model (TRL's DPOTrainer does so) and to two models: experts that come to one are no others'."""
    config = switch_config()
    model, twin = (randomize_adapter(get_peft_model(tiny_llama(), config)).eval() for _ in range(2))
    model.add_adapter("ref", model.peft_config["default"])
    randomize_adapter(model, "ref")
    model.set_adapter("ref")
    expected = logits_of(model, input_ids=tokens())
    assert add_expert(model, name="law", adapter_name="default") == 4
    assert [each.num_experts for each in (model.peft_config["ref"], twin.peft_config["default"], config)] == [4, 4, 4]
    assert torch.equal(logits_of(model, input_ids=tokens()), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ref").eval()
    torch.testing.assert_close(logits_of(loaded, input_ids=tokens()), expected, **ROUNDING)
    model.peft_config["default"].trainable = ["law"]
    model.set_adapter("default")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"expert_4"}
    with pytest.raises(ValueError, match="4 is unknown"), use_experts(twin, 4):
        pass


@pytest.mark.parametrize("gone", ["a", "b"])
@pytest.mark.parametrize("trained", [["law"], ["b", "law"], ["c"]], ids=str)
def test_what_trains_alone_goes_on(folders, gone, trained):
    """Also the last of the stack, whose place is gone when another has left."""
    model = routed(folders, "a", "b", "c")
    add_expert(model, name="law")
    model.peft_config["default"].trainable = trained
    model.set_adapter("default")
    stacks = len([p for p in model.parameters() if p.requires_grad]) // len(trained)
    if trained == ["law"] and gone == "a":
        held = [p for p in model.parameters() if p.requires_grad]  # as an optimizer would
        with pytest.warns(UserWarning, match="make a new one"):
            remove_expert(model, gone)
        del held
    else:
        remove_expert(model, gone)
    left = [name for name in trained if name != gone]
    names = model.peft_config["default"].expert_names
    wanted = {f"expert_{names.index(name)}" for name in left}
    found = [name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad]
    assert set(found) == wanted and len(found) == stacks * len(left)
    with use_experts(model, left[-1]):
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_weights_that_are_elsewhere(folders, tmp_path):
    """accelerate's offloading leaves them on the meta device: refused by name, and the model goes on."""
    accelerate = pytest.importorskip("accelerate")
    model = routed(folders, "a", "b").eval()
    expected = logits_of(model, input_ids=tokens())
    accelerate.cpu_offload(model, execution_device="cpu")
    for call in (
        lambda: add_expert(model, name="law"),
        lambda: remove_expert(model, "a"),
        lambda: export_expert(model, "a", tmp_path / "a"),
        lambda: router_from_texts(model, tokenizer(), {"a": ["one"], "b": ["two"]}),
        lambda: model.routing_report("one", tokenizer()),
    ):
        with pytest.raises(RuntimeError, match="not in memory.*remove_hook_from_submodules"):
            call()
    torch.testing.assert_close(logits_of(model, input_ids=tokens()), expected)
    assert model.peft_config["default"].num_experts == 2


@pytest.mark.parametrize("new", ["c", "big"])
def test_add_a_lora(folders, tmp_path, new):
    model = routed(folders, "a", "b")
    experts, rows = experts_of(model), router_layer(model).loraswitch_router["default"].weight.detach().clone()
    assert add_expert(model, folders[new]) == 2
    config = model.peft_config["default"]
    assert config.num_experts == 3 and config.expert_names == ["a", "b", new]
    for name, now in experts_of(model).items():
        check_same_experts(experts[name], now[:2])
    weight = router_layer(model).loraswitch_router["default"].weight
    assert torch.equal(weight[:2], rows) and 0 < weight[2].abs().max() <= 0.1 * 32**-0.5
    for expert, lora in enumerate(("a", "b", new)):
        with alone(model, expert):
            got = logits_of(model, tokens())
        torch.testing.assert_close(got, peft_logits(folders[lora], tiny_llama(), tokens()), **ROUNDING)
        torch.testing.assert_close(
            got.double(), logits_of(lora_oracle(folders[lora], tiny_llama()), tokens()), **ROUNDING
        )
    torch.testing.assert_close(logits_of(model, tokens()).double(), Oracle(model)(tokens()).logits, **ROUNDING)
    assert model.router_stats()["expert_names"] == ["a", "b", new] and len(model.router_stats()["load"]) == 3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens()), logits_of(tiny_llama(), tokens()))


@pytest.mark.parametrize("router", [None, "layers.1.self_attn.q_proj"])
@pytest.mark.parametrize("shared", [0, 2])
def test_add_a_fresh_expert_and_take_it_out(shared, router):
    """Also with shared experts, which stay behind the routed ones, and patterns."""
    model = adapted(
        tiny_llama(),
        num_shared_experts=shared,
        router_module=router,
        rank_pattern={"up_proj": 5},
        alpha_pattern={"k_proj": 3},
    )
    before, experts, out = model.peft_config["default"].to_dict(), experts_of(model), logits_of(model, tokens())
    row = torch.randn(32)
    assert add_expert(model, router_row=row) == 4
    assert model.peft_config["default"].expert_names is None
    for name, layer in switch_layers(model).items():
        now = experts_of(model)[name]
        if layer.routing_options["default"].is_routed:
            assert len(now) == 5 + shared and not now[4][1].any() and now[4][0].abs().max() > 0
            del now[4]
        check_same_experts(experts[name], now)
    assert torch.equal(router_layer(model).loraswitch_router["default"].weight[4], row)
    torch.testing.assert_close(logits_of(model, tokens()).double(), Oracle(model)(tokens()).logits, **ROUNDING)
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    model.eval()
    assert all(p.grad is not None for n, p in model.named_parameters() if "loraswitch_router" in n)
    remove_expert(model, 4)
    assert model.peft_config["default"].to_dict() == before
    for name, now in experts_of(model).items():
        check_same_experts(experts[name], now)
    assert torch.equal(logits_of(model, tokens()), out)


def test_remove(folders, tmp_path):
    """The middle one, by name; the rank is then that of the largest left, and the others compute the same."""
    model = routed(folders, "a", "big", "b", top_k=1)
    experts, rows = experts_of(model), router_layer(model).loraswitch_router["default"].weight.detach().clone()
    with alone(model, 2):
        wanted = logits_of(model, tokens())
    remove_expert(model, "big")
    config = model.peft_config["default"]
    assert config.expert_names == ["a", "b"] and config.num_experts == 2 and config.r == 4 and not config.rank_pattern
    for name, now in experts_of(model).items():
        check_same_experts([experts[name][0], experts[name][2]], now)
        assert now[0][0].shape[0] == 4
    assert torch.equal(router_layer(model).loraswitch_router["default"].weight, rows[[0, 2]])
    with alone(model, 1):
        torch.testing.assert_close(logits_of(model, tokens()), wanted, **ROUNDING)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path), tokens()), logits_of(model, tokens())
    )
    remove_expert(model, 0)
    config = model.peft_config["default"]
    assert config.num_experts == 1 and config.expert_names == ["b"]


def test_names(folders):
    model = adapted(tiny_llama(), target_modules=LINEARS)
    add_expert(model, folders["a"], name="new")
    assert model.peft_config["default"].expert_names == ["expert_0", "expert_1", "expert_2", "expert_3", "new"]
    for name, lora, word in (
        ("new", None, "name='new' is the name of another"),
        (None, None, "name is missing"),
        ("", None, "name"),
        (3, None, "name"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=word):
            add_expert(model, lora, name=name)


def test_refused(folders, tmp_path):
    model = routed(folders, "a", "b")
    wide = save_lora(tmp_path / "wide", tiny_llama(), target_modules=["q_proj", "gate_proj"])
    broken = save_lora(tmp_path / "broken", tiny_llama())
    configure(use_dora=True)(Path(broken))
    for call, word in {
        lambda: add_expert(model, wide): "wide/.*gate_proj.*has no routed experts.*from_loras",
        lambda: add_expert(model, broken): "use_dora",
        lambda: add_expert(model, tmp_path / "nothing" / "x" / "y" / "z"): "nothing",
        lambda: add_expert(model, folders["c"], router_row=torch.ones(31)): r"router_row is \[31\]",
        lambda: add_expert(model, folders["c"], router_row=torch.full((32,), float("nan"))): "NaN",
        lambda: add_expert(model, folders["c"], adapter_name="x"): "adapter_name='x'",
        lambda: add_expert(model, folders["c"], name="a"): "another expert",
        lambda: remove_expert(model, "c"): "the names a, b and indices 0 to 1",
        lambda: remove_expert(model, 2): "indices 0 to 1",
        lambda: remove_expert(model, "a"): "top_k=2 of the 2 experts",
    }.items():
        with unchanged(model), pytest.raises(Exception, match=word):
            call()
    one = adapted(tiny_llama(), num_experts=1, top_k=1)
    with unchanged(one), pytest.raises(ValueError, match="the last of adapter 'default'"):
        remove_expert(one, 0)
    model.get_base_model().name_or_path = "you/one"
    configure(base_model_name_or_path="you/two")(Path(wide))
    with unchanged(model), pytest.raises(ValueError, match="'you/two', but the model's name is 'you/one'"):
        add_expert(model, wide)
    with pytest.raises(ValueError, match="carries no LoRA-Switch adapter"):
        add_expert(tiny_llama())


def test_not_while_the_model_is_fused_or_recorded(folders):
    model = adapted(tiny_llama())
    with model.fuse_for_inference(strategy="fused"):
        for call in (lambda: add_expert(model), lambda: remove_expert(model, 0)):
            with unchanged(model), pytest.raises(RuntimeError, match=r"call unfuse\(\)"):
                call()
    with model.record_routing(), pytest.raises(RuntimeError, match="record_routing"):
        add_expert(model)
    for call in (lambda: add_expert(model), lambda: remove_expert(model, 0)):
        with use_experts(model, 1), unchanged(model), pytest.raises(RuntimeError, match=r"within use_experts\(\)"):
            call()
    add_expert(model)
    wanted = logits_of(model, tokens())
    with model.fuse_for_inference(strategy="fused"):
        torch.testing.assert_close(logits_of(model, tokens()), wanted, **ROUNDING)


def test_a_configuration_that_was_edited(tmp_path):
    """Layers stay as they were made, also when experts come or go; saving says so, and what is saved runs as edited."""
    model = adapted(tiny_llama(), num_experts=5, top_k=2)
    wanted = logits_of(model, tokens())
    model.peft_config["default"].top_k = 1
    model.peft_config["default"].router_decay = 0.5
    assert torch.equal(logits_of(model, tokens()), wanted)
    remove_expert(model, 4)
    with model.record_routing() as recorded:
        logits_of(model, tokens())
    assert recorded.summary()["mean_experts"] == 2
    with pytest.warns(
        UserWarning, match=r"edited after .*: top_k from 2 to 1, router_decay from 0.0 to 0.5\. This model"
    ):
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with again.record_routing() as recorded:
        logits_of(again, tokens())
    assert recorded.summary()["mean_experts"] == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again.save_pretrained(tmp_path)
    assert not any("edited" in str(each.message) for each in told)


def test_an_interruption_changes_nothing(folders, monkeypatch):
    model = routed(folders, "a", "b")
    with unchanged(model):
        with monkeypatch.context() as patched:
            patched.setattr("peft_loraswitch.compose.resize.PendingBatches", interrupt)
            with pytest.raises(KeyboardInterrupt):
                add_expert(model, folders["big"])
    add_expert(model, folders["big"])


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_optimizer_of_before_is_told(folders):
    model = routed(folders, "a", "b")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="optimizer, make a new one"):
        add_expert(model, folders["c"])
    del optimizer
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_expert(model, "c")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_a_checkpoint_with_another_number_of_experts_is_refused(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    model = adapted(tiny_llama())
    OrderedTrainer(
        model=model, args=arguments(tmp_path, **settings), train_dataset=samples(), data_collator=collate
    ).train()
    grown = adapted(tiny_llama())
    add_expert(grown)
    trainer = OrderedTrainer(
        model=grown, args=arguments(tmp_path, **settings), train_dataset=samples(), data_collator=collate
    )
    with pytest.raises(ValueError, match="num_experts=4, but the adapter 'default'.* has 5"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with unchanged(grown.eval()), pytest.raises(ValueError, match="num_experts=4"):
        grown.load_adapter(tmp_path / "checkpoint-1", "default")


def test_one_of_two_adapters(folders):
    """The other one, and what is active, stay as they are."""
    model = routed(folders, "a", "b")
    model.add_adapter("other", switch_config(init_weights=False))
    randomize_adapter(model, "other")
    experts = experts_of(model, "other")
    out = logits_of(model, tokens())
    add_expert(model, adapter_name="other")
    assert torch.equal(logits_of(model, tokens()), out)
    for name, now in experts_of(model, "other").items():
        check_same_experts(experts[name], now[:4])
    model.set_adapter("other")
    assert logits_of(model, tokens()).isfinite().all()


def test_train_the_new_one_and_export_it(folders, tmp_path):
    """From two experts to three and back to files, which are those of before to the bit but for the one that trained."""
    model = routed(folders, "a", "b")
    add_expert(model, name="new")
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(2):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    export_expert(model, "new", tmp_path / "new")
    with alone(model, 2):
        wanted = logits_of(model, tokens())
    torch.testing.assert_close(peft_logits(str(tmp_path / "new"), tiny_llama(), tokens()), wanted, **ROUNDING)
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["peft_type"] == "LORA"


def test_a_base_expert_stays_the_last_choice(folders):
    """Its row of the router is behind those of the experts, whichever of them come and go."""
    model = routed(folders, "a", "b", top_k=1, normalize_gates=True, base_expert=True)
    router = router_layer(model).loraswitch_router
    before = router["default"].weight.detach().clone()
    row = torch.randn(before.shape[1])
    assert add_expert(model, folders["big"], router_row=row) == 2
    assert torch.equal(router["default"].weight, torch.cat([before[:2], row[None], before[2:]]))
    with torch.no_grad():
        router["default"].weight[3] += 100 * tokens_mean(model)
        with model.disable_adapter():
            backbone = model(tokens()).logits
        with model.record_routing() as recorded:
            chosen = model(tokens()).logits
    summary = recorded.summary()
    assert len(summary["load"]) == 3 and summary["expert_names"] == ["a", "b", "big"]
    assert abs(sum(summary["load"]) + summary["base_share"] - 1) < 1e-6
    if summary["base_share"] == 1:
        assert torch.equal(chosen, backbone)
    remove_expert(model, "a")
    assert router["default"].weight.shape[0] == 3
    with model.record_routing() as recorded:
        model(tokens())
    assert len(recorded.summary()["load"]) == 2


def tokens_mean(model: PeftModel) -> torch.Tensor:
    """The mean input of the router, so that a row along it wins."""
    seen = []
    handle = router_layer(model).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1).mean(0))
    )
    with torch.no_grad(), model.disable_adapter():
        model(tokens())
    handle.remove()
    return seen[0]
