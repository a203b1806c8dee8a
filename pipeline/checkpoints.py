"""Checkpoints of a training run, saved while training goes on: complete, or absent.

    with Checkpoints(run.folder / "checkpoints", keep=2) as checkpoints:
        begin, notes = checkpoints.restore(state, progress)          # (0, {}) where there is none
        ...
        checkpoints.save(step, state, publish=publish_weights)       # returns as soon as the tensors are copied
        checkpoints.finish()                                         # everything is on disk

    CHECKPOINTS/step-00001234/*.safetensors       each process's share of the tensors (torch.distributed.checkpoint)
    CHECKPOINTS/step-00001234/checkpoint.json     the sizes of these files, and notes; written last

All processes write into ``step-00001234.part``, which the first one renames when all are done: several machines need a
shared file system. Tensors are stored whole or in shares, whichever way the run holds them, and are read the way that
the next run does: on another number of processes, with FSDP or without. Nothing in a checkpoint is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from pipeline.device import rank, world_size
from pipeline.ema import EMA
from pipeline.errors import StageError
from pipeline.parallel import agree, wait_for_all
from pipeline.progress import Progress
from shards.manifest import write_json

SEAL = "checkpoint.json"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class TrainState:
    """What a checkpoint holds: a model, its optimizers, and the average of its weights where there is one."""

    def __init__(
        self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], average: EMA | None = None
    ) -> None:
        self.model, self.optimizers, self.average = model, tuple(optimizers), average

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies, as ``model.NAME``, ``optimizer.NAME`` and ``ema.NAME``."""
        model = get_model_state_dict(self.model)
        found = {f"model.{name}": value for name, value in model.items() if isinstance(value, Tensor)}
        found |= {f"optimizer.{name}": v for name, v in self._optimizer().items() if isinstance(v, Tensor)}
        if self.average is not None:
            found |= {f"ema.{name}": t for name, t in self.average.tensors.items()}
        return found

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Takes over ``tensors``; the optimizers' settings stay those of this run."""
        set_model_state_dict(self.model, dict(under("model.", tensors)))
        optimizer = self._optimizer() | under("optimizer.", tensors)
        set_optimizer_state_dict(self.model, self.optimizers, optimizer, options=FLAT)

    def _optimizer(self) -> dict[str, Any]:
        return dict(get_optimizer_state_dict(self.model, self.optimizers, options=FLAT))


class Checkpoints:
    """The checkpoints in one folder. All processes of a run call the same methods in the same order."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Keeps the newest ``keep`` checkpoints in ``folder``, which is there."""
        self.folder, self.keep = folder, keep
        self._saving: Future[Any] | None = None
        self._step = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Saving goes on beside the steps, so it must not share their order of messages.
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        for message in ("torch.distributed is disabled", "TypedStorage is deprecated"):  # one process; torch's own
            warnings.filterwarnings("ignore", message)

    def __enter__(self) -> Self:
        if rank() == 0:
            for part in self.folder.glob("*.part"):  # of a run that was killed
                shutil.rmtree(part)
        wait_for_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def save(
        self, step: int, state: TrainState, publish: Callable[[Path], None], notes: dict[str, Any] | None = None
    ) -> None:
        """Begins to save the state after ``step`` steps; waits only for the save before and for a copy of the tensors.

        Args:
            step: finished steps.
            state: may be trained on as soon as this returns.
            publish: called in the first process, on a thread of its own, with the folder that :func:`whole` reads.
            notes: JSON values that :meth:`restore` gives back.

        Raises:
            StageError: the save before failed.
        """
        self.finish()
        part = self.folder / f"step-{step:08d}.part"
        self._step = step
        storage = HuggingFaceStorageWriter(os.fspath(part), save_distributed=True)
        writing = async_save(
            state.tensors(), storage_writer=storage, process_group=self._group, no_dist=self._group is None
        )
        assert isinstance(writing, Future)
        if rank() == 0:  # its part of the writing ends when everybody's has
            self._saving = self._pool.submit(self._complete, writing, part, publish, {"step": step, **(notes or {})})
        else:
            self._saving = writing

    def _complete(
        self, writing: Future[Any], part: Path, publish: Callable[[Path], None], notes: dict[str, Any]
    ) -> None:
        writing.result()
        publish(part)  # first: a run that finds its last checkpoint does not come here again
        sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        write_json(part / SEAL, {"notes": notes, "files": sizes})
        final = part.with_suffix("")
        if final.exists():  # damaged, so that the run went on from an earlier one
            shutil.rmtree(final)
        os.rename(part, final)
        names = [path.name for path in self.all()]
        at = names.index(final.name)
        for name in (*names[: max(0, at + 1 - self.keep)], *names[at + 1 :]):
            shutil.rmtree(self.folder / name)

    def failed(self) -> bool:
        """Whether the save under way has failed in this process, as far as is known without waiting."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def finish(self) -> None:
        """Waits until nothing is being saved.

        Raises:
            StageError: it could not be saved, here or in another process.
        """
        if self._saving is None:
            return
        error = self._saving.exception()
        self._saving = None
        if int(agree(torch.tensor(int(error is not None)))) == 0:
            return
        if rank() == 0:
            shutil.rmtree(self.folder / f"step-{self._step:08d}.part", ignore_errors=True)
        newest = [path.name for path in self.all()]
        kept = f"the newest checkpoint is {newest[-1]}" if newest else "there is no checkpoint yet"
        raise StageError(
            f"the checkpoint of step {self._step} could not be saved in {self.folder}: {_reason(error)}; {kept}. "
            "Put that right (free some space?) and run the same command again to go on"
        ) from error

    def all(self) -> list[Path]:
        """Folders of checkpoints that were completed, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix == "")

    def restore(self, state: TrainState, progress: Progress) -> tuple[int, dict[str, Any]]:
        """Loads the newest whole checkpoint; gives its step and notes, ``(0, {})`` where there are no checkpoints.

        Raises:
            StageError: there are checkpoints, and all of them are damaged.
        """
        found = self.all()
        for path in reversed(found):
            if (fault := damage(path)) is None:
                break
            progress.say(f"the checkpoint {path} is damaged: {fault}; the one before it serves")
        else:
            if found:
                raise StageError(
                    f"all checkpoints in {self.folder} are damaged; name another output, or remove that folder to "
                    "begin anew"
                )
            return 0, {}
        wait_for_all()  # nobody removes what another process still looks at
        tensors = state.tensors()
        stored = _sizes(path)
        if not any(name.startswith("ema.") for name in stored):  # it was switched on since
            tensors = {name: t for name, t in tensors.items() if not name.startswith("ema.")}
        self._load(path, tensors)
        state.adopt(tensors)
        if state.average is not None and not any(name.startswith("ema.") for name in stored):
            state.average.begin_at(state.model)
        notes: dict[str, Any] = json.loads((path / SEAL).read_text(encoding="utf-8"))["notes"]
        return notes.pop("step"), notes

    def _load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        reader = HuggingFaceStorageReader(os.fspath(path))
        try:
            load(tensors, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            raise StageError(
                f"the checkpoint {path} does not fit this run: {_reason(error)}. Name another output"
            ) from error


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files: one is missing or cut short; None where nothing is."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        for name, size in sizes.items():
            path = checkpoint / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            with safe_open(path, framework="pt"):  # its header
                pass
    except FileNotFoundError as error:
        return f"{Path(error.filename).name if error.filename else SEAL} is missing"
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        return str(error)
    return None


def whole(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with ``prefix``, put together from all shares, without it."""
    stored = {name: item for name, item in _sizes(checkpoint).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in stored.items()}
    if tensors:
        load(tensors, storage_reader=HuggingFaceStorageReader(os.fspath(checkpoint)), no_dist=True)
    return under(prefix, tensors)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _sizes(checkpoint: Path) -> dict[str, Any]:
    return dict(HuggingFaceStorageReader(os.fspath(checkpoint)).read_metadata().state_dict_metadata)


def _reason(error: BaseException | None) -> str:
    """What befell a save, in a line; torch wraps the errors of all processes."""
    if error is None:
        return "another process says why"
    if isinstance(error, CheckpointException):
        inner = [wrapped[0] for wrapped in error.failures.values()]
        return "; ".join(dict.fromkeys(map(_reason, inner)))
    if isinstance(error, OSError):
        return (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__
