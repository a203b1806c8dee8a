"""What an evaluation compares: checkpoints of a run, each with several patch rules.

rows = [Row(candidate=c, threshold=7.0, max_length=None) for c in candidates(Path("run"), settings.checkpoint)]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dpar.flops import TRAINING_FLOPS_PER_MAC, count
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from pipeline.generation.generator import run_of
from pipeline.runs.run_folder import read_metrics, read_run
from pipeline.runtime.errors import StageError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to score: the run's newest, or another checkpoint."""

    name: str  # part of cells' names; empty for the newest
    path: str | None  # None for the newest
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the held-out table."""

    candidate: Candidate
    threshold: float | None  # nats; None: that of the training data
    max_length: int | None  # 0: no limit; None: that of the training data

    @property
    def name(self) -> str:
        """Name of its file and prefix of its cells' names; empty for the run's newest weights and own rule."""
        parts = [self.candidate.name] if self.candidate.name else []
        parts += [] if self.threshold is None else [f"threshold-{number_in_name(self.threshold)}"]
        parts += [] if self.max_length is None else [f"max-length-{self.max_length}"]
        return "-".join(parts)

    def cell_name(self, cfg_scale: float) -> str:
        """Return the name of this row's cell at a guidance scale."""
        return "-".join(filter(None, [self.name, f"cfg-{number_in_name(cfg_scale)}"]))


def candidates(run: Path, checkpoints: tuple[str, ...]) -> list[Candidate]:
    """Return the weights to score, without duplicates: the run's newest if no checkpoints are named.

    Raises:
        StageError: two checkpoints have the same name.
    """
    folder = run_of(run)
    if not checkpoints:
        steps = [] if folder is None else [line["step"] for line in read_metrics(folder) if "step" in line]
        return [Candidate(name="", path=None, step=max(steps, default=None))]
    by_path: dict[str, Candidate] = {}
    for checkpoint in checkpoints:
        inside = [] if folder is None else [folder / part / checkpoint for part in ("checkpoints", "")]
        path = str(next((place for place in (Path(checkpoint), *inside) if place.exists()), checkpoint))
        step = re.search(r"step-(\d+)", path)
        slug = re.sub(r"[^\w-]+", "_", Path(path).name).strip("_")[:40]
        by_path.setdefault(path, Candidate(name=slug, path=path, step=None if step is None else int(step[1])))
    names = [candidate.name for candidate in by_path.values()]
    for name in names:
        if names.count(name) > 1:
            raise StageError(f"--checkpoint: several are called {name}; cells of the table need different names")
    return list(by_path.values())


def training_flops(run: Path, candidate: Candidate, model: DPAR | LlamaGen) -> float | None:
    """Return the FLOPs of training up to the candidate's step (paper section 4.3); None if unknown."""
    folder = run_of(run)
    if folder is None or candidate.step is None:
        return None
    measured = [
        line["training_gflops_per_image"] for line in read_metrics(folder) if "training_gflops_per_image" in line
    ]
    record = read_run(folder)
    length = 1.0 if isinstance(model, LlamaGen) else record["inputs"].get("mean_patch_length")
    if measured:
        per_image = measured[-1] * 1e9
    elif length is not None:
        per_image = TRAINING_FLOPS_PER_MAC * count(model.config, length).linear
    else:
        return None
    return float(per_image * candidate.step * record["settings"]["batch"])


def number_in_name(value: float) -> str:
    """Format a number for a name: short, and unique for every number."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
