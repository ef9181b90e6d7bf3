"""`routing_report`: the decision of the reference for every token, the text in full, and nothing of the model changed."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import oracle
from fusing import adapted as fusable
from fusing import devices
from helpers import adapted, router_layer, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from peft_loraswitch import routing_report
from peft_loraswitch.reporting.report import RoutingReport, pieces
from peft_loraswitch.reporting.routes import RoutedText, RoutedToken, Totals
from trainer_tools import sentence, tokenizer
from unchanged import unchanged

TOKENIZER = tokenizer()
TEXTS = [sentence(seed, length) for seed, length in enumerate((7, 2, 12, 5))]


def router_inputs(model: nn.Module, text: str) -> torch.Tensor:
    seen = []
    handle = router_layer(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]]))
    handle.remove()
    return seen[0][0].double()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1, "normalize_gates": True},
        {"base_expert": True, "top_k": 3},
        {"num_shared_experts": 2, "router_module": "layers.1.mlp.up_proj"},
        {"num_shared_experts": 1, "base_expert": True, "expert_names": ["a", "b", "c", "d"]},
    ],
)
def test_every_token_has_the_decision_of_the_reference(settings):
    model = adapted(tiny_llama(), **settings)
    config = model.peft_config["default"]
    report = model.routing_report(TEXTS, TOKENIZER, batch_size=3)
    weight = router_layer(model).loraswitch_router["default"].weight.detach()
    names = list(config.expert_names or [f"expert_{i}" for i in range(4)]) + ["base"] * config.base_expert
    assert list(report.names) == names and report.has_base == config.base_expert
    for text, found in zip(TEXTS, report.texts, strict=True):
        x = router_inputs(model, text)
        expected = oracle.decide(x, weight, config.top_k, config.normalize_gates)
        assert found.text == text and "".join(token.text for token in found.tokens) == text
        assert [token.token_id for token in found.tokens] == TOKENIZER(text)["input_ids"]
        softmax = torch.softmax(x @ weight.double().T, -1)
        for token, choice, probabilities in zip(found.tokens, expected, softmax, strict=True):
            assert list(token.experts) == [expert for expert, _ in choice]
            assert token.gates == pytest.approx([float(gate) for _, gate in choice], abs=1e-5)
            assert token.probabilities == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_probabilities_are_of_averaged_logits_where_the_decision_is():
    model = adapted(tiny_llama())
    model.peft_config["default"].router_decay = 0.5
    weight = router_layer(model).loraswitch_router["default"].weight.detach().double()
    report = model.routing_report(TEXTS, TOKENIZER, batch_size=2)
    for text, found in zip(TEXTS, report.texts, strict=True):
        logits = router_inputs(model, text) @ weight.T
        for t, token in enumerate(found.tokens):
            weights = torch.tensor([0.5 ** (t - s) for s in range(t + 1)], dtype=torch.float64)
            mean = (weights[:, None] * logits[: t + 1]).sum(0) / weights.sum()
            assert token.probabilities == pytest.approx(mean.softmax(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize("base_expert", [False, True])
def test_sums_are_those_of_the_statistics(base_expert):
    model = adapted(tiny_llama(), base_expert=base_expert)
    report = routing_report(model, TEXTS, TOKENIZER)
    with model.record_routing() as recorded, torch.no_grad():
        for text, found in zip(TEXTS, report.texts, strict=True):
            with model.record_routing() as of_text:
                model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]]))
            check_totals(found.totals, of_text.summary())
    summary = recorded.summary()
    check_totals(report.totals, summary)
    assert report.base_share == (pytest.approx(summary["base_share"]) if base_expert else None)


def check_totals(found: Totals, summary: dict) -> None:
    shares = summary["load"] + ([summary["base_share"]] if "base_share" in summary else [])
    assert found.tokens == summary["tokens"] and found.shares == pytest.approx(shares)
    assert found.entropy == pytest.approx(summary["entropy"], rel=1e-4)


@pytest.mark.parametrize("backbone", [tiny_gpt2, tiny_opt, tiny_t5])
def test_other_backbones(backbone):
    settings = {"target_modules": r"decoder\..*SelfAttention\.[qkv]", "task_type": "SEQ_2_SEQ_LM"}
    model = adapted(backbone(), **(settings if backbone is tiny_t5 else {}))
    report = model.routing_report(TEXTS, TOKENIZER)
    for text in report.texts:
        for token in text.tokens:
            assert token.experts[0] == max(range(4), key=lambda e, token=token: token.probabilities[e])
    assert len({token.experts for text in report.texts for token in text.tokens}) > 1


@devices
def test_a_fused_model_tells_the_same(device):
    model = fusable(tiny_llama(), device)
    expected = model.routing_report(TEXTS, TOKENIZER)
    model.fuse_for_inference("fused")
    found = model.routing_report(TEXTS, TOKENIZER)
    for text, other in zip(found.texts, expected.texts, strict=True):
        for token, twin in zip(text.tokens, other.tokens, strict=True):
            assert token.experts == twin.experts and token.gates == pytest.approx(twin.gates, abs=1e-5)


def test_the_model_stays_as_it_was():
    model = adapted(tiny_llama(), lora_dropout=0.5, router_jitter=0.5).train()
    model.base_model.model.model.norm.eval()
    stats, modes = model.router_stats(), [module.training for module in model.modules()]
    first = model.routing_report(TEXTS, TOKENIZER)
    assert [module.training for module in model.modules()] == modes
    with unchanged(model.eval()):
        model.routing_report(TEXTS, TOKENIZER)
    assert model.train().routing_report(TEXTS, TOKENIZER) == first, "no noise"
    with model.record_routing() as recorded:
        model.routing_report(TEXTS, TOKENIZER)
    assert model.router_stats() == stats and recorded.summary()["tokens"] == 0
    model(input_ids=torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()
    assert router_layer(model).loraswitch_router["default"].weight.grad.any()


def test_one_text_in_part():
    report = adapted(tiny_llama()).routing_report(TEXTS[2], TOKENIZER, max_length=4)
    assert len(report.texts) == 1 and len(report.texts[0].tokens) == 4


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"texts": []}, r"texts=\[\] must be a text or a list"),
        ({"texts": ""}, "texts: entry 0 is ''"),
        ({"texts": ["w3", None]}, "texts: entry 1 is None"),
        ({"texts": 3}, "texts=3 must be"),
        ({"adapter_name": "other"}, "adapter_name='other' is unknown"),
        ({"max_length": 0}, "max_length=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"tokenizer": None}, "tokenizer is missing"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, match):
    model = adapted(tiny_llama())
    with unchanged(model), pytest.raises(ValueError, match=match):
        model.routing_report(**{"texts": TEXTS, "tokenizer": TOKENIZER, **arguments})


def test_an_adapter_that_is_off_is_refused():
    model = adapted(tiny_llama())
    with model.disable_adapter(), unchanged(model), pytest.raises(ValueError, match="switched off"):
        model.routing_report(TEXTS, TOKENIZER)
    with pytest.raises(ValueError, match="carries no LoRA-Switch adapter"):
        routing_report(tiny_llama(), TEXTS, TOKENIZER)


def test_a_broken_router_says_so_and_leaves_no_hook():
    model = adapted(tiny_llama())
    router_layer(model).loraswitch_router["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf in the weight of the router"):
        model.routing_report(TEXTS, TOKENIZER)
    assert not router_layer(model)._forward_pre_hooks and not router_layer(model)._forward_hooks
    assert router_layer(model).routing_state.running_frame() is None


# -------------------------------------------------------------------------------------------------------- text pieces


def byte_tokenizer(template: bool = True):
    """Bytes and a few pairs of them, with <s> before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, the hat"] * 3, trainer)
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_pieces_are_the_text_in_full():
    """Whatever the characters: several tokens for one, none that is lost, the special token by its name."""
    made, rng = byte_tokenizer(), random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice("the cat \n\té零🙂\x1b<&") for _ in range(rng.randrange(1, 20)))
        ids = made(text)["input_ids"]
        found = pieces(text, ids, made)
        assert len(found) == len(ids) and found[0] == "<s>" and "".join(found[1:]) == text


def test_special_tokens_within_a_text_have_their_names():
    found = pieces("a <s> b", byte_tokenizer()("a <s> b")["input_ids"], byte_tokenizer())
    assert "".join(found[1:]).replace(" ", "") == "a<s>b"


class Slow:
    """A tokenizer that does not say where tokens stand."""

    is_fast, all_special_ids = False, [0]
    words = ("<s>", "\N{LOWER ONE EIGHTH BLOCK}the", "re")

    def convert_ids_to_tokens(self, index):
        return self.words[index]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").lstrip()


def test_pieces_of_a_tokenizer_without_places():
    assert pieces("there", [0, 1, 2], Slow()) == ["<s>", " the", "re"]


# ------------------------------------------------------------------------------------------------------------- showing


def a_report(texts: list[list[str]], names: list[str], has_base: bool = False, seed: int = 0) -> RoutingReport:
    """With random decisions."""
    rng, routed = random.Random(seed), []
    for words in texts:
        tokens = []
        for word in words:
            heights = [rng.random() for _ in names]
            softmax = tuple(h / sum(heights) for h in heights)
            best = tuple(sorted(range(len(names)), key=lambda e, softmax=softmax: -softmax[e])[:2])
            tokens.append(RoutedToken(word, 5, best, (0.75, 0.25)[: len(best)], softmax))
        routed.append(RoutedText("".join(words), tuple(tokens), Totals.of(tokens, len(names))))
    total = Totals.of([token for text in routed for token in text.tokens], len(names))
    return RoutingReport("default", tuple(names), has_base, tuple(routed), total)


NASTY = ["<b>", " &amp;", "\n", "\tx", "\x1b[2J", "\r", "", "a\n\nb", '"><script>alert(1)</script>', "\u202e", " é零"]


class Page(HTMLParser):
    """Elements and text of a page, and that all of them are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.tokens: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if "t" in str(dict(attrs).get("class")).split():
            self.tokens.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.tokens and len(self.open) > 4:
            self.tokens[-1] += data


def test_the_page_is_escaped_complete_and_loads_nothing(tmp_path):
    report = a_report([NASTY, ["plain", " text"]], ["<i>maths</i>", 'co"de', "base"], has_base=True)
    report.save(tmp_path / "routes.html")
    raw = (tmp_path / "routes.html").read_text(encoding="utf-8")
    page = Page(raw)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "i", "b", "img", "link"} and "http" not in raw and "url(" not in raw
    assert "\x1b" not in raw and "\u202e" not in raw
    tokens = [attrs for tag, attrs in page.found if "t" in str(attrs.get("class")).split()]
    routed = [token for text in report.texts for token in text.tokens]
    assert len(tokens) == len(routed) == len(NASTY) + 2
    for attrs, token in zip(tokens, routed, strict=True):
        assert attrs["class"] == f"t e{token.experts[0]}"
        best = report.names[token.experts[0]]
        assert attrs["title"].startswith(f"{best} {token.probabilities[token.experts[0]]:.1%}")
        assert f"gates: {best} 0.750" in attrs["title"]
        assert float(attrs["style"].removeprefix("--p:")) == pytest.approx(max(token.probabilities), abs=0.005)
    widths = [float(attrs["style"][6:-1]) for _, attrs in page.found if str(attrs.get("style")).startswith("width")]
    assert sum(widths) == pytest.approx(300, abs=0.1), "two texts, and all"
    assert report.html() == raw


def test_a_page_of_what_utf8_does_not_hold(tmp_path):
    report = a_report([["\ud800", "x"]], ["a", "b"])
    report.save(tmp_path / "routes.html")
    assert "ud800" in (tmp_path / "routes.html").read_text(encoding="utf-8")
    with pytest.raises(OSError, match="no_such_folder"):
        report.save(tmp_path / "no_such_folder" / "routes.html")


def test_many_experts_have_colours_and_lines_that_differ():
    names = [f"x{index}" for index in range(28)]
    rules = re.findall(r"\.e\d+ \{ (.*?) \}", a_report([["a"]], names).html())
    assert len(set(rules)) == len(rules) == 28
    legend = a_report([["a"]], names).terminal(True).splitlines()[0]
    codes = re.findall(r"\x1b\[([\d;]+)m x\d+ ", legend)
    assert len(set(codes)) == len(codes) == 28
    assert repr(a_report([["a"], ["b", "c"]], names)) == "RoutingReport(adapter='default', texts=2, tokens=3)"
    more = a_report([["a"]], [f"x{index}" for index in range(40)])
    assert ".e39 {" in more.html() and "x39" in more.terminal(True)


def test_a_terminal_gets_the_text_and_no_commands_of_the_text():
    report = a_report([NASTY], ["maths", "code", "base"], has_base=True)
    coloured = report.terminal(colours=True)
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert "\x1b" not in bare and "\r" not in bare and "\u202e" not in bare
    for word in ("<b> &amp;", "\N{RETURN SYMBOL}\n", "\\x1b[2J", "\\r", "\\u202e", "a\N{RETURN SYMBOL}\n", " é零"):
        assert word in bare, word
    for line in coloured.splitlines():
        assert line.count("\x1b[0m") * 2 == line.count("\x1b"), "no colour goes over the end of a line"
    plain = report.terminal(colours=False)
    assert "\x1b" not in plain
    last, runs = None, 0
    for token in report.texts[0].tokens:
        runs += token.experts[0] != last
        last = token.experts[0]
    assert len(re.findall(r"\[(maths|code|base)\]", plain)) == runs


class Terminal:
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "tty, environment, coloured",
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(tty, environment, coloured, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report = a_report([["a", "b"]], ["x", "y"])
    with monkeypatch.context() as patched:
        if tty:
            patched.setattr("sys.stdout", Terminal())
        shown = str(report)
    assert shown == report.terminal(coloured) != report.terminal(not coloured)


def test_totals_by_hand():
    tokens = [
        RoutedToken("a", 1, (0, 2), (0.5, 0.5), (0.5, 0.25, 0.25)),
        RoutedToken("b", 2, (2, 1), (1, 0), (0, 0, 1)),
    ]
    totals = Totals.of(tokens, 3)
    assert totals.shares == (0.25, 0.25, 0.5) and totals.tokens == 2
    assert totals.entropy == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / 2)
