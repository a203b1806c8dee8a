"""Work in numbered pieces that any number of processes share, and that a kill at any moment does not lose.

    parts = Parts(out / "features", n=40)
    for index in parts.missing():                            # several processes at once get different pieces
        parts.save(index, features=extract(...))
    everything = [parts.load(i) for i in range(40)]          # whoever is here has all of them

A piece is made under a lock that the system takes back from a process that dies. Processes need not know of each
other: those of ``torchrun`` and those started by hand share alike. Where the file system has no locks, or the
system none of this kind, pieces may be made twice, which changes nothing: a piece is a function of its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.device import rank, world_size
from pipeline.runtime.errors import StageError
from shards.files import atomic_path
from shards.locks import Claims
from shards.records import differences

LOCKS = ".locks"


def claim_parts(made: Path, n: int, there: Callable[[int], bool]) -> Iterator[int]:
    """Pieces that this process has to make; when the iterator ends, all ``n`` are there.

    Args:
        made: what the pieces make, a file or a folder; their locks lie beside it, in ``.locks``.
        n: pieces, numbered from 0.
        there: whether a piece is finished, whoever made it. It must say so before the loop's body ends.
    """
    claims = Claims(made.parent / LOCKS / made.name)
    first = rank() * n // world_size()
    busy = []
    for index in (*range(first, n), *range(first)):
        if not there(index):
            claims.folder.mkdir(parents=True, exist_ok=True)
            with claims.claimed(index) as claimed:
                if not claimed:
                    busy.append(index)
                elif not there(index):
                    yield index
    for index in busy:  # another process works on it, or died with it
        with claims.claimed(index, wait=True):
            if not there(index):
                yield index


def write_once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON file at ``path``, made by one process where it is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in claim_parts(path, 1, lambda _: path.is_file()):
        with atomic_path(path) as part, open(part, "w", encoding="utf-8") as file:
            json.dump(make(), file, indent=1, ensure_ascii=False, allow_nan=False)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def claim_folder(out: Path, record: str, identity: dict[str, Any], holds: str) -> None:
    """Takes ``out`` for work that ``identity`` decides, which the file ``record`` in it says from now on.

    Raises:
        StageError: it holds something else, or what another identity made; ``holds`` is its name in the message.
    """
    if out.exists() and not out.is_dir():
        raise StageError(f"{out} is a file; name a directory")
    ours = (LOCKS, f"{record}.part")  # what another process makes first, or a kill has left
    others = [path for path in out.iterdir() if path.name not in ours] if out.exists() else []
    if others and not (out / record).is_file():
        raise StageError(f"{out} holds something else; name a new or empty directory")
    now = json.loads(json.dumps(identity, default=str))
    before = write_once(out / record, lambda: now)
    if before != now:
        raise StageError(f"{out} {holds}: {differences(before, now)}. Name another directory")


class Parts:
    """Arrays in ``.npz`` files, one a piece."""

    def __init__(self, folder: Path, n: int, done: Callable[[], bool] = lambda: False) -> None:
        """Pieces 0 to ``n - 1`` in ``folder``; once ``done`` says so they are not needed any more, and may be gone."""
        self.folder, self.n, self._done = folder, n, done

    def missing(self) -> Iterator[int]:
        """See :func:`claim_parts`."""
        return claim_parts(self.folder, self.n, lambda index: index in self or self._done())

    def __contains__(self, index: int) -> bool:
        return self._path(index).is_file()

    def save(self, index: int, **arrays: NDArray[Any]) -> None:
        """Writes a piece, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(index)) as part, open(part, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy names its own arguments too

    def load(self, index: int) -> dict[str, NDArray[Any]]:
        """The arrays of a piece."""
        with np.load(self._path(index), allow_pickle=False) as file:
            return dict(file)

    def joined(self, name: str) -> NDArray[Any]:
        """One array of all pieces, one after the other along the first axis."""
        found = []
        for index in range(self.n):
            with np.load(self._path(index), allow_pickle=False) as file:
                found.append(file[name])
        return np.concatenate(found)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.npz"
