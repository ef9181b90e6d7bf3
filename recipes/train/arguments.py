"""The command line of `sft.py` and `dpo.py`: a YAML file and options, TRL's own and those that it does not have."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, ScriptArguments, TrlParser

from peft_loraswitch import LoRASwitchConfig


@dataclass
class RecipeArguments:
    """Options next to TRL's own."""

    adapter: dict | str | None = field(
        default=None,
        metadata={
            "help": "The fields of LoRASwitchConfig: a block in the YAML, or JSON on the command line, which replaces "
            'the block: --adapter \'{"r": 16, "num_experts": 8}\'.'
        },
    )
    local_assets: bool = field(
        default=False,
        metadata={"help": "Make a tiny model and a dataset from local text where the configuration names them."},
    )

    def __post_init__(self) -> None:
        options = json.loads(self.adapter) if isinstance(self.adapter, str) else self.adapter or {}
        if not isinstance(options, dict):
            raise ValueError(f"adapter={self.adapter!r} must be a mapping of LoRASwitchConfig fields.")
        # Made here, so that a mistake shows before a model is loaded.
        self.adapter_config = LoRASwitchConfig(**{"task_type": "CAUSAL_LM", **options})


def parse(training_config: type) -> tuple[Any, ...]:
    """(script, training, model, recipe) arguments from `<script> config.yaml [--option value ...]`."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    parser = TrlParser((ScriptArguments, training_config, ModelConfig, RecipeArguments))
    return parser.parse_args_and_config(args=argv)
