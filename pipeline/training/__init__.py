"""The training loop and its parts: learning rate, micro-batches, throughput, trackers, sample sheets."""
