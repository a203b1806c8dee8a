"""A training run on disk: what made it, its metrics, its checkpoints, and its newest weights.

RUN/run.json          settings, inputs, steps, versions, command; and a history of its starts
RUN/metrics.jsonl     one line a report
RUN/checkpoints/      the newest complete checkpoints (:mod:`pipeline.runs.checkpoints`)
RUN/model/            the newest weights, as ``from_pretrained`` takes them
RUN/model-ema/        likewise their moving average, where there is one
RUN/sheets/           samples drawn while it trained
RUN/.lock             held by the command that trains here (:mod:`pipeline.runs.run_lock`)
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from dpar.errors import ModelError
from dpar.patching import PatchRule
from dpar.pretrained import CARD, CONFIG, WEIGHTS
from pipeline.runs.run_lock import LOCK, RunLock
from pipeline.runtime.device import rank
from pipeline.runtime.errors import StageError
from pipeline.runtime.provenance import command_line, made_by
from shards.errors import ArtifactError
from shards.files import write_json, write_text
from shards.records import differences, parse, parse_json, read_json

FORMAT_VERSIONS = {"tokenizer": 1, "entropy": 2, "train": 2}  # of run.json, by kind of run
RUN = "run.json"
METRICS = "metrics.jsonl"
# What writing weights leaves behind when it is killed: safetensors' temporary file, and our own.
LEFTOVER = re.compile(rf"\.tmp[A-Za-z0-9]{{6}}|({'|'.join(map(re.escape, (WEIGHTS, CONFIG, CARD)))})\.part")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Weights that a run's data was made with."""

    path: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What sampling from a run of ``dpar train`` reads of its inputs."""

    tokenizer: Origin
    patch_rule: PatchRule | None
    class_names: tuple[str, ...]
    entropy_model: Origin | None = None


@dataclass(frozen=True, kw_only=True)
class BatchSetting:
    """The setting of a run of ``dpar train`` that other stages read."""

    batch: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """``run.json``."""

    kind: Literal["tokenizer", "entropy", "train"]
    format_version: int = 1
    settings: dict[str, Any]
    inputs: dict[str, Any]
    steps: int | None = None  # to train in all; None in runs that train nothing
    resolved: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Return the record of a run directory.

        Raises:
            StageError: it is not a run directory, or the record is damaged.
        """
        path = folder / RUN
        if not path.is_file():
            raise StageError(f"{folder} is no run: it has no {RUN}. `dpar train` makes one")
        try:
            values = read_json(path)
            if isinstance(values, dict):
                _check_version(values.get("kind"), values.get("format_version", 1), path)
            record = parse(cls, values, str(path), ignore_unknown=True)
            if record.kind == "train":
                parse(BatchSetting, record.settings, str(path), at="settings", ignore_unknown=True)
                parse(Lineage, record.inputs, str(path), at="inputs", ignore_unknown=True)
        except (ArtifactError, ModelError) as error:
            raise StageError(f"{error}. Restore {path} from a copy, or name another run") from error
        return record


@dataclass(frozen=True, kw_only=True)
class MetricsLine:
    """What every line of ``metrics.jsonl`` holds; the rest are numbers by name."""

    step: int


class RunFolder:
    """One run's directory, which this process has to itself until :meth:`close`."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        *,
        steps: int | None = None,
        free: Collection[str] = (),
        fixed: Collection[str] = (),
        override: bool = False,
        resolved: dict[str, Any] | None = None,
    ) -> None:
        """Opens ``folder`` for a new run, or to go on with the run that these settings began there.

        Under ``torchrun`` the first process writes; the others come here when it has.

        Args:
            folder: made if it is not there.
            kind: what is trained: ``tokenizer``, ``entropy``, ``train``.
            settings: all of them.
            inputs: what it reads: paths and fingerprints.
            steps: to train in all; more than before continue the run, whatever ``settings`` say of steps and epochs.
            free: names of settings that do not decide the result, so that they may change.
            fixed: names of settings that ``override`` does not change either.
            override: go on under other settings and inputs, and record what changed.
            resolved: what settings came to here, for the record: device, precision, processes.

        Raises:
            StageError: the folder holds something else, or a run with other settings or inputs; or another process
                trains there.
        """
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.model = folder / "model"
        self.model_ema = folder / "model-ema"
        self.sheets = folder / "sheets"
        self._lock: RunLock | None = None
        is_run = (folder / RUN).is_file()
        if not is_run and folder.exists() and (not folder.is_dir() or any(not _first(p) for p in folder.iterdir())):
            raise StageError(f"{folder} holds something else; name a new or empty directory for the run")
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(folder)
        try:
            self._open(kind, settings, inputs, steps, free, fixed, override, resolved or {})
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        kind: str,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        steps: int | None,
        free: Collection[str],
        fixed: Collection[str],
        override: bool,
        resolved: dict[str, Any],
    ) -> None:
        folder = self.folder
        record = json.loads(json.dumps({"kind": kind, "settings": settings, "inputs": inputs, "steps": steps}))
        record = {"format_version": FORMAT_VERSIONS[kind], **record}
        start: dict[str, Any] = {"command": command_line(), "made_by": made_by(), "resolved": resolved}
        history: list[dict[str, Any]] = []
        if (folder / RUN).is_file():
            before = RunRecord.read(folder)
            longer = steps is not None and before.steps is not None and steps >= before.steps
            ignored = {*free, "steps", "epochs"} if longer else {*free}
            then, now = (_decisive(run, ignored) for run in (dataclasses.asdict(before), record))
            changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
            if changed:
                held = [name for name in changed if name in ("kind", *fixed)]
                if held or not override:
                    raise StageError(
                        f"{folder} holds a run with other settings: {differences(then, now)}. Name another output"
                        + ("" if held or not free else ", or go on under the new ones with --override")
                    )
            values = {name: [then.get(name), now.get(name)] for name in changed}
            if longer and steps != before.steps:
                values["steps"] = [before.steps, steps]
            if values:
                start["changed"] = values
            history = list(before.history)
        if self._lock is not None:
            if self._lock.held:
                self._remove_leftovers()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            history.append({"step": self._newest_step()} | start)
            write_json(folder / RUN, record | start | {"history": history})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other commands train here."""
        if self._lock is not None:
            self._lock.release()

    def _remove_leftovers(self) -> None:
        """Remove temporary files of killed processes, each as large as the weights."""
        for folder in (self.model, self.model_ema, self.checkpoints):
            for path in folder.glob("*"):
                if LEFTOVER.fullmatch(path.name) and path.is_file():
                    path.unlink()

    def log(self, **values: Any) -> None:
        """Add a line to ``metrics.jsonl``; a number that is not finite, which JSON lacks, is null."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``; one that a kill cut short is left out."""
        return read_metrics(self.folder)

    def forget_metrics_after(self, step: int) -> None:
        """Takes back what was said of steps that will be done again."""
        if rank() != 0:
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def _newest_step(self) -> int:
        steps = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return max((int(step) for step in steps if step.isdecimal()), default=0)


def _first(path: Path) -> bool:
    """Whether it is what a run makes ahead of run.json, in another process or before a kill."""
    if path.name == "checkpoints":
        return path.is_dir() and not any(path.iterdir())
    return path.name == LOCK or (path.name.startswith(f"{RUN}.") and path.suffix == ".part")


def _check_version(kind: object, version: object, path: Path) -> None:
    """Raises StageError unless a run of this ``kind`` has the format version that is read here."""
    reads = FORMAT_VERSIONS.get(kind) if isinstance(kind, str) else None
    if reads is None or version == reads:  # an unknown kind is found when the record is parsed
        return
    what = f"{path} has format version {version!r}; this version reads {reads}"
    if version == 1:
        what += f". Version 1 trained another architecture: train again with `dpar {kind}`, in a new directory"
    raise StageError(what)


def _decisive(record: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    """What must be as it was for a run to be gone on with."""
    settings = {name: value for name, value in record["settings"].items() if name not in free}
    return {"kind": record["kind"], **settings, **record["inputs"]}


def read_run(folder: Path) -> dict[str, Any]:
    """Return the checked ``run.json`` of a run directory as a dict; see :meth:`RunRecord.read`."""
    return dataclasses.asdict(RunRecord.read(folder))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``, without a last one that a kill cut short.

    Returns:
        A dict per line: ``step``, a whole number, and by name numbers, or None where a number was not finite.

    Raises:
        StageError: a line is not of this form.
    """
    path = folder / METRICS
    data = path.read_bytes() if path.is_file() else b""
    lines = []
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            if line:
                lines.append(_parse_metrics(line, f"line {number} of {path}"))
        except ArtifactError as error:
            if number > data.count(b"\n"):  # without its end
                continue
            raise StageError(
                f"{error}. Remove the line, on which nothing depends, or restore the file from a copy"
            ) from error
    return lines


def _parse_metrics(line: bytes, where: str) -> dict[str, Any]:
    values = parse_json(line, where)
    parse(MetricsLine, values, where, ignore_unknown=True)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = None
        elif value is not None and type(value) not in (int, float):
            raise ArtifactError(f"{where}: field {name} is {value!r}, expected a finite number or null")
    return dict(values)
