"""A training run on disk: its record, lock, metrics and checkpoints; and loading weights by name."""
