"""Where the pieces of a stage are computed: in this process and others like it, or on the workers of a Ray cluster.

    with open_engine(settings, progress) as engine:
        model = engine.load(load_model, "weights", settings.device)

        def work(indices, task):                             # computes and writes these pieces
            for index in indices:
                parts.save(index, features=model(...))
                task.advance(1)

        engine.run(parts.pieces, work, task)                 # all pieces exist afterwards
        picture = engine.call(lambda: draw(model))           # runs where the models are

``--engine processes``: this process takes the pieces that no other process has claimed (``torchrun``, plain starts).
``--engine ray``: this process is the driver and hands missing pieces to workers (:mod:`pipeline.runtime.ray_engine`).
In both a piece is the same function of its index and the settings, so the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

from pipeline.runtime.progress import Progress
from shards.storage import Location

T = TypeVar("T")


class Count(Protocol):
    """Counts finished images; a :class:`pipeline.runtime.progress.Task` is one."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more."""

    def skip(self, n: int) -> None:
        """Count ``n`` more as done by another process."""


class Pieces(Protocol):
    """Numbered pieces of work; see :mod:`pipeline.runtime.work_sharing`."""

    @property
    def n(self) -> int:
        """Their number."""

    @property
    def output(self) -> Location:
        """Where they are written, for messages."""

    def unfinished(self) -> list[int]:
        """Return the pieces that no process has finished yet."""

    def missing(self, only: int | None = None) -> Generator[int, None, None]:
        """Claim and yield the unfinished pieces, or this one, waiting for a process that has it."""


Work = Callable[[Generator[int, None, None], Count], None]


class Engine(Protocol):
    """Computes pieces. Functions passed to it may run on another machine: they may capture only data and models."""

    def load(self, make: Callable[..., T], *arguments: object) -> T:
        """Return ``make(*arguments)``; a worker makes the same call once, instead of receiving the result."""

    def run(self, pieces: Pieces, work: Work, task: Count) -> None:
        """Compute the missing pieces, except those that ``pieces`` leaves to other processes."""

    def call(self, compute: Callable[[], T]) -> T:
        """Return the result of a function that uses models."""


class Processes:
    """Computes, in this process, the pieces that no other process has claimed."""

    def load(self, make: Callable[..., T], *arguments: object) -> T:
        """See :class:`Engine`."""
        return make(*arguments)

    def run(self, pieces: Pieces, work: Work, task: Count) -> None:
        """See :class:`Engine`."""
        work(pieces.missing(), task)

    def call(self, compute: Callable[[], T]) -> T:
        """See :class:`Engine`."""
        return compute()


class EngineOptions(Protocol):
    """The settings that choose an engine: :class:`pipeline.settings.engine.EngineSettings`."""

    @property
    def engine(self) -> Literal["processes", "ray"]:
        """Name of the engine."""

    @property
    def ray_address(self) -> str | None:
        """Address of the cluster; None is `RAY_ADDRESS`, or a cluster on this machine, started if missing."""

    @property
    def ray_workers(self) -> int | None:
        """Number of workers; None is as many as the cluster has room for."""

    @property
    def gpus_per_worker(self) -> float | None:
        """GPUs per worker, possibly a fraction; None is 1 if the cluster has GPUs, else 0."""

    @property
    def device(self) -> str:
        """Device of each worker."""


@contextmanager
def open_engine(options: EngineOptions, progress: Progress) -> Iterator[Engine]:
    """Yield the engine that the options choose.

    Raises:
        StageError: Ray is not installed, or no cluster answers.
    """
    if options.engine == "processes":
        yield Processes()
        return
    from pipeline.runtime.ray_engine import ray_engine

    with ray_engine(options, progress) as engine:
        yield engine
