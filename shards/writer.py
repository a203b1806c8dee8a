"""Write an artifact, so that a kill at any moment loses no finished shard.

    build = ArtifactBuild(out, settings=settings, n_shards=12, container="arrow", overwrite=False)
    for index in build.todo(rank, world_size):
        build.add(index, rows)                               # atomic
    build.finish(make_manifest)                              # by whichever process sees all shards finished

The life of a shard:

    1. todo()    claims it: a lock, which ends with the process
    2. add()     writes NNNNN.arrow.part, flushes and renames it; then its record .build/NNNNN.json; releases the lock
    3. finish()  when all are recorded: writes manifest.json, and removes .build/ (:mod:`shards.build_records`)
    4. a later run of the command verifies its SHA-256; on a mismatch it starts again at 1

A shard is a function of its index and the settings, so any number of processes may share the work, and running the
same command again resumes it and gives the same bytes. At a URL (:mod:`shards.remote_records`) add() uploads a complete
file, and nothing is claimed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from shards.build_records import BuildRecords
from shards.errors import ArtifactError, disk_errors
from shards.manifest import BUILD, MANIFEST, Container, LeftOut, Manifest, ShardInfo
from shards.records import differences
from shards.remote_records import RemoteRecords
from shards.rows import EXTENSION, Rows
from shards.storage import Location


class ArtifactBuild:
    """An artifact that is being written; ``finished`` is its manifest if it was complete when opened."""

    def __init__(
        self,
        folder: Location,
        *,
        settings: dict[str, Any],
        n_shards: int,
        container: Container,
        overwrite: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Open ``folder`` for writing, create it if missing, and verify what earlier runs wrote.

        Args:
            folder: the artifact's directory, or its URL.
            settings: JSON values that determine the bytes.
            n_shards: number of shards.
            container: format of the shards.
            overwrite: delete an artifact made with other settings.
            share: this process's rank and the number of processes; at a URL, where nothing can be claimed, each
                verifies its share.

        Raises:
            ArtifactError: the folder holds something else, or an artifact made with other settings; processes with
                other settings are writing it; or it cannot be written.
        """
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.n_shards = n_shards
        self.container = container
        self.records = _records_of(folder)
        self.finished: Manifest | None = None
        with self._disk_errors(folder):
            self.records.prepare()
            with self.records.exclusive():
                self._join(overwrite, share)
            self.records.verify(share)
            with self.records.exclusive():
                if self.records.has_manifest():  # verify() removes it if a shard is damaged
                    self.finished = Manifest.read(folder)
                    self.records.remove()
        if self.finished is not None:
            self.close()

    def _disk_errors(self, path: Location) -> AbstractContextManager[None]:
        return disk_errors(path, lambda: self.n_shards - self.remaining())

    def _join(self, overwrite: bool, share: tuple[int, int]) -> None:
        """Join the running processes; mark all records unchecked if there are none. Runs exclusively."""
        n_others = self.records.count_processes()
        before = self.records.settings()
        if before is not None and before != self.settings:
            changes = differences(before, self.settings)
            if not overwrite:
                raise ArtifactError(
                    f"{self.folder} was made with other settings: {changes}. "
                    "Name another output, or pass --overwrite to replace it"
                )
            if n_others:
                count = "1 process is" if n_others == 1 else f"{n_others} processes are"
                raise ArtifactError(
                    f"{count} writing to {self.folder} with other settings: {changes}. "
                    "Stop them first, or name another output"
                )
            self.records.remove_artifact(self.settings, share)
            before = self.records.settings()  # at a URL, those of the process that removed it
        names = self.records.names()[:3]
        if before is None and names and not (names == [BUILD] and self.records.is_empty()):
            raise ArtifactError(
                f"{self.folder} holds something else ({', '.join(names)} …); name an empty or new directory"
            )
        self.records.join(self.settings, first=not n_others)

    def name(self, index: int) -> str:
        """Return the file name of shard ``index``."""
        return f"{index:05d}{EXTENSION[self.container]}"

    def done(self, index: int) -> ShardInfo | None:
        """Return the record of shard ``index`` if it was written, or verified since this build was opened."""
        return self.records.read(index)

    def unfinished(self) -> list[int]:
        """Return the unfinished shards, whoever writes them; none if the artifact is finished."""
        if self.finished is not None:
            return []
        left = set(range(self.n_shards)) - self.records.finished()
        return [] if left and self.records.has_manifest() else sorted(left)  # records end after the manifest begins

    def remaining(self) -> int:
        """Return the number of unfinished shards, whoever writes them; 0 if the artifact is finished."""
        return len(self.unfinished())

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without claims: the copy writes shards of the build that this process has opened and finishes."""
        return {name: value for name, value in self.__dict__.items() if name != "records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.records = _records_of(self.folder)

    def todo(self, rank: int = 0, world_size: int = 1, *, only: int | None = None) -> Generator[int, None, None]:
        """Claim the shards that this process has to write, one by one; :meth:`add` releases each.

        The process passes over all shards once, from a start that depends on its rank, and takes those that are
        neither finished nor claimed by another process, of the same ``torchrun`` or started by hand. On a file system
        without locks it takes every ``world_size``-th. At a URL nothing is claimed (:mod:`shards.remote_records`).
        With ``only`` it claims at most this shard, and waits while another process has it.

        Raises:
            ArtifactError: a lock file cannot be written.
        """
        if self.finished is not None:
            return
        first = rank * self.n_shards // world_size
        try:
            for index in (*range(first, self.n_shards), *range(first)) if only is None else (only,):
                if only is None and index in self.records:
                    continue
                with self._disk_errors(self.records.folder):
                    claimed = self.records.claim(index, wait=only is not None)
                if not claimed or (not self.records.has_locks and index % world_size != rank):
                    continue
                if self.records.has_manifest():  # another process has finished the artifact
                    self.records.release(index)
                    return
                if self.done(index) is not None:
                    self.records.release(index)
                    continue
                yield index
        except GeneratorExit:  # the caller stopped early
            self.close()
            raise

    def add(
        self, index: int, rows: Rows, statistics: dict[str, Any] | None = None, left_out: Sequence[LeftOut] = ()
    ) -> None:
        """Write shard ``index`` and record it; any thread may call this.

        Raises:
            ArtifactError: the disk cannot be written; no partial shard is left.
        """
        name = self.name(index)
        try:
            with self._disk_errors(self.folder / name):
                digest, size = self.records.write_shard(name, rows, self.container)
                info = ShardInfo(
                    name=name,
                    rows=len(rows),
                    sha256=digest,
                    bytes=size,
                    statistics=statistics or {},
                    left_out=tuple(left_out),
                )
                self.records.write(index, info)
        finally:
            self.records.release(index)

    def finish(self, make_manifest: Callable[[tuple[ShardInfo, ...]], Manifest]) -> Manifest | None:
        """Write the manifest if every shard is finished; return None while other processes still write some.

        Raises:
            ArtifactError: the disk cannot be written.
        """
        if self.finished is not None:
            return self.finished
        with self._disk_errors(self.folder / MANIFEST), self.records.exclusive():
            if self.records.has_manifest():  # written by another process
                self.finished = Manifest.read(self.folder)
            elif len(infos := self.records.infos()) == self.n_shards:
                manifest = make_manifest(tuple(infos[index] for index in range(self.n_shards)))
                self.records.publish(manifest)
                self.finished = manifest
        self.close()
        return self.finished

    def close(self) -> None:
        """Release all locks; other processes take over the shards that this one has not written."""
        self.records.close()


def _records_of(folder: Location) -> BuildRecords | RemoteRecords:
    return BuildRecords(folder) if isinstance(folder, Path) else RemoteRecords(folder)
