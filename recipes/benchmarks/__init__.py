"""What LoRA-Switch costs: decoding on a GPU, the host's share of it, kernels alone, training on a CPU."""
