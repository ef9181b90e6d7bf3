"""LoRA-Switch for PEFT: several LoRA experts in one adapter, routed once per token (arXiv 2405.17741).

Importing this package is all it takes: PEFT, Transformers and TRL then know the method.
"""

from importlib.util import find_spec as _find_spec
from typing import Any as _Any

__version__ = "0.1.0"
__all__ = [
    "ExpertCollator",
    "ExpertLoss",
    "LoRASwitchConfig",
    "LoRASwitchLinear",
    "LoRASwitchModel",
    "RouterStatsCallback",
    "RoutingReport",
    "add_expert",
    "export_expert",
    "from_loras",
    "record_routing",
    "remove_expert",
    "router_from_texts",
    "router_from_weights",
    "router_stats",
    "routing_report",
    "use_experts",
]

if _find_spec("peft") is not None:
    from .callback import RouterStatsCallback
    from .compose.export import export_expert
    from .compose.given_experts import use_experts
    from .compose.import_loras import from_loras
    from .compose.initial_router import router_from_texts, router_from_weights
    from .compose.one_pass import ExpertCollator, ExpertLoss
    from .compose.resize import add_expert, remove_expert
    from .config import LoRASwitchConfig
    from .integrations import install
    from .layer import LoRASwitchLinear
    from .model import LoRASwitchModel, record_routing, router_stats
    from .reporting.report import RoutingReport, routing_report

    install(LoRASwitchConfig, LoRASwitchModel)
else:  # vLLM's environment: the plugin that serves adapters there (`vllm_plugin/`) needs no PEFT

    def __getattr__(name: str) -> _Any:
        if name in __all__:
            raise ImportError(f"peft_loraswitch.{name} needs PEFT, which is not installed: pip install peft")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
