"""Adapter files made to do harm, through everything that loads one: refused by name at once, and nothing has changed.

They write tensors of the backbone or of another adapter, are no files, make the reader wait or allocate, or hold numbers that no
training gives.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from transformers import pipeline

from helpers import adapted, switch_config, tiny_llama, tiny_opt, tokens
from loaders import (
    CONFIG,
    LOADERS,
    ROUTER,
    WEIGHTS,
    K,
    bounded,
    configure,
    pickle_instead,
    rewrite,
    same_shape,
    through_loaders,
)
from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.loading import tensor_file
from unchanged import unchanged

pytestmark = pytest.mark.compat
PREFIX = "base_model.model."


def add(key: str, *shape: int):
    return rewrite(lambda held: held.update({PREFIX + key: torch.full(shape, 9.0)}))


def instead(make, name: str = WEIGHTS):
    """Something else in place of a file."""

    def corrupt(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return corrupt


def dtype(key: str, dtype: torch.dtype):
    return rewrite(lambda tensors: tensors.update({key: tensors[key].to(dtype)}))


def spoil(key: str, value: float):
    return rewrite(lambda tensors: tensors[key].view(-1)[-1:].fill_(value))


def embedding(key: str, value: float):
    """One of the backbone besides the adapter, as PEFT saves them where a vocabulary was resized."""

    def corrupt(folder: Path) -> None:
        weight = tiny_llama().state_dict()[key].clone()
        weight[-1, -1] = value
        rewrite(lambda held: held.update({PREFIX + key: weight}))(folder)

    return corrupt


def with_header(header: bytes, size: int | None = None, data: int = 0):
    """A weights file with this header, and `data` bytes of nothing (a hole on disk)."""

    def corrupt(folder: Path) -> None:
        with open(folder / WEIGHTS, "wb") as file:
            file.write((len(header) if size is None else size).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + data)

    return corrupt


def many_tensors(number: int) -> bytes:
    entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(number)}
    return json.dumps(entries).encode()


def huge_experts(folder: Path) -> None:
    """A configuration of a few bytes that asks for 200 GB, beside the small file that it had."""
    configure(num_shared_experts=12, r=4096)(folder)


def huge_experts_of_other_widths(folder: Path) -> None:
    """The file has them, too, but of linears that are one feature wide."""
    configure(num_experts=256, r=256)(folder)
    shapes = {"A": (256, 256, 1), "B": (256, 1, 256), "router": (256, 1)}
    small = torch.zeros(1, dtype=torch.float8_e4m3fn)

    def change(tensors):
        for key in tensors:
            tensors[key] = small.expand(shapes[key.split(".loraswitch_")[1].removesuffix(".weight")]).contiguous()

    rewrite(change)(folder)


def one_huge_layer(folder: Path) -> None:
    """One linear's experts are in the file, so that those of all others would be made."""
    configure(num_experts=256, r=256)(folder)
    made = {K + "A.weight": torch.zeros(256, 256, 32, dtype=torch.float16)}
    rewrite(lambda tensors: (tensors.clear(), tensors.update(made)))(folder)


BACKBONE = {
    "a norm": (add("model.norm.weight", 32), "not in the model: .*model.norm.weight"),
    "a norm, without prefix": (
        rewrite(lambda t: t.update({"model.norm.weight": torch.ones(32)})),
        "not in the model: model.norm",
    ),
    "an adapted linear": (
        add("model.layers.0.mlp.up_proj.base_layer.weight", 48, 32),
        "not in the model: .*base_layer",
    ),
    "an adapted linear by its own name": (
        add("model.layers.0.mlp.up_proj.weight", 48, 32),
        "not in the model: .*up_proj",
    ),
    "a norm, and a wrong shape": (
        rewrite(
            lambda t: t.update({PREFIX + "model.norm.weight": torch.ones(32), K + "B.weight": torch.ones(3, 1, 3)})
        ),
        "wrong shape|not in the model",
    ),
    "embeddings, and a wrong shape": (
        rewrite(
            lambda t: t.update({PREFIX + "lm_head.weight": torch.ones(64, 32), K + "B.weight": torch.ones(3, 1, 3)})
        ),
        "wrong shape",
    ),
    "embeddings of another width": (add("lm_head.weight", 64, 31), "wrong shape.*lm_head"),
    "another adapter's experts": (
        add("model.layers.0.mlp.up_proj.loraswitch_A.first.weight", 4, 3, 32),
        "not in the model",
    ),
    "this adapter's, by the model's name": (
        add("model.layers.0.mlp.up_proj.loraswitch_A.new.weight", 3, 3, 32),
        "not in the model",
    ),
    "another adapter's head": (add("lm_head.modules_to_save.first.weight", 64, 32), "not in the model"),
    "a bias that it does not have": (add("model.layers.0.mlp.up_proj.base_layer.bias", 48), "not in the model"),
    "statistics": (add("model.layers.0.self_attn.q_proj.loraswitch_record.new.load", 3), "not in the model"),
}
NO_FILES = {
    "FIFO": (instead(os.mkfifo), f"{WEIGHTS} is a device, a FIFO"),
    "device": (instead(lambda path: path.symlink_to("/dev/zero")), f"{WEIGHTS} is a device, a FIFO"),
    "folder": (instead(Path.mkdir), f"{WEIGHTS} is a folder"),
    "link to itself": (instead(lambda path: path.symlink_to(path)), f"{WEIGHTS} cannot be read"),
    "broken link": (instead(lambda path: path.symlink_to("nowhere")), f"{WEIGHTS} cannot be read"),
    "pickle as FIFO": (
        lambda folder: (instead(os.mkfifo)(folder), (folder / WEIGHTS).rename(folder / "adapter_model.bin")),
        "adapter_model.bin is a device, a FIFO",
    ),
}
HUGE = {
    "r and experts in the config": (huge_experts, "holds 3 experts|rank 3"),
    "experts of other widths": (huge_experts_of_other_widths, "wrong shape.*another backbone|num_experts=256, but"),
    "one layer of many": (one_huge_layer, "missing: |num_experts=256, but"),
    "a header that claims to be": (with_header(b"{}", size=2**62), "truncated or not"),
    "a header": (with_header(b" " * (tensor_file.MAX_HEADER_BYTES + 1)), "has a header of"),
    "a nested header": (with_header(b"[" * 100_000), "truncated or not"),
    "nested metadata": (
        with_header(b'{"__metadata__": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001),
        "truncated or not",
    ),
    "a nested shape": (
        with_header(b'{"a": {"dtype": "F32", "data_offsets": [0, 0], "shape": ' + b"[" * 10**5 + b"]" * 10**5 + b"}}"),
        "truncated or not",
    ),
    "many tensors": (
        with_header(many_tensors(100_000)),
        "missing: |not in the model: t0",
    ),
    "a hole": (
        with_header(
            json.dumps({"a": {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}}).encode(), data=2**36
        ),
        "not in the model: a|truncated or not",
    ),
}
NUMBERS = {
    **{
        f"{part} of {kind}": (dtype(key, kind), f"'{key}' holds numbers of type .*, not floating-point")
        for part, key in (("experts", K + "A.weight"), ("router", ROUTER))
        for kind in (torch.bool, torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    **{
        f"{value} in {part}": (spoil(key, value), f"{WEIGHTS}: '{key}' holds NaN or Inf")
        for part, key in (("experts", K + "B.weight"), ("router", ROUTER))
        for value in (float("nan"), float("inf"), -float("inf"))
    },
    **{
        f"{value} in {key}": (embedding(key, value), f"{WEIGHTS}: '{PREFIX}{key}' holds NaN or Inf")
        for key, value in (("lm_head.weight", float("nan")), ("model.embed_tokens.weight", float("inf")))
    },
}
HOSTILE = {**BACKBONE, **NO_FILES, **HUGE, **NUMBERS}


EVERYWHERE = [  # of each kind
    "a norm", "FIFO", "r and experts in the config", "experts of torch.int8", "nan in router", "nan in lm_head.weight",
]  # fmt: skip


@pytest.mark.parametrize("loader, problem", through_loaders(HOSTILE, EVERYWHERE))
def test_refused_at_once(loader, problem, adapter):
    build, load = LOADERS[loader]
    corrupt, message = HOSTILE[problem]
    corrupt(adapter)
    model = build()
    with unchanged(model), pytest.raises(ValueError, match=message), bounded(seconds=5, megabytes=300):
        load(model, adapter)


# ------------------------------------------------------------------------------------------------- modules trained in full

EVERYTHING = ["e", "s", "m", "0", "1", "2", "p", "d", "n"]  # short endings that all modules' names have
LARGE = ["orm", "tokens", "head", "gate_proj"]
TRAINED = {
    "all modules": (configure(modules_to_save=EVERYTHING), "modules_to_save: '.*' lies within"),
    "all large modules": (configure(modules_to_save=LARGE), "missing: .*modules_to_save"),
    "all modules, tensors of no size": (
        lambda folder: (
            configure(modules_to_save=LARGE)(folder),
            rewrite(lambda held: held.update({PREFIX + key: torch.zeros(0) for key in tiny_llama().state_dict()}))(
                folder
            ),
        ),
        "wrong shape: ",
    ),
    "all modules of other names": (
        configure(modules_to_save=[*LARGE, *(f"no{i}" for i in range(1000))]),
        "missing: .*modules_to_save",
    ),
    "the head": (configure(modules_to_save=["lm_head"]), "missing: .*lm_head.weight .of modules_to_save"),
    "tokens everywhere": (
        configure(trainable_token_indices={"tokens": [1], "orm": [1, 2]}),
        "missing: .*trainable_token",
    ),
    "rows of every linear": (
        configure(trainable_token_indices={"gate_proj": list(range(30))}),
        "missing: .*trainable_token",
    ),
    "too many names": (
        configure(modules_to_save=[f"no{i}" for i in range(100_000)]),
        "modules_to_save has 100,000 names",
    ),
    "too many embeddings": (
        configure(
            trainable_token_indices={"no_embedding_of_the_model"[i:]: [1] for i in range(25)}
            | {f"no{i}": [1] for i in range(100)}
        ),
        "trainable_token_indices has 125 names",
    ),
}


@pytest.mark.parametrize("problem", TRAINED)
@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "into an adapter that exists"])
def test_nothing_is_copied_that_the_file_does_not_hold(loader, problem, adapter, monkeypatch):
    """PEFT copies a module that is trained in full when it wraps it, and reads the file later."""
    build, load = LOADERS[loader]
    corrupt, message = TRAINED[problem]
    corrupt(adapter)
    model = build()

    def wrap(*args, **kwargs):
        pytest.fail("a module has been wrapped")

    monkeypatch.setattr(AuxiliaryTrainingWrapper, "__init__", wrap)
    with unchanged(model), pytest.raises(ValueError, match=message), bounded(seconds=5, megabytes=100):
        load(model, adapter)


# -------------------------------------------------------------------------------------------------------- configuration


def nested_field(name: str, depth: int):
    """A field that is a list in a list in a list ..."""

    def corrupt(folder: Path) -> None:
        content = json.dumps({**json.loads((folder / CONFIG).read_text()), name: "here"})
        (folder / CONFIG).write_text(content.replace('"here"', "[" * depth + "]" * depth))

    return corrupt


BAD_CONFIGS = {
    "FIFO": (instead(os.mkfifo, CONFIG), "adapter|Unrecognized|config"),
    "device": (instead(lambda path: path.symlink_to("/dev/zero"), CONFIG), "adapter|Unrecognized|config"),
    "link to itself": (instead(lambda path: path.symlink_to(path), CONFIG), "adapter|Unrecognized|config"),
    "too large": (
        lambda folder: os.truncate(folder / CONFIG, tensor_file.MAX_CONFIG_BYTES + 1),
        f"{CONFIG} has .* bytes",
    ),
    "huge": (lambda folder: os.truncate(folder / CONFIG, 400 * 2**20), f"{CONFIG} has .* bytes"),
    "truncated": (lambda folder: os.truncate(folder / CONFIG, 100), f"{CONFIG}: "),
    "empty": (lambda folder: os.truncate(folder / CONFIG, 0), f"{CONFIG}: "),
    "a list": (lambda folder: (folder / CONFIG).write_text("[1]"), f"{CONFIG} holds a JSON list"),
    "nested": (lambda folder: (folder / CONFIG).write_text("[" * 99_999), f"{CONFIG} is not valid JSON"),
    "nested to its end": (
        lambda folder: (folder / CONFIG).write_text("[" * 99_999 + "]" * 99_999),
        f"{CONFIG} is not valid JSON",
    ),
    "nested objects": (lambda folder: (folder / CONFIG).write_text('{"a":' * 99_999), f"{CONFIG} is not valid JSON"),
    "nested deeply": (nested_field("auto_mapping", 99_999), f"{CONFIG} is not valid JSON"),
    **{
        f"a nested {name}": (nested_field(name, depth=400), name)
        for name in ("peft_type", "auto_mapping", "base_model_name_or_path", "rank_pattern", "target_modules", "other")
    },
    "bytes": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{"), f"{CONFIG} is not valid JSON"),
    "digits": (lambda folder: (folder / CONFIG).write_text('{"r": ' + "9" * 9999 + "}"), f"{CONFIG} is not valid JSON"),
    "backbone's name": (configure(base_model_name_or_path=["a"]), "base_model_name_or_path=.*must be a string"),
    "revision": (configure(revision=7), "revision=7 must be a string"),
    "auto_mapping": (configure(auto_mapping={"base_model_class": "LlamaForCausalLM"}), "auto_mapping=.*parent_library"),
    "inference_mode": (configure(inference_mode="no"), "inference_mode='no' must be true or false"),
    "task_type": (configure(task_type=[1]), "task_type=.*must be a string"),
    "r": (configure(r=1.5), "r=1.5 must be a whole number"),
}
PARSED_ALIKE = ("truncated", "empty", "nested", "bytes", "digits")  # no JSON, as "a list" is none of ours


READERS = {
    **LOADERS,
    "pipeline": (tiny_llama, lambda model, folder: pipeline("text-generation", model=str(folder))),
    "LoRASwitchConfig": (tiny_llama, lambda model, folder: LoRASwitchConfig.from_pretrained(folder)),
    "PeftConfig": (tiny_llama, lambda model, folder: PeftConfig.from_pretrained(folder)),
}


# Configurations are found and parsed by the loaders' own code before ours sees them: most through all of them.
@pytest.mark.parametrize(
    "loader, problem", through_loaders(BAD_CONFIGS, [n for n in BAD_CONFIGS if n not in PARSED_ALIKE], READERS)
)
def test_a_bad_configuration(loader, problem, adapter):
    build, load = READERS[loader]
    corrupt, message = BAD_CONFIGS[problem]
    corrupt(adapter)
    model = build()
    with unchanged(model), pytest.raises((ValueError, OSError), match=message), bounded(seconds=5, megabytes=300):
        load(model, adapter)


ANOTHER_MEANING = {
    "top_k": (configure(top_k=1, normalize_gates=False), "top_k=1, but the adapter 'default' .* has 2"),
    "top_p": (configure(top_p=0.5), "top_p=0.5, but the adapter 'default' .* has 1.0"),
    "normalize_gates": (configure(normalize_gates=False), "normalize_gates=False, but"),
    "router_decay": (configure(router_decay=0.5), "router_decay=0.5, but the adapter 'default' .* has 0.0"),
    "lora_alpha": (configure(lora_alpha=60), "lora_alpha.*=20.0, but .* has 2.0"),
    "use_rslora": (configure(use_rslora=True), "use_rslora"),
    "alpha_pattern": (configure(alpha_pattern={"up_proj": 1}), "alpha_pattern.*up_proj"),
    "num_experts": (configure(num_experts=2, num_shared_experts=1), "num_experts"),
    "trainable_token_indices": (configure(trainable_token_indices=[3]), "trainable_token_indices=.*has None"),
}


@pytest.mark.parametrize("field", ANOTHER_MEANING)
def test_new_weights_of_another_meaning(field, adapter):
    """Over an adapter that exists, whose configuration stays: PEFT would not look."""
    corrupt, message = ANOTHER_MEANING[field]
    corrupt(adapter)
    model = same_shape()
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.load_adapter(adapter, "default")


def test_new_weights_of_the_same_meaning(adapter, saved):
    """What only training reads may differ, and there may be no configuration at all."""
    wanted = PeftModel.from_pretrained(tiny_llama(), saved / "adapter")(tokens()).logits
    for_training = {"lora_dropout": 0.5, "router_jitter": 0.1, "router_z_loss_coef": 0.5, "init_weights": False}
    configure(base_model_name_or_path="elsewhere", **for_training)(adapter)
    for prepare in (lambda: None, (adapter / CONFIG).unlink):
        prepare()
        model = same_shape()
        model.load_adapter(adapter, "default")
        assert torch.equal(model(tokens()).logits, wanted)


def test_other_tokens_over_trained_ones(tmp_path):
    for name, tokens_ in (("a", [1, 5]), ("b", [2, 5])):
        adapted(tiny_llama(), trainable_token_indices=tokens_).save_pretrained(tmp_path / name)
    model = adapted(tiny_llama(), trainable_token_indices={"embed_tokens": [1, 5]}, seed=3)
    model.load_adapter(tmp_path / "a", "default")
    with unchanged(model), pytest.raises(ValueError, match=r"trainable_token_indices=\[\[2, 5\]\]"):
        model.load_adapter(tmp_path / "b", "default")


# ------------------------------------------------------------------------------------------------------ other ways in


def test_a_pickle_that_is_preferred(adapter):
    """`use_safetensors=False` makes Transformers read the pickle where there are both."""
    weights = (adapter / WEIGHTS).read_bytes()
    pickle_instead(adapter)
    (adapter / WEIGHTS).write_bytes(weights)
    model = tiny_llama()
    with unchanged(model), pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        model.load_adapter(adapter, use_safetensors=False)
    model.load_adapter(adapter)


GIVEN = {**BACKBONE, **NUMBERS}


@pytest.mark.parametrize("problem", GIVEN)
def test_tensors_given_to_transformers(problem, adapter):
    corrupt, message = GIVEN[problem]
    corrupt(adapter)
    model, tensors = tiny_llama(), load_file(adapter / WEIGHTS)
    with unchanged(model), pytest.raises(ValueError, match=message.replace(f"{WEIGHTS}: ", "")):
        model.load_adapter(peft_config=switch_config(num_experts=3), adapter_state_dict=tensors)


def test_good_tensors_given_to_transformers(saved):
    model = tiny_llama()
    model.load_adapter(
        peft_config=switch_config(num_experts=3), adapter_state_dict=load_file(saved / "adapter" / WEIGHTS)
    )
    assert torch.equal(
        model(tokens()).logits, PeftModel.from_pretrained(tiny_llama(), saved / "adapter")(tokens()).logits
    )


@pytest.mark.parametrize("problem", GIVEN)
def test_tensors_given_to_peft(problem, adapter):
    pytest.importorskip("peft", minversion="0.21")  # before, PEFT does not ask the method which of them to load
    corrupt, _ = GIVEN[problem]
    corrupt(adapter)
    model, tensors = same_shape(), load_file(adapter / WEIGHTS)
    problems = "not in the model|wrong shape|not floating-point numbers|holds NaN or Inf"
    with unchanged(model), pytest.raises(ValueError, match=problems):
        set_peft_model_state_dict(model, tensors)


def test_biases_belong_to_an_adapter_that_says_so(tmp_path):
    pytest.importorskip("peft", minversion="0.21")
    model = adapted(tiny_opt(), bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1)
    model.save_pretrained(tmp_path)
    wanted = model(tokens()).logits
    assert torch.equal(PeftModel.from_pretrained(tiny_opt(), tmp_path)(tokens()).logits, wanted)
    configure(bias="none")(tmp_path)
    plain = tiny_opt()
    with unchanged(plain), pytest.raises(ValueError, match="not in the model: .*bias"):
        PeftModel.from_pretrained(plain, tmp_path)
    configure(bias="all")(tmp_path)
    rewrite(lambda t: t.pop(PREFIX + "model.decoder.layers.0.fc1.base_layer.bias"))(tmp_path)
    with unchanged(plain), pytest.raises(ValueError, match="missing: .*fc1.base_layer.bias .of bias"):
        PeftModel.from_pretrained(plain, tmp_path)


def test_infinite_numbers_in_a_buffer_are_its_own(tmp_path):
    """A mask in a module that is trained may be infinite; its parameters may not."""
    model = adapted(tiny_llama(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    spoil(PREFIX + "lm_head.weight", float("nan"))(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight' holds NaN"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)

    def masked() -> torch.nn.Module:
        backbone = tiny_llama()
        backbone.lm_head.register_buffer("mask", torch.full((2,), -float("inf")))
        return backbone

    model = adapted(masked(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(masked(), tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
