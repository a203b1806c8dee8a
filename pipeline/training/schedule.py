"""The number of steps of a run, and the learning rate of each step.

rate = learning_rate(step, steps=2000, peak=1e-4, warmup=100, schedule="cosine")
"""

from __future__ import annotations

import math

from pipeline.runtime.device import world_size
from pipeline.runtime.errors import StageError
from pipeline.settings.fields import Schedule
from pipeline.settings.training import OptimSettings


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: Schedule) -> float:
    """Return the learning rate of ``step``: linear warm-up, then constant, or a cosine down to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def total_steps(settings: OptimSettings, images: int) -> int:
    """Return the number of optimizer steps of a run.

    Raises:
        StageError: the batch is not divisible by the number of processes.
    """
    if settings.batch % world_size():
        raise StageError(f"--batch {settings.batch} is not divisible by the {world_size()} processes")
    return settings.steps or max(1, round(settings.epochs * images / settings.batch))
