"""Does one routing decision per token learn as well as one per layer? README.md in this folder has the answer."""
