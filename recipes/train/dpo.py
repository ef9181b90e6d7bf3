"""Preference training (DPO) of a LoRA-Switch adapter with TRL; the reference is the backbone with the adapter off.

    python -m recipes.train.dpo recipes/train/configs/dpo_smoke.yaml
    accelerate launch -m recipes.train.dpo recipes/train/configs/dpo_llama31_8b.yaml --beta 0.05

Every option of TRL's ScriptArguments, DPOConfig and ModelConfig works in the YAML and, after it, on the command line; the
block `adapter` holds the fields of LoRASwitchConfig.
"""

from __future__ import annotations

from trl import DPOConfig, DPOTrainer

from recipes.train.trl_script import train

if __name__ == "__main__":
    train(DPOTrainer, DPOConfig, preference=True)
