"""The runtime of all stages: devices, processes, progress, signals and exit statuses, errors, work sharing."""
