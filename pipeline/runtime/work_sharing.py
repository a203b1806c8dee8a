"""Share work in numbered pieces among any number of processes; a kill at any moment loses no finished piece.

    parts = Parts(out / "features", n=40)
    for index in parts.missing():                            # concurrent processes get different pieces
        parts.save(index, features=extract(...))
    everything = [parts.load(i) for i in range(40)]          # all pieces exist, in every process

Pieces are claimed with :class:`shards.locks.Claims`, by processes of one ``torchrun`` or started by hand. On a file
system without locks pieces may be computed twice, with the same result: a piece is a function of its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.device import rank, world_size
from pipeline.runtime.errors import StageError
from shards.files import atomic_path
from shards.locks import Claims
from shards.records import differences
from shards.storage import Location
from shards.writer import ArtifactBuild

LOCKS = ".locks"


def claim_parts(
    output: Path, n: int, is_done: Callable[[int], bool], only: int | None = None
) -> Generator[int, None, None]:
    """Yield the pieces that this process has to compute; when the iterator ends, all ``n`` are done.

    Args:
        output: the file or folder of the pieces; their locks are in ``.locks`` next to it.
        n: number of pieces.
        is_done: returns whether a piece is done, by any process; must be true at the end of the loop's body.
        only: yield at most this piece.
    """
    claims = Claims(output.parent / LOCKS / output.name)
    first = rank() * n // world_size()
    busy = []
    for index in (*range(first, n), *range(first)) if only is None else (only,):
        if not is_done(index):
            claims.folder.mkdir(parents=True, exist_ok=True)
            with claims.claimed(index) as claimed:
                if not claimed:
                    busy.append(index)
                elif not is_done(index):
                    yield index
    for index in busy:  # another process works on it, or died with it
        with claims.claimed(index, wait=True):
            if not is_done(index):
                yield index


@dataclass(frozen=True)
class Pieces:
    """Numbered pieces of work, as :mod:`pipeline.runtime.engine` hands them out; arguments of :func:`claim_parts`."""

    output: Path
    n: int
    is_done: Callable[[int], bool]

    def unfinished(self) -> list[int]:
        """Return the pieces that are not done."""
        return [index for index in range(self.n) if not self.is_done(index)]

    def missing(self, only: int | None = None) -> Generator[int, None, None]:
        """See :func:`claim_parts`."""
        return claim_parts(self.output, self.n, self.is_done, only)


@dataclass(frozen=True)
class Shards:
    """The shards of an artifact as pieces. Shards claimed by another process are left to it."""

    build: ArtifactBuild

    @property
    def output(self) -> Location:
        """The artifact's directory."""
        return self.build.folder

    @property
    def n(self) -> int:
        """Their number."""
        return self.build.n_shards

    def unfinished(self) -> list[int]:
        """See :meth:`shards.writer.ArtifactBuild.unfinished`."""
        return self.build.unfinished()

    def missing(self, only: int | None = None) -> Generator[int, None, None]:
        """See :meth:`shards.writer.ArtifactBuild.todo`."""
        return self.build.todo(rank(), world_size(), only=only)


def write_once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON file at ``path``; if it is missing, one process writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in claim_parts(path, 1, lambda _: path.is_file()):
        with atomic_path(path) as part, open(part, "w", encoding="utf-8") as file:
            json.dump(make(), file, indent=1, ensure_ascii=False, allow_nan=False)
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def claim_folder(out: Path, record: str, identity: dict[str, Any], holds: str) -> None:
    """Reserve ``out`` for work with this ``identity``, which is written to the file ``record``.

    Raises:
        StageError: it holds something else, or work of another identity, which the message describes as ``holds``.
    """
    if out.exists() and not out.is_dir():
        raise StageError(f"{out} is a file; name a directory")
    expected = (LOCKS, f"{record}.part")  # of another process, or left by a kill
    foreign = [path for path in out.iterdir() if path.name not in expected] if out.exists() else []
    if foreign and not (out / record).is_file():
        raise StageError(f"{out} holds something else; name a new or empty directory")
    now = json.loads(json.dumps(identity, default=str))
    before = write_once(out / record, lambda: now)
    if before != now:
        raise StageError(f"{out} {holds}: {differences(before, now)}. Name another directory")


class Parts:
    """Arrays in ``.npz`` files, one per piece."""

    def __init__(self, folder: Path, n: int, done: Callable[[], bool] = lambda: False) -> None:
        """Pieces 0 to ``n - 1`` in ``folder``; when ``done`` returns True they are obsolete and may be missing."""
        self.folder, self.n, self._done = folder, n, done

    @property
    def pieces(self) -> Pieces:
        """The pieces, for :mod:`pipeline.runtime.engine`."""
        return Pieces(self.folder, self.n, lambda index: index in self or self._done())

    def missing(self) -> Generator[int, None, None]:
        """See :func:`claim_parts`."""
        return self.pieces.missing()

    def __contains__(self, index: int) -> bool:
        return self._path(index).is_file()

    def save(self, index: int, **arrays: NDArray[Any]) -> None:
        """Write a piece atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(index)) as part, open(part, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy names its own arguments too

    def load(self, index: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of a piece."""
        with np.load(self._path(index), allow_pickle=False) as file:
            return dict(file)

    def joined(self, name: str) -> NDArray[Any]:
        """Return one array of all pieces, concatenated along the first axis."""
        arrays = []
        for index in range(self.n):
            with np.load(self._path(index), allow_pickle=False) as file:
                arrays.append(file[name])
        return np.concatenate(arrays)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.npz"
