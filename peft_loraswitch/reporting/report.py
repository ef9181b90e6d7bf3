"""`routing_report`: the model reads texts, and what it decided for each token is shown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compose.experts import adapted_linears, check_in_memory, choice_name, config_of, router_layer
from ..loading.layout import backbone_of
from ..patterns import shown
from ..router_inputs import AT_A_TIME, Reading, averaged, read, tokenized, tokenizer_of
from ..routing.options import RoutingOptions
from ..routing.router import router_logits
from . import terminal, web_page
from .routes import RoutedText, RoutedToken, Totals


@dataclass(frozen=True, repr=False)
class RoutingReport:
    """What `routing_report` returns. `print(report)` shows it, in colours where the output is a terminal that has them;
    `report.terminal(colours=True)` is that text. `report.save("routes.html")` writes one web page, without scripts and with
    nothing to load; `report.html()` is its text.

    Attributes:
        adapter: the name of the adapter.
        names: of its experts, in the router's order; the base expert, if there is one, is the last.
        has_base: whether it is.
        texts: for each text `text`, `tokens` and `totals`. A token has `text`, `token_id`, `experts` (indices in `names`, the
            best first), their `gates`, and the `probabilities` of all names. Totals have `tokens` (their number), `shares` (of
            the picks, for each name), `entropy` (of the softmax, nats, mean over the tokens) and `mean_experts` (that a token
            has, the base expert not counted).
        totals: of all texts.
    """

    adapter: str
    names: tuple[str, ...]
    has_base: bool
    texts: tuple[RoutedText, ...]
    totals: Totals

    @property
    def base_share(self) -> float | None:
        """The base expert's share of the picks in all texts; None if there is none."""
        return self.totals.shares[-1] if self.has_base else None

    def terminal(self, colours: bool | None = None) -> str:
        """As text. With colours, each token stands on that of its best expert; without, the expert's name stands in brackets
        before each run of tokens. None: with, if the standard output is a terminal and NO_COLOR is not set."""
        wanted = terminal.wants_colours() if colours is None else colours
        return terminal.rendered(self.names, self.has_base, self.texts, self.totals, wanted)

    def __repr__(self) -> str:
        return f"RoutingReport(adapter={self.adapter!r}, texts={len(self.texts)}, tokens={self.totals.tokens})"

    def __str__(self) -> str:
        return self.terminal()

    def html(self) -> str:
        """As one web page: tokens in the colour of their best expert, with all probabilities where the pointer is."""
        title = f"Experts of adapter '{self.adapter}'"
        return web_page.rendered(self.names, self.has_base, self.texts, self.totals, title)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `html()` to a file.

        Raises:
            OSError: it cannot be written.
        """
        with open(path, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
            file.write(self.html())


def routing_report(
    model: nn.Module,
    texts: str | Sequence[str],
    tokenizer: Any = None,
    adapter_name: str | None = None,
    max_length: int | None = None,
    batch_size: int = AT_A_TIME,
) -> RoutingReport:
    """Have the model read texts, and tell which experts each token gets.

    Every text is read from its beginning, with the special tokens that the tokenizer adds, in evaluation mode, up to the
    router: nothing behind that is computed. Nothing of the model changes, and `router_stats()` does not count it.

    Args:
        model: a `PeftModel`, or any model with LoRA-Switch layers, also a fused one; the adapter must be active.
        texts: a text or several. Of a conversation, what the chat template makes of it.
        tokenizer: of the backbone. None: the one that stands where the backbone was loaded from.
        adapter_name: which adapter; may be left out if there is only one.
        max_length: tokens of a text that are read. None: all.
        batch_size: texts that are read at a time.

    Returns:
        RoutingReport: `print(report)`, `report.save("routes.html")`, and the numbers as attributes.

    Raises:
        ValueError: a text is empty, the adapter is unknown, ambiguous or not active, or there is no tokenizer.
        RuntimeError: the model is offloaded.

    Example:
        ```py
        report = model.routing_report(["def add(a, b):", "The court finds that"], tokenizer)
        print(report)
        report.save("routes.html")
        ```
    """
    adapter, config = config_of(model, adapter_name)
    backbone = backbone_of(model)
    several = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Sequence) else None
    if not several:
        raise ValueError(f"texts={shown(texts)} must be a text or a list of one or more texts.")
    tokenizer = tokenizer_of(backbone, tokenizer)
    if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1):
        raise ValueError(f"max_length={shown(max_length)} must be a positive whole number or None.")
    sequences = tokenized(several, tokenizer, max_length)
    layer = router_layer(adapted_linears(backbone, adapter), adapter)
    check_in_memory([layer])
    options, weight = layer.routing_options[adapter], layer.loraswitch_router[adapter].weight
    routed: list[RoutedText] = []
    for batch in read(backbone, adapter, sequences, batch_size, decide=True, progress="routing_report"):
        for decided in _decisions(batch, options, weight, config.router_decay):
            text = several[len(routed)]
            ids = sequences[len(routed)]
            tokens = tuple(map(RoutedToken, pieces(text, ids, tokenizer), ids, *decided))
            routed.append(RoutedText(text, tokens, Totals.of(tokens, options.num_choices, options.base_expert)))
    names = tuple(choice_name(config, index) for index in range(options.num_choices))
    every_token = [token for text in routed for token in text.tokens]
    totals = Totals.of(every_token, options.num_choices, options.base_expert)
    return RoutingReport(adapter, names, options.base_expert, tuple(routed), totals)


@torch.no_grad()
def _decisions(
    batch: Reading, options: RoutingOptions, weight: torch.Tensor, decay: float
) -> list[tuple[Any, Any, Any]]:
    """For each text its tokens' experts, gates and probabilities, as lists of tuples."""
    assert batch.routing is not None
    shape, k = batch.real.shape, options.top_k
    experts = batch.routing.experts.reshape(*shape, -1)[..., :k]
    experts = experts.where(experts < options.num_experts, options.num_experts)  # the base expert's row is the last
    gates = batch.routing.gates.reshape(*shape, -1)[..., :k]
    logits = averaged(router_logits(batch.x, weight.to(batch.x.device)), decay)
    columns = [each.cpu().tolist() for each in (experts, gates, logits.softmax(-1))]
    if options.top_p < 1:  # those that were not taken have gate 0
        for rows in zip(*columns[:2], strict=True):
            for chosen, weights in zip(*rows, strict=True):
                taken = sum(gate != 0 for gate in weights)
                del chosen[taken:], weights[taken:]
    lengths = batch.real.sum(1).tolist()
    return [tuple([tuple(row) for row in column[i][:n]] for column in columns) for i, n in enumerate(lengths)]  # type: ignore[misc]


def pieces(text: str, ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The part of `text` that each token stands for, with the white space before it; names of special tokens."""
    special = set(tokenizer.all_special_ids)
    offsets = None
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    found, done = [], 0
    for position, token_id in enumerate(ids):
        start, end = offsets[position] if offsets is not None else (0, 0)
        if token_id in special and (offsets is None or end <= start or text[start:end] == tokenizer.decode([token_id])):
            found.append(str(tokenizer.convert_ids_to_tokens(token_id)))
            done = max(done, end)
        elif offsets is None:
            found.append(_by_itself(token_id, tokenizer))
        else:  # one character in several tokens is the first one's
            found.append(text[done:end])
            done = max(done, end)
    return found


def _by_itself(token_id: int, tokenizer: Any) -> str:
    """Of a tokenizer that does not say where a token stands: what it is alone, with the sign of a space as one."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    text = str(tokenizer.decode([token_id]))
    return f" {text}" if token.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" ") else text
