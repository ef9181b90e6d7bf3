"""Decisions that are given to the experts: one for a whole prompt, a deeper router's, and wrong ones for the first tokens.

All by `RoutedLora`, which computes what the adapter computes. Also text that switches domains in its middle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from recipes.compose import domains
from recipes.compose.lab import Lab, say
from recipes.compose.routed_lora import GivenRoutes, RoutedLora
from recipes.compose.routers import LABEL_STEPS, LABEL_TEXTS, Ours
from recipes.compose.scoring import Sets, answers
from recipes.compose.text_batches import Example, padded, right

FIRST_TOKENS = (1, 4, 16, 32)
Table = dict[tuple[int, ...], torch.Tensor]


def open_routed(lab: Lab, seed: int) -> RoutedLora:
    stack = lab.stack()
    return RoutedLora(lab.model(), stack, lab.flat(stack, seed))


def one_hot(index: torch.Tensor) -> torch.Tensor:
    """Gates for expert indices [...], -1 meaning none: [..., experts]."""
    experts = len(domains.EIGHT)
    return F.one_hot(index.clamp(min=0), experts).float() * (index >= 0)[..., None]


def table_of(sets: Sets, gates: Callable[[int, Example], torch.Tensor]) -> Table:
    """gates: of (index of the domain, item), [tokens of the prompt, experts]."""
    return {
        tuple(example.prompt): gates(index, example) for index, items in enumerate(sets.values()) for example in items
    }


# ---------------------------------------------------------------------------------------------------------- per prompt


def per_prompt(lab: Lab, seed: int, how: str) -> None:
    """The router's mean over the prompt decides once, for all of its tokens and the answer's."""
    ours, routed = Ours(lab, seed, 1.0), open_routed(lab, seed)
    if how == "texts":
        ours.from_texts()
        rows = ours.router.weight.detach()
    else:
        rows = ours.labelled((lab.label_rate(),))[0]
    sets = lab.test()
    routes = GivenRoutes(routed, prompt_table(ours, rows, sets))
    lab.measure(f"{how}_per_prompt", "g", seed, routed.model, rows.numel(), routes, sets)
    right_ones = {
        name: {"accuracy_prompt": float(torch.stack([routes.table[tuple(e.prompt)][-1, i] for e in items]).mean())}
        for i, (name, items) in enumerate(sets.items())
    }
    lab.rows(f"{how}_per_prompt", "g", seed, right_ones, rows.numel())


def prompt_table(ours: Ours, rows: torch.Tensor, sets: Sets) -> Table:
    table: Table = {}
    for items in sets.values():
        for example, x in zip(items, ours.inputs(items), strict=True):
            choice = F.linear(x[len(example.prompt) - 1], rows.float()).argmax()
            table[tuple(example.prompt)] = one_hot(choice.cpu()).expand(len(example.prompt), -1)
    return table


# --------------------------------------------------------------------------------------------------------- deep router


@torch.no_grad()
def deep_inputs(lab: Lab, items: list[Example], block: int) -> list[torch.Tensor]:
    """Hidden states of the base before block `block` at each token of the prompts, of mean square 1 (as a norm makes them)."""
    placed: list[torch.Tensor] = [torch.empty(0)] * len(items)
    order = sorted(range(len(items)), key=lambda index: len(items[index].prompt))
    for begin in range(0, len(order), 128):
        part = order[begin : begin + 128]
        ids, _ = padded([items[index].prompt for index in part], lab.tokenizer.pad_token_id, left=False)
        out = lab.plain.model(input_ids=ids.to(lab.device), use_cache=False, output_hidden_states=True)
        states = out.hidden_states[block].float()
        states = states * states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        for row, index in enumerate(part):
            placed[index] = states[row, : len(items[index].prompt)]
    return placed


def deep(lab: Lab, seed: int) -> None:
    """A router on the base's hidden states further up, trained on the domains' labels. `deep_previous`: each token follows what
    the token before it has made the router decide, so that all blocks can follow it (the first token follows no expert).
    `deep_per_prompt`: the mean of the logits over the prompt decides once. In both, answers follow the prompt's last decision."""
    settings = lab.settings
    items = [e for name in domains.EIGHT for e in lab.data[name]["mixed"][: settings.mixed_items]]
    owners = [i for i, n in enumerate(domains.EIGHT) for _ in lab.data[n]["mixed"][: settings.mixed_items]]
    inputs = deep_inputs(lab, items, settings.deep_block)
    rows = torch.zeros(len(domains.EIGHT), inputs[0].shape[-1], device=lab.device, requires_grad=True)
    optimizer = torch.optim.AdamW([rows], lr=lab.label_rate(), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(LABEL_STEPS):
        chosen = torch.randperm(len(items), generator=generator)[:LABEL_TEXTS].tolist()
        x = torch.cat([inputs[i] for i in chosen])
        y = torch.cat([torch.full((len(inputs[i]),), owners[i]) for i in chosen]).to(x.device)
        optimizer.zero_grad()
        F.cross_entropy(F.linear(x, rows), y).backward()
        optimizer.step()
    weight, sets, routed = rows.detach(), lab.test(), open_routed(lab, seed)
    previous: Table = {}
    whole: Table = {}
    hits: dict[str, dict[str, float]] = {}
    for owner, (name, tests) in enumerate(sets.items()):
        good = []
        for example, x in zip(tests, deep_inputs(lab, tests, settings.deep_block), strict=True):
            logits = F.linear(x, weight).cpu()
            choices = logits.argmax(-1)
            # Of the prompt's n tokens, the last one and the answer follow the decision of the token before them.
            previous[tuple(example.prompt)] = one_hot(torch.cat([torch.tensor([-1]), choices[:-1]]))
            whole[tuple(example.prompt)] = one_hot(logits.mean(0).argmax()).expand(len(choices), -1)
            good.append(float((choices == owner).float().mean()))
        hits[name] = {"accuracy_prompt": sum(good) / len(good)}
    for method, table in (("deep_previous", previous), ("deep_per_prompt", whole)):
        lab.measure(method, "g", seed, routed.model, weight.numel(), GivenRoutes(routed, table), sets)
    lab.rows("deep_previous", "g", seed, hits, weight.numel())


# -------------------------------------------------------------------------------------------------------- first tokens


def first_tokens(lab: Lab, seed: int, how: str) -> None:
    """What is lost when the first n tokens of a prompt follow no expert (`base`), or another domain's (`wrong`), and all later
    ones the right one: what early, uncertain decisions leave in the KV cache."""
    routed, sets = open_routed(lab, seed), lab.test()
    for count in FIRST_TOKENS:

        def gates(index: int, example: Example, count: int = count) -> torch.Tensor:
            choices = torch.full((len(example.prompt),), index)
            choices[:count] = -1 if how == "base" else (index + 1 + count % 3) % len(domains.EIGHT)
            return one_hot(choices)

        lab.measure(
            f"first_{count}_{how}",
            "diagnostic",
            seed,
            routed.model,
            0,
            GivenRoutes(routed, table_of(sets, gates)),
            sets,
        )


# -------------------------------------------------------------------------------------------------------------- switch


def pairs(lab: Lab) -> list[tuple[str, Example, str, Example]]:
    """Two items of different domains each, every pair of domains about equally often."""
    found = []
    names = [name for name in domains.EIGHT if name != "gsm8k"]  # long answers, few of them right
    data = lab.test(names)
    most = min(map(len, data.values()))
    for number in range(lab.settings.switch_pairs):
        first = number % len(names)
        second = (first + 1 + number // len(names) % (len(names) - 1)) % len(names)
        item = number // len(names) % most
        found.append((names[first], data[names[first]][item], names[second], data[names[second]][(item + 7) % most]))
    return found


def joined(lab: Lab, first: Example, answer: list[int], second: Example) -> list[int]:
    """One text: the first prompt, an answer to it, an empty line, the second prompt."""
    gap = lab.tokenizer("\n\n", add_special_tokens=False).input_ids
    begin = 0 if lab.tokenizer.bos_token_id is None else 1
    return first.prompt + answer + gap + second.prompt[begin:]


def switch_scores(
    lab: Lab, method: str, kind: str, seed: int, model: Any,
    routes_of: Callable[[list[list[int]], list[tuple[int, int, int]]], GivenRoutes] | None = None,
) -> None:  # fmt: skip
    """`second_right`: the right answer to the first item is in the text. `both_right`: the model has answered it itself.

    routes_of: gives the routes for prompts, each with (domain of the first item, of the second, where the second begins).
    """
    settings, found = lab.settings, pairs(lab)
    longest = max(len(e.answer) for _, first, _, second in found for e in (first, second))
    place = {name: index for index, name in enumerate(domains.EIGHT)}

    def ask(prompts: list[list[int]], marks: list[tuple[int, int, int]]) -> list[str]:
        routes = routes_of(prompts, marks) if routes_of is not None else None
        made = answers(model, lab.tokenizer, prompts, longest, settings, routes)
        return list(lab.tokenizer.batch_decode(made))

    def marks_of(answered: list[list[int]]) -> list[tuple[int, int, int]]:
        return [
            (place[a], place[b], len(first.prompt) + len(answer))
            for (a, first, b, _), answer in zip(found, answered, strict=True)
        ]

    given = [first.answer[:-1] for _, first, _, _ in found]
    texts = ask([joined(lab, f, g, s) for (_, f, _, s), g in zip(found, given, strict=True)], marks_of(given))
    second_right = [right(text, s.text) for text, (_, _, _, s) in zip(texts, found, strict=True)]
    ends = [(place[a], place[a], len(first.prompt)) for a, first, _, _ in found]
    own_texts = ask([first.prompt for _, first, _, _ in found], ends)
    first_right = [right(text, f.text) for text, (_, f, _, _) in zip(own_texts, found, strict=True)]
    own = [lab.tokenizer(text, add_special_tokens=False).input_ids for text in own_texts]
    texts = ask([joined(lab, f, o, s) for (_, f, _, s), o in zip(found, own, strict=True)], marks_of(own))
    in_turn = [right(text, s.text) for text, (_, _, _, s) in zip(texts, found, strict=True)]
    scores = {
        "first_right": sum(first_right) / len(found),
        "second_right": sum(second_right) / len(found),
        "second_right_in_turn": sum(in_turn) / len(found),
        "both_right": sum(a and b for a, b in zip(first_right, in_turn, strict=True)) / len(found),
    }
    lab.rows(method, kind, seed, {"switch": scores})
    say(f"{lab.worker}: switch, {method}, seed {seed}: { ({k: round(v, 3) for k, v in scores.items()}) }")


def switch(lab: Lab, seed: int) -> None:
    """Per-token and per-prompt decisions, the right ones, and one LoRA for all."""
    routed = open_routed(lab, seed)

    def right_ones(prompts: list[list[int]], marks: list[tuple[int, int, int]]) -> GivenRoutes:
        table: Table = {}
        for prompt, (first, second, begin) in zip(prompts, marks, strict=True):
            choices = torch.full((len(prompt),), second)
            choices[:begin] = first
            table[tuple(prompt)] = one_hot(choices)
        return GivenRoutes(routed, table)

    switch_scores(lab, "oracle", "b", seed, routed.model, right_ones)
    ours = Ours(lab, seed, 1.0)
    rows = ours.labelled((lab.label_rate(),))[0]

    def one_decision(prompts: list[list[int]], marks: list[tuple[int, int, int]]) -> GivenRoutes:
        items = [Example(prompt, [lab.tokenizer.eos_token_id], "") for prompt in prompts]
        return GivenRoutes(routed, prompt_table(ours, rows, {"": items}))

    switch_scores(lab, "labels_per_prompt", "g", seed, routed.model, one_decision)
    for decay in (0.9, 0.98, 1.0):
        each = Ours(lab, seed, decay)
        each.set_rows(each.labelled((lab.label_rate(),))[0])
        switch_scores(lab, f"labels_decay_{decay:g}", "g", seed, each.backbone)


def switch_one_lora(lab: Lab, seed: int) -> None:
    stack = lab.stack(lab.settings.rank * len(domains.EIGHT))
    stack.use(stack.load([lab.out / "one_lora" / f"seed{seed}"]))
    switch_scores(lab, "one_lora", "a", seed, stack.model)
