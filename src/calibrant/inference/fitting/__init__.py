"""Training: the loop, its objectives, its state and its checkpoints."""
