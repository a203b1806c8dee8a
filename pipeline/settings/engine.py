"""Settings of the commands whose work Ray can distribute: tokenize, patchify, sample and eval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.settings.fields import HARDWARE, RUN_TIME, at_least, require


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Where the pieces of a stage are computed."""

    engine: Annotated[
        Literal["processes", "ray"],
        "processes: this one and others that run the same command; ray: workers of a Ray cluster (extra ray).",
        HARDWARE,
        RUN_TIME,
    ] = "processes"
    ray_address: Annotated[
        str | None,
        "Address of the cluster; auto is that of this machine. (default: RAY_ADDRESS, else auto, else start one here)",
        HARDWARE,
        RUN_TIME,
    ] = None
    ray_workers: Annotated[
        int | None, "Workers to ask Ray for. (default: as many as its nodes have room for)", HARDWARE, RUN_TIME
    ] = None
    gpus_per_worker: Annotated[
        float | None, "A whole number, or a fraction below 1. (default: 1, or 0 without GPUs)", HARDWARE, RUN_TIME
    ] = None

    def check_engine(self) -> None:
        """Raise StageError if a value is invalid."""
        at_least(self, 1, "ray_workers")
        at_least(self, 0, "gpus_per_worker")
        gpus = self.gpus_per_worker or 0.0
        require(
            gpus < 1 or gpus == math.floor(gpus),
            f"--gpus-per-worker is {gpus:g}; it must be a whole number, or below 1 for workers that share a GPU",
        )
        if self.engine != "ray":
            for name in ("ray_address", "ray_workers", "gpus_per_worker"):
                require(getattr(self, name) is None, f"--{name.replace('_', '-')} needs --engine ray")
