"""A training run on disk: its record, lock, metrics and checkpoints, and the weights that stages name."""
