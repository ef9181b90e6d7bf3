"""What is decided, and where the decision lives: the router, one decision per token, the frame of one forward, statistics."""
