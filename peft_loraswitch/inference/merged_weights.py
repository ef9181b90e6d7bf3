"""Strategy "merge": the paper's method. Before a single token runs, its experts go into the weights of all adapted linears,
in one launch; then every linear is a plain one.

From pristine weights (the default) the merged ones are a second copy: as much memory again as the adapted weights take,
no drift. In place, a step takes the last token's experts out and puts the new token's in, and rounds each weight once: the
error grows with the number of tokens; the pristine weights wait on the host for `unfuse()`.

Merged weights serve one routing decision. A forward of more than one token takes the unmerged path, with one warning.

What changes after fusing is taken up before the next merge that no compiler has traced: other experts, scalings, weights of the
backbone. Weights merged in place are the exception: they hold experts, so new ones in their place are an error.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels, ops
from ..adapted_layers import adapted_layers
from ..fingerprint import Fingerprint
from ..layer import LoRASwitchLinear
from ..ordinary import ordinary
from ..routing.decision import Routing
from ..routing.frame import RoutingFrame
from ..transforms import outside_of_transforms, under_transform
from .capabilities import base_of, facts_of, within_limits
from .counted_writes import count_writes

logger = logging.getLogger(__name__)
# Ids that are no expert's: nothing was merged; what was merged has been taken out, which leaves rounding errors.
PRISTINE, TAKEN_OUT = -1, -2


class MergedWeights:
    """The merged weights of all adapted layers of a model. One thread at a time: they hold one decision.

    Raises:
        ValueError: a layer that cannot be merged (quantised, hooked, several devices or dtypes, several adapters active, an
            adapter beyond the sizes that the ops take).
    """

    def __init__(self, model: nn.Module, in_place: bool) -> None:
        self.model, self.in_place = model, in_place
        self.warned: set[str] = set()
        self._take_up()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or a pickle, with its model: parameters come on their own, so these weights are not the model's any more."""
        self.__dict__.update(state, copied=True, index={})

    @torch.inference_mode(False)  # what is made here serves forwards of every mode
    @torch.no_grad()
    def _take_up(self) -> None:
        """The layers as they are now; nothing is merged."""
        # What can fail comes before the first change.
        layers, in_place = adapted_layers(self.model), self.in_place
        adapter = self._one_adapter(layers)
        # Linears before the one that routes are left out: they run before there is a decision, and theirs never changes.
        served = [
            layer for layer in layers if adapter in layer.routing_options and layer.routing_options[adapter].is_routed
        ]
        bases = [base_of(layer) for layer in served]
        kinds = {(base.weight.dtype, base.weight.device) for base in bases}
        facts = [facts_of(layer) for layer in served]
        if not all(fact.plain for fact in facts) or len(kinds) != 1:
            raise ValueError("strategy='merge' needs plain 16/32-bit linears of one dtype on one device: use 'fused'.")
        if len({layer.routing_options[adapter] for layer in served}) != 1:
            raise ValueError("strategy='merge' needs the same number of experts on every layer.")
        active = served[0].routing_options[adapter].num_active
        if not all(within_limits(layer, adapter, active) for layer in served):
            raise ValueError(
                f"strategy='merge' takes at most {kernels.MAX_TOP_K} experts per token (top_k + num_shared_experts), "
                f"{kernels.MAX_EXPERTS} experts and rank {kernels.MAX_RANK}: use 'fused'."
            )
        self.adapter, self.served, self.bases, self.copied = adapter, served, bases, False
        self.weights: list[Tensor] = []  # their memory goes before the new ones' comes
        self.transposed = [fact.transposed for fact in facts]
        self.scalings = [layer.scaling[self.adapter] for layer in self.served]
        dtype, device = kinds.pop()
        experts: list[Any] = [
            (layer.loraswitch_A[self.adapter], layer.loraswitch_B[self.adapter]) for layer in self.served
        ]
        for a, b in experts:
            count_writes(a)
            count_writes(b)
        fingerprint = self._fingerprint()  # before what it is of is read
        self.lora_a = [a.weight.detach().to(dtype) for a, _ in experts]
        self.lora_b = [b.weight.detach().to(dtype) for _, b in experts]
        sources = [ordinary(base.weight.detach()) for base in self.bases]
        self.host_copies = [source.to("cpu", copy=True) for source in sources] if in_place else []
        self.sources = sources
        self.weights = sources if in_place else [torch.empty_like(source) for source in sources]
        for tensor in (*self.weights, *self.lora_a, *self.lora_b):
            torch._dynamo.mark_static_address(tensor, guard=False)
        self.index = {id(layer): i for i, layer in enumerate(self.served)}
        # What is merged in place now; PRISTINE: nothing was. Buffers with fixed addresses, so that a CUDA graph can keep them.
        self.experts = torch.full((active,), PRISTINE, dtype=torch.int64, device=device)
        self.gates = torch.zeros(active, dtype=torch.float32, device=device)
        self.nothing = torch.full_like(self.experts, TAKEN_OUT)
        for tensor in (self.experts, self.gates, self.nothing):
            torch._dynamo.mark_static_address(tensor, guard=False)
        self.fingerprint = fingerprint
        self.kernels = facts[0].kernels
        if self.kernels:  # now: not while a CUDA graph is recorded, whose memory it would live in
            ops.merge_table(*self._arguments())

    @staticmethod
    def _one_adapter(layers: list[LoRASwitchLinear]) -> str:
        active = {tuple(layer.active_adapters) for layer in layers}
        if len(active) != 1 or len(names := active.pop()) != 1:
            raise ValueError("strategy='merge' needs exactly one active adapter, the same on every layer.")
        return names[0]

    def _fingerprint(self) -> Fingerprint:
        """Of each layer: what a merge reads, where that is, and how often experts were written to."""
        bases = [base._parameters for base in self.bases]
        experts = [
            each[self.adapter]._parameters for layer in self.served for each in (layer.loraswitch_A, layer.loraswitch_B)
        ]
        return Fingerprint(
            weights=bases,
            written=experts,
            scalings=[layer.scaling for layer in self.served],
            adapter=self.adapter,
            hooks=[hooks for base in self.bases for hooks in (base._forward_hooks, base._forward_pre_hooks)],
        )

    def _follow(self, adapter: str) -> bool:
        """Take up what has changed, be it the adapter; False if what there is now cannot be merged.

        Raises:
            RuntimeError: weights that are merged in place have been replaced.
        """
        if adapter == self.adapter and self.fingerprint.is_current():
            return True
        self.put_back()
        ops.drop_merge_tables(self.weights)
        try:
            self._take_up()
        except ValueError as error:
            self._warn(
                f"something has changed since strategy='merge' was chosen, so that nothing is merged now: {error}"
            )
            return False
        return True

    def put_back(self) -> None:
        """Weights that are merged in place as they were, bit for bit: before something else moves, reads or writes them.

        Raises:
            RuntimeError: they have been replaced.
        """
        if not self.touched:
            return
        for layer, base, source in zip(self.served, self.bases, self.sources, strict=True):
            now = base_of(layer)
            if now is not base or now.weight.data_ptr() != source.data_ptr():
                raise RuntimeError(
                    f"The weight of '{layer.name}' was replaced while experts were merged into it in place: whether the new one "
                    "holds them cannot be known. Call unfuse() before the backbone's weights are changed."
                )
        self._write_back()

    @property
    def touched(self) -> bool:
        """Whether the backbone's own weights are not, bit for bit, what they were."""
        return self.in_place and not self.copied and bool((self.experts != PRISTINE).any())

    @torch.no_grad()
    def _write_back(self) -> None:
        for source, pristine in zip(self.sources, self.host_copies, strict=True):
            source.copy_(pristine)
        self.experts.fill_(PRISTINE)

    def forward(
        self, layer: LoRASwitchLinear, adapter: str, x: Tensor, routing: Routing, frame: RoutingFrame
    ) -> Tensor | None:
        """The layer's output from merged weights, or None if this layer or forward takes the unmerged path."""
        if (
            adapter not in layer.routing_options or not layer.routing_options[adapter].is_routed
        ):  # it runs before there is a decision
            return None
        if frame.merged is None:
            frame.merged = self._merge_for(adapter, x, routing, frame)
        if frame.merged and adapter != self.adapter:  # layers that do not agree
            frame.merged = None
            self.leave_out(frame)
        i = self.index.get(id(layer))
        if not frame.merged or i is None:
            return None
        weight = self.weights[i]
        return F.linear(x, weight.T if self.transposed[i] else weight, self.bases[i].bias)

    def _merge_for(self, adapter: str, x: Tensor, routing: Routing, frame: RoutingFrame) -> bool:
        """Merge what this forward follows; False if it takes the unmerged path."""
        compiling = torch.compiler.is_compiling()
        single = routing.experts.shape[:-1].numel() == 1 and x.shape[:-1].numel() == 1
        if not (compiling or self._follow(adapter)):
            return False
        if single and adapter == self.adapter:
            self._merge(routing.experts.flatten(), routing.gates.flatten())
            return True
        self.leave_out(frame)
        if not single:
            self._warn(
                "merged weights serve one token at a time; forwards of more tokens (a prompt, a batch, beams) take the "
                "unmerged path."
            )
        return False

    def leave_out(self, frame: RoutingFrame | None) -> None:
        """Before a layer of this forward runs unmerged: weights that are merged in place go without experts."""
        if not self.in_place or (frame is not None and frame.merged is False):
            return
        if not torch.compiler.is_compiling() and under_transform():
            with outside_of_transforms():  # which refuse to have weights written to
                return self.leave_out(frame)
        compiling = torch.compiler.is_compiling()
        trains = frame is not None and frame.training
        if compiling or (self.fingerprint.is_current() and not trains):
            self._merge(self.nothing, torch.zeros_like(self.gates))
        else:  # those that were merged are not there any more to be taken out, or are going to be trained
            self.put_back()
        if frame is not None:
            frame.merged = False

    def _warn(self, text: str) -> None:
        if not torch.compiler.is_compiling() and text not in self.warned:
            self.warned.add(text)
            logger.warning(f"LoRA-Switch: {text}")

    def _arguments(self) -> tuple[Any, ...]:
        return self.weights, self.sources, self.lora_a, self.lora_b, self.scalings, self.transposed

    def _merge(self, experts: Tensor, gates: Tensor) -> None:
        old = (self.experts, self.gates) if self.in_place else (None, None)
        if self.kernels and not torch.compiler.is_compiling():
            ops.merge_table(*self._arguments())(experts, gates, *old)
        else:
            ops.merge(*self._arguments(), experts, gates, *old)
        if self.in_place:
            self.experts.copy_(experts)
            self.gates.copy_(gates)

    def restore(self) -> None:
        """The pristine weights, bit for bit, and no more memory than before."""
        ops.drop_merge_tables(self.weights)
        if self.touched:
            self._write_back()
