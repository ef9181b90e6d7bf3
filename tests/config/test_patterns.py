"""Patterns of a configuration: the same meaning as in PEFT, a limit on the time they take, and errors that name the field."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
import warnings

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists, inspect_matched_modules
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from helpers import adapted, switch_config, switch_layers, tiny_llama
from peft_loraswitch import LoRASwitchConfig, patterns
from peft_loraswitch.loading.layout import check_experts
from peft_loraswitch.loading.tensor_file import read_header
from peft_loraswitch.patterns import TimeLimit
from peft_loraswitch.targets.selection import selects
from unchanged import unchanged

pytestmark = pytest.mark.compat
SLOW = r"(a|aa)+!|(\w|\w\w|.|\.)+!"  # for both engines: 2^n ways to match the name, none of which ends in "!"
SLOW_FIELDS = {
    "target_modules": {"target_modules": SLOW},
    "exclude_modules": {"exclude_modules": SLOW, "target_modules": ["q_proj"]},
    "rank_pattern": {"rank_pattern": {SLOW: 2}},
    "alpha_pattern": {"alpha_pattern": {SLOW: 2}},
    "layers_pattern": {"layers_pattern": [SLOW], "layers_to_transform": [0], "target_modules": ["q_proj"]},
}


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)


# ---------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("field", SLOW_FIELDS)
def test_a_pattern_that_takes_too_long(field: str, tmp_path):
    """By every way a configuration reaches a model: given, added, loaded. The model stays as it was."""
    backbone = tiny_llama()
    started = time.process_time()
    with unchanged(backbone), pytest.raises(ValueError, match=f"{field}.*too long"):
        get_peft_model(backbone, switch_config(**SLOW_FIELDS[field]))
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    with unchanged(model), pytest.raises(ValueError, match=f"{field}.*too long"):
        model.add_adapter("other", switch_config(**SLOW_FIELDS[field]))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SLOW_FIELDS[field]}))
    with unchanged(backbone), pytest.raises(ValueError, match=f"{field}.*too long"):
        PeftModel.from_pretrained(backbone, tmp_path)
    with unchanged(model), pytest.raises(ValueError, match=f"{field}.*too long"):
        model.load_adapter(tmp_path, "other")
    with unchanged(backbone), pytest.raises(ValueError, match=f"{field}.*too long"):
        backbone.load_adapter(str(tmp_path))
    assert time.process_time() - started < 15


def test_names_in_the_weights_file_are_matched_within_the_limit(tmp_path):
    """The pattern is harmless on the model's names and not on those that the file invents."""
    adapted(tiny_llama()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights["base_model.model." + "z" * 60 + ".loraswitch_A.weight"] = torch.zeros(4, 3, 8)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = LoRASwitchConfig(r=3, num_experts=4, rank_pattern={"(z|zz)+!": 3})
    with pytest.raises(ValueError, match=r"rank_pattern.*too long"):
        check_experts(tmp_path, read_header(str(tmp_path / "adapter_model.safetensors")), config)


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\w+\.?)+!", "(.*)*(.*)*z", "(?:(?:(?:a{1,1000}){1,1000}){1,1000})!"])
@pytest.mark.parametrize("field", ["exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_that_hang_only_python_work(field: str, pattern: str):
    value = pattern if field == "exclude_modules" else {pattern: 2}
    model = get_peft_model(tiny_llama(), switch_config(**{field: value}))
    assert len(switch_layers(model)) == 14


def test_saving_matches_within_the_limit_as_well(tmp_path):
    """PEFT asks there whether the embeddings are among the targets."""
    hangs_python = r".*q_proj|(?:(?:\w+\.?)+)+!"  # `regex` decides this one at once
    model = adapted(tiny_llama(), target_modules=hangs_python)
    model.get_base_model().add_module("a" * 40, torch.nn.ModuleDict({"embed_tokens": torch.nn.Identity()}))
    started = time.process_time()
    model.save_pretrained(tmp_path)
    assert time.process_time() - started < 5


def test_many_patterns_share_one_limit():
    """Each takes a part of the limit only, all together more than it."""
    name = "z" * 27
    config = LoRASwitchConfig(rank_pattern={f"(z|zz)+{'x' * i}!": 2 for i in range(100)})
    started, limit = time.thread_time(), TimeLimit()
    with pytest.raises(ValueError, match="rank_pattern.*too long"):
        for _ in range(1000):
            config.rank_of(name, limit)
    assert time.thread_time() - started < 5


def test_the_limit_does_not_count_the_time_of_others():
    """`regex` looks at the processor time of the whole process: other threads compute beside us."""
    done, data = threading.Event(), b"x" * 10_000_000

    def compute():
        while not done.is_set():
            hashlib.sha256(data)  # without the GIL

    others = [threading.Thread(target=compute) for _ in range(8)]
    [thread.start() for thread in others]
    try:
        limit = TimeLimit()
        limit.left = 0.2
        assert limit.match("f", r"((z|zz)+!)|.*", "z" * 26) is not None  # about 0.05 s of this thread
    finally:
        done.set()
        [thread.join() for thread in others]


def test_twenty_thousand_names_are_no_reason_to_stop():
    limit = TimeLimit()
    for i in range(20_000):
        assert limit.match("target_modules", r".*\.(q|v)_proj", f"model.layers.{i}.self_attn.q_proj")
    assert limit.left > patterns.SECONDS, "ordinary patterns use less than they bring"


def test_a_million_names_in_a_list():
    names = [f"none.{i}" for i in range(1_000_000)]
    started = time.process_time()
    model = get_peft_model(
        tiny_llama(), switch_config(target_modules=["q_proj"], exclude_modules=names, modules_to_save=["norm"])
    )
    assert len(switch_layers(model)) == 2
    assert time.process_time() - started < 20


# ------------------------------------------------------------------------------------------------------------- validity


INVALID = ["(unclosed", "a{99999999999999999999}", "*", "[z-a]", "(?P<idx>a)(?P<idx>b)", "(" * 5000 + ")" * 5000]


@pytest.mark.parametrize("pattern", INVALID, ids=lambda p: p[:12])
@pytest.mark.parametrize("field", SLOW_FIELDS)
def test_an_invalid_pattern_names_the_field(field: str, pattern: str):
    value = {pattern: 2} if field in ("rank_pattern", "alpha_pattern") else pattern
    more = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if field == "layers_pattern" else {}
    with pytest.raises(ValueError, match=f"^{field}.*not a valid regular expression") as raised:
        LoRASwitchConfig(**{field: value}, **more)
    assert len(str(raised.value)) < 1500


@pytest.mark.parametrize(
    ("field", "pattern"),
    [("layers_pattern", "(?P<idx>layers)"), ("rank_pattern", "(?i)Q_PROJ"), ("alpha_pattern", "a)|(b")],
)
def test_a_pattern_that_is_invalid_only_where_peft_puts_it(field: str, pattern: str):
    test_an_invalid_pattern_names_the_field(field, pattern)


@pytest.mark.parametrize("field", SLOW_FIELDS)
def test_a_pattern_that_is_too_long(field: str):
    pattern = "a" * 200_000
    value = {pattern: 2} if field in ("rank_pattern", "alpha_pattern") else pattern
    more = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if field == "layers_pattern" else {}
    with pytest.raises(ValueError, match=f"^{field}.*200,000 characters") as raised:
        LoRASwitchConfig(**{field: value}, **more)
    assert len(str(raised.value)) < 1500


def test_flags_at_the_start_stay_valid():
    model = get_peft_model(
        tiny_llama(), switch_config(target_modules="(?i).*Q_PROJ", exclude_modules="(?x) .* \\.1\\. .* # no")
    )
    assert [name.split(".")[-3:] for name in switch_layers(model)] == [["0", "self_attn", "q_proj"]]


# ------------------------------------------------------------------------------------------------- the same as in PEFT


NAMES = [
    f"{root}{block}.{i}.{child}.{linear}"
    for root in ("", "model.", "model.encoder.")
    for block in ("layers", "h")
    for i in (0, 1, 12)
    for child in ("attn", "mlp", "mlp.experts.3")
    for linear in ("q_proj", "dense", "out")
] + ["lm_head", "score", "model.norm", "q_proj", "layers.0"]
PIECES = [
    r".*", r"\.", r"\d+", "layers", "model", "(q|v)_proj", "[a-z]+", "dense", "mlp", "(?:attn|mlp)", "^", "$", "o?", r"\w*",
    r"(?!.*mlp).*", r"(?<=\.)", "h", "(?:0|12)", r"[^.]*", "experts", "(a|b)", r"\b", "q_proj", ".+?", r"(?=.*q).*",
]  # fmt: skip


def peft_answers(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


def test_random_configurations_select_what_peft_selects():
    """An independent reference: PEFT's own functions, with Python's `re`."""
    chance, outcomes = random.Random(0), []

    def pattern():
        return "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 5)))

    def ends():
        return [chance.choice(NAMES).split(".", chance.randint(0, 4))[-1] for _ in range(chance.randint(1, 4))]

    for _ in range(1500):
        fields = {
            "target_modules": chance.choice([pattern, ends])(),
            "exclude_modules": chance.choice([pattern, ends, str])(),
        }
        if isinstance(fields["target_modules"], list) and chance.random() < 0.5:
            fields["layers_to_transform"] = chance.choice([0, [1, 12], []])
            fields["layers_pattern"] = chance.choice(
                [None, [], "layers", ["h", "layers"], r"[a-z]+", [r"model\.layers", "h"]]
            )
        try:
            config = LoRASwitchConfig(
                **fields,
                rank_pattern={pattern(): 2, pattern(): 3},
                modules_to_save=chance.choice([None, ["mlp", "lm_head"]]),
            )
        except ValueError:  # a pattern that is not valid, or needs something else
            continue
        if config.layers_pattern and peft.__version__ < "0.21":  # does not see a list of blocks at the top
            continue
        for name in chance.sample(NAMES, 20):
            wanted = peft_answers(check_target_module_exists, config, name)
            assert bool(selects(config, name)) == bool(wanted), (config, name)
            assert isinstance(selects(config, name), _ExcludedModule) == isinstance(wanted, _ExcludedModule)
            key = config.matching_key("rank_pattern", name)
            assert (name if key is None else key) == peft_answers(get_pattern_key, list(config.rank_pattern), name)
            outcomes.append(bool(wanted))
    assert len(outcomes) > 10_000 and 0.02 < sum(outcomes) / len(outcomes) < 0.9


def test_patterns_on_names_mean_the_same_to_both_engines():
    chance = random.Random(1)
    for _ in range(4000):
        pattern = "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 6)))
        try:
            compiled = re.compile(pattern)
        except re.error:
            continue
        for name in chance.sample(NAMES, 10):
            assert (TimeLimit().match("f", pattern, name) is None) == (compiled.fullmatch(name) is None), (
                pattern,
                name,
            )


def test_peft_can_be_asked_what_was_matched():
    model = get_peft_model(tiny_llama(), switch_config(target_modules=r".*(q|v)_proj", exclude_modules=r".*\.0\..*"))
    found = inspect_matched_modules(model.base_model)["matched"]
    assert [name for name in found if "loraswitch" not in name] == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_keys_that_match_nothing_are_reported(pattern: str):
    with pytest.warns(RuntimeWarning, match=rf"{pattern}: \['no_such'\]"):
        get_peft_model(tiny_llama(), switch_config(**{pattern: {"no_such": 2, "q_proj": 3}}))


def test_exclusions_that_match_nothing_are_reported():
    with pytest.warns(UserWarning, match="no modules were excluded"):
        get_peft_model(tiny_llama(), switch_config(target_modules=["q_proj"], exclude_modules=["no_such"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(), switch_config(target_modules=["q_proj"], exclude_modules=r".*\.0\..*"))
