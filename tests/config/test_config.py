"""`LoRASwitchConfig`: every field checked and explained; what is saved is what is loaded."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

from helpers import HIDDEN, switch_config, switch_layers, tiny_gpt2, tiny_llama
from peft_loraswitch import LoRASwitchConfig

pytestmark = pytest.mark.compat
OWN = [
    f for f in dataclasses.fields(LoRASwitchConfig) if f.name not in {f.name for f in dataclasses.fields(PeftConfig)}
]
NEW_PEFT = Version(peft.__version__) >= Version("0.21")


# ------------------------------------------------------------------------------------------------------------- fields


def test_defaults():
    """As README and issue say; a changed default is a changed adapter."""
    config = LoRASwitchConfig()
    assert {f.name: getattr(config, f.name) for f in OWN} == {
        "r": 8,
        "num_experts": 8,
        "expert_names": None,
        "top_k": 2,
        "num_shared_experts": 0,
        "normalize_gates": True,
        "router_module": None,
        "target_modules": None,
        "exclude_modules": None,
        "lora_alpha": 8,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "trainable_token_indices": None,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "router_jitter": 0.0,
        "router_decay": 0.0,
        "top_p": 1.0,
        "trainable": "all",
        "base_expert": False,
        "ensure_weight_tying": False,
    }
    assert config.peft_type == "LORASWITCH" and not config.is_prompt_learning
    assert LoRASwitchConfig(top_k=1).normalize_gates is False


@pytest.mark.parametrize("field", OWN, ids=lambda f: f.name)
def test_every_field_has_a_help(field):
    text = field.metadata["help"]
    assert len(text) > 30 and text.endswith((".", ".)"))
    if isinstance(field.default, (bool, int, float)) and not isinstance(field.default, bool):
        assert re.search(r"[<>]=?|\[\d|\(\d", text), "says the range"


def test_shared_words_mean_the_same_as_in_lora():
    """One word changes: what is named as in LoraConfig has LoraConfig's default and accepts the same values."""
    lora = {f.name: f for f in dataclasses.fields(LoraConfig)}
    shared = {f.name for f in OWN} & set(lora)
    assert shared >= {
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    }
    assert shared >= {"layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"}
    for name in shared:
        assert getattr(LoRASwitchConfig(), name) == getattr(LoraConfig(), name)


def test_the_docstring_names_the_error():
    assert "ValueError" in inspect.getdoc(LoRASwitchConfig)


BAD = [
    *[
        {name: value}
        for name in ("r", "num_experts", "top_k")
        for value in (0, -1, 1.0, 2.5, "8", None, True, 10**6, [8])
    ],
    *[{"lora_alpha": value} for value in (0, -1, "16", None, float("nan"), float("inf"), True)],
    *[{name: v} for name in ("lora_dropout", "router_jitter") for v in (-0.1, 1, 1.0, "0", None, float("nan"), True)],
    *[{"top_p": value} for value in (0, 0.0, -0.1, 1.01, "0.5", None, float("nan"), True)],
    {"top_k": 1, "top_p": 0.5},
    *[{"router_decay": value} for value in (-0.1, 1.01, "0", None, float("nan"), float("inf"), True)],
    *[{n: v} for n in ("router_aux_loss_coef", "router_z_loss_coef") for v in (-1e-9, "0", None, float("inf"), True)],
    {"top_k": 3, "num_experts": 2},
    *[{"normalize_gates": value} for value in (1, "yes", 0.5)],
    *[{"base_expert": value} for value in (1, "yes", None)],
    *[{"trainable": value} for value in ("", "experts", None, True, ["router"])],
    *[{"use_rslora": value} for value in (1, "yes", None)],
    *[{"bias": value} for value in ("lora_only", "", None, True)],
    *[{"init_weights": value} for value in (1, 0, "kaiming", None)],
    *[{"router_module": value} for value in ("", 3, ["q_proj"])],
    *[{"rank_pattern": value} for value in ([8], "q", {"q": 0}, {"q": 2.0}, {3: 8}, {"q": True})],
    *[{"alpha_pattern": value} for value in ([8], {"q": 0}, {"q": "2"}, {3: 8.0})],
    *[{n: v} for n in ("target_modules", "exclude_modules") for v in (3, [3], [""], {"q": 1}, "(unclosed", b"q")],
    *[{"modules_to_save": value} for value in ("score", [3], 3, [""])],
    *[{"layers_to_transform": v, "target_modules": ["q"]} for v in (-1, [0, -1], [0.5], "0", [True], {0})],
    *[{"layers_pattern": v, "layers_to_transform": 0, "target_modules": ["q"]} for v in (3, [3])],
    *[{"trainable_token_indices": value} for value in (3, [-1], ["a"], {"embed": 3}, {"embed": [0.5]})],
    {"layers_to_transform": [0], "target_modules": r".*q_proj"},
    {"layers_to_transform": [0], "target_modules": "all-linear"},
    {"layers_pattern": "layers", "target_modules": r".*q_proj"},
    {"layers_pattern": "layers", "target_modules": ["q_proj"]},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: ",".join(f"{k}={v!r}" for k, v in fields.items())[:60])
def test_bad_values_name_the_field(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=name) as raised:
        LoRASwitchConfig(**fields)
    value = fields[name]
    if len(fields) == 1:
        assert repr(value) in str(raised.value) or repr(next(iter(value.values()))) in str(raised.value)


HUGE: list[tuple[dict, str]] = [
    ({"lora_alpha": 1e40}, "lora_alpha"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
    ({"lora_alpha": 65504 * 8 * 1.01}, "lora_alpha=.*scale of 6.6.*rank 8"),
    ({"lora_alpha": 1e-40}, "lora_alpha"),
    ({"lora_alpha": 70000, "rank_pattern": {"q": 1}}, "lora_alpha=.*rank 1"),
    ({"lora_alpha": 400_000, "r": 8, "use_rslora": True}, "lora_alpha"),
    ({"alpha_pattern": {"q_proj": 1e40}}, r"alpha_pattern\['q_proj'\]"),
    ({"router_aux_loss_coef": 1e40}, "router_aux_loss_coef"),
    ({"router_z_loss_coef": 10**400}, "router_z_loss_coef"),
    ({"num_shared_experts": 4096, "r": 4096}, "r=4096 with num_experts=8, num_shared_experts=4096.*16,809,984 rows"),
    ({"num_experts": 4096, "r": 64}, "num_experts=4096"),
    ({"rank_pattern": {"q_proj": 65536}}, r"rank_pattern\['q_proj'\]=65536 with num_experts=8"),
    ({"r": 10**5000}, "r=<int> must be"),
    ({"layers_to_transform": list(range(100_000)), "target_modules": ["q"]}, "layers_to_transform has 100,000 indices"),
    ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path"),
    ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
    ({"revision": 3}, "revision"),
    ({"auto_mapping": "x"}, "auto_mapping"),
    ({"inference_mode": "no"}, "inference_mode"),
    ({"bias": "x" * 10**7}, "bias"),
    ({"init_weights": ["x" * 100] * 10**4}, "init_weights"),
    ({"router_module": 10**5000}, "router_module"),
    ({"trainable_token_indices": [3, 5, 3]}, "trainable_token_indices=.*twice"),
    ({"trainable_token_indices": {"embed": [3, 5, 3]}}, r"trainable_token_indices\['embed'\]=.*twice"),
]


@pytest.mark.parametrize(("fields", "message"), HUGE, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_numbers_and_strings_beyond_all_measure(fields, message):
    """Refused by name, at once, in a message that can be read, and before anything is allocated."""
    with pytest.raises(ValueError, match=message) as raised:
        LoRASwitchConfig(**fields)
    assert len(str(raised.value)) < 1500


def test_deep_nesting():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    for name in (
        "target_modules",
        "modules_to_save",
        "r",
        "rank_pattern",
        "bias",
        "trainable_token_indices",
        "auto_mapping",
    ):
        with pytest.raises(ValueError, match=f"{name}.*<list>"):
            LoRASwitchConfig(**{name: nested})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_scale_is_a_number_in_every_dtype(dtype):
    fields = {"r": 2, "lora_alpha": 65504 * 2, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), switch_config(**fields))
    scale = switch_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"].scaling["default"]
    assert torch.tensor(scale).to(dtype).isfinite()


@pytest.mark.parametrize("name", ["use_dora", "init_lora_weights"])
def test_fields_of_lora_that_are_not_ours(name):
    """An upgrade would not help."""
    if name not in {f.name for f in dataclasses.fields(LoraConfig)}:
        pytest.skip("not a field of this PEFT")
    with pytest.raises(ValueError, match=f"no {name}: this part of LoraConfig has no counterpart") as raised:
        LoRASwitchConfig(**{name: True})
    assert "upgrade" not in str(raised.value) and "pip" not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1, "num_experts": 1, "top_k": 1},
        {"num_experts": 2, "top_k": 2, "normalize_gates": False},
        {"top_k": 1, "normalize_gates": False},
        {"top_k": 1, "normalize_gates": True},
        {"num_experts": 1, "top_k": 1, "base_expert": True, "num_shared_experts": 1},
        {
            "lora_alpha": 0.5,
            "lora_dropout": 0.99,
            "router_jitter": 0,
            "router_decay": 1,
            "router_aux_loss_coef": 0,
            "router_z_loss_coef": 2,
        },
        {"init_weights": "gaussian", "use_rslora": True, "trainable": "router"},
        {"target_modules": ("q_proj", "v_proj"), "exclude_modules": {"lm_head"}},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers", "h"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": 4, r".*\.mlp\..*": 16}, "alpha_pattern": {"q_proj": 2.5}},
        {"rank_pattern": None, "alpha_pattern": None},
        {"modules_to_save": ["score"], "trainable_token_indices": {"embed_tokens": [0, 5]}},
        {"trainable_token_indices": [1, 2]},
        {"task_type": "CAUSAL_LM", "router_module": "layers.1.self_attn.q_proj"},
        {"task_type": TaskType.SEQ_CLS, "inference_mode": True, "base_model_name_or_path": "x/y", "revision": "main"},
    ],
    ids=str,
)
def test_good_values_survive_every_round_trip(fields, tmp_path):
    config = LoRASwitchConfig(**fields)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORASWITCH"
    for again in (
        PeftConfig.from_pretrained(tmp_path),
        LoRASwitchConfig.from_pretrained(tmp_path),
        LoRASwitchConfig(**saved),
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        dataclasses.replace(config),
    ):
        assert type(again) is LoRASwitchConfig
        assert again.to_dict() == config.to_dict()
        assert isinstance(again.target_modules, type(config.target_modules))


def test_saved_names_are_in_order(tmp_path):
    names = [f"layers.{i}.q_proj" for i in range(20)]
    LoRASwitchConfig(target_modules=names).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


@pytest.mark.parametrize("name", ["num_expert", "lora_r", "soft_routing", "cls", "self"])
def test_unknown_fields(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.*spelling.*newer version.*pip install -U peft"):
        LoRASwitchConfig(**{name: 4})
    LoRASwitchConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 4}))
    for config_class in (PeftConfig, LoRASwitchConfig):
        with pytest.raises(ValueError, match=name):
            config_class.from_pretrained(tmp_path)


def test_a_task_type_that_does_not_exist():
    with pytest.raises(ValueError, match="task type"):
        LoRASwitchConfig(task_type="CAUSAL")


@pytest.mark.parametrize("bias", ["all", "loraswitch_only"])
def test_biases_that_peft_would_not_save(bias):
    """PEFT before 0.21 loses the trained biases of methods that are not its own, silently."""
    if NEW_PEFT:
        assert LoRASwitchConfig(bias=bias).bias == bias
    else:
        with pytest.raises(ValueError, match=rf"bias='{bias}' needs PEFT 0.21"):
            LoRASwitchConfig(bias=bias)


# ------------------------------------------------------------------------------------------- what the fields select


def adapted_names(**fields) -> set[str]:
    return set(switch_layers(get_peft_model(tiny_llama(num_hidden_layers=3), switch_config(**fields)).get_base_model()))


def names(*linears: str, layers=(0, 1, 2)) -> set[str]:
    return {f"model.layers.{i}.{'mlp' if linear in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{linear}"
            for i in layers for linear in linears}  # fmt: skip


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"target_modules": "all-linear"}, names(*ALL)),
        ({"target_modules": "ALL-LINEAR"}, names(*ALL)),
        ({"target_modules": None}, names("q_proj", "v_proj")),  # PEFT's choice for Llama
        ({"target_modules": ["q_proj", "mlp.up_proj"]}, names("q_proj", "up_proj")),
        ({"target_modules": ["model.layers.1.self_attn.k_proj"]}, names("k_proj", layers=[1])),
        ({"target_modules": r".*\.[12]\..*(q|k)_proj"}, names("q_proj", "k_proj", layers=[1, 2])),
        ({"exclude_modules": ["q_proj", "mlp.down_proj"]}, names("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")),
        ({"exclude_modules": r".*\.0\..*"}, names(*ALL, layers=[1, 2])),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, names("q_proj", layers=[0, 2])),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, names("q_proj", layers=[1])),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            names("q_proj", layers=[1]),
        ),
        ({"target_modules": None, "layers_to_transform": [2]}, names("q_proj", "v_proj", layers=[2])),
        ({"router_module": "layers.1.self_attn.q_proj"}, names(*ALL, layers=[1, 2])),
        ({"router_module": "model.layers.2.mlp.gate_proj"}, names("gate_proj", "up_proj", "down_proj", layers=[2])),
        ({"modules_to_save": ["mlp"]}, names("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_which_linears_are_adapted(fields, wanted):
    assert adapted_names(**fields) == wanted


def test_an_architecture_without_a_default(monkeypatch):
    from peft_loraswitch import LoRASwitchModel

    mapping = {k: v for k, v in LoRASwitchModel.target_module_mapping.items() if k != "gpt2"}
    monkeypatch.setattr(LoRASwitchModel, "target_module_mapping", mapping)
    model = get_peft_model(tiny_gpt2(), switch_config(target_modules=None))
    assert {name.rpartition(".")[2] for name in switch_layers(model)} == {"c_attn", "c_proj", "c_fc"}
    with pytest.raises(ValueError, match="layers_to_transform needs target_modules as a list"):
        get_peft_model(tiny_gpt2(), switch_config(target_modules=None, layers_to_transform=[0]))


def test_ranks_scales_and_shapes():
    model = get_peft_model(
        tiny_llama(),
        switch_config(
            r=4,
            num_experts=5,
            lora_alpha=12,
            rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
            alpha_pattern={r".*\.0\..*k_proj": 3, "q_proj": 5},
        ),
    )
    layers = switch_layers(model.get_base_model())
    expected = {
        "model.layers.0.self_attn.q_proj": (2, 5 / 2),
        "model.layers.1.mlp.up_proj": (7, 12 / 7),
        "model.layers.0.mlp.up_proj": (4, 3.0),
        "model.layers.0.self_attn.k_proj": (4, 3 / 4),
        "model.layers.1.self_attn.k_proj": (4, 3.0),
    }
    for name, (rank, scaling) in expected.items():
        layer = layers[name]
        assert layer.loraswitch_A["default"].weight.shape == (5, rank, layer.in_features)
        assert layer.loraswitch_B["default"].weight.shape == (5, layer.out_features, rank)
        assert layer.scaling["default"] == pytest.approx(scaling)
    routers = [layer for layer in layers.values() if "default" in layer.loraswitch_router]
    assert len(routers) == 1 and routers[0].loraswitch_router["default"].weight.shape == (5, HIDDEN)


def test_rank_stabilised_scale():
    for layer in switch_layers(
        get_peft_model(tiny_llama(), switch_config(r=4, lora_alpha=6, use_rslora=True))
    ).values():
        assert layer.scaling["default"] == pytest.approx(6 / 4**0.5)


@pytest.mark.parametrize(("init_weights", "zero"), [(True, True), ("gaussian", True), (False, False)])
def test_initialisation(init_weights, zero):
    """Each expert as LoRA would initialise its [r, in] matrix; and no two experts alike."""
    model = get_peft_model(
        tiny_llama(hidden_size=64, intermediate_size=256), switch_config(r=16, init_weights=init_weights)
    )
    for layer in switch_layers(model).values():
        a, b = layer.loraswitch_A["default"].weight, layer.loraswitch_B["default"].weight
        assert bool((b == 0).all()) is zero
        wanted = 1 / 16 if init_weights == "gaussian" else (3 * layer.in_features) ** -0.5
        assert a.std().item() == pytest.approx(wanted, rel=0.1)
        assert all(not torch.equal(a[i], a[j]) for i in range(4) for j in range(i))


def test_configuration_of_a_live_model_is_found_by_peft():
    model = get_peft_model(tiny_llama(), switch_config())
    assert isinstance(model.base_model, BaseTuner) and model.peft_type == "LORASWITCH"
    assert model.active_peft_config.num_experts == 4
