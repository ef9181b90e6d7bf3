"""The settings of routing, as layers and kernels see them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RoutingOptions:
    """What routing needs to know of a `LoRASwitchConfig`; same words, same meaning. One object for each adapter and layer: of a
    linear before the one that routes, which has shared experts only, `num_experts` is 0 (`shared_only()`)."""

    num_experts: int
    top_k: int
    normalize_gates: bool
    num_shared_experts: int = 0
    base_expert: bool = False
    top_p: float = 1.0
    jitter: float = 0.0
    decay: float = 0.0
    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    edition: int = 0  # how often experts have come or gone: an index may mean another one since

    @property
    def is_routed(self) -> bool:
        """Whether there is anything to choose."""
        return self.num_experts > 0

    @property
    def num_choices(self) -> int:
        """Logits for each token: one for each routed expert, and with `base_expert` a last one for "nothing"."""
        return self.num_experts + self.base_expert

    @property
    def num_stacked(self) -> int:
        """Experts in the stack: the routed ones, then the shared ones."""
        return self.num_experts + self.num_shared_experts

    @property
    def num_active(self) -> int:
        """Experts that compute for a token, at most; the base expert is one that has nothing to compute."""
        return (self.top_k if self.is_routed else 0) + self.num_shared_experts

    def shared_only(self) -> RoutingOptions:
        """The same for a linear that follows no decision. `top_k` stays: the shared experts' gate is 1 / top_k."""
        return replace(self, num_experts=0)
