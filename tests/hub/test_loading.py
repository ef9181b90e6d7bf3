"""Adapter files that do not fit, through everything that loads one: a named error, and nothing has changed. And files that
are being written when the disk fills up: the previous adapter survives."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from helpers import adapted, randomize_adapter, switch_config, switch_layers, tiny_llama, tiny_llama_classifier, tokens
from loaders import (
    CONFIG,
    LOADERS,
    ROUTER,
    WEIGHTS,
    K,
    configure,
    pickle_instead,
    rewrite,
    same_shape,
    through_loaders,
    truncate,
)
from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.loading import load as loading
from peft_loraswitch.loading import weights_file
from unchanged import unchanged

pytestmark = pytest.mark.compat


BAD_FILES = {
    "truncated": (truncate, rf"{WEIGHTS} is truncated"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), rf"{WEIGHTS} is truncated"),
    "not safetensors": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"hello" * 99),
        rf"{WEIGHTS} is truncated or not",
    ),
    "pickle": (pickle_instead, "adapter_model.bin is a pickle"),
    "no tensors": (rewrite(dict.clear), "missing: .*loraswitch_A"),
    "one tensor missing": (
        rewrite(lambda t: t.pop(K + "B.weight")),
        r"missing: .*layers.1.self_attn.k_proj.loraswitch_B(\.\w+)?.weight",
    ),
    "a layer missing": (
        rewrite(lambda t: (t.pop(K + "A.weight"), t.pop(K + "B.weight"))),
        r"missing: .*k_proj.loraswitch_A",
    ),
    "router missing": (rewrite(lambda t: t.pop(ROUTER)), "missing: .*loraswitch_router"),
    "unknown tensor of ours": (
        rewrite(lambda t: t.update({K + "C.weight": torch.ones(2)})),
        r"not in the model: .*layers.1.self_attn.k_proj.loraswitch_C",
    ),
    "unknown layer": (
        rewrite(lambda t: t.update({k.replace("1.self", "7.self"): v.clone() for k, v in t.items() if K in k})),
        r"not in the model: .*layers.7.self_attn.k_proj",
    ),
    "second router": (
        rewrite(lambda t: t.update({K + "router.weight": t[ROUTER].clone()})),
        r"not in the model: .*layers.1.self_attn.k_proj.loraswitch_router",
    ),
    "foreign tensor": (rewrite(lambda t: t.update({"foo.bar": torch.ones(2)})), "not in the model: foo.bar"),
    "too many inputs": (
        rewrite(lambda t: t.update({K + "A.weight": torch.ones(3, 3, 33)})),
        rf"wrong shape: '{K}A.weight' is \[3, 3, 33\], this model needs \[3, 3, 32\]",
    ),
    "too few outputs": (
        rewrite(lambda t: t.update({K + "B.weight": torch.ones(3, 15, 3)})),
        rf"wrong shape: '{K}B.weight' is \[3, 15, 3\], this model needs \[3, 16, 3\]",
    ),
    "two-dimensional": (
        rewrite(lambda t: t.update({K + "A.weight": torch.ones(9, 32)})),
        "wrong shape.*num_experts, r, in",
    ),
    "router of another width": (
        rewrite(lambda t: t.update({ROUTER: torch.ones(3, 48)})),
        rf"wrong shape: '{ROUTER}' is \[3, 48\], this model needs \[3, 32\]",
    ),
    "whole numbers": (rewrite(lambda t: t.update({K + "A.weight": t[K + "A.weight"].long()})), "floating-point"),
    "one rank differs": (
        rewrite(lambda t: t.update({K + "A.weight": torch.ones(3, 5, 32), K + "B.weight": torch.ones(3, 16, 5)})),
        f"rank 5 .*{K}A.weight.*says r=3",
    ),
    "one number of experts differs": (
        rewrite(lambda t: t.update({K + "A.weight": torch.ones(4, 3, 32)})),
        f"holds 4 experts .*{K}A.weight.*num_experts=3",
    ),
    "E changed in the config": (configure(num_experts=4), f"{WEIGHTS} holds 3 experts.*num_experts=4"),
    "r changed in the config": (configure(r=5), f"{WEIGHTS} holds experts of rank 3.*r=5"),
    "rank_pattern changed": (configure(rank_pattern={"k_proj": 7}), f"{WEIGHTS} holds experts of rank 3.*k_proj.*=7"),
    "top_k above E in the config": (configure(top_k=4), "top_k=4 is larger than num_experts=3"),
    "r of the wrong type": (configure(r="3"), "r='3' must be a whole number"),
    "field of a newer version": (configure(soft_routing=True), "soft_routing.*newer version"),
    "other linears in the config": (configure(target_modules=["q_proj"]), "not in the model: .*down_proj"),
    "no such linears": (configure(target_modules=["nope"]), "nope"),
}
# an adapter that exists keeps its own linears: that the file names others has no effect, as it holds the weights of all
ANOTHER_CHOICE_OF_LINEARS = ("other linears in the config", "no such linears")


EVERYWHERE = ["truncated", "pickle", "a layer missing", "E changed in the config", "no such linears"]


@pytest.mark.parametrize("loader, problem", through_loaders(BAD_FILES, [*EVERYWHERE, "other linears in the config"]))
def test_a_bad_file_changes_nothing(loader, problem, adapter):
    build, load = LOADERS[loader]
    corrupt, message = BAD_FILES[problem]
    corrupt(adapter)
    model = build()
    if loader == "into an adapter that exists" and problem in ANOTHER_CHOICE_OF_LINEARS:
        load(model, adapter)
        return
    with unchanged(model), pytest.raises(ValueError, match=message):
        load(model, adapter)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_good_file_loads_after_a_bad_one(loader, saved, adapter):
    build, load = LOADERS[loader]
    model = build()
    truncate(adapter)
    with pytest.raises(ValueError, match="truncated"):
        load(model, adapter)
    result = load(model, saved / "adapter")
    model = result if isinstance(result, torch.nn.Module) else model
    if loader in ("PeftModel.load_adapter", "second model.load_adapter"):
        model.set_adapter("new")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, reference(saved))


def reference(saved: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny_llama(), saved / "adapter")(tokens()).logits


@pytest.mark.parametrize("loader", LOADERS)
def test_no_file_at_all(loader, adapter):
    build, load = LOADERS[loader]
    (adapter / WEIGHTS).unlink()
    model = build()
    with unchanged(model), pytest.raises(Exception, match="adapter"):  # PEFT's and Transformers' own words
        load(model, adapter)


def test_interrupted_after_the_tensors_were_copied(saved, monkeypatch):
    """A trained adapter that is loaded again has its own values back."""
    model, loaded = same_shape(), reference(saved)

    def interrupt(*args):
        assert torch.equal(model(tokens()).logits, loaded)  # they were copied
        raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(loading, "_check_result", interrupt)
        model.load_adapter(saved / "adapter", "default")


def test_modules_to_save_missing(tmp_path):
    model = get_peft_model(tiny_llama_classifier(), switch_config(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    rewrite(lambda t: [t.pop(k) for k in list(t) if "score" in k])(tmp_path)
    backbone = tiny_llama_classifier()
    with unchanged(backbone), pytest.raises(ValueError, match="score.*modules_to_save"):
        PeftModel.from_pretrained(backbone, tmp_path)
    with unchanged(backbone), pytest.raises(ValueError, match="missing: .*score.weight .of modules_to_save"):
        backbone.load_adapter(tmp_path)


def test_modules_to_save_come_back(tmp_path):
    model = get_peft_model(tiny_llama_classifier(), switch_config(task_type="SEQ_CLS")).eval()
    randomize_adapter(model)
    model.base_model.model.score.modules_to_save["default"].weight.data.normal_()
    model.save_pretrained(tmp_path)
    wanted = model(tokens()).logits
    assert torch.equal(PeftModel.from_pretrained(tiny_llama_classifier(), tmp_path)(tokens()).logits, wanted)
    backbone = tiny_llama_classifier()
    backbone.load_adapter(tmp_path)  # Transformers before 5.20 leaves the head as it was, without a word: we do not
    assert torch.equal(backbone(tokens()).logits, wanted)


@pytest.mark.parametrize("problem", ["a layer missing", "too few outputs", "E changed in the config"])
def test_several_adapters_survive(problem, saved, adapter):
    """Two adapters of different shapes, one in training: both as before, gradients too."""
    corrupt, message = BAD_FILES[problem]
    corrupt(adapter)
    model = adapted(tiny_llama())
    model.add_adapter("other", switch_config(num_experts=2, top_k=1, r=2, init_weights=False))
    model.set_adapter("other")
    model.train()
    wanted = gradients(model)
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.load_adapter(adapter, "new", is_trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))
    model.load_adapter(saved / "adapter", "new")
    model.set_adapter("new")
    model.eval()
    assert torch.equal(model(tokens()).logits, reference(saved))


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_for_another_backbone(saved):
    model = tiny_llama(hidden_size=64)
    message = rf"{WEIGHTS}: wrong shape.*another backbone.*{saved.name}"
    with unchanged(model), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, saved / "adapter")


# ------------------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def hub(adapter, monkeypatch):
    """A repository "me/adapter" whose files are those of `adapter`; only what `find_weights_file` asks for. (Real
    downloads: test_hub.py.)"""
    asked = []

    def hf_hub_download(repo_id, filename, subfolder=None, **kwargs):
        asked.append((repo_id, filename, subfolder, kwargs))
        path = adapter / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404 {filename}")
        return str(path)

    monkeypatch.setattr(weights_file, "hf_hub_download", hf_hub_download)
    return asked


def test_the_weights_on_the_hub_are_found(hub, adapter):
    assert weights_file.find_weights_file("me/adapter", revision="v2", token="t") == str(adapter / WEIGHTS)
    assert hub == [("me/adapter", WEIGHTS, None, {"revision": "v2", "token": "t"})]
    (adapter / WEIGHTS).unlink()
    assert weights_file.find_weights_file("me/adapter") is None  # the loader says what is missing


def test_a_pickle_on_the_hub_is_refused(hub, adapter):
    pickle_instead(adapter)
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        weights_file.find_weights_file("me/adapter")


@pytest.mark.parametrize("loader", ["PeftModel.from_pretrained", "PeftModel.load_adapter", "model.load_adapter"])
@pytest.mark.parametrize("problem", ["truncated", "E changed in the config", "too few outputs"])
def test_a_bad_file_on_the_hub_changes_nothing(loader, problem, hub, adapter, monkeypatch):
    """The same checks, with the arguments that say where on the Hub."""
    build, _ = LOADERS[loader]
    corrupt, message = BAD_FILES[problem]
    corrupt(adapter)
    config = PeftConfig.from_pretrained(adapter)
    monkeypatch.setattr(PeftConfig, "_get_peft_type", classmethod(lambda *args, **kwargs: "LORASWITCH"))
    for owner in (LoRASwitchConfig, PeftConfig):
        monkeypatch.setattr(owner, "from_pretrained", classmethod(lambda *args, **kwargs: config))
    monkeypatch.setattr("transformers.integrations.peft.find_adapter_config_file", lambda *args, **kwargs: "found")
    if hasattr(transformers.integrations.peft, "resolve_revision"):
        monkeypatch.setattr("transformers.integrations.peft.resolve_revision", lambda *args, **kwargs: "v2")
    model, where = build(), {"revision": "v2"}
    with unchanged(model), pytest.raises(ValueError, match=message):
        if loader == "PeftModel.from_pretrained":
            PeftModel.from_pretrained(model, "me/adapter", **where)
        elif loader == "PeftModel.load_adapter":
            model.load_adapter("me/adapter", "new", **where)
        else:
            model.load_adapter("me/adapter", adapter_kwargs=where)
    assert hub[0][:2] == ("me/adapter", WEIGHTS) and hub[0][3]["revision"] == "v2"


def test_tensors_given_directly():
    model = adapted(tiny_llama())
    good = {n: p for n, p in model.state_dict().items() if "loraswitch_A" in n or "loraswitch_B" in n}
    bad = {n.replace(".default", ""): torch.ones(3, 3) for n in good}
    with pytest.raises((ValueError, RuntimeError), match=r"layers.0.*loraswitch_A.default.weight"):
        set_peft_model_state_dict(model, bad)


@pytest.mark.parametrize(
    ("changed", "blamed"),
    [({"num_experts": 5}, "compare num_experts"), ({"r": 2}, "compare num_experts.* and r"), ({}, "another backbone")],
    ids=str,
)
def test_tensors_of_another_adapter_given_directly(changed, blamed):
    pytest.importorskip("peft", "0.21")  # from there on it calls what checks them
    model = get_peft_model(tiny_llama(), switch_config())
    other = get_peft_model(tiny_llama(**({} if changed else {"hidden_size": 64})), switch_config(**changed))
    with unchanged(model), pytest.raises(ValueError, match=f"wrong shape.*{blamed}"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def test_a_given_configuration_is_compared_with_the_file(saved):
    model = tiny_llama()
    with unchanged(model), pytest.raises(ValueError, match="holds 3 experts.*num_experts=4"):
        PeftModel.from_pretrained(model, saved / "adapter", config=switch_config())


def test_a_loaded_configuration_may_be_changed_for_a_new_adapter(saved):
    """The file is compared when it is loaded, not when its configuration is used again."""
    config = PeftConfig.from_pretrained(saved / "adapter")
    config.num_experts, config.inference_mode = 5, False
    model = get_peft_model(tiny_llama(hidden_size=64), config)
    assert {layer.routing_options["default"].num_experts for layer in switch_layers(model).values()} == {5}


def test_loads_of_other_methods_pass_through(tmp_path):
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path)
    wanted = lora(tokens()).logits
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens()).logits, wanted)
    backbone = tiny_llama()
    backbone.load_adapter(tmp_path)
    assert torch.equal(backbone(tokens()).logits, wanted)
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(Exception, match="header|Header"):  # the library's own words, as without us
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("name", ["0", "model", "q_proj"])
def test_a_name_that_is_part_of_a_path_is_never_silently_wrong(name, tmp_path):
    """PEFT may drop weights when it saves such an adapter. We warn when it is made; loading notices what is missing."""
    with pytest.warns(UserWarning, match="part of a module's name"):
        model = get_peft_model(tiny_llama(), switch_config(init_weights=False), adapter_name=name).eval()
    wanted = model(tokens()).logits
    model.save_pretrained(tmp_path)
    backbone = tiny_llama()
    try:
        again = PeftModel.from_pretrained(backbone, tmp_path / name)
    except ValueError as error:
        assert "missing" in str(error)
    else:
        assert torch.equal(again(tokens()).logits, wanted)


def test_configurations_of_different_methods(saved, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = adapted(tiny_llama())
    with unchanged(model), pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(tmp_path, "lora")


# ------------------------------------------------------------------------------------------------------ the disk is full


@contextmanager
def no_file_larger_than(limit: int):
    """Writing beyond `limit` bytes of a file fails with EFBIG, an OSError like the ENOSPC of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", ["weights", "card", "config", "start"])
def test_disk_full_while_saving(limit, saved, adapter):
    """Into the same folder, at four points: the adapter of before loads, and gives the same logits."""
    before = contents(adapter)
    size = {
        "weights": len(before[WEIGHTS]) - 100,
        "card": len(before["README.md"]) // 2,
        "config": len(before[CONFIG]) // 2,
        "start": 10,
    }[limit]
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    randomize_adapter(model, seed=77)
    with no_file_larger_than(size), pytest.raises(Exception, match="File too large|EFBIG|os error 27"):
        model.save_pretrained(adapter)
    after = contents(adapter)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), adapter)(tokens()).logits, reference(saved))
    assert after == before  # no leftovers, and the card is whole
    model.save_pretrained(adapter)  # there is room again
    again = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)


def test_disk_full_while_transformers_saves(saved, adapter):
    """`model.save_pretrained` of a Transformers model with our adapter writes the same files in its own way."""
    before = contents(adapter)
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    model.load_adapter(adapter)
    randomize_adapter(model, seed=77)
    for size in (len(before[WEIGHTS]) - 100, 10):
        with no_file_larger_than(size), pytest.raises(Exception, match="File too large|EFBIG|os error 27"):
            model.save_pretrained(adapter)
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), adapter)(tokens()).logits, reference(saved))


def test_disk_full_while_saving_the_configuration_alone(adapter):
    before = contents(adapter)
    config = LoRASwitchConfig(num_experts=5, target_modules=["q_proj"])
    with no_file_larger_than(len(before[CONFIG]) // 2), pytest.raises(OSError, match="File too large"):
        config.save_pretrained(adapter)
    assert contents(adapter) == before


def test_save_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="save_directory.*is a file"):
        switch_config().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
