"""Whatever PEFT's `save_pretrained` writes for an adapter loads again, through everything that loads one, with equal logits.

Options that decide what is written: a resized vocabulary, tied embeddings, `modules_to_save`, `trainable_token_indices`,
`ensure_weight_tying`, `bias`, `save_embedding_layers`. Their combinations are generated; those that make no adapter are named.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import (
    switch_config,
    tiny_bert,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
    tokens,
)
from peft_loraswitch.loading import load as loading
from peft_loraswitch.loading.layout import PREFIX, Layout
from trainer_tools import OrderedTrainer, arguments, collate, samples
from unchanged import unchanged

pytestmark = pytest.mark.compat
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RESIZED = 70
BIASES_ARE_SAVED = Version(peft.__version__) >= Version("0.21")


class Options(NamedTuple):
    """What makes a difference to the file."""

    build: str = "llama"
    tied: bool = False
    resized: bool = False
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: str | None = None  # of TOKENS
    ensure_weight_tying: bool = False
    bias: str = "none"
    save_embedding_layers: bool | str = "auto"

    def config(self, **overrides: Any) -> Any:
        fields = {
            "modules_to_save": None if self.modules_to_save is None else list(self.modules_to_save),
            "trainable_token_indices": TOKENS[self.trainable_token_indices],
            "ensure_weight_tying": self.ensure_weight_tying,
            "bias": self.bias,
            "task_type": "SEQ_CLS" if self.build in HEADS else "CAUSAL_LM",
            "target_modules": TARGETS[self.build],
        }
        return switch_config(num_experts=3, init_weights=False, **{**fields, **overrides})

    def __str__(self) -> str:
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != Options._field_defaults[k]) or "plain"


BUILDERS = {"llama": tiny_llama, "opt": tiny_opt, "classifier": tiny_llama_classifier, "bert": tiny_bert}
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "opt": ["q_proj", "fc1"],
    "classifier": ["q_proj", "down_proj"],
    "bert": ["query", "intermediate.dense"],
}
HEADS = {"classifier": "score", "bert": "classifier"}

EMBEDDINGS = (("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"))
TOKENS: dict[str | None, Any] = {
    None: None,
    "list": [1, 5],
    "input": {"embed_tokens": [1, 5]},
    "both": {"embed_tokens": [1, 5], "lm_head": [1, 5]},
    "output": {"lm_head": [2]},
    "different": {"embed_tokens": [1, 5], "lm_head": [2]},
}


def combinations() -> list[Options]:
    made = [
        Options("llama", tied, resized, modules, indices, tie, "none", save)
        for tied, resized, modules, indices, tie, save in itertools.product(
            (False, True), (False, True), (None, *EMBEDDINGS), TOKENS, (False, True), (True, False, "auto")
        )
        if not (modules and indices)  # an embedding is trained in full or in part
        and (tied or not tie)
        and not (tie and indices == "different")  # PEFT refuses
        and save is not resized  # "auto" is the same
    ]
    if not BIASES_ARE_SAVED:
        return made
    made += [
        Options("opt", True, False, modules, indices, False, bias, save)  # every linear of OPT has a bias
        for modules, indices, bias, save in itertools.product(
            (None, ("embed_tokens",), ("fc2",), ("final_layer_norm",)),
            (None, "list"),
            ("all", "loraswitch_only"),
            (True, False),
        )
        if not (modules == ("embed_tokens",) and indices)
    ]
    return made + [
        Options(build, False, False, modules, None, False, bias, save)
        for build, modules, bias, save in itertools.product(
            HEADS, (None, ("norm",), ("pooler.dense",)), ("none", "all", "loraswitch_only"), (True, False)
        )  # PEFT adds the head to modules_to_save; that of BERT, its pooler, and ours have a bias
        if modules != (("pooler.dense",) if build == "classifier" else ("norm",))
    ]


def backbone(options: Options) -> nn.Module:
    settings = {"tie_word_embeddings": options.tied} if options.build in ("llama", "opt") else {}
    settings["num_hidden_layers"] = 1
    model = BUILDERS[options.build](**settings)
    if options.build == "classifier":  # a head with a bias
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            model.score = nn.Linear(model.score.in_features, model.score.out_features)
    if options.resized:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.resize_token_embeddings(RESIZED, mean_resizing=False)
    return model.eval()


def make(options: Options) -> PeftModel:
    """An adapter all of whose trainable parameters, also those of the backbone, differ from what they were."""
    model = get_peft_model(backbone(options), options.config())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


class Saved(NamedTuple):
    folder: Path
    logits: torch.Tensor
    layout: Layout


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Any:
    """Backbones on disk, by the options that make a difference to them."""
    folders: dict[Any, str] = {}

    def base(options: Options) -> str:
        key = (options.build, options.tied, options.resized)
        if key not in folders:
            folders[key] = str(tmp_path_factory.mktemp("base"))
            backbone(options).save_pretrained(folders[key])
        return folders[key]

    return base


@pytest.fixture(scope="module")
def saved(tmp_path_factory, bases) -> Any:
    """Adapters on disk, by their options. `save_embedding_layers="auto"` looks at the configuration of the backbone that
    the adapter names, which was not resized."""
    made: dict[Options, Saved] = {}

    def save(options: Options) -> Saved:
        if options not in made:
            folder = tmp_path_factory.mktemp("adapter")
            model = make(options)
            model.peft_config["default"].base_model_name_or_path = bases(options._replace(resized=False))
            model.save_pretrained(folder, save_embedding_layers=options.save_embedding_layers)
            layout = Layout(model, model.peft_config["default"], "default")
            made[options] = Saved(folder, logits_of(model), layout)
        return made[options]

    return save


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def load_again(options: Options, folder: Path, trainable: bool = False) -> nn.Module:
    model = get_peft_model(backbone(options), options.config())
    model.load_adapter(folder, "default", is_trainable=trainable)
    return model


def load_beside(options: Options, folder: Path, first: Options | None = None) -> nn.Module:
    plain = Options(options.build)
    model = get_peft_model(backbone(options), (first or plain).config())
    model.load_adapter(folder, "new")
    model.set_adapter("new")
    return model


def load_into(options: Options, folder: Path) -> nn.Module:
    model = backbone(options)
    model.load_adapter(folder)
    return model


LOADERS = {
    "from_pretrained": lambda options, folder: PeftModel.from_pretrained(backbone(options), folder),
    "meta": lambda options, folder: PeftModel.from_pretrained(backbone(options), folder, low_cpu_mem_usage=True),
    "trainable": lambda options, folder: PeftModel.from_pretrained(backbone(options), folder, is_trainable=True),
    "load_adapter, beside another": load_beside,
    "load_adapter, again": load_again,
    "load_adapter, again, trainable": lambda options, folder: load_again(options, folder, trainable=True),
    "model.load_adapter": load_into,
}
AUTO_LOADERS = {
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained,
    "AutoModel": AutoModelForCausalLM.from_pretrained,
}


def files_of(options: Options, save: Any) -> tuple[Layout, set[str]]:
    found = save(options)
    return found.layout, set(load_file(found.folder / WEIGHTS))


def some_of(loaders: dict[str, Any], number: int, options: Options) -> list[str]:
    """A choice of loaders that is the same in every run; over all combinations each meets every option."""
    return random.Random(str(options)).sample(sorted(loaders), number)


@pytest.mark.parametrize("options", combinations(), ids=str)
def test_loads_again(options, saved):
    folder, wanted, _ = saved(options)
    for name in {"from_pretrained", *some_of(LOADERS, 2, options)}:
        assert torch.allclose(logits_of(LOADERS[name](options, folder)), wanted, atol=1e-6), name


@pytest.mark.parametrize("options", [c for c in combinations() if c.build == "llama"], ids=str)
def test_loads_again_with_its_backbone(options, saved, bases, tmp_path):
    """The loaders that find the backbone by its name: the resized one was saved, too."""
    folder, wanted, _ = saved(options)
    fields = json.loads((folder / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": bases(options)}))
    (tmp_path / WEIGHTS).symlink_to(folder / WEIGHTS)
    for name in some_of(AUTO_LOADERS, 1, options):
        assert torch.allclose(logits_of(AUTO_LOADERS[name](tmp_path)), wanted, atol=1e-6), name


@pytest.mark.parametrize("options", combinations(), ids=str)
def test_the_layout_is_what_peft_saves(options, saved):
    """Every key is known, and what is required is there; more than that is only ever embeddings."""
    layout, keys = files_of(options, saved)
    required = {PREFIX + name for name, slot in layout.slots.items() if slot.required}
    assert required <= keys and all(layout.find(key) for key in keys)
    _, everything = files_of(options._replace(save_embedding_layers=True), saved)
    assert {PREFIX + name for name in layout.slots} == everything


WITH_EMBEDDINGS = [c for c in combinations() if c.build == "llama" and c.save_embedding_layers is not False]


ONE_OF_THE_TWO = "adapter 'new' .*'first' on this model .*PEFT can do only one of the two.*delete_adapter"


def seconds(first: Options) -> list[Options]:
    """What is loaded beside `first`: for every way in which embeddings of its backbone are wrapped one of the options that
    make it, two of many, in turns: every option of the backbone is loaded beside some adapter."""
    found: dict[tuple[tuple[str, str], ...], list[Options]] = {}
    for options in (c for c in WITH_EMBEDDINGS if c[:3] == first[:3]):
        found.setdefault(tuple(sorted(embeddings_trained(options).items())), []).append(options)
    turn = [other for other in WITH_EMBEDDINGS[::4] if other[:3] == first[:3]].index(first)
    return [
        ways[(place + turn + further) % len(ways)]
        for place, ways in enumerate(found.values())
        for further in (range(0, len(ways), len(ways) // 2) if len(ways) > 4 else [0])
    ]


def check_both(model: PeftModel, first: torch.Tensor, new: torch.Tensor) -> None:
    for name, wanted in (("first", first), ("new", new), ("first", first)):
        model.set_adapter(name)
        assert torch.allclose(logits_of(model), wanted, atol=1e-6), name


@pytest.mark.parametrize("first", WITH_EMBEDDINGS[::4], ids=str)
def test_loads_beside_any_other(first, saved, tmp_path):
    """The first adapter may have wrapped the embeddings, which then have other names in the model. A second one either computes
    what it does alone, also saved again and when the first is deleted, and does no harm to the first; or it is refused by name,
    and loads once the first is deleted."""
    outcomes = Counter()
    for options in seconds(first):
        (folder, wanted, _), (first_folder, first_wanted, _) = saved(options), saved(first)
        model = PeftModel.from_pretrained(backbone(options), first_folder, adapter_name="first")
        if not same_wrappers(first, options):
            with unchanged(model), pytest.raises(ValueError, match=ONE_OF_THE_TWO):
                model.load_adapter(folder, "new")
            model.delete_adapter("first")
            model.load_adapter(folder, "new")
        else:
            model.load_adapter(folder, "new")
            check_both(model, first_wanted, wanted)
            model.save_pretrained(tmp_path, save_embedding_layers=options.save_embedding_layers)
            again = PeftModel.from_pretrained(backbone(options), tmp_path / "new")
            assert torch.allclose(logits_of(again), wanted, atol=1e-6)
            model.delete_adapter("first")
        model.set_adapter("new")
        assert torch.allclose(logits_of(model), wanted, atol=1e-6), str(options)
        outcomes[same_wrappers(first, options)] += 1
    assert outcomes[True] >= 2


def embeddings_trained(options: Options) -> dict[str, str]:
    """How an adapter trains the embeddings: a word for each kind of wrapper."""
    tokens_ = options.trainable_token_indices
    full, tie = options.modules_to_save or (), options.ensure_weight_tying
    if options.tied and tokens_ in ("list", "input", "both"):
        return {"embed_tokens": "tokens", "lm_head": "tied tokens"}
    if options.tied and full and tie:
        full = ("embed_tokens", "lm_head")
    in_part = {"list": ["embed_tokens"], "input": ["embed_tokens"], "output": ["lm_head"]}
    names = in_part.get(tokens_, ["embed_tokens", "lm_head"]) if tokens_ else []
    return {**dict.fromkeys(full, "in full"), **dict.fromkeys(names, "tokens")}


def same_wrappers(*both: Options) -> bool:
    first, second = (embeddings_trained(options) for options in both)
    return all(first[name] == second[name] for name in first.keys() & second.keys())


def test_embeddings_trained_in_two_ways():
    """By one adapter, of a model where the two are tied: PEFT would put two wrappers around the output's."""
    config = switch_config(modules_to_save=["lm_head"], trainable_token_indices=[1, 5])
    model = tiny_llama(tie_word_embeddings=True)
    with unchanged(model), pytest.raises(ValueError, match="trainable_token_indices and modules_to_save .*'lm_head'"):
        get_peft_model(model, config)
    get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("tokens_", ["list", "output"])
def test_a_deleted_adapter_leaves_no_wrapper(tokens_, saved):
    """One of Transformers' too: what PEFT leaves around a module would decide about the next adapter."""
    options = Options(tied=True, trainable_token_indices=tokens_)
    names = [
        (name, type(module))
        for name, module in load_into(Options(tied=True), saved(Options(tied=True)).folder).named_modules()
    ]
    model = load_into(Options(tied=True), saved(Options(tied=True)).folder)
    model.load_adapter(saved(options).folder, "first")
    model.delete_adapter("first")
    assert [(name, type(module)) for name, module in model.named_modules()] == names


def test_saves_and_loads_beside_one_that_trains_tokens(tmp_path):
    model = get_peft_model(tiny_llama(), switch_config(init_weights=False, trainable_token_indices=[1, 5]))
    model.add_adapter("new", switch_config(init_weights=False))
    model.set_adapter("new")
    wanted = logits_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path / "new")), wanted)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model.load_adapter(tmp_path / "new", "new")
    model.set_adapter("new")
    assert torch.equal(logits_of(model), wanted)


def test_modules_within_modules_trained_in_full(tmp_path):
    """What has no tensors may be there; what has some PEFT would save and not find again."""
    model = get_peft_model(tiny_llama(), switch_config(modules_to_save=["layers.0.mlp", "lm_head", "act_fn"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits_of(model))
    model = tiny_llama()
    with unchanged(model), pytest.raises(ValueError, match="modules_to_save: '.*mlp.up_proj' lies within '.*mlp'"):
        get_peft_model(model, switch_config(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]))


# ---------------------------------------------------------------------------------------------------------- trainers

TRAINED = [
    Options(resized=True, modules_to_save=("embed_tokens", "lm_head")),
    Options(tied=True, resized=True, modules_to_save=("embed_tokens",), ensure_weight_tying=True),
    Options(tied=True, resized=True, trainable_token_indices="list"),
    Options(resized=True, trainable_token_indices="both"),
]


def trainer(options: Options, bases: Any, folder: Path, **overrides: Any) -> OrderedTrainer:
    model = get_peft_model(backbone(options), options.config())
    model.peft_config["default"].base_model_name_or_path = bases(options._replace(resized=False))
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1, **overrides}
    data = samples()
    return OrderedTrainer(
        model=model, args=arguments(folder, **settings), train_dataset=data, eval_dataset=data, data_collator=collate
    )


@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_resume_from_checkpoint(options, bases, tmp_path):
    whole = trainer(options, bases, tmp_path)
    whole.train()
    resumed = trainer(options, bases, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.allclose(logits_of(resumed.model), logits_of(whole.model), atol=1e-6)


@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_load_best_model_at_end(options, bases, tmp_path):
    """Best is here what is worst, so that it is not the last."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    made = trainer(options, bases, tmp_path, eval_strategy="steps", eval_steps=1, **best)
    made.train()
    checkpoint = made.state.best_model_checkpoint
    assert checkpoint is not None and checkpoint.endswith("-1")
    wanted = logits_of(PeftModel.from_pretrained(backbone(options), checkpoint))
    assert torch.allclose(logits_of(made.model), wanted, atol=1e-6)


# ------------------------------------------------------------------------------------------- what a load says and refuses


def test_a_vocabulary_that_was_not_resized(saved):
    for options in (Options(resized=True), Options(resized=True, modules_to_save=("embed_tokens", "lm_head"))):
        folder = saved(options).folder
        model = backbone(options._replace(resized=False))
        with unchanged(model), pytest.raises(ValueError, match=r"wrong shape.*resize_token_embeddings\(70\) before"):
            PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_load_that_writes_embeddings_says_so_once(loader, saved, caplog):
    for options, lines in ((Options(resized=True), 1), (Options(save_embedding_layers=False), 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "peft_loraswitch"):
            LOADERS[loader](options, saved(options).folder)
        told = [record.getMessage() for record in caplog.records if record.name.startswith("peft_loraswitch")]
        assert len(told) == lines and all("lm_head.weight, model.embed_tokens.weight" in line for line in told)


@pytest.mark.parametrize("loader", [name for name in LOADERS if "again" in name or "beside" in name])
def test_embeddings_come_back_after_an_interrupt(loader, saved, monkeypatch):
    """They were written, and then it went wrong: all or nothing is about them, too."""
    options = Options(resized=True)
    folder, wanted, _ = saved(options)
    model = get_peft_model(backbone(options), options.config())
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_check_result", interrupt)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        model.load_adapter(folder, "default" if "again" in loader else "new")


def test_names_of_an_older_backbone(saved, tmp_path):
    """`key_mapping` renames what is in the file before it is compared."""
    options = Options()
    folder, wanted, _ = saved(options)
    tensors = load_file(folder / WEIGHTS)
    save_file({k.replace("self_attn", "attention"): t for k, t in tensors.items()}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    with pytest.raises(ValueError, match="missing: .*self_attn"):
        PeftModel.from_pretrained(backbone(options), tmp_path)
    mapping = {r"\.attention\.": ".self_attn."}
    model = PeftModel.from_pretrained(backbone(options), tmp_path, key_mapping=mapping)
    assert torch.equal(logits_of(model), wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping=mapping)
    assert torch.equal(logits_of(model), wanted)


def test_without_the_prefix_of_peft(saved, tmp_path):
    """As Transformers saves with `save_peft_format=False`."""
    options = Options(modules_to_save=("lm_head",))
    folder, wanted, _ = saved(options)
    model = backbone(options)
    model.load_adapter(folder)
    model.save_pretrained(tmp_path, save_peft_format=False)
    assert not any(key.startswith(PREFIX) for key in load_file(tmp_path / WEIGHTS))
    again = backbone(options)
    again.load_adapter(tmp_path)
    assert torch.equal(logits_of(again), wanted)
