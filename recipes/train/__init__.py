"""Training: the quickstart, and TRL's SFT and DPO with a LoRA-Switch adapter."""
