"""Bad input gives an error that names the field, and leaves the model and its other adapters as they were."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from helpers import adapted, switch_config, switch_layers, tiny_gpt2, tiny_llama, tiny_opt, tokens
from peft_loraswitch import LoRASwitchConfig, LoRASwitchLinear
from unchanged import unchanged

pytestmark = pytest.mark.compat


# -------------------------------------------------------------------- refused at injection, through every way to inject

WAYS_IN = {
    "get_peft_model": (tiny_llama, lambda model, config, name: get_peft_model(model, config, adapter_name=name)),
    "inject_adapter_in_model": (tiny_llama, lambda model, config, name: inject_adapter_in_model(config, model, name)),
    "model.add_adapter": (tiny_llama, lambda model, config, name: model.add_adapter(config, adapter_name=name)),
    "second model.add_adapter": (
        lambda: with_transformers_adapter(),
        lambda model, config, name: model.add_adapter(config, adapter_name=name),
    ),
    "PeftModel.add_adapter": (
        lambda: adapted(tiny_llama(), target_modules=["q_proj", "v_proj", "down_proj"]),
        lambda model, config, name: model.add_adapter(name, config),
    ),
}


def with_transformers_adapter() -> torch.nn.Module:
    model = tiny_llama()
    model.add_adapter(switch_config(target_modules=["q_proj", "v_proj", "down_proj"], init_weights=False), "first")
    return model.eval()


def later(**fields):
    """A configuration whose fields are set after construction, as PEFT advises for loaded ones."""
    config = switch_config()
    for name, value in fields.items():
        setattr(config, name, value)
    return config


BAD_INJECTIONS = {
    "no module matched": (lambda: switch_config(target_modules=["nope"]), "new", "nope"),
    "regex without a match": (lambda: switch_config(target_modules=r".*nope"), "new", "nope"),
    "all modules excluded": (
        lambda: switch_config(target_modules=["q_proj"], exclude_modules=["q_proj"]),
        "new",
        "exclude_modules",
    ),
    "router_module unknown": (lambda: switch_config(router_module="nope"), "new", "router_module='nope'"),
    "router_module not adapted": (
        lambda: switch_config(target_modules=["q_proj"], router_module="layers.0.self_attn.k_proj"),
        "new",
        "router_module='layers.0.self_attn.k_proj' must name exactly one adapted linear, but it names 0",
    ),
    "router_module ambiguous": (
        lambda: switch_config(router_module="q_proj"),
        "new",
        "router_module='q_proj'.*it names 2",
    ),
    "output embedding": (lambda: switch_config(target_modules=["lm_head", "q_proj"]), "new", "target_modules.*lm_head"),
    "not a linear": (
        lambda: switch_config(target_modules=["embed_tokens"]),
        "new",
        "'model.embed_tokens' is a Embedding",
    ),
    "top_k raised later": (lambda: later(top_k=9), "new", "top_k=9 is larger than num_experts=4"),
    "top_k lowered later": (lambda: later(top_k=0), "new", "top_k=0"),
    "r lowered later": (lambda: later(r=0), "new", "r=0"),
    "layers_to_transform later": (lambda: later(layers_to_transform=[0]), "new", "layers_to_transform"),
    "empty name": (switch_config, "", "adapter_name=''"),
    "name with a dot": (switch_config, "a.b", "adapter_name='a.b'"),
    "name of an attribute": (switch_config, "train", "adapter_name='train'"),
}


@pytest.mark.parametrize(
    ("way_in", "problem"),
    # Transformers takes an empty name for the default name
    [(w, p) for w in WAYS_IN for p in BAD_INJECTIONS if p != "empty name" or "model.add_adapter" not in w],
)
def test_refused_before_anything_changes(way_in, problem):
    build, inject = WAYS_IN[way_in]
    make_config, name, message = BAD_INJECTIONS[problem]
    model, config = build(), make_config()
    given = config.to_dict()
    with unchanged(model), pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject(model, config, name)
    # base_model_name_or_path is set by PEFT and Transformers before they call us
    kept = {key: value for key, value in config.to_dict().items() if key != "base_model_name_or_path"}
    assert kept == {key: given[key] for key in kept}
    result = inject(model, switch_config(init_weights=False), "new")  # and it is as good as new
    model = model if result is None else result
    names = list(switch_layers(model))
    assert names and torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("way_in", WAYS_IN)
def test_interrupted_half_way(way_in, error, monkeypatch):
    """Out of memory at the fifth layer: the first four are taken off again."""
    build, inject = WAYS_IN[way_in]
    model, original, calls = build(), LoRASwitchLinear.update_layer, []

    def update_layer(self, *args, **kwargs):
        original(self, *args, **kwargs)
        calls.append(self.name)
        if len(calls) == 5:
            raise error

    monkeypatch.setattr(LoRASwitchLinear, "update_layer", update_layer)
    with unchanged(model), pytest.raises(error):
        inject(model, switch_config(), "new")
    assert len(calls) == 5


def test_another_method_on_the_same_linear():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with (
        unchanged(model),
        pytest.raises(ValueError, match="'model.layers.0.self_attn.q_proj' already carries another PEFT method"),
    ):
        inject_adapter_in_model(switch_config(), model.get_base_model(), "new")


def test_two_methods_in_one_peft_model():
    model = adapted(tiny_llama())
    with unchanged(model), pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_same_name_twice():
    model = adapted(tiny_llama())
    with unchanged(model), pytest.raises(ValueError, match="'default' exists already"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model.get_base_model(), switch_config())
    if Version(peft.__version__) >= Version("0.21"):  # before, PEFT replaces the adapter, of every method
        with unchanged(model), pytest.raises(ValueError, match="'default'.* exists"):
            model.add_adapter("default", switch_config(num_experts=2))


def test_a_failed_attempt_leaves_gradients_and_training_alone():
    model = adapted(tiny_llama()).train()
    model(tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match="nope"):
        model.add_adapter("new", switch_config(target_modules=["nope"]))
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    for name, p in model.named_parameters():
        assert (name in gradients) == (p.grad is not None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])


@pytest.mark.parametrize("name", ["model", "layers", "0", "q_proj"])
def test_a_name_that_is_part_of_a_path_warns(name):
    with pytest.warns(UserWarning, match=f"adapter name '{name}' is also part of a module's name"):
        get_peft_model(tiny_llama(), switch_config(), adapter_name=name)


@pytest.mark.parametrize("name", ["a", "A", "weight", "default_2", "with-dash", "über"])
def test_names_that_work(name, tmp_path):
    from peft import PeftModel

    model = adapted(tiny_llama())
    model.add_adapter(name, switch_config(num_experts=3, init_weights=False))
    model.set_adapter(name)
    wanted = model(tokens()).logits
    model.save_pretrained(tmp_path, selected_adapters=[name])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(again(tokens()).logits, wanted)


# --------------------------------------------------------------------------------------------- refused while running


def two_adapters():
    model = adapted(tiny_llama())
    model.add_adapter("other", switch_config(num_experts=3, init_weights=False, target_modules=["q_proj", "up_proj"]))
    return model.eval()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "nope"], r"adapter_names holds \['nope'\], which are not loaded. Choose from .*default.*other"),
        (["default", "other", "other"], "adapter_names has 3 entries.*one name per sample"),
        ([], "adapter_names is empty.*one name per sample"),
    ],
)
def test_adapter_names(names, message):
    model = two_adapters()
    batch = tokens(2, 7)
    with unchanged(model), pytest.raises(ValueError, match=message):
        model(batch, adapter_names=names)
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.generate(input_ids=batch, adapter_names=names, max_new_tokens=2)


def test_adapter_names_in_training():
    model = two_adapters().train()
    with unchanged(model), pytest.raises(ValueError, match="adapter_names.*training"):
        model(tokens(), adapter_names=["default", "other"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_hidden_states(bad):
    model = two_adapters()
    embeddings = model.get_input_embeddings()(tokens()).detach()
    embeddings[1, 3, 5] = bad
    message = "NaN or Inf in the input of the router of adapter 'default'.*layers.0.self_attn.q_proj"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeddings)
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2)
    model.set_adapter("other")
    assert torch.isfinite(model(tokens()).logits).all()


def test_router_module_that_runs_too_late():
    """OPT lists k, v before q, but runs q first: k's router comes too late for q. Named, it is an error; by default the
    first that runs decides."""
    router = "layers.0.self_attn.k_proj"
    model = get_peft_model(tiny_opt(), switch_config(router_module=router, init_weights=False)).eval()
    message = r"'model.decoder.layers.0.self_attn.q_proj' runs before the linear that routes, .*k_proj.*router_module='.*q_proj'"
    with pytest.raises(RuntimeError, match=message) as raised:
        model(tokens())
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, tiny_opt()(tokens()).logits)
    advice = str(raised.value).split("router_module='")[1].split("'")[0]  # do what it says
    model = get_peft_model(tiny_opt(), switch_config(router_module=advice, init_weights=False)).eval()
    assert torch.isfinite(model(tokens()).logits).all()


def test_a_layer_reached_before_any_routing():
    model = adapted(tiny_llama())
    layer = switch_layers(model)["base_model.model.model.layers.1.mlp.down_proj"]
    x = torch.randn(2, 3, layer.in_features)
    message = "'model.layers.1.mlp.down_proj' was reached before any routing.*Call the model, not the layer"
    with unchanged(model), pytest.raises(RuntimeError, match=message):
        layer(x)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_other_tokens_than_were_routed(build):
    """A layer that is handed a token more or less than the router saw."""
    model = adapted(build())
    name, layer = list(switch_layers(model.get_base_model()).items())[-1]
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0][:, 1:].contiguous(),))
    with pytest.raises(
        RuntimeError, match=rf"routed tokens of shape \(2, 7\), but the adapted layer '{name}' sees \(2, 6\)"
    ):
        model(tokens())
    handle.remove()
    assert layer.routing_state.frame is None
    assert torch.equal(model(tokens()).logits, adapted(build())(tokens()).logits)


def test_a_failed_forward_is_forgotten():
    """The next forward routes anew: nothing of the failed one is left, also under `generate`."""
    model = adapted(tiny_llama())
    wanted = model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False)
    handle = model.get_base_model().model.layers[1].register_forward_hook(lambda *args: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model.generate(input_ids=tokens(3, 5), max_new_tokens=3)
    handle.remove()
    assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False), wanted)


def test_top_k_one_has_a_gradient_for_its_router():
    model = get_peft_model(
        tiny_llama(),
        LoRASwitchConfig(top_k=1, num_experts=4, init_weights=False, router_aux_loss_coef=0.0, router_z_loss_coef=0.0),
    )
    model.train()(tokens(), labels=tokens()).loss.backward()
    router = next(p for n, p in model.named_parameters() if "loraswitch_router" in n)
    assert router.grad.abs().max() > 0


def test_a_model_that_has_an_adapter_is_not_wrapped_once_more():
    model = adapted(tiny_llama())
    with unchanged(model), pytest.raises(ValueError, match=r"model\.add_adapter\('second', config\)"):
        get_peft_model(model, switch_config(), adapter_name="second")
    model.add_adapter("second", switch_config())
    assert set(model.peft_config) == {"default", "second"}
