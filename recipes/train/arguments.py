"""What `sft.py` and `dpo.py` share: the options that TRL does not have, and loading the model they train."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser, get_quantization_config

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


def parse(training_config: type, script_arguments: type) -> tuple[Any, ...]:
    """(script, training, model, recipe) arguments from `<script> config.yaml [--option value ...]`."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    parser = TrlParser((script_arguments, training_config, ModelConfig, RecipeArguments))
    return parser.parse_args_and_config(args=argv)


def load_model(arguments: ModelConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The backbone in the dtype (and quantisation) that the configuration asks for."""
    options: dict[str, Any] = {}
    quantization = get_quantization_config(arguments)
    if quantization is not None:
        # A quantised model cannot be moved later: each process puts its copy on its own GPU at once.
        options = {"quantization_config": quantization, "device_map": {"": PartialState().local_process_index}}
    dtype = arguments.dtype if arguments.dtype in ("auto", None) else getattr(torch, arguments.dtype)
    return AutoModelForCausalLM.from_pretrained(
        arguments.model_name_or_path,
        revision=arguments.model_revision,
        dtype=dtype,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=trust_remote_code,
        **options,
    )


def load_tokenizer(arguments: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token (Llama, Mistral) pads with its end token, masked as padding."""
    tokenizer = AutoTokenizer.from_pretrained(
        arguments.model_name_or_path, revision=arguments.model_revision, trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
