"""Many LoRAs of one rank on one model, each for its own rows of a batch: trained, or measured, in one pass.

A batch holds the LoRAs' rows one after the other, equally many of each. What one computes is what PEFT's LoRA computes; their
gradients do not mix, and AdamW works element by element with a learning rate for each, so that training them together is training
each alone. A model of 270 million parameters, fed one small batch, would leave a GPU waiting for launches.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]  # name of a linear -> A [r, in], B [out, r]


class _StackedLinear(nn.Module):
    """base(x) + scale * B_e A_e x, where e is the LoRA whose rows these are."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a: torch.Tensor | None = None  # [loras, r, in]
        self.b: torch.Tensor | None = None  # [loras, out, r]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        if self.a is None or self.b is None:
            return out
        rows = x.reshape(len(self.a), -1, x.shape[-1])
        flat = out.view(len(self.a), -1, out.shape[-1])
        down = torch.bmm(rows, self.a.transpose(1, 2))
        return torch.baddbmm(flat, down, self.b.transpose(1, 2), alpha=self.scale).view(out.shape)


class StackedLora:
    """The LoRAs of a model. Weights are kept in float32, [loras, weights of one], and used in the model's dtype.

    Args:
        model: a causal language model; its linears (q, k, v, o, gate, up, down) are wrapped in place, and all of it is frozen.
        rank, alpha: of every LoRA, as in `LoraConfig`.
    """

    def __init__(self, model: nn.Module, rank: int, alpha: float) -> None:
        self.model, self.rank, self.alpha = model, rank, alpha
        model.requires_grad_(False)
        self.linears: dict[str, _StackedLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in LINEARS:
                parent, _, leaf = name.rpartition(".")
                wrapped = _StackedLinear(module, alpha / rank)
                setattr(model.get_submodule(parent), leaf, wrapped)
                self.linears[name] = wrapped
        first = next(iter(self.linears.values())).base.weight
        self.device, self.dtype = first.device, first.dtype
        self.size = sum(rank * (layer.base.in_features + layer.base.out_features) for layer in self.linears.values())

    def fresh(self, seeds: list[int]) -> torch.Tensor:
        """New LoRAs, [len(seeds), weights of one]: A as PEFT begins (uniform, Kaiming with a = sqrt(5)), B zero."""
        flat = torch.zeros(len(seeds), self.size)
        for row, seed in zip(flat, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for a, _ in self.views(row[None]).values():
                bound = 1 / math.sqrt(a.shape[-1])
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        return flat.to(self.device)

    def use(self, flat: torch.Tensor | None) -> torch.Tensor | None:
        """From now on the model computes with these LoRAs, [loras, weights of one]; None: with none.

        Returns:
            Their gradients in the model's dtype, of the same shape, into which `backward` adds.
        """
        if flat is None:
            for layer in self.linears.values():
                layer.a = layer.b = None
            return None
        used = flat.to(self.dtype, copy=True)
        gradients = torch.zeros_like(used)
        values, sums = self.views(used), self.views(gradients)
        for name, layer in self.linears.items():
            pair = []
            for value, total in zip(values[name], sums[name], strict=True):
                leaf = value.detach().requires_grad_()
                leaf.grad = total  # backward adds in place, into one tensor for all
                pair.append(leaf)
            layer.a, layer.b = pair
        self._used = used
        return gradients

    def refresh(self, flat: torch.Tensor, gradients: torch.Tensor) -> None:
        """The optimizer changed `flat`: use that, and begin the gradients anew."""
        with torch.no_grad():
            self._used.copy_(flat)
            gradients.zero_()

    def views(self, flat: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        views, begin = {}, 0
        for name, layer in self.linears.items():
            shapes = ((self.rank, layer.base.in_features), (layer.base.out_features, self.rank))
            pair = []
            for shape in shapes:
                count = shape[0] * shape[1]
                pair.append(flat[:, begin : begin + count].unflatten(1, shape))
                begin += count
            views[name] = (pair[0], pair[1])
        return views

    def save(self, row: torch.Tensor, folder: Path, base: str) -> None:
        """One LoRA as PEFT has it: `PeftModel.from_pretrained(base, folder)` loads it."""
        tensors = {}
        for name, (a, b) in self.views(row[None].float().cpu()).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a[0].clone()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b[0].clone()
        folder.mkdir(parents=True, exist_ok=True)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=list(LINEARS), task_type="CAUSAL_LM",
            base_model_name_or_path=base, inference_mode=True,
        )  # fmt: skip
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors")

    def load(self, folders: list[Path]) -> torch.Tensor:
        """LoRAs that `save` wrote, [len(folders), weights of one]."""
        flat = torch.zeros(len(folders), self.size)
        for row, folder in zip(flat, folders, strict=True):
            tensors = load_file(folder / "adapter_model.safetensors")
            for name, (a, b) in self.views(row[None]).items():
                a.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
                b.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
        return flat.to(self.device)


class StackedAdamW:
    """AdamW without decay for [loras, weights], with a learning rate and a limit on the gradient's norm for each."""

    def __init__(self, flat: torch.Tensor, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.flat, self.betas, self.steps = flat, betas, 0
        self.mean, self.square = torch.zeros_like(flat), torch.zeros_like(flat)

    @torch.no_grad()
    def step(self, gradients: torch.Tensor, rates: torch.Tensor, longest: float = 1.0) -> None:
        """rates: [loras]."""
        self.steps += 1
        gradient = gradients.float()
        gradient *= (longest / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        self.mean.lerp_(gradient, 1 - self.betas[0])
        self.square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        first, second = (1 - beta**self.steps for beta in self.betas)
        update = (self.mean / first) / ((self.square / second).sqrt_() + 1e-8)
        self.flat.addcmul_(update, rates[:, None].expand_as(update), value=-1.0)
