"""One message for running out of memory, which says which settings to lower.

with enough_memory(settings, out):
    fit(...)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.runtime.device import world_size
from pipeline.runtime.errors import StageError
from pipeline.settings.training import OptimSettings


@contextlib.contextmanager
def enough_memory(settings: OptimSettings, out: Path) -> Iterator[None]:
    """Turn running out of memory in the block into a StageError that says which settings to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not full and "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        at_once = min(settings.micro_batch or settings.batch, settings.batch // world_size())
        ways = [f"a lower --micro-batch (now {at_once}; the result does not depend on it)"] if at_once > 1 else []
        ways += [] if settings.checkpoint_layers else ["--checkpoint-layers"]
        ways += [] if settings.fsdp or world_size() == 1 else ["--fsdp"]
        raise StageError(
            f"memory is full. Run the same command with {', or '.join(ways) or 'a smaller --model'}; it resumes from "
            f"the newest checkpoint in {out}, if there is one"
        ) from error
