"""The study's cells: each is a `dpar` command with its own folder, run once and resumed by running the study again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.rows import (
    CHOICES,
    DPAR,
    LENGTHS,
    LLAMAGEN,
    MAIN,
    STATIC,
    Row,
    Size,
    equal_flops,
    limits,
    rule_options,
)
from dpar.locations import RUN
from dpar.patching import PatchRule
from pipeline.runs.run_folder import METRICS, read_metrics
from pipeline.runtime.work_sharing import claim_folder
from shards.files import write_json
from shards.manifest import Manifest

LR, WARMUP = 8e-4, 100
TIMES = 5  # checkpoints and validations of a run


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One command's result: a run, its scores, or its probe."""

    kind: str  # runs, scores, probes
    row: Row
    seed: int
    length: float | None = None  # mean patch length at inference; None is the training data's

    @property
    def name(self) -> str:
        at = "" if self.length is None else f"-at-{self.length:g}"
        return f"{self.kind}/{self.row.name}{at}-seed-{self.seed}"


class Study:
    """A study in its folder."""

    def __init__(
        self, work: Path, codes_train: Path, codes_validation: Path, entropy_model: str, size: Size, seeds: int
    ) -> None:
        """Open or create the study of these data at this size in ``work``.

        Raises:
            StageError: it holds another study.
        """
        self.work, self.size, self.seeds = work, size, seeds
        self.codes = {"train": codes_train, "validation": codes_validation}
        self.entropy_model = entropy_model
        manifests = {part: Manifest.read(folder) for part, folder in self.codes.items()}
        identity = vars(size) | {part: manifest.fingerprint() for part, manifest in manifests.items()}
        claim_folder(work, "study.json", identity | {"entropy_model": entropy_model}, "holds another study")
        manifest = manifests["validation"]
        self.samples = size.samples or manifest.rows
        sizes = {"grid_height": manifest.grid[0], "grid_width": manifest.grid[1]}
        self.shape = sizes | {"codebook_size": manifest.codebook_size, "classes": len(manifest.class_names)}

    def rows(self, part: str) -> tuple[Row, ...]:
        """Return the rows of a part, including the published model for comparison."""
        if part == "choices":
            return (DPAR, *CHOICES)
        if part == "thresholds":
            return (DPAR, STATIC)
        if part == "limits":
            return (DPAR, *limits())
        if part == "equal-flops":
            return (LLAMAGEN, DPAR, equal_flops(self.size, self.shape))
        return MAIN

    def cells(self, part: str) -> list[Cell]:
        """Return the cells of a part in the order in which they run: the first seed of all rows before the second."""
        pairs = [(row, seed) for seed in range(self.seeds) for row in self.rows(part) if seed < (row.seeds or seed + 1)]
        cells = [Cell(kind="runs", row=row, seed=seed) for row, seed in pairs]
        if part == "probe":
            cells += [Cell(kind="probes", row=row, seed=seed) for row, seed in pairs]
        elif part == "thresholds":
            cells += [Cell(kind="scores", row=row, seed=seed, length=x) for row, seed in pairs for x in LENGTHS]
        elif part != "speed":
            cells += [Cell(kind="scores", row=row, seed=seed) for row, seed in pairs]
        return cells

    def done(self, cell: Cell) -> bool:
        """Return whether the cell's command has finished."""
        return self.record(cell.name).is_file()

    def record(self, name: str) -> Path:
        """Return the path of the file that records a finished command and its duration."""
        return self.work / "done" / f"{name}.json"

    def state(self, cell: Cell) -> str:
        """Return "done", "missing", or "begun" with a run's step."""
        if self.done(cell):
            return "done"
        folder = self.work / cell.name
        if not folder.exists():
            return "missing"
        steps = [line["step"] for line in read_metrics(folder)] if cell.kind == "runs" else []
        return f"begun, step {max(steps)} of {self.size.steps}" if steps else "begun"

    def run(self, cell: Cell) -> None:
        """Run the cell's command unless it is done."""
        if self.done(cell):
            return
        row, out = cell.row, self.work / cell.name
        run = self.work / "runs" / f"{row.name}-seed-{cell.seed}"
        train, validation = (self.patches(row.rule, part) for part in self.codes)
        compute = ("--precision", self.size.precision)
        if cell.kind == "runs":
            self.dpar(cell.name, "train", train, out, *self._recipe(row, cell.seed), "--validation", validation)
            return
        if cell.kind == "probes":
            self.dpar(cell.name, "probe", run, out, "--train", train, "--test", validation, *compute)
            return
        options: tuple[object, ...] = ()
        if cell.length is not None and row.rule == "static":
            run = self._run_at_length(run, cell.length)
        elif cell.length is not None:
            options = ("--threshold", repr(self.rule(f"length-{cell.length:g}").threshold))
        if row == LLAMAGEN and cell.seed == 0:
            options += ("--floor", self.codes["train"])
        scored: tuple[object, ...]
        scored = ("--samples", self.samples, "--cfg-scale", self.size.guidance, "--labels", "reference")
        scored += ("--reference", self.codes["validation"], "--features", "efficientnet", "--held-out", validation)
        self.dpar(cell.name, "eval", run, out, *scored, "--seed", cell.seed, *compute, *options)

    def _recipe(self, row: Row, seed: int) -> list[object]:
        size, every = self.size, max(1, self.size.steps // TIMES)
        overrides = {"width": size.width, "heads": size.heads, **dict(row.overrides)}
        options: list[object] = ["--model", row.preset, "--steps", size.steps, "--batch", size.batch, "--seed", seed]
        options += [part for name, value in overrides.items() for part in ("--set", f"{name}={value}")]
        options += ["--lr", LR, "--warmup", min(WARMUP, size.steps // 8), "--schedule", "cosine", "--sheet", 0]
        options += ["--eval-every", every, "--checkpoint-every", every, "--log-every", every, "--keep", 1]
        return [*options, "--precision", size.precision]

    def patches(self, rule: str, part: str) -> Path:
        """Return the patches of training or held-out images by a rule.

        Missing ones are computed from the entropies of DPAR's patches, without a model.
        """
        name = f"patches/{rule}-{part}"
        folder = self.work / name
        if self.record(name).is_file():
            return folder
        options: tuple[object, ...]
        source = self.codes[part] if rule == "dpar" else self.patches("dpar", part)
        if part == "validation":
            options = _as_options(self.rule(rule))
        elif rule == "dpar":
            options = ("--target-length", self.size.length)
        else:
            base = Manifest.read(self.patches("dpar", "train"))
            threshold = PatchRule.from_dict(base.settings).threshold
            assert threshold is not None  # it is an entropy rule
            options = rule_options(rule, threshold, base.statistics["mean_length"])
        if rule == "dpar":
            options += ("--entropy-model", self.entropy_model, "--precision", self.size.precision)
        self.dpar(name, "patchify", source, folder, *options)
        return folder

    def rule(self, name: str) -> PatchRule:
        """Return the patch rule of the training images, with its threshold."""
        return PatchRule.from_dict(Manifest.read(self.patches(name, "train")).settings)

    def _run_at_length(self, run: Path, length: float) -> Path:
        """Copy a static run with another length in its record, because `dpar eval` has no option for it."""
        copy = self.work / "runs" / f"{run.name}-at-{length:g}"
        if (copy / RUN).is_file():
            return copy
        shutil.copytree(run / "model", copy / "model", dirs_exist_ok=True)
        shutil.copyfile(run / METRICS, copy / METRICS)
        record: dict[str, Any] = json.loads((run / RUN).read_text(encoding="utf-8"))
        record["inputs"] |= {"patch_rule": PatchRule.static(length).to_dict(), "mean_patch_length": length}
        write_json(copy / RUN, record)
        return copy

    def dpar(self, name: str, *arguments: object) -> None:
        """Run a `dpar` command in a new process and record its end; raise SystemExit if it fails."""
        command = [sys.executable, "-m", "dpar", *map(str, arguments)]
        print(f"{time.strftime('%H:%M:%S')} {name}: dpar {shlex.join(command[3:])}", flush=True)
        began = time.monotonic()
        status = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).returncode
        if status:
            raise SystemExit(f"{name} failed with status {status}; run the study again to resume")
        path = self.record(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"command": command[3:], "seconds": time.monotonic() - began})


def _as_options(rule: PatchRule) -> tuple[object, ...]:
    """Return the options of `dpar patchify` for a rule."""
    if rule.static_length is not None:
        return ("--strategy", "static", "--static-length", repr(rule.static_length))
    reset = "--row-reset" if rule.row_reset else "--no-row-reset"
    return ("--threshold", repr(rule.threshold), "--max-length", rule.max_length or 0, reset)
