"""The learning rate of a step, for every stage that trains.

rate = learning_rate(step, steps=2000, peak=1e-4, warmup=100, schedule="cosine")
"""

from __future__ import annotations

import math

from pipeline.settings.fields import Schedule


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: Schedule) -> float:
    """The rate of step ``step``: a linear warm-up, then constant, or a cosine down to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
