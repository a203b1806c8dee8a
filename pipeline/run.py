"""A training run on disk: what made it, its metrics, its checkpoints, and its newest weights.

RUN/run.json          settings, inputs, versions, command; and a history of its starts
RUN/metrics.jsonl     one line a report
RUN/checkpoints/      the newest complete checkpoints (:mod:`pipeline.checkpoints`)
RUN/model/            the newest weights, as ``from_pretrained`` takes them
RUN/model-ema/        likewise their moving average, where there is one
RUN/sheets/           samples drawn while it trained
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.device import rank
from pipeline.errors import StageError
from pipeline.versions import command_line, made_by
from shards.build import differences
from shards.manifest import write_json

FORMAT_VERSIONS = {"tokenizer": 1, "entropy": 2, "train": 2}  # of run.json, by kind of run


class RunFolder:
    """One run's directory."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        *,
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
            free: names of settings that do not decide the result, so that they may change.
            fixed: names of settings that ``override`` does not change either.
            override: go on under other settings and inputs, and record what changed.
            resolved: what settings came to here, for the record: device, precision, processes.

        Raises:
            StageError: the folder holds something else, or a run with other settings or inputs.
        """
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.model = folder / "model"
        self.model_ema = folder / "model-ema"
        self.sheets = folder / "sheets"
        record: dict[str, Any] = json.loads(json.dumps({"kind": kind, "settings": settings, "inputs": inputs}))
        record = {"format_version": FORMAT_VERSIONS[kind], **record}
        start: dict[str, Any] = {"command": command_line(), "made_by": made_by(), "resolved": resolved or {}}
        history = []
        if (folder / "run.json").is_file():
            before = read_run(folder)
            then, now = (_decisive(run, free) for run in (before, record))
            if then != now:
                changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
                held = [name for name in changed if name in ("kind", *fixed)]
                if held or not override:
                    raise StageError(
                        f"{folder} holds a run with other settings: {differences(then, now)}. Name another output"
                        + ("" if held or not free else ", or go on under the new ones with --override")
                    )
                start["changed"] = {name: [then.get(name), now.get(name)] for name in changed}
            history = before.get("history", [])
        elif folder.exists() and (not folder.is_dir() or any(not _first(path) for path in folder.iterdir())):
            raise StageError(f"{folder} holds something else; name a new or empty directory for the run")
        if rank() == 0:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            history.append({"step": self._newest_step()} | start)
            write_json(folder / "run.json", record | start | {"history": history})

    def log(self, **values: Any) -> None:
        """Adds a line to ``metrics.jsonl``."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``; one that a kill cut short is left out."""
        return read_metrics(self.folder)

    def forget_metrics_after(self, step: int) -> None:
        """Takes back what was said of steps that will be done again."""
        if rank() != 0:
            return
        kept = [line for line in self.metrics() if line.get("step", 0) <= step]
        part = self.folder / "metrics.jsonl.part"
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self.folder / "metrics.jsonl")

    def _newest_step(self) -> int:
        steps = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return max((int(step) for step in steps if step.isdecimal()), default=0)


def _first(path: Path) -> bool:
    """Whether it is what a run makes ahead of run.json, in another process or before a kill."""
    if path.name == "checkpoints":
        return path.is_dir() and not any(path.iterdir())
    return path.name.startswith("run.json.") and path.suffix == ".part"


def _decisive(record: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    """What must be as it was for a run to be gone on with."""
    settings = {name: value for name, value in record["settings"].items() if name not in free}
    return {"kind": record["kind"], **settings, **record["inputs"]}


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run directory.

    Raises:
        StageError: it is no run directory, or the file is damaged.
    """
    try:
        record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StageError(f"{folder} is no run: it has no run.json. `dpar train` makes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StageError(f"{folder / 'run.json'} is damaged: {error}") from error
    kind, version = record.get("kind"), record.get("format_version", 1)
    if version != FORMAT_VERSIONS.get(str(kind), version):
        raise StageError(
            f"{folder / 'run.json'} has format version {version}; this version reads {FORMAT_VERSIONS[str(kind)]}. "
            f"Version 1 trained another architecture: train again with `dpar {kind}`, in a new directory"
        )
    return record


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; one that a kill cut short is left out."""
    path = folder / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
