"""The directory of a training run: its record, metrics, checkpoints and newest weights.

RUN/run.json          settings, inputs, steps, versions, command, and a history of starts
RUN/metrics.jsonl     one line per report
RUN/checkpoints/      the newest complete checkpoints (:mod:`pipeline.runs.checkpoints`)
RUN/model/            the newest weights, as ``from_pretrained`` takes them
RUN/model-ema/        their moving average, if the run keeps one
RUN/sheets/           samples drawn during training
RUN/.lock             the lock of the command that trains here (:mod:`pipeline.runs.run_lock`)
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
from dpar.locations import CARD, CONFIG, RUN, WEIGHTS
from dpar.patching import PatchRule
from pipeline.runs.run_lock import LOCK, lock_run
from pipeline.runtime.device import rank
from pipeline.runtime.errors import StageError
from pipeline.runtime.provenance import command_line, made_by
from shards.errors import ArtifactError
from shards.files import write_json, write_text
from shards.locks import Claims
from shards.records import differences, parse, parse_json, read_json

FORMAT_VERSIONS = {"tokenizer": 1, "entropy": 2, "train": 2}  # of run.json, by kind of run
METRICS = "metrics.jsonl"
# Temporary files of a killed save of weights: those of safetensors and of dpar.files.
LEFTOVER = re.compile(rf"\.tmp[A-Za-z0-9]{{6}}|({'|'.join(map(re.escape, (WEIGHTS, CONFIG, CARD)))})\.part")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The weights that a run's data was made with."""

    path: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The inputs of a run of ``dpar train`` that sampling reads."""

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
    steps: int | None = None  # in total; None in runs without training
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
            raise StageError(f"{folder} is not a run: it has no {RUN}. `dpar train` makes one")
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
    """The fields of every line of ``metrics.jsonl``; the others are numbers by name."""

    step: int


class RunFolder:
    """The directory of one run, locked by this process until :meth:`close`."""

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
        """Open ``folder`` for a new run, or to resume the run of these settings.

        Under ``torchrun`` the first process writes; the others must wait for it.

        Args:
            folder: created if missing.
            kind: ``tokenizer``, ``entropy`` or ``train``.
            settings: all of them.
            inputs: paths and fingerprints of what the run reads.
            steps: total steps; more than before extend the run, whatever ``settings`` say about steps and epochs.
            free: names of settings that do not affect the result and may change.
            fixed: names of settings that even ``override`` cannot change.
            override: resume with other settings and inputs, and record the changes.
            resolved: resolved settings, for the record: device, precision, processes.

        Raises:
            StageError: the folder holds something else, or a run with other settings or inputs; or another process
                trains there.
        """
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.model = folder / "model"
        self.model_ema = folder / "model-ema"
        self.sheets = folder / "sheets"
        self._lock: Claims | None = None
        is_run = (folder / RUN).is_file()
        if not is_run and folder.exists() and (not folder.is_dir() or any(not _early(p) for p in folder.iterdir())):
            raise StageError(f"{folder} holds something else; name a new or empty directory for the run")
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_run(folder)
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
                unchangeable = [name for name in changed if name in ("kind", *fixed)]
                if unchangeable or not override:
                    raise StageError(
                        f"{folder} holds a run with other settings: {differences(then, now)}. Name another output"
                        + ("" if unchangeable or not free else ", or resume with the new ones with --override")
                    )
            values = {name: [then.get(name), now.get(name)] for name in changed}
            if longer and steps != before.steps:
                values["steps"] = [before.steps, steps]
            if values:
                start["changed"] = values
            history = list(before.history)
        if self._lock is not None:
            if self._lock.has_locks:
                self._remove_leftovers()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            history.append({"step": self._newest_step()} | start)
            write_json(folder / RUN, record | start | {"history": history})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release_all()

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of killed processes, which can be as large as the weights."""
        for folder in (self.model, self.model_ema, self.checkpoints):
            for path in folder.glob("*"):
                if LEFTOVER.fullmatch(path.name) and path.is_file():
                    path.unlink()

    def log(self, **values: Any) -> None:
        """Append a line to ``metrics.jsonl``; JSON lacks numbers that are not finite, so they become null."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines of ``metrics.jsonl``."""
        return read_metrics(self.folder)

    def forget_metrics_after(self, step: int) -> None:
        """Remove the metrics of steps that will be repeated."""
        if rank() != 0:
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def _newest_step(self) -> int:
        steps = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return max((int(step) for step in steps if step.isdecimal()), default=0)


def _early(path: Path) -> bool:
    """Return whether a run creates ``path`` before run.json: another process, or one that was killed."""
    if path.name == "checkpoints":
        return path.is_dir() and not any(path.iterdir())
    return path.name == LOCK or (path.name.startswith(f"{RUN}.") and path.suffix == ".part")


def _check_version(kind: object, version: object, path: Path) -> None:
    """Raise StageError unless this version reads the format version of the run."""
    supported = FORMAT_VERSIONS.get(kind) if isinstance(kind, str) else None
    if supported is None or version == supported:  # parsing reports an unknown kind
        return
    message = f"{path} has format version {version!r}; this version reads {supported}"
    if version == 1:
        message += f". Version 1 trained another architecture: train again with `dpar {kind}`, in a new directory"
    raise StageError(message)


def _decisive(record: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    """Return the settings and inputs that must be unchanged for a run to resume."""
    settings = {name: value for name, value in record["settings"].items() if name not in free}
    return {"kind": record["kind"], **settings, **record["inputs"]}


def read_run(folder: Path) -> dict[str, Any]:
    """Return the checked ``run.json`` of a run directory as a dict; see :meth:`RunRecord.read`."""
    return dataclasses.asdict(RunRecord.read(folder))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``, without an incomplete last one.

    Returns:
        A dict per line: ``step``, an integer, and numbers by name; None if a number was not finite.

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
            if number > data.count(b"\n"):  # incomplete
                continue
            raise StageError(
                f"{error}. Remove the line, which nothing else depends on, or restore the file from a copy"
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
