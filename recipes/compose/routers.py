"""(g) Ours: `from_loras(..., top_k=1, normalize_gates=True)` with routers of several origins; and (f), random experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from peft_loraswitch import from_loras, router_from_texts, router_from_weights
from peft_loraswitch.router_inputs import averaged, read
from recipes.compose import domains
from recipes.compose.lab import Lab
from recipes.compose.mixed_training import loss_of, train_parameters
from recipes.compose.text_batches import Example

DECAYS = (0.0, 0.9, 0.98, 1.0)
LABEL_STEPS, LABEL_TEXTS = 200, 64
POSITIONS = (1, 2, 4, 8, 16, 32, 64)


class Ours:
    """A routed adapter over the LoRAs of one seed."""

    def __init__(
        self, lab: Lab, seed: int, decay: float = 0.0, top_k: int = 1, names: tuple[str, ...] = domains.EIGHT,
        folders: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.lab, self.seed, self.names, self.decay = lab, seed, names, decay
        model = lab.model()
        model.config._name_or_path = lab.base
        torch.manual_seed(seed)
        self.peft = from_loras(
            model, folders or lab.loras(seed, names), expert_names=list(names), top_k=top_k, normalize_gates=True,
            router_decay=decay, trainable="router", router_aux_loss_coef=0.0, router_z_loss_coef=0.0,
            autocast_adapter_dtype=False,
        )  # fmt: skip
        self.peft.eval()
        self.backbone = self.peft.get_base_model()
        self.float_router()

    def float_router(self) -> None:
        """Experts are in the base's dtype; the router is trained in float32, as it computes."""
        for name, module in self.backbone.named_modules():
            if name.endswith("loraswitch_router.default"):
                module.float()
                self.router = module

    @property
    def parameters(self) -> int:
        return int(self.router.weight.numel())

    def set_rows(self, rows: torch.Tensor) -> None:
        with torch.no_grad():
            self.router.weight.copy_(rows)

    # ------------------------------------------------------------------------------------------------------- routers

    def from_texts(self, method: str = "discriminant") -> None:
        """A few prompts of each domain, without answers."""
        count = self.lab.settings.example_prompts
        decode = self.lab.tokenizer.decode
        texts = {
            name: [decode(e.prompt, skip_special_tokens=True) for e in self.lab.data[name]["mixed"][:count]]
            for name in self.names
        }
        router_from_texts(self.peft, _WithBos(self.lab.tokenizer), texts, method=method, batch_size=64)

    def from_weights(self) -> dict[str, float]:
        return router_from_weights(self.peft)

    def trained(self, rate: float, seed: int, start: torch.Tensor | None) -> None:
        """On the loss of the mixed items' answers alone, from these rows, or from fresh ones."""
        torch.manual_seed(seed)
        self.router.reset_parameters()
        if start is not None:
            self.set_rows(start)
        self.go_on(rate, self.lab.mixed_batches(seed, self.names))

    def go_on(self, rate: float, steps: list[list[Example]]) -> None:
        self.peft.train()
        train_parameters(
            [self.router.weight], rate, steps,
            lambda model, chosen: loss_of(model, self.lab.tokenizer, chosen), self.backbone,
        )  # fmt: skip
        self.peft.eval()

    # --------------------------------------------------------------------------------------------- what routers see

    def inputs(self, items: list[Example]) -> list[torch.Tensor]:
        """What the router decides by at each token of prompt and answer: float32 [tokens, d] each, averaged by the decay."""
        found = []
        order = sorted(range(len(items)), key=lambda index: len(items[index]))
        sequences = [items[index].prompt + items[index].answer for index in order]
        with torch.no_grad():
            for reading in read(self.backbone, "default", sequences, 128):
                means = averaged(reading.x.float(), self.decay)
                lengths = reading.real.sum(1).tolist()
                found += [row[:length] for row, length in zip(means, lengths, strict=True)]
        placed: list[torch.Tensor] = [torch.empty(0)] * len(items)
        for index, row in zip(order, found, strict=True):
            placed[index] = row
        return placed

    def labelled(self, rates: tuple[float, ...]) -> list[torch.Tensor]:
        """Rows of the router, one set for each rate, by cross-entropy between its logits and the item's domain at every token."""
        lab = self.lab
        torch.manual_seed(self.seed)
        items = [e for name in self.names for e in lab.data[name]["mixed"][: lab.settings.mixed_items]]
        owners = [i for i, n in enumerate(self.names) for _ in lab.data[n]["mixed"][: lab.settings.mixed_items]]
        inputs = self.inputs(items)
        rows = [torch.zeros_like(self.router.weight, requires_grad=True) for _ in rates]
        optimizers = [
            torch.optim.AdamW([row], lr=rate, weight_decay=0.0) for row, rate in zip(rows, rates, strict=True)
        ]
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(LABEL_STEPS):
            chosen = torch.randperm(len(items), generator=generator)[:LABEL_TEXTS].tolist()
            x = torch.cat([inputs[i] for i in chosen])
            y = torch.cat([torch.full((len(inputs[i]),), owners[i]) for i in chosen]).to(x.device)
            for row, optimizer in zip(rows, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("initial", group["lr"]) * (1 - 0.9 * step / LABEL_STEPS)
                optimizer.zero_grad()
                F.cross_entropy(F.linear(x, row), y).backward()
                optimizer.step()
        return [row.detach() for row in rows]

    def accuracy(self) -> dict[str, dict[str, float]]:
        """How many tokens choose the right expert: by their place in the prompt, at its end, and in the answer."""
        settings, found = self.lab.settings, {}
        for owner, name in enumerate(self.names):
            items = self.lab.data[name]["test"][: settings.test_items]
            hits: dict[str, list[float]] = {}
            for example, x in zip(items, self.inputs(items), strict=True):
                good = (F.linear(x, self.router.weight.float()).argmax(-1) == owner).float().tolist()
                end = len(example.prompt)
                for place in POSITIONS:
                    if place < end:
                        hits.setdefault(f"accuracy_token_{place}", []).append(good[place])
                hits.setdefault("accuracy_prompt", []).append(sum(good[:end]) / end)
                hits.setdefault("accuracy_last", []).append(good[end - 1])
                hits.setdefault("accuracy_answer", []).append(sum(good[end - 1 : -1]) / len(good[end - 1 : -1]))
            found[name] = {metric: sum(each) / len(each) for metric, each in hits.items()}
        return found


class _WithBos:
    """The tokenizer as `router_from_texts` calls it, with the BOS that all items have."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> dict[str, list[int]]:
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return {"input_ids": begin + self.tokenizer(text, add_special_tokens=False).input_ids}


def shown(decay: float) -> str:
    return f"decay_{decay:g}"


def _measure(ours: Ours, method: str, kind: str, seed: int) -> None:
    ours.lab.measure(method, kind, seed, ours.backbone, ours.parameters)
    ours.lab.rows(method, kind, seed, ours.accuracy(), ours.parameters)


def untrained(lab: Lab, seed: int, how: str, decay: float) -> None:
    """From weights or from texts."""
    ours = Ours(lab, seed, decay)
    if how == "weights":
        lab.note("router_from_weights", {f"seed {seed}": ours.from_weights()})
    else:
        ours.from_texts()
    _measure(ours, f"{how}_{shown(decay)}", "g", seed)


def labels(lab: Lab, seed: int, decay: float) -> None:
    """Trained on the domains' labels: needs the router's input alone, no pass of the model."""
    ours = Ours(lab, seed, decay)
    method, rates = f"labels_{shown(decay)}", lab.settings.label_rates
    best = lab.chosen(method)
    sets = ours.labelled(rates if best is None else (rates[best],))

    def take(index: int) -> tuple[Any, None]:
        ours.set_rows(sets[index])
        return ours.backbone, None

    take(lab.tuned(range(len(sets)), take, method, seed) if best is None else 0)
    _measure(ours, method, "g", seed)


def trained(lab: Lab, seed: int, decay: float, top_k: int = 1, start: str = "fresh") -> None:
    """trainable="router" on the mixed items. With top_k = 2 the gates of the two add to 1.

    start: the router is fresh, or "texts": from texts; "random": it is fresh, and the experts are noise of the same norms (f).
    """
    random = start == "random"
    ending = {"fresh": "", "texts": "_from_texts", "random": "_random_experts"}[start]
    method = f"trained_{shown(decay)}" + ("_top2" if top_k == 2 else "") + ending
    ours = Ours(lab, seed, decay, top_k, folders=random_loras(lab, seed) if random else None)
    rates = lab.settings.router_rates
    best = lab.chosen(method)
    begin = None
    if start == "texts":
        ours.from_texts()
        begin = ours.router.weight.detach().clone()
    sets = []
    for rate in rates if best is None else (rates[best],):
        ours.trained(rate, seed, begin)
        sets.append(ours.router.weight.detach().clone())

    def take(index: int) -> tuple[Any, None]:
        ours.set_rows(sets[index])
        return ours.backbone, None

    take(lab.tuned(range(len(sets)), take, method, seed) if best is None else 0)
    _measure(ours, method, "f" if random else "g", seed)
    if not random:
        path = lab.out / "routers" / f"{method}_seed{seed}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(ours.router.weight.detach().cpu(), path)


def random_loras(lab: Lab, seed: int) -> list[str]:
    """Folders of LoRAs whose tensors are normal noise, each with the norm of an expert's."""
    stack = lab.stack()
    flat = lab.flat(stack, seed)
    torch.manual_seed(5000 + seed)
    noise = torch.randn_like(flat)
    for name, each in stack.views(noise).items():
        for values, like in zip(each, stack.views(flat)[name], strict=True):
            norms = like.flatten(1).norm(dim=1) / values.flatten(1).norm(dim=1)
            values.mul_(norms[:, None, None])
    folders = []
    for row, name in zip(noise, domains.EIGHT, strict=True):
        folder = lab.out / "random" / f"seed{seed}" / name
        stack.save(row, folder, lab.base)
        folders.append(str(folder))
    return folders
