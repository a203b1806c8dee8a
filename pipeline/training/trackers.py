"""Dashboards for a run's metrics: TensorBoard, Weights & Biases. ``metrics.jsonl`` is always written too.

with Trackers(run.folder, tensorboard=True, wandb=False, config={...}) as trackers:
    trackers.log(100, {"loss": 7.2})
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Self

from pipeline.runtime.errors import StageError


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """Raise StageError if a requested package is not installed."""
    for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise StageError(f"--{name} needs the package {name}, which is not installed: pip install 'dpar[{name}]'")


class Trackers:
    """The requested dashboards, possibly none."""

    def __init__(self, folder: Path, *, tensorboard: bool, wandb: bool, config: dict[str, Any]) -> None:
        """Open them. TensorBoard writes to ``folder/tensorboard``; W&B gets ``config`` and resumes the folder's run."""
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if wandb:
            import wandb as client

            identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self._wandb = client.init(
                project="dpar", name=folder.name, id=identity, resume="allow", dir=str(folder), config=config
            )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the metrics of one step."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
