"""What routing has to beat: the base, the right LoRA for each item, one LoRA for all domains, and LoRAs that are merged."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from peft import PeftModel

from recipes.checkout import ROOT
from recipes.compose import domains, experts
from recipes.compose.experts import Bench, Job
from recipes.compose.lab import Lab, balanced_batches, say
from recipes.compose.mixed_training import train_stacked
from recipes.compose.routed_lora import RoutedLora
from recipes.compose.scoring import losses, score
from recipes.compose.stacked_lora import StackedLora

RATES = ROOT / "recipes" / "results" / "compose_rates.json"


def train_experts(lab: Lab, seed: int, names: tuple[str, ...]) -> None:
    """The LoRAs of these domains, with the rates that stage 1 found."""
    rates = json.loads(RATES.read_text())["rates"]
    bench = Bench(lab.model(), lab.tokenizer, lab.stack(), lab.data, lab.settings, lab.base, lab.out)
    bench.model = bench.stack.model
    for group in experts.groups(bench, [Job(name, seed, rates[name]["rate"]) for name in names]):
        for row, job in zip(experts.train(bench, group), group, strict=True):
            bench.stack.save(row, lab.lora(job.domain, seed), lab.base)


def base(lab: Lab) -> None:
    lab.measure("base", "base", 0, lab.model())


def oracle(lab: Lab, seed: int) -> None:
    """The right LoRA for each item: every domain's items with its own LoRA."""
    stack = lab.stack()
    flat = lab.flat(stack, seed)
    scores = {}
    for row, (name, items) in zip(flat, lab.test().items(), strict=True):
        stack.use(row[None])
        scores |= score(stack.model, lab.tokenizer, {name: items}, lab.settings)
    lab.rows("oracle", "b", seed, scores, stack.size * len(flat))
    say(f"{lab.worker}: oracle, seed {seed}: { ({n: round(s['exact_match'], 3) for n, s in scores.items()}) }")


def confusion(lab: Lab, seed: int) -> None:
    """Loss of every LoRA on every domain, and exact match between the two that are most alike."""
    stack = lab.stack()
    for row, lora in zip(lab.flat(stack, seed), domains.EIGHT, strict=True):
        stack.use(row[None])
        found = {name: {"loss": v} for name, v in losses(stack.model, lab.tokenizer, lab.test()).items()}
        if lora in ("arc", "openbookqa"):
            other = {"arc": "openbookqa", "openbookqa": "arc"}[lora]
            found |= score(stack.model, lab.tokenizer, {other: lab.test()[other]}, lab.settings)
        lab.rows(f"lora_{lora}", "diagnostic", seed, found)


# ------------------------------------------------------------------------------------------------- one LoRA for all


def one_lora_flat(lab: Lab, stack: StackedLora, seed: int, rate: float, names: tuple[str, ...]) -> torch.Tensor:
    """As many steps and items of each domain as each expert had, all domains in each step."""
    settings = lab.settings
    rows = settings.expert_rows * len(names)
    steps = balanced_batches(lab.sets("train", 10**9, names), rows, settings.expert_steps, seed)
    return train_stacked(lab, stack, stack.fresh([1000 * seed + 8]), [rate], steps)


def one_lora_rank(lab: Lab, names: tuple[str, ...]) -> int:
    return lab.settings.rank * len(names)


def one_lora_try(lab: Lab, index: int) -> None:
    """One learning rate on the first seed: kept, with its validation loss."""
    settings = lab.settings
    stack = lab.stack(one_lora_rank(lab, domains.EIGHT))
    flat = one_lora_flat(lab, stack, settings.seeds[0], settings.lora_rates[index], domains.EIGHT)
    stack.use(flat)
    found = losses(stack.model, lab.tokenizer, lab.sets("validation", settings.tuning_items))
    folder = lab.out / "one_lora" / f"rate{index}"
    stack.save(flat[0], folder, lab.base)
    (folder / "loss.json").write_text(json.dumps(sum(found.values()) / len(found)))


def one_lora_best(lab: Lab) -> int:
    each = [
        json.loads((lab.out / "one_lora" / f"rate{i}" / "loss.json").read_text())
        for i in range(len(lab.settings.lora_rates))
    ]
    lab.note("tuned", {"one_lora": {"seed": lab.settings.seeds[0], "losses": each, "best": each.index(min(each))}})
    return each.index(min(each))


def one_lora(lab: Lab, seed: int) -> None:
    """(a)"""
    settings = lab.settings
    stack = lab.stack(one_lora_rank(lab, domains.EIGHT))
    best = one_lora_best(lab)
    if seed == settings.seeds[0]:
        flat = stack.load([lab.out / "one_lora" / f"rate{best}"])
    else:
        flat = one_lora_flat(lab, stack, seed, settings.lora_rates[best], domains.EIGHT)
    stack.save(flat[0], lab.out / "one_lora" / f"seed{seed}", lab.base)
    stack.use(flat)
    lab.measure("one_lora", "a", seed, stack.model, stack.size)


def new_lora(lab: Lab, rank_factor: int) -> None:
    """(e) On the data and steps that routers get. Rates on the first seed, all of them at once; then the other seeds."""
    settings = lab.settings
    stack = lab.stack(settings.rank * rank_factor)
    method = "new_lora_r" if rank_factor == 1 else "new_lora_Er"
    best = 0
    for seed in settings.seeds:
        rates = list(settings.lora_rates) if seed == settings.seeds[0] else [settings.lora_rates[best]]
        flat = stack.fresh([1000 * seed + 9] * len(rates))
        steps = lab.mixed_batches(seed)
        flat = train_stacked(lab, stack, flat, rates, steps)
        if len(rates) > 1:

            def take(index: int, trained: torch.Tensor = flat) -> tuple[Any, None]:
                stack.use(trained[index : index + 1])
                return stack.model, None

            best = lab.tuned(range(len(rates)), take, method, seed)
            flat = flat[best : best + 1]
        stack.use(flat)
        lab.measure(method, "e", seed, stack.model, stack.size)


# ------------------------------------------------------------------------------------------------------------- merges


MERGES: dict[str, dict[str, Any]] = {
    "merge_cat": {"combination_type": "cat"},  # the sum of the experts' changes, exactly
    "merge_linear": {"combination_type": "linear"},
    "merge_ties": {"combination_type": "ties", "density": 0.3},
    "merge_dare_linear": {"combination_type": "dare_linear", "density": 0.5},
    "merge_dare_ties": {"combination_type": "dare_ties", "density": 0.5},
}


def merges(lab: Lab, seed: int, methods: tuple[str, ...]) -> None:
    """(c) PEFT's `add_weighted_adapter`, its common weight tuned on the first seed; and (h) the plain average."""
    settings = lab.settings
    paths = lab.loras(seed)
    model = PeftModel.from_pretrained(lab.model(), paths[0], adapter_name="lora0", autocast_adapter_dtype=False)
    for index, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=f"lora{index}", autocast_adapter_dtype=False)
    model.eval()
    names = [f"lora{index}" for index in range(len(paths))]
    backbone = model.get_base_model()

    def take(weight: float, method: str) -> tuple[Any, None]:
        torch.manual_seed(seed)  # DARE draws
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "merged" in model.peft_config:
                model.set_adapter("lora0")
                model.delete_adapter("merged")
            model.add_weighted_adapter(names, [weight] * len(names), "merged", **MERGES[method])
        model.set_adapter("merged")
        return backbone, None

    for method in methods:
        best = lab.chosen(method)
        if best is None:
            weight = lab.tuned(settings.merge_weights, lambda w, m=method: take(w, m), method, seed)
        else:
            weight = settings.merge_weights[best]
        take(weight, method)
        lab.measure(method, "c", seed, backbone)
        if method == "merge_cat":
            take(1 / len(names), method)
            lab.measure("uniform", "h", seed, backbone)


def soups(lab: Lab, seed: int) -> None:
    """(c) LoRA Soups CAT (arXiv 2410.13025): a coefficient for each LoRA on each linear, learned on the mixed data."""
    settings = lab.settings
    stack = lab.stack()
    routed = RoutedLora(lab.model(), stack, lab.flat(stack, seed))
    rates = list(settings.coefficient_rates)
    best = lab.chosen("lora_soups_cat")
    if best is not None:
        rates = [rates[best]]
    values = torch.full((len(rates), len(routed.linears), routed.experts), 1 / routed.experts, device=lab.device)
    steps = lab.mixed_batches(seed)
    train_stacked(lab, routed, values, rates, steps, use=routed.use_coefficients)

    def take(index: int) -> tuple[Any, None]:
        routed.use_coefficients(values[index : index + 1])
        return routed.model, None

    index = lab.tuned(range(len(rates)), take, "lora_soups_cat", seed) if best is None else 0
    take(index)
    lab.measure("lora_soups_cat", "c", seed, routed.model, values[0].numel())
