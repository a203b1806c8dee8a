"""A warning about thresholds above the highest possible entropy of a codebook.

warn_if_out_of_reach(7.8, codebook_size=1024, progress=progress)
"""

from __future__ import annotations

import math

from pipeline.runtime.progress import Progress


def warn_if_out_of_reach(threshold: float | None, codebook_size: int, progress: Progress) -> None:
    """Warn if ``threshold``, in nats, is above ln V, the entropy of ``codebook_size`` equally likely codes."""
    highest = math.log(codebook_size)
    if threshold is not None and threshold > highest:
        progress.say(
            f"Warning: the threshold of {threshold:g} nats is above ln V = {highest:.2f}, the highest entropy of "
            f"{codebook_size} codes, so no token starts a patch by its entropy. The published 7.8 is 0.80·ln V of "
            "16384 codes; `dpar patchify --target-length 1.81` finds a threshold for any codebook"
        )
