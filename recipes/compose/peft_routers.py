"""(d) Routers that PEFT has: Arrow (no training) and X-LoRA (trained on the mixed items)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model

from recipes.compose.lab import Lab, say
from recipes.compose.mixed_training import train_parameters
from recipes.compose.scoring import Sets, by_answer_length
from recipes.compose.text_batches import Example, padded, right

TEMPERATURE = 1.0
SHORT = 16  # items of a batch whose logits are made for all tokens of the answers


def arrow_model(lab: Lab, seed: int, top_k: int) -> Any:
    settings = ArrowConfig(top_k=top_k, router_temperature=TEMPERATURE)
    model = create_arrow_model(lab.model(), lab.loras(seed), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(lab.plain.dtype)
    return model.eval()


def arrow(lab: Lab, seed: int, top_k: int) -> None:
    model = arrow_model(lab, seed, top_k)
    # It makes the outputs of all experts for all tokens: fewer rows at a time.
    lab = replace(lab, settings=replace(lab.settings, rows_at_once=max(1, lab.settings.rows_at_once // 4)))
    lab.measure(f"arrow_top{top_k}", "d", seed, model.get_base_model())


def xlora_model(lab: Lab, seed: int) -> Any:
    base = lab.model()
    base.config.use_cache = False  # X-LoRA asks for it
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, xlora_depth=1,
        adapters={str(index): path for index, path in enumerate(lab.loras(seed))},
    )  # fmt: skip
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model.to(lab.device)


def _at_answers(model: Any, lab: Lab, chosen: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses of the answers' tokens, whose item each is). Rows are padded on the left, so that answers are at the end."""
    ids, mask = padded([e.prompt + e.answer for e in chosen], lab.tokenizer.pad_token_id, left=True)
    ids, mask = ids.to(lab.device), mask.to(lab.device)
    longest = max(len(e.answer) for e in chosen)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=longest + 1)
    places = [
        (row, longest - len(e.answer) + i, token) for row, e in enumerate(chosen) for i, token in enumerate(e.answer)
    ]
    rows, columns, targets = torch.tensor(places, device=lab.device).T
    return torch.nn.functional.cross_entropy(out.logits[rows, columns].float(), targets, reduction="none"), rows


def _classifier(model: Any) -> dict[str, torch.nn.Parameter]:
    """X-LoRA's router, by its parameters' names."""
    return {name: each for name, each in model.named_parameters() if "internal_xlora_classifier" in name}


def xlora_try(lab: Lab, seed: int, index: int) -> None:
    """One learning rate: the router is kept, with its validation loss. A task of its own, because it takes minutes."""
    settings = lab.settings
    torch.manual_seed(seed)
    model = xlora_model(lab, seed)
    parameters = _classifier(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(lab.plain.dtype)
    train_parameters(
        list(parameters.values()), settings.xlora_rates[index], lab.mixed_batches(seed),
        lambda m, chosen: _at_answers(m, lab, chosen)[0].mean(), model.train(),
    )  # fmt: skip
    values = xlora_losses(model.eval(), lab, lab.sets("validation", settings.xlora_items))
    path = _xlora_file(lab, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"loss": sum(values.values()) / len(values), "router": {n: p.detach() for n, p in parameters.items()}}, path
    )


def _xlora_file(lab: Lab, index: int) -> Path:
    return lab.out / "xlora" / f"rate{index}.pt"


def xlora(lab: Lab, seed: int) -> None:
    """Measured on fewer items than the others, because there is no KV cache."""
    settings = lab.settings
    tried = [torch.load(_xlora_file(lab, index), map_location=lab.device) for index in range(len(settings.xlora_rates))]
    found = [each["loss"] for each in tried]
    index = found.index(min(found))
    lab.note("tuned", {"xlora": {"seed": seed, "losses": found, "best": index}})
    model = xlora_model(lab, seed).eval()
    count = 0
    for name, parameter in _classifier(model).items():
        parameter.data = tried[index]["router"][name]
        count += parameter.numel()
    sets = lab.sets("test", settings.xlora_items)
    scores = {name: {"loss": value} for name, value in xlora_losses(model, lab, sets).items()}
    for longest, names in by_answer_length(sets, settings):
        for name in names:
            texts = lab.tokenizer.batch_decode(xlora_answers(model, lab, [e.prompt for e in sets[name]], longest))
            good = [right(text, e.text) for text, e in zip(texts, sets[name], strict=True)]
            scores[name]["exact_match"] = sum(good) / len(good)
    lab.rows("xlora", "d", seed, scores, count)
    say(f"{lab.worker}: xlora, seed {seed}: {scores}")


@torch.no_grad()
def xlora_losses(model: Any, lab: Lab, sets: Sets) -> dict[str, float]:
    found = {}
    for name, items in sets.items():
        each = [_at_answers(model, lab, items[begin : begin + SHORT])[0] for begin in range(0, len(items), SHORT)]
        found[name] = float(torch.cat(each).mean())
    return found


@torch.no_grad()
def xlora_answers(model: Any, lab: Lab, prompts: list[list[int]], longest: int) -> list[list[int]]:
    """As `greedy_answers`, without a cache."""
    end = lab.tokenizer.eos_token_id
    ids, mask = (each.to(lab.device) for each in padded(prompts, lab.tokenizer.pad_token_id, left=True))
    made: list[list[int]] = [[] for _ in prompts]
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=lab.device)
    for _ in range(longest):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1).masked_fill(ended, end)
        ended |= token == end
        for row, value in zip(made, token.tolist(), strict=True):
            row.append(value)
        if bool(ended.all()):
            break
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return [row[: row.index(end)] if end in row else row for row in made]
