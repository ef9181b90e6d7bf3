"""What is compared: every method by name, the family that it runs in, and how it is built on the frozen base.

Sizes are chosen so that all methods but the base and the small LoRA train as many parameters as a LoRA of rank 64 (8 experts
of rank 8), to within one percent: where routers or un-adapted layers change the count, the ranks of some linears differ by
one (`equal_ranks`). The scale s of a method with k experts per token is k times that of LoRA, because its gates sum to 1 (and
that of a shared expert is 1 / k): with even gates it then starts as a LoRA of rank k * r does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_loraswitch import LoRASwitchConfig
from peft_loraswitch.layer import LoRASwitchLayer
from recipes.quality import optimizers, routers
from recipes.quality.moe_lora import MoELoRALinear, MoELoRAModel

FAMILIES = ("baselines", "paper", "routers", "combined")
ASIDE_FAMILIES = ("optimizers", "top_p")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 64  # E * r of the paper's shape here, and the rank of the LoRA that has as many parameters
SCALE = 8.0  # s of LoRA


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        what: one sentence for the table.
        build: frozen base -> model with trainable adapter, whose forward takes input_ids and labels.
        equal: whether it has the parameters of a LoRA of rank 64.
        optimizer: what it is trained with.
    """

    name: str
    family: str
    what: str
    build: Callable[[nn.Module], nn.Module]
    equal: bool = True
    optimizer: optimizers.Maker = optimizers.adamw


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the blocks by full name, in module order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS
    }


def block_of(name: str) -> int:
    """model.layers.3.mlp.up_proj -> 3"""
    return int(name.split(".layers.")[1].split(".")[0])


def budget(model: nn.Module) -> int:
    """Parameters of the LoRA of rank 64."""
    return sum(RANK * (linear.in_features + linear.out_features) for linear in linears_of(model).values())


def equal_ranks(model: nn.Module, names: Sequence[str], experts: int, others: int) -> dict[str, int]:
    """Rank of each linear so that the adapter has the common budget: two neighbouring ranks, the larger one first.

    Args:
        names: the linears that share the budget evenly.
        experts: how many experts each of them has.
        others: parameters that everything else takes: routers, other linears.
    """
    linears = linears_of(model)
    size = {name: experts * (linears[name].in_features + linears[name].out_features) for name in names}
    left = budget(model) - others
    low = max(1, left // sum(size[name] for name in names))
    ranks = dict.fromkeys(names, low)
    left -= sum(low * size[name] for name in names)
    for name in names:
        if size[name] <= left:
            ranks[name] += 1
            left -= size[name]
    return ranks


# ------------------------------------------------------------------------------------------------ builders


def base_only(model: nn.Module) -> nn.Module:
    return model


def lora(rank: int) -> Callable[[nn.Module], nn.Module]:
    def build(model: Any) -> nn.Module:
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=list(TARGETS)))  # type: ignore[arg-type]

    return build


def layer_wise(num_experts: int = 8, top_k: int = 2) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        linears = linears_of(model)
        cost = sum(num_experts * linear.in_features for linear in linears.values())
        ranks = equal_ranks(model, list(linears), num_experts, cost)
        return MoELoRAModel(model, ranks, num_experts, top_k, scale=SCALE * top_k)

    return build


def switch(
    top_k: int = 2,
    num_experts: int = 8,
    block: int | float = 0,
    shared: int = 0,
    router: Callable[[int, int, int], nn.Module] | None = None,
    **config: Any,
) -> Callable[[nn.Module], nn.Module]:
    """LoRA-Switch through the package's own configuration.

    Args:
        block: index of the block whose first linear is routed; a fraction counts from the depth of the model.
        shared: experts of every adapted linear that serve every token. The blocks before the router have those alone, and
            put all their parameters into them; without shared experts those blocks are not adapted.
        router: (in_features, num_experts, top_k) -> a module in place of the package's router.
    """

    def build(model: Any) -> nn.Module:
        linears = linears_of(model)
        depth = 1 + max(map(block_of, linears))
        at = max(1, round(block * depth)) if isinstance(block, float) else block
        names = [name for name in linears if block_of(name) >= at]
        earlier = {name: RANK // shared for name in linears if block_of(name) < at} if shared else {}
        hidden = linears[names[0]].in_features
        new_router = router(hidden, num_experts, top_k) if router else None
        cost = sum(p.numel() for p in new_router.parameters()) if new_router else num_experts * hidden
        if earlier:  # they hold the shared experts alone
            cost += sum(RANK * (linears[n].in_features + linears[n].out_features) for n in earlier)
        ranks = {**equal_ranks(model, names, num_experts + shared, cost), **earlier}
        scale = SCALE * top_k
        settings = dict(config)
        if shared:
            settings["num_shared_experts"] = shared
        usual = min(ranks.values())
        settings |= {
            "r": usual,
            "lora_alpha": scale * usual,
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
            "alpha_pattern": {name: scale * rank for name, rank in ranks.items() if rank != usual},
        }
        if at:
            settings["router_module"] = names[0]
        adapted = get_peft_model(
            model,
            LoRASwitchConfig(num_experts=num_experts, top_k=top_k, target_modules=list(TARGETS), **settings),
        )
        if new_router:
            routers.replace(adapted, new_router)
        return adapted

    return build


# ------------------------------------------------------------------------------------------------ the table

FIRST, QUARTER = 1 / 8, 1 / 4  # of the depth
NO_LOSSES: dict[str, Any] = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}

METHODS: tuple[Method, ...] = (
    Method("base", "baselines", "The pretrained base, not adapted.", base_only, equal=False),
    Method("lora-r16", "baselines", "LoRA of the rank that a token uses in LoRA-Switch, k * r.", lora(16), equal=False),
    Method("lora-r64", "baselines", "LoRA of rank E * r: equal parameters, all used by every token.", lora(RANK)),
    Method("moe-lora", "baselines", "Layer-wise MoE-LoRA, E=8, k=2: each linear has a router of its own.", layer_wise()),
    Method("switch", "paper", "LoRA-Switch as in the paper: E=8, r=8, k=2, routed at the first linear.", switch()),
    Method("switch-k1", "paper", "One expert per token instead of two.", switch(1)),
    Method("switch-k4", "paper", "Four experts per token.", switch(4)),
    Method("switch-e16", "paper", "E=16, r=4, k=4: more and smaller experts, the same active rank.", switch(4, 16)),
    Method("deep-quarter", "routers", "Router at 1/4 of the depth, the layers below not adapted.", switch(block=QUARTER)),
    Method("deep-quarter-shared", "routers", "Router at 1/4 of the depth; one shared expert next to 2 of 7 routed ones, and "
           "alone below the router.", switch(2, 7, QUARTER, shared=1)),
    Method("shared", "routers", "One shared expert and 2 of 7 routed ones, routed at the first linear.", switch(2, 7, shared=1)),
    Method("context", "routers", "Routed at the first linear from the token's embedding and two running means of the "
           "embeddings before it.", switch(router=routers.ContextRouter)),
    Method("sigmoid", "routers", "Sigmoid gates, balanced by a bias instead of an auxiliary loss.",
           switch(router=routers.SigmoidRouter, **NO_LOSSES)),
    Method("switch-k8", "combined", "All 8 experts for every token: routing chooses the gates only.", switch(8)),
    Method("deep-eighth-shared-k3", "combined", "Router at 1/8, 1 shared and 3 of 7 routed experts.",
           switch(3, 7, FIRST, shared=1)),
    Method("deep-quarter-shared-k3", "combined", "Router at 1/4, 1 shared and 3 of 7 routed experts.",
           switch(3, 7, QUARTER, shared=1)),
    Method("deep-quarter-sigmoid-k3", "combined", "Router at 1/4 with sigmoid gates, 1 shared and 3 of 7 routed experts.",
           switch(3, 7, QUARTER, shared=1, router=routers.SigmoidRouter, **NO_LOSSES)),
    Method("deep-eighth-shared-k7", "combined", "Router at 1/8, 1 shared and all 7 other experts with routed gates.",
           switch(7, 7, FIRST, shared=1)),
    Method("deep-quarter-shared-k7", "combined", "Router at 1/4, 1 shared and all 7 other experts with routed gates.",
           switch(7, 7, QUARTER, shared=1)),
)  # fmt: skip

BY_NAME = {method.name: method for method in METHODS}


def frozen_a(model: nn.Module) -> nn.Module:
    adapted = switch()(model)
    for module in adapted.modules():
        if isinstance(module, LoRASwitchLayer):
            module.loraswitch_A["default"].weight.requires_grad_(False)
    return adapted


# What stands in files of its own (aside.py): it is asked with other steps, and is no variant of the table above.
PAPER = "The paper's LoRA-Switch, trained"
ASIDE: tuple[Method, ...] = (
    Method("switch-loraplus", "optimizers", f"{PAPER} by LoRA+: B has 16 times the learning rate of A and the router.",
           switch(), optimizer=optimizers.loraplus),
    Method("switch-lorafa", "optimizers", f"{PAPER} by LoRA-FA: A stays as it began.", frozen_a, equal=False,
           optimizer=optimizers.lorafa),
    Method("switch-riemannian", "optimizers", f"{PAPER} by AdamW with Riemannian preconditioning.", switch(),
           optimizer=optimizers.riemannian),
    Method("switch-lorarite", "optimizers", f"{PAPER} by LoRA-RITE, the router by AdamW.", switch(),
           optimizer=optimizers.lorarite),
    *(Method(f"switch-k{k}-p{round(100 * p)}", "top_p", f"At most {k} experts per token, fewer from top_p = {p} on.",
             switch(k, top_p=p)) for k in (2, 4) for p in (0.5, 0.7, 0.9)),
)  # fmt: skip
EVERY = {method.name: method for method in (*METHODS, *ASIDE)}


def chosen(families: Sequence[str] | None, names: Sequence[str] | None) -> list[Method]:
    """The methods of these families, or these; in the order of the table. None of either: all that the table has.

    Raises:
        ValueError: an unknown name.
    """
    for kind, given, known in (("family", families, (*FAMILIES, *ASIDE_FAMILIES)), ("method", names, tuple(EVERY))):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise ValueError(f"unknown {kind} {', '.join(unknown)}: choose from {', '.join(known)}.")
    if not families and not names:
        families = FAMILIES
    return [m for m in EVERY.values() if m.family in (families or ()) or m.name in (names or ())]


# ------------------------------------------------------------------------------------------------ a built model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in trainable(model))


def active_rank(model: nn.Module) -> float:
    """Rank of the adapter that a token uses, mean over all linears of the blocks weighted by their size: what decoding reads
    on top of the backbone is proportional to it. An un-adapted linear counts as rank 0."""
    rank_times_size, size = 0.0, 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in TARGETS:
            continue
        base: Any = module if isinstance(module, nn.Linear) else module.base_layer
        here = base.in_features + base.out_features
        size += here
        if isinstance(module, LoRASwitchLayer):
            rank_times_size += here * module.r["default"] * module.routing_options["default"].num_active
        elif isinstance(module, MoELoRALinear):
            rank_times_size += here * module.top_k * module.experts_a.shape[1]
        elif hasattr(module, "lora_A"):
            rank_times_size += here * module.r["default"]  # type: ignore[operator]
    return rank_times_size / size


def reset(model: nn.Module, seed: int) -> None:
    """Give the adapter the weights that a new one has; in place, so that a compiled model stays compiled."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRASwitchLayer):
                module.reset_parameters("default", True)
            elif isinstance(module, MoELoRALinear):
                module.reset_parameters()
            elif hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", True)
