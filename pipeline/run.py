"""A training run on disk: what made it, its metrics, its checkpoints, and its newest weights.

    RUN/run.json          settings, inputs and versions
    RUN/metrics.jsonl     one line a report
    RUN/checkpoints/      the newest complete checkpoints, safetensors: weights and optimizer
    RUN/model/            the newest weights, as ``from_pretrained`` takes them

A checkpoint is written under a temporary name and renamed: it is there whole, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dpar.checkpoint import Pretrained
from pipeline.errors import StageError
from pipeline.versions import command_line, made_by
from shards.build import differences
from shards.manifest import write_json

KEEP = 2


class RunFolder:
    """One run's directory."""

    def __init__(self, folder: Path, kind: str, settings: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Opens ``folder`` for a new run, or to go on with the run that these settings began there.

        Args:
            folder: made if it is not there.
            kind: what is trained: ``tokenizer``, ``entropy``, ``train``.
            settings: those that decide the result; a run can only be gone on with under the same ones.
            inputs: what it reads: paths and fingerprints.

        Raises:
            StageError: the folder holds something else, or a run with other settings or inputs.
        """
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.model = folder / "model"
        now = json.loads(json.dumps({"kind": kind, **settings, **inputs}))
        before = read_run(folder) if (folder / "run.json").is_file() else None
        if before is not None:
            then = {"kind": before["kind"], **before["settings"], **before["inputs"]}
            if then != now:
                raise StageError(
                    f"{folder} holds a run with other settings: {differences(then, now)}. Name another output"
                )
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StageError(f"{folder} holds something else; name a new or empty directory for the run")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        record = {"kind": kind, "settings": settings, "inputs": inputs}
        write_json(folder / "run.json", record | {"made_by": made_by(), "command": command_line()})

    def log(self, **values: Any) -> None:
        """Adds a line to ``metrics.jsonl``."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``; one that a kill cut short is left out."""
        return read_metrics(self.folder)

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizers: dict[str, torch.optim.Optimizer],
        publish: Pretrained[Any],
    ) -> None:
        """Writes the checkpoint of ``step``, and ``publish``'s weights to ``model/``; keeps the newest checkpoints."""
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for label, optimizer in optimizers.items():
            tensors |= {f"{label}.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
        path = self.checkpoints / f"step-{step:08d}.safetensors"
        part = path.with_name(path.name + ".part")
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part, metadata={"step": str(step)})
        publish.save_pretrained(self.model)  # first: a run that finds its last checkpoint does not come here again
        shutil.copymode(self.folder / "run.json", part)  # safetensors lets nobody else read what it writes
        os.replace(part, path)
        for old in self._complete()[:-KEEP]:
            old.unlink()

    def restore(self, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> int:
        """Loads the newest complete checkpoint into model and optimizers; gives its step, 0 if there is none."""
        for path in reversed(self._complete()):
            try:
                with safe_open(path, framework="pt") as file:
                    step = int(file.metadata()["step"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            except (SafetensorError, OSError):
                continue  # damaged since it was written; the one before it serves
            model.load_state_dict(_under("model", tensors))
            for label, optimizer in optimizers.items():
                load_optimizer_tensors(optimizer, _under(label, tensors))
            self._forget_metrics_after(step)
            return step
        self._forget_metrics_after(0)
        return 0

    def _complete(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.safetensors"))

    def _forget_metrics_after(self, step: int) -> None:
        kept = [line for line in self.metrics() if line.get("step", 0) <= step]
        part = self.folder / f"metrics.jsonl.{os.getpid()}.part"  # every process comes here
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self.folder / "metrics.jsonl")


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as named tensors, without pickles: ``INDEX.exp_avg`` and so on."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`; hyperparameters stay those of ``optimizer``."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(label: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = label + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
