"""What `sft.py` and `dpo.py` share: everything but the trainer, its configuration and the shape of the data."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from peft_loraswitch import RouterStatsCallback
from recipes.train import local_assets
from recipes.train.arguments import parse


def train(trainer_class: type, training_config: type, preference: bool) -> None:
    """Train a LoRA-Switch adapter as the command line asks, and save it with the trainer's log in its output folder.

    Args:
        trainer_class, training_config: `SFTTrainer` and `SFTConfig`, or another of TRL's pairs.
        preference: whether the data is pairs of answers; says which dataset `local_assets` makes.
    """
    script, training, model_arguments, recipe = parse(training_config)
    if recipe.local_assets:
        local_assets.make(model_arguments.model_name_or_path, script.dataset_name, preference)

    dataset = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    trainer = trainer_class(
        model=load_model(model_arguments, training.trust_remote_code),
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        processing_class=load_tokenizer(model_arguments, training.trust_remote_code),
        peft_config=recipe.adapter_config,
        callbacks=[RouterStatsCallback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    note_memory(trainer)
    trainer.save_state()  # trainer_state.json: the log, with the router's statistics next to the loss
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"Adapter saved to {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def note_memory(trainer: Any) -> None:
    """Into the trainer's log: the most memory that PyTorch has held for each process on its own GPU, in GiB, by rank ("reserved":
    tensors and room between them, without CUDA's own few hundred MiB). Nothing where there is no GPU."""
    accelerator = trainer.accelerator
    if accelerator.device.type != "cuda":
        return
    held = torch.tensor([torch.cuda.max_memory_reserved(accelerator.device) / 2**30], device=accelerator.device)
    by_rank = [round(each, 1) for each in accelerator.gather(held).tolist()]
    trainer.state.log_history.append({"step": trainer.state.global_step, "reserved_gib": by_rank})


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
