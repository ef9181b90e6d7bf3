"""What the user sets with `--additional-config '{"loraswitch": {...}}'`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

KEY = "loraswitch"


@dataclass(frozen=True)
class ServingOptions:
    """Fixed when the server starts, because vLLM compiles and captures the model once.

    Attributes:
        router_modules: linears that adapters may route at, besides the first that runs: full names or unique endings.
        max_experts: the most choices of a router, `num_experts` and the base expert.
    """

    router_modules: tuple[str, ...] = ()
    max_experts: int = 32

    @classmethod
    def read(cls, additional_config: Any) -> ServingOptions:
        """Raises ValueError: an unknown option, or a wrong value. Names it."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"--additional-config: {KEY}={given!r} must be an object.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"--additional-config: {KEY} has no {unknown}; there are {sorted(known)}.")
        names, most = given.get("router_modules", ()), given.get("max_experts", cls.max_experts)
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"--additional-config: {KEY}.router_modules={names!r} must be a list of names of linears.")
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= 512:
            raise ValueError(f"--additional-config: {KEY}.max_experts={most!r} must be a whole number from 1 to 512.")
        return cls(tuple(names), most)

    def advice(self, router_module: str | None = None, max_experts: int | None = None) -> str:
        """The argument that a server with these options needs for one router module more, or for more experts."""
        wanted: dict[str, Any] = {}
        if self.router_modules or router_module:
            wanted["router_modules"] = [*self.router_modules, *([router_module] if router_module else [])]
        if max_experts or self.max_experts != ServingOptions.max_experts:
            wanted["max_experts"] = max_experts or self.max_experts
        return "--additional-config '" + json.dumps({KEY: wanted}) + "'"
