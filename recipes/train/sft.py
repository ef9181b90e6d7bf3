"""Supervised fine-tuning of a LoRA-Switch adapter with TRL.

    python -m recipes.train.sft recipes/train/configs/sft_smoke.yaml
    accelerate launch -m recipes.train.sft recipes/train/configs/sft_llama31_8b.yaml --learning_rate 1.0e-4

Every option of TRL's ScriptArguments, SFTConfig and ModelConfig works in the YAML and, after it, on the command line; the
block `adapter` holds the fields of LoRASwitchConfig.
"""

from __future__ import annotations

from trl import SFTConfig, SFTTrainer

from recipes.train.trl_script import train

if __name__ == "__main__":
    train(SFTTrainer, SFTConfig, preference=False)
