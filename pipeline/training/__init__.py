"""The training loop and its parts: learning rate, average of the weights, throughput, trackers, sample sheets."""
