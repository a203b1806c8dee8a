"""Checkpoints of a training run, saved atomically while training continues.

    with Checkpoints(run.folder / "checkpoints", keep=2) as checkpoints:
        begin, notes = checkpoints.restore(state, progress)          # (0, {}) if there is none
        ...
        checkpoints.save(step, state, publish=publish_weights)       # returns when the tensors are copied
        checkpoints.finish()                                         # waits until everything is on disk

    CHECKPOINTS/step-00001234/*.safetensors       each process's share of the tensors (torch.distributed.checkpoint)
    CHECKPOINTS/step-00001234/checkpoint.json     sizes and SHA-256 of these files, and notes; written last

All processes write into ``step-00001234.part``, which the first one renames when all are done, so several machines
need a shared file system. During a save the processes hold one copy of the state in host memory in total: each copies
its own share, whether tensors are sharded (FSDP) or equal in all processes (DDP). A run can resume with another number
of processes, with or without FSDP. Nothing in a checkpoint is pickled. Each process hashes the files that it wrote, on
the saving thread, and verifies its share of the hashes when a run resumes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from pipeline.runs.ema import EMA
from pipeline.runtime.device import rank, world_size
from pipeline.runtime.distributed import all_reduce_max, barrier, gather_first
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from shards.files import file_sha256, write_json
from shards.records import parse, read_json

SEAL = "checkpoint.json"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, kw_only=True)
class FileSeal:
    """The expected size and hash of a checkpoint's file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Seal:
    """``checkpoint.json``, written last: a checkpoint with it is complete."""

    notes: dict[str, int]  # step, and further numbers of the run
    files: dict[str, FileSeal | int]  # by name; earlier versions recorded only sizes

    @classmethod
    def read(cls, checkpoint: Path) -> Seal:
        """Return the seal of a checkpoint; raise OSError or ValueError if it is missing or damaged."""
        seal = parse(cls, read_json(checkpoint / SEAL), SEAL)
        step = seal.notes.get("step")
        if checkpoint.name != step_name(step or 0):
            raise ValueError(f"{SEAL}: step is {step}, expected that of the folder's name")
        return seal


def step_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


class HashingWriter(HuggingFaceStorageWriter):
    """Writes this process's share of the tensors and hashes it on the same thread; the first process collects all."""

    def __init__(self, folder: Path) -> None:
        super().__init__(os.fspath(folder), save_distributed=True)
        self._folder = folder
        self.files: dict[str, FileSeal] = {}  # of all processes; set in the first one when the save is done

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write the files; the results carry their seals to the first process."""
        results = super().write_data(plan, planner).wait()
        names = [result.storage_data.relative_path for result in results]
        seals = {name: _seal_file(self._folder / name) for name in set(names)}
        sealed: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        sealed.set_result(
            [
                dataclasses.replace(result, storage_data=(name, seals[name]))
                for result, name in zip(results, names, strict=True)
            ]
        )
        return sealed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect the seals; called in the first process. The files themselves list their tensors."""
        sealed = dict(result.storage_data for share in results for result in share)
        self.files = {name: sealed[name] for name in sorted(sealed)}


def _seal_file(path: Path) -> FileSeal:
    return FileSeal(bytes=path.stat().st_size, sha256=file_sha256(path))


class TrainState:
    """The content of a checkpoint: a model, its optimizers, and the average of its weights, if any."""

    def __init__(
        self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], average: EMA | None = None
    ) -> None:
        self.model, self.optimizers, self.average = model, tuple(optimizers), average

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, not copies, as ``model.NAME``, ``optimizer.NAME`` and ``ema.NAME``."""
        model = get_model_state_dict(self.model)
        tensors = {f"model.{name}": value for name, value in model.items() if isinstance(value, Tensor)}
        tensors |= {f"optimizer.{name}": v for name, v in self._optimizer().items() if isinstance(v, Tensor)}
        if self.average is not None:
            tensors |= {f"ema.{name}": t for name, t in self.average.tensors.items()}
        return tensors

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Load ``tensors``; the optimizers keep the settings of this run."""
        set_model_state_dict(self.model, dict(strip_prefix("model.", tensors)))
        optimizer = self._optimizer() | strip_prefix("optimizer.", tensors)
        set_optimizer_state_dict(self.model, self.optimizers, optimizer, options=FLAT)

    def _optimizer(self) -> dict[str, Any]:
        return dict(get_optimizer_state_dict(self.model, self.optimizers, options=FLAT))


def own_share(tensors: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Return the tensors that process ``rank`` copies and writes: its parts of DTensors, and a share of the others.

    The others are equal in all processes. Shares have about as many bytes each and add up to one copy of the state.
    """
    equal = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
    shares, sizes = [set[str]() for _ in range(world_size)], [0] * world_size
    for name in sorted(equal, key=lambda name: -tensors[name].nbytes):  # a stable sort: the same in all processes
        smallest = sizes.index(min(sizes))
        shares[smallest].add(name)
        sizes[smallest] += tensors[name].nbytes
    others = set(equal) - shares[rank]
    return {name: tensor for name, tensor in tensors.items() if name not in others}


class Checkpoints:
    """The checkpoints in one folder. All processes of a run call the same methods in the same order."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Keep the newest ``keep`` checkpoints in ``folder``, which exists."""
        self.folder, self.keep = folder, keep
        self._saving: Future[Any] | None = None
        self._step = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Saving overlaps with training steps, so it needs a separate process group.
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        for message in ("torch.distributed is disabled", "TypedStorage is deprecated"):  # raised inside torch
            warnings.filterwarnings("ignore", message)

    def __enter__(self) -> Self:
        if rank() == 0:
            for part in self.folder.glob("*.part"):  # of a run that was killed
                shutil.rmtree(part)
        barrier()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def save(
        self, step: int, state: TrainState, publish: Callable[[Path], None], notes: dict[str, int] | None = None
    ) -> None:
        """Start to save the state after ``step`` steps; waits only for the previous save and a copy of the tensors.

        Args:
            step: finished steps.
            state: training may change it when this returns.
            publish: called in the first process, on another thread, with the folder, for :func:`load_full_tensors`.
            notes: numbers that :meth:`restore` returns.

        Raises:
            StageError: the previous save failed.
        """
        self.finish()
        part = self.folder / f"{step_name(step)}.part"
        self._step = step
        storage = HashingWriter(part)
        tensors = own_share(state.tensors(), rank(), world_size())
        writing = async_save(tensors, storage_writer=storage, process_group=self._group, no_dist=self._group is None)
        assert isinstance(writing, Future)
        if rank() == 0:  # its write ends when those of all processes have
            self._saving = self._pool.submit(
                self._complete, writing, storage, part, publish, {"step": step, **(notes or {})}
            )
        else:
            self._saving = writing

    def _complete(
        self,
        writing: Future[Any],
        storage: HashingWriter,
        part: Path,
        publish: Callable[[Path], None],
        notes: dict[str, int],
    ) -> None:
        writing.result()
        publish(part)  # first: a run that resumes at its last step does not save again
        write_json(part / SEAL, dataclasses.asdict(Seal(notes=notes, files={**storage.files})))
        final = part.with_suffix("")
        if final.exists():  # damaged: the run resumed from an earlier one
            shutil.rmtree(final)
        os.rename(part, final)
        names = [path.name for path in self.all()]
        at = names.index(final.name)
        for name in (*names[: max(0, at + 1 - self.keep)], *names[at + 1 :]):
            shutil.rmtree(self.folder / name)

    def failed(self) -> bool:
        """Return whether the current save is known to have failed in this process; does not wait."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def finish(self) -> None:
        """Wait until the current save is complete.

        Raises:
            StageError: it failed, here or in another process.
        """
        if self._saving is None:
            return
        error = self._saving.exception()
        self._saving = None
        if int(all_reduce_max(torch.tensor(int(error is not None)))) == 0:
            return
        if rank() == 0:
            shutil.rmtree(self.folder / f"{step_name(self._step)}.part", ignore_errors=True)
        newest = [path.name for path in self.all()]
        kept = f"the newest checkpoint is {newest[-1]}" if newest else "there is no checkpoint yet"
        raise StageError(
            f"the checkpoint of step {self._step} could not be saved in {self.folder}: {_reason(error)}; {kept}. "
            "Correct that (free some space?) and run the same command again to resume"
        ) from error

    def all(self) -> list[Path]:
        """Return the folders of the complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix == "")

    def restore(self, state: TrainState, progress: Progress) -> tuple[int, dict[str, int]]:
        """Load the newest undamaged checkpoint; return its step and notes, ``(0, {})`` if there are no checkpoints.

        Raises:
            StageError: all checkpoints are damaged.
        """
        checkpoints = self.all()
        for path in reversed(checkpoints):
            if (fault := gather_first(damage(path, share=(rank(), world_size())))) is None:
                break
            progress.say(f"the checkpoint {path} is damaged: {fault}; using the one before it")
        else:
            if checkpoints:
                raise StageError(
                    f"all checkpoints in {self.folder} are damaged; name another output, or remove that folder to "
                    "start again"
                )
            return 0, {}
        tensors = state.tensors()
        stored = _sizes(path)
        if not any(name.startswith("ema.") for name in stored):  # averaging starts now
            tensors = {name: t for name, t in tensors.items() if not name.startswith("ema.")}
        self._load(path, tensors)
        state.adopt(tensors)
        if state.average is not None and not any(name.startswith("ema.") for name in stored):
            state.average.begin_at(state.model)
        notes = dict(Seal.read(path).notes)
        return notes.pop("step"), notes

    def _load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        reader = HuggingFaceStorageReader(os.fspath(path))
        try:
            load(tensors, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            raise StageError(
                f"the checkpoint {path} does not fit this run: {_reason(error)}. Name another output"
            ) from error


def damage(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return what is wrong with a checkpoint's files (missing, truncated or changed); None if nothing is.

    Args:
        checkpoint: its folder.
        share: check the content of every ``share[1]``-th file, starting at ``share[0]``; the sizes of all.
    """
    first, every = share
    try:
        for number, (name, sealed) in enumerate(Seal.read(checkpoint).files.items()):
            path = checkpoint / name
            size = path.stat().st_size
            expected = sealed if isinstance(sealed, int) else sealed.bytes
            if size != expected:
                return f"{name} has {size} bytes, not {expected}"
            with safe_open(path, framework="pt"):  # its header
                pass
            if number % every == first and isinstance(sealed, FileSeal) and file_sha256(path) != sealed.sha256:
                return f"{name} has changed since it was written: its SHA-256 differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name if error.filename else SEAL} is missing"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return None


def load_full_tensors(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Return the full tensors of a checkpoint whose names start with ``prefix``, by the rest of the name.

    Raises:
        StageError: the checkpoint is damaged.
    """
    if (checkpoint / SEAL).exists() and (fault := damage(checkpoint)) is not None:
        raise StageError(f"the checkpoint {checkpoint} is damaged: {fault}. Name another one")
    stored = {name: item for name, item in _sizes(checkpoint).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in stored.items()}
    if tensors:
        load(tensors, storage_reader=HuggingFaceStorageReader(os.fspath(checkpoint)), no_dist=True)
    return strip_prefix(prefix, tensors)


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _sizes(checkpoint: Path) -> dict[str, Any]:
    return dict(HuggingFaceStorageReader(os.fspath(checkpoint)).read_metadata().state_dict_metadata)


def _reason(error: BaseException | None) -> str:
    """Return in one line why a save failed; torch wraps the errors of all processes."""
    if error is None:
        return "another process reports the reason"
    if isinstance(error, CheckpointException):
        inner = [wrapped[0] for wrapped in error.failures.values()]
        return "; ".join(dict.fromkeys(map(_reason, inner)))
    if isinstance(error, OSError):
        return (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__
