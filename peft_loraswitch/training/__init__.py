"""What training adds: the router's losses, how they join an objective, gradient checkpointing."""
