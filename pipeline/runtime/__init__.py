"""The runtime of every stage: devices, processes, progress, signals and exit statuses, errors, shared work."""
