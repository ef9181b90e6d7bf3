"""Routers without training: the rows are those of the definitions, computed here in float64, and what does not fit is refused."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import adapted, router_layer, switch_layers, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5, tokens
from loras import save_lora
from peft_loraswitch import from_loras, router_from_texts, router_from_weights
from peft_loraswitch.compose.initial_router import LOGISTIC_RIDGE
from peft_loraswitch.compose.linear_classifiers import Moments, regression_rows
from peft_loraswitch.router_inputs import averaged, read
from trainer_tools import sentence, tokenizer
from unchanged import unchanged

TOKENIZER = tokenizer()
NAMES = ["maths", "code", "law"]


def example_texts(seed: int, words: range, number: int = 6) -> list[str]:
    """Sentences of different lengths, from a part of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (number,), generator=generator).tolist()
    return [
        " ".join(f"w{words[i]}" for i in torch.randint(len(words), (n,), generator=generator).tolist()) for n in lengths
    ]


TEXTS = {
    "law": example_texts(2, range(20, 60)),
    "maths": example_texts(0, range(3, 40), number=9),
    "code": example_texts(1, range(10, 50)),
}


def made(backbone: nn.Module | None = None, **settings) -> PeftModel:
    settings = {"num_experts": 3, "expert_names": NAMES, **settings}
    return adapted(tiny_llama() if backbone is None else backbone, **settings)


def router(model: nn.Module) -> torch.Tensor:
    return router_layer(model).loraswitch_router["default"].weight


def inputs_of(model: nn.Module, texts: list[str]) -> list[np.ndarray]:
    """What the router's linear gets, text by text, in a whole forward."""
    seen = []
    handle = router_layer(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]]))
    handle.remove()
    return [x[0].double().numpy() for x in seen]


def discriminant(classes: list[np.ndarray], ridge: float) -> np.ndarray:
    """By the definition: log-densities of normal distributions up to what they share, the constant fitted by least squares."""
    means = np.stack([x.mean(0) for x in classes])
    within = np.mean([np.cov(x.T, bias=True) for x in classes], axis=0)
    within = (1 - ridge) * within + ridge * np.trace(within) / len(within) * np.eye(len(within))
    inverse, centre = np.linalg.inv(within), means.mean(0)
    between = np.cov(means.T, bias=True)
    constant = np.linalg.inv(within + between + np.outer(centre, centre)) @ centre
    rows = []
    for mean in means:
        offset = -0.5 * mean @ inverse @ mean + 0.5 * centre @ inverse @ centre
        rows.append(inverse @ (mean - centre) + offset * constant)
    return np.stack(rows)


# ---------------------------------------------------------------------------------------------------------- from texts


@pytest.mark.parametrize("method, ridge", [("discriminant", 0.1), ("centroid", 1.0)])
@pytest.mark.parametrize("settings", [{}, {"router_module": "layers.1.self_attn.v_proj", "num_shared_experts": 1}])
def test_rows_are_those_of_the_definition(method, ridge, settings):
    model = made(**settings)
    expected = discriminant([np.concatenate(inputs_of(model, TEXTS[name])) for name in NAMES], ridge)
    counts = router_from_texts(model, TOKENIZER, TEXTS, method=method, batch_size=4, temperature=2.0)
    np.testing.assert_allclose(router(model).detach().numpy(), expected / 2, rtol=2e-3, atol=2e-4)
    assert counts == {name: sum(len(text.split()) for text in TEXTS[name]) for name in NAMES}
    assert list(counts) == NAMES


@pytest.mark.parametrize("method, least", [("discriminant", 0.6), ("centroid", 0.5), ("logistic", 0.6)])
def test_text_finds_its_expert(method, least):
    """Token by token more often than by chance, 1/3, and all of a text together always."""
    words = [range(3 + 20 * i, 23 + 20 * i) for i in range(3)]
    texts = {name: example_texts(i, words[i], 10) for i, name in enumerate(NAMES)}
    model = made(top_k=1, normalize_gates=True)
    router_from_texts(model, TOKENIZER, texts, method=method)
    for index in range(3):
        text = " ".join(f"w{word}" for word in words[index])
        with model.record_routing() as recorded, torch.no_grad():
            model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]]))
        assert recorded.summary()["load"][index] > least
        (x,) = inputs_of(model, [text])
        assert (x @ router(model).detach().double().numpy().T).mean(0).argmax() == index


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_logistic_regression_is_at_its_optimum(decay):
    """The gradient of the penalised cross-entropy, in float64 and written out, is nothing there; and it is no start's."""
    model = made(router_decay=decay)
    groups = [inputs_of(model, TEXTS[name]) for name in NAMES]
    if decay:
        groups = [[averaged(torch.from_numpy(x)[None], decay)[0].numpy() for x in group] for group in groups]
    classes = [np.concatenate(group) for group in groups]
    within = np.mean([np.cov(each.T, bias=True) for each in classes], 0)

    def gradient(rows: np.ndarray) -> np.ndarray:
        total = LOGISTIC_RIDGE * rows @ within
        for place, each in enumerate(classes):
            logits = each @ rows.T
            chances = np.exp(logits - logits.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            chances[:, place] -= 1
            total += chances.T @ each / len(each) / len(classes)
        return np.abs(total).max()

    router_from_texts(model, TOKENIZER, TEXTS)
    before = gradient(router(model).detach().double().numpy())
    router_from_texts(model, TOKENIZER, TEXTS, method="logistic")
    assert gradient(router(model).detach().double().numpy()) < min(1e-3, before / 20)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_discriminant_is_the_better_one(decay):
    """On made-up domains: four kinds of text that use the same words with other frequencies, ten texts of each to learn from."""
    words, kinds = 512, range(4)
    model = made(tiny_llama(vocab_size=words, hidden_size=64), num_experts=4, expert_names=None)
    model.peft_config["default"].router_decay = decay
    right = {"centroid": 0.0, "discriminant": 0.0}
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        liked = [torch.exp(0.7 * torch.randn(words, generator=rng)) / (torch.arange(words) + 5) for _ in kinds]

        def text(kind: int, rng=rng, liked=liked) -> str:
            return " ".join(map(str, torch.multinomial(liked[kind], 64, replacement=True, generator=rng).tolist()))

        texts = {kind: [text(kind) for _ in range(10)] for kind in kinds}
        others = [(kind, [int(word) for word in text(kind).split()]) for kind in kinds for _ in range(25)]
        for method in right:
            router_from_texts(model, Numbers(), texts, method=method)
            best: list[torch.Tensor] = []
            for batch in read(model.get_base_model(), "default", [ids for _, ids in others], 50):
                best += averaged(batch.x @ router(model).detach().T, decay).argmax(-1)
            hits = [(found == kind).double().mean() for found, (kind, _) in zip(best, others, strict=True)]
            right[method] += float(torch.stack(hits).mean()) / 6
    assert right["discriminant"] > right["centroid"] + 0.01, right
    assert right["centroid"] > (0.6 if decay else 0.3), right


class Numbers:
    """A tokenizer of texts that are token ids."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(number) for number in text.split()]}


def test_averaged_logits_make_the_rows_larger():
    model = made()
    model.peft_config["default"].router_decay = 0.75
    classes, averages = [], []
    for name in NAMES:
        classes.append(np.concatenate(inputs_of(model, TEXTS[name])))
        rows = []
        for x in inputs_of(model, TEXTS[name]):
            for t in range(len(x)):
                weights = np.array([0.75 ** (t - s) for s in range(t + 1)])
                rows.append(weights @ x[: t + 1] / weights.sum())
        averages.append(np.stack(rows))
    expected = discriminant(classes, 0.1)
    variances = [np.mean([np.var(x @ expected.T, axis=0).sum() for x in each]) for each in (classes, averages)]
    router_from_texts(model, TOKENIZER, TEXTS)
    expected *= variances[0] / variances[1]
    assert variances[0] > 1.5 * variances[1]
    np.testing.assert_allclose(router(model).detach().numpy(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_decayed_mean(decay):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    for t in range(5):
        weights = torch.tensor([decay ** (t - s) for s in range(t + 1)], dtype=torch.float64)
        torch.testing.assert_close(averaged(x, decay)[:, t], (weights[:, None] * x[:, : t + 1]).sum(1) / weights.sum())


def test_the_base_expert_gets_a_row_of_its_texts_or_logit_zero():
    base = example_texts(5, range(3, 63))
    model = made(base_expert=True)
    expected = discriminant(
        [np.concatenate(inputs_of(model, t)) for t in (*(TEXTS[name] for name in NAMES), base)], 0.1
    )
    counts = router_from_texts(model, TOKENIZER, {"base": base, **TEXTS})
    np.testing.assert_allclose(router(model).detach().numpy(), expected, rtol=2e-3, atol=2e-4)
    assert list(counts) == [*NAMES, "base"]
    router_from_texts(model, TOKENIZER, TEXTS)
    assert not router(model)[3].any() and router(model)[:3].any(1).all()


def test_indices_do_where_there_are_no_names():
    model = made(expert_names=None)
    named = made()
    counts = router_from_texts(model, TOKENIZER, {NAMES.index(name): texts for name, texts in TEXTS.items()})
    router_from_texts(named, TOKENIZER, TEXTS)
    assert torch.equal(router(model), router(named)) and list(counts) == ["expert_0", "expert_1", "expert_2"]


def test_nothing_but_the_router_changes_in_its_dtype():
    model = made().train()
    model.base_model.model.model.layers[0].eval()
    router_layer(model).loraswitch_router["default"].to(torch.bfloat16)
    weight = router(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    router_from_texts(model, TOKENIZER, TEXTS)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == 1 and "loraswitch_router" in changed[0]
    assert router(model) is weight and weight.dtype == torch.bfloat16 and weight.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not router_layer(model)._forward_pre_hooks and not router_layer(model)._forward_hooks


@pytest.mark.parametrize("backbone", [tiny_gpt2, tiny_opt, tiny_t5])
def test_other_backbones(backbone):
    settings = {"target_modules": ["q", "k", "v"], "task_type": "SEQ_2_SEQ_LM"} if backbone is tiny_t5 else {}
    if backbone is tiny_t5:
        settings["exclude_modules"] = r"encoder\..*|.*EncDecAttention.*"
    model = made(backbone(), **settings)
    router_from_texts(model, TOKENIZER, TEXTS)
    assert torch.isfinite(router(model)).all() and router(model).any(1).all()


def test_a_tokenizer_without_a_padding_token_does():
    bare = tokenizer()
    bare.pad_token = None
    first, second = made(), made()
    router_from_texts(first, bare, TEXTS)
    router_from_texts(second, TOKENIZER, TEXTS, batch_size=1)
    torch.testing.assert_close(router(first), router(second), rtol=1e-4, atol=1e-5)


def test_within_inference_mode():
    """The router can be trained afterwards."""
    model, other = made(), made()
    with torch.inference_mode():
        router_from_texts(model, TOKENIZER, TEXTS)
    router_from_texts(other, TOKENIZER, TEXTS)
    assert torch.equal(router(model), router(other)) and not router(model).is_inference()
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert router(model).grad.any()


@contextlib.contextmanager
def refused(model: nn.Module, error: type[Exception], match: str):
    with unchanged(model), pytest.raises(error, match=match):
        yield


@pytest.mark.parametrize(
    "texts, match",
    [
        ({**TEXTS, "physics": ["w4"]}, "expert 'physics' is unknown.*maths, code, law"),
        ({**TEXTS, "base": ["w4"]}, "expert 'base' is unknown"),
        ({**TEXTS, 0: ["w4"]}, r"texts\[0\] is expert 0, which has texts under another key"),
        ({name: TEXTS[name] for name in NAMES[:2]}, "texts has none for law"),
        ({}, "texts has none for maths, code, law"),
        ({**TEXTS, "law": []}, r"texts\['law'\] is \[\]"),
        ({**TEXTS, "law": "w3 w4"}, r"texts\['law'\] is 'w3 w4'; it must be a list"),
        ({**TEXTS, "law": ["w3", ""]}, r"texts\['law'\]: entry 1 is ''"),
        ({**TEXTS, "law": ["w3", " \n"]}, r"texts\['law'\]: entry 1, .* has no tokens"),
        ({**TEXTS, "law": [3]}, r"texts\['law'\]: entry 0 is 3"),
        (["w3"], "must be a dict"),
        (dict.fromkeys(NAMES, ["w3 w3"]), "all tokens of an expert look alike"),
        (dict.fromkeys(NAMES, ["w3 w4 w5"]), "look to the router like those of every other"),
    ],
)
def test_texts_that_do_not_fit_are_refused(texts, match):
    model = made()
    with refused(model, ValueError, match):
        router_from_texts(model, TOKENIZER, texts)


def test_the_tokenizer_may_stand_where_the_backbone_was_loaded_from(tmp_path):
    expected, model = made(), made()
    with refused(model, ValueError, "tokenizer is missing: this .* does not say where it was loaded from"):
        router_from_texts(model, None, TEXTS)
    TOKENIZER.save_pretrained(tmp_path)
    model.get_base_model().name_or_path = str(tmp_path)
    router_from_texts(expected, TOKENIZER, TEXTS)
    router_from_texts(model, None, TEXTS)
    assert torch.equal(router(model), router(expected))
    router_from_weights(model, texts=TEXTS["law"])


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"method": "nearest"}, "method='nearest' is not one of discriminant, centroid"),
        ({"temperature": 0}, "temperature=0 must be a positive number"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-45}, "beyond torch.float32: raise the temperature"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": True}, "max_length=True"),
        ({"adapter_name": "other"}, "adapter_name='other' is unknown"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, match):
    model = made()
    with refused(model, ValueError, match):
        router_from_texts(model, TOKENIZER, TEXTS, **arguments)


def test_models_whose_router_cannot_be_set_are_refused():
    model = made()
    calls = (lambda: router_from_texts(model, TOKENIZER, TEXTS), lambda: router_from_weights(model))
    for call in calls:
        with model.disable_adapter(), refused(model, ValueError, "switched off"):
            call()
        with pytest.raises(ValueError, match="carries no LoRA-Switch adapter"):
            router_from_texts(tiny_llama(), TOKENIZER, TEXTS)
        model.fuse_for_inference("fused")
        with refused(model, RuntimeError, "is fused: call unfuse"):
            call()
        model.unfuse()
        handle = model.base_model.model.model.norm.register_forward_pre_hook(lambda module, args, call=call: call())
        with pytest.raises(RuntimeError, match="in a forward"):
            model(tokens())
        handle.remove()
    model.add_adapter("other", model.peft_config["default"])
    with refused(model, ValueError, r"'other' is not active, default is: call set_adapter\('other'\)"):
        router_from_texts(model, TOKENIZER, TEXTS, adapter_name="other")
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.weight[4:].fill_(float("nan"))
    before = router(model).clone()
    with pytest.raises(ValueError, match="NaN or Inf in what the router"):
        router_from_texts(model, TOKENIZER, TEXTS, adapter_name="default")
    assert torch.equal(router(model), before)


# -------------------------------------------------------------------------------------------------------- from weights


def arrow(model: nn.Module, linears: list[str], x: np.ndarray, directions: int) -> np.ndarray:
    """|v x| [n, E] from the full matrices of all `linears`, one below the other."""
    layers = [layer for name, layer in switch_layers(model).items() if name.endswith(tuple(linears))]
    heights = []
    for expert in range(layers[0].loraswitch_A["default"].weight.shape[0]):
        full = [
            layer.scaling["default"]
            * layer.loraswitch_B["default"].weight[expert].detach().double().numpy()
            @ layer.loraswitch_A["default"].weight[expert].detach().double().numpy()
            for layer in layers
        ]
        _, values, right = np.linalg.svd(np.concatenate(full))
        weighted = right[:directions] * (values[:directions] / values[0])[:, None]
        heights.append(np.linalg.norm(x @ weighted.T, axis=1))
    return np.stack(heights, 1)


@pytest.mark.parametrize("directions", [1, 4])
def test_rows_follow_arrow_as_well_as_linear_functions_can(directions):
    model = made(alpha_pattern={"k_proj": 11}, rank_pattern={"v_proj": 5})
    x = np.concatenate(inputs_of(model, [TOKENIZER.decode([i]) for i in range(64)]))
    heights = arrow(model, [f"layers.0.self_attn.{name}_proj" for name in "qkv"], x, directions)
    wanted = heights / heights.std(0)
    wanted = wanted - wanted.mean(1, keepdims=True)
    covariance = np.cov(x.T, bias=True)
    damped = 0.9 * covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    mean = x.mean(0)
    shares = router_from_weights(model, directions=directions, batch_size=10)
    for expert, name in enumerate(NAMES):
        cross = (x - mean).T @ (wanted[:, expert] - wanted[:, expert].mean()) / len(x)
        row = np.linalg.solve(damped, cross)
        back = np.linalg.solve(damped, mean)
        row -= back * (mean @ row) / (mean @ back)
        row /= (x @ row).std()
        np.testing.assert_allclose(router(model)[expert].detach().numpy(), row, rtol=2e-3, atol=2e-4)
        logits = x @ router(model)[expert].detach().double().numpy()
        assert abs(logits.mean()) < 1e-4 and logits.std() == pytest.approx(1, abs=1e-4)
        assert shares[name] == pytest.approx(np.corrcoef(logits, wanted[:, expert])[0, 1] ** 2, abs=1e-4)
    assert list(shares) == NAMES and all(0.05 < share < 1 for share in shares.values())


def test_an_expert_is_found_by_tokens_that_it_changes():
    """Experts that look for one token each: their tokens choose them."""
    model = made(top_k=1, normalize_gates=True)
    wanted = [10, 30, 50]
    x = torch.tensor(np.concatenate(inputs_of(model, [f"w{index}" for index in wanted])))
    for layer in switch_layers(model).values():
        if layer.name.endswith(("q_proj", "k_proj", "v_proj")):
            with torch.no_grad():
                layer.loraswitch_A["default"].weight.zero_()[:, 0] = torch.linalg.pinv(x).T * -1.0
    router_from_weights(model)
    logits = x.float() @ router(model).T
    assert logits.argmax(1).tolist() == [0, 1, 2]


def test_the_norm_of_an_expert_does_not_count(tmp_path):
    folders = [save_lora(tmp_path / name, tiny_llama(), seed) for seed, name in enumerate(NAMES)]
    model = from_loras(tiny_llama(), folders)
    router_from_weights(model)
    before = router(model).clone()
    with torch.no_grad():
        for layer in switch_layers(model).values():
            layer.loraswitch_B["default"].weight[1] *= 100
    router_from_weights(model)
    torch.testing.assert_close(router(model), before, rtol=1e-4, atol=1e-5)


def test_texts_for_references_and_a_base_expert():
    model = made(base_expert=True, router_module="layers.1.self_attn.q_proj")
    router_from_weights(model)
    by_tokens = router(model).clone()
    router_from_weights(model, texts=[sentence(seed, 9) for seed in range(8)], tokenizer=TOKENIZER, batch_size=3)
    assert not router(model)[3].any() and not torch.allclose(router(model), by_tokens, atol=1e-2)


def without_experts(model: nn.Module) -> None:
    for layer in switch_layers(model).values():
        if layer.name.endswith(("q_proj", "k_proj", "v_proj")):
            layer.loraswitch_B["default"].weight.data[1] = 0


def all_the_same(model: nn.Module) -> None:
    for layer in switch_layers(model).values():
        for part in (layer.loraswitch_A, layer.loraswitch_B):
            part["default"].weight.data[:] = part["default"].weight.data[:1].clone()


@pytest.mark.parametrize(
    "change, match",
    [
        (
            without_experts,
            "Expert 'code' adds nothing in .*q_proj, .*k_proj, .*v_proj, which read what the router reads",
        ),
        (all_the_same, "cannot be told apart by their weights"),
    ],
)
def test_weights_that_tell_nothing_are_refused(change, match):
    model = made()
    change(model)
    with refused(model, ValueError, match):
        router_from_weights(model)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"directions": 0}, "directions=0"),
        ({"references": 1.5}, "references=1.5"),
        ({"references": 1}, "reference inputs are all alike"),
        ({"texts": ["w3"]}, "tokenizer is missing"),
        ({"texts": "w3", "tokenizer": TOKENIZER}, "must be a list"),
        ({"temperature": -1}, "temperature=-1"),
        ({"batch_size": None}, "batch_size=None"),
    ],
)
def test_arguments_of_the_weights_are_checked(arguments, match):
    model = made()
    with refused(model, ValueError, match):
        router_from_weights(model, **arguments)


@pytest.mark.parametrize(("difference", "told_apart"), [(0.0, False), (1e-15, False), (1e-4, True)])
def test_values_that_differ_by_rounding_alone_are_not_told_apart(difference, told_apart):
    """Whatever the processor makes of equal experts: products of the same numbers may be summed up in another order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    same = 3.0 + x[:, :1].abs()
    values = same * (1.0 + difference * torch.randn(200, 3, generator=generator, dtype=torch.float64) * x[:, 1:4])
    _, shares = regression_rows(Moments.of(x, values), 1e-3)
    assert bool((shares > 1e-12).all()) == told_apart and bool((shares == 0).all()) != told_apart
