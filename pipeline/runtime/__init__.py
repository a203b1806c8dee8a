"""What every stage runs on: devices, processes, progress, signals and exit statuses, errors, shared work."""
