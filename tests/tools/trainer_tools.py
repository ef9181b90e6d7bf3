"""What the tests of real trainers share: tiny data, a tokenizer made here, and what a router's gradient should be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from helpers import VOCAB, switch_layers, tokens

LENGTHS = [9, 4, 7, 5, 8, 6, 3, 9]  # of the samples: padding in every batch


def samples(lengths: list[int] = LENGTHS, seed: int = 0) -> Any:
    from datasets import Dataset  # not on every GPU machine, where other helpers here are used too

    rows = tokens(len(lengths), max(lengths), seed=seed).tolist()
    return Dataset.from_list([{"input_ids": row[:n]} for row, n in zip(rows, lengths, strict=True)])


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 ... w63 and three special tokens, whitespace between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ ' ' }}{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
        "{% else %}{{ '<s> ' + m['content'] }}{% endif %}{% endfor %}"
    )
    return made


def sentence(seed: int, length: int) -> str:
    return " ".join(f"w{index}" for index in tokens(1, length, seed=seed)[0].tolist())


def arguments(output_dir: Any, make: Any = TrainingArguments, **overrides: Any) -> Any:
    """Plain SGD with a constant rate and no clipping: an update is -rate * gradient."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return make(**{**settings, **overrides})


class InOrder:
    """Mixin: batches in the order of the data, so that two runs (and a computation by hand) see the same ones."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class OrderedTrainer(InOrder, Trainer):
    pass


def routers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "loraswitch_router" in n and ".ref" not in n}


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "loraswitch_" in n}


def auxiliary_gradient(
    model: nn.Module, x: torch.Tensor, aux: float, z: float, adapter: str = "default"
) -> torch.Tensor:
    """Gradient of both losses with respect to the router's weight [E, d], from their definition, in float64.

    x: what the router sees of the real tokens of one optimiser step, [T, d].
    """
    layer = next(layer for layer in switch_layers(model).values() if adapter in layer.loraswitch_router)
    weight = layer.loraswitch_router[adapter].weight.detach().double().requires_grad_()
    experts, top_k = weight.shape[0], layer.routing_options[adapter].top_k
    balance, square = 0.0, 0.0
    counts = [0.0] * experts
    total = [0.0] * experts
    for token in x.double():
        logits = weight @ token
        p = logits.softmax(0)
        # Of equal logits (a padding token's are all zero) the lowest index first: topk leaves their order open.
        for expert in logits.detach().sort(descending=True, stable=True).indices[:top_k].tolist():
            counts[expert] += 1
        total = [sofar + p[expert] for expert, sofar in enumerate(total)]
        square = square + logits.logsumexp(0) ** 2
    for expert in range(experts):
        balance = balance + counts[expert] / len(x) * total[expert] / len(x)
    (aux * experts * balance + z * square / len(x)).backward()
    return weight.grad.float()


class RouterInputs:
    """Notes what the router saw of real tokens, by watching the first adapted linear: `x` is [T, d]."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[torch.Tensor] = []
        self.masks: list[torch.Tensor | None] = []
        layer = next(layer for layer in switch_layers(model).values() if len(layer.loraswitch_router))
        layer.register_forward_pre_hook(lambda module, args: self._note(module, args[0]))
        base = model.base_model.model
        base.register_forward_pre_hook(
            lambda module, args, kwargs: self.masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )

    def _note(self, module: nn.Module, x: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not module.disable_adapters:
            mask = self.masks[-1]
            x = x.detach()
            self.seen.append(x.flatten(0, -2) if mask is None else x[mask.bool()])

    @property
    def x(self) -> torch.Tensor:
        return torch.cat(self.seen)
