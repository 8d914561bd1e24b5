"""A run: the training loop, its folder, checkpoints, log and signals."""
