"""The records of an artifact that is being written to a URL: those of :mod:`shards.build_records`, as objects.

Object stores have no locks: processes start at different shards, and if two compute the same shard, they write the same
bytes. A process learns which shards are finished from a listing that is at most `FRESH` seconds old, or older if a
listing takes long.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from shards.errors import ArtifactError
from shards.left_out import LEFT_OUT, write_left_out
from shards.manifest import BUILD, MANIFEST, SETTINGS, Container, Manifest, ShardInfo
from shards.records import parse, read_json
from shards.rows import Rows, write_shard
from shards.scratch import Scratch, remove_abandoned
from shards.storage import CONNECTIONS, READ_ONLY, Url, entries, is_file, pieces, put, remove, size, write_json

FRESH = 10.0  # seconds
LISTING_SHARE = 0.05  # largest share of a process's time: a listing has 1,000 names per request
PATIENCE = 600.0  # seconds to wait for the first process to delete what --overwrite replaces


class RemoteRecords:
    """The records of one artifact at a URL, as this process sees them; see :class:`shards.build_records.BuildRecords`.

    A claim always succeeds.
    """

    has_locks = True  # there are none, but True lets every process take every shard

    def __init__(self, artifact: Url) -> None:
        """Prepare the records of the directory ``artifact``; nothing is read or written yet."""
        self.artifact = artifact
        self.folder = artifact / BUILD
        self._finished: set[int] = set()
        self._valid_until = 0.0

    def prepare(self) -> None:
        """Check that the directory can be listed, and remove the temporary files of killed processes.

        Raises:
            ArtifactError: it cannot be listed, or is read-only.
        """
        if self.artifact.scheme in READ_ONLY:
            raise ArtifactError(
                f"{self.artifact} cannot be written: {self.artifact.scheme}:// is read-only. Write to s3://, gs:// "
                "or a folder"
            )
        entries(self.artifact)
        remove_abandoned()

    def exclusive(self) -> AbstractContextManager[object]:
        """Return an empty context: there are no locks."""
        return nullcontext()

    def has_manifest(self) -> bool:
        """Return whether the artifact is finished."""
        return is_file(self.artifact / MANIFEST)

    def names(self) -> list[str]:
        """Return the names in the artifact's directory."""
        return sorted(entries(self.artifact))

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the artifact, finished or not; None if there is none."""
        if self.has_manifest():
            return Manifest.read(self.artifact).settings
        path = self.folder / SETTINGS
        if not is_file(path):
            return None
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise ArtifactError(f"{path} is damaged: it is {settings!r:.60}, expected an object")
        return settings

    def is_empty(self) -> bool:
        """Return whether there are no settings: they are removed last."""
        return not is_file(self.folder / SETTINGS)

    def count_processes(self) -> int:
        """Return 0: without locks other processes are not visible."""
        return 0

    def join(self, settings: dict[str, Any], *, first: bool) -> None:
        """Write the settings of a new artifact."""
        if not self.has_manifest() and self.is_empty():
            write_json(self.folder / SETTINGS, settings)

    def verify(self, share: tuple[int, int]) -> None:
        """Verify this process's share of the finished shards, and drop the records of damaged ones."""
        manifest = Manifest.read(self.artifact) if self.has_manifest() else None
        infos = self.infos() if manifest is None else dict(enumerate(manifest.shards))
        mine = [index for index in infos if index % share[1] == share[0]]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            valid = pool.map(self._is_valid, (infos[index] for index in mine))
            damaged = {index for index, sound in zip(mine, valid, strict=True) if not sound}
        if damaged and manifest is not None:
            for index in infos.keys() - damaged:
                self.write(index, infos[index])
            write_json(self.folder / SETTINGS, manifest.settings)
            remove([self.artifact / MANIFEST])  # last: without it and the records all shards would be made again
        remove([self._path(index) for index in damaged])
        self._valid_until = 0.0

    def _is_valid(self, info: ShardInfo) -> bool:
        url, digest = self.artifact / info.name, hashlib.sha256()
        try:
            if (actual := size(url)) != info.bytes:
                return False
            for piece in pieces(url, actual):
                digest.update(piece)
        except FileNotFoundError:
            return False
        return digest.hexdigest() == info.sha256

    def claim(self, index: int, *, wait: bool = False) -> bool:
        """Return True."""
        return True

    def release(self, index: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Remove records that this process wrote after another one finished the artifact."""
        if self._finished and self.has_manifest():
            self.remove()

    def __contains__(self, index: int) -> bool:
        if time.monotonic() >= self._valid_until:
            self.finished()
        return index in self._finished

    def finished(self) -> set[int]:
        """Return the finished shards, from a new listing."""
        start = time.monotonic()
        names = entries(self.folder)
        end = time.monotonic()
        self._finished = {int(name[:-5]) for name in names if re.fullmatch(r"\d{5,}\.json", name)}
        self._valid_until = end + max(FRESH, (end - start) / LISTING_SHARE)
        return self._finished

    def read(self, index: int) -> ShardInfo | None:
        """Return the record of shard ``index``; None if it is not finished."""
        path = self._path(index)
        try:
            return parse(ShardInfo, read_json(path), path)
        except ArtifactError as error:
            if isinstance(error.__cause__, FileNotFoundError) or "damaged" in str(error):
                return None
            raise

    def infos(self) -> dict[int, ShardInfo]:
        """Return the records of all finished shards, by index."""
        indices = sorted(self.finished())
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            infos = pool.map(self.read, indices)
            return {index: info for index, info in zip(indices, infos, strict=True) if info is not None}

    def write_shard(self, name: str, rows: Rows, container: Container) -> tuple[str, int]:
        """Write a shard to a temporary file and upload it in one piece; return its SHA-256 and its bytes."""
        with Scratch() as folder:
            path = folder / name
            digest = write_shard(path, rows, container)
            put(path, self.artifact / name)
            return digest, path.stat().st_size

    def write(self, index: int, info: ShardInfo) -> None:
        """Record shard ``index`` as finished."""
        write_json(self._path(index), dataclasses.asdict(info))
        self._finished.add(index)

    def publish(self, manifest: Manifest) -> None:
        """Write the list of inputs left out, then the manifest, and remove the records."""
        write_left_out(self.artifact, [item for shard in manifest.shards for item in shard.left_out])
        manifest.write(self.artifact)
        self.remove()

    def remove_artifact(self, settings: dict[str, Any], share: tuple[int, int]) -> None:
        """Delete shards and records, the manifest first: without it the rest counts as unfinished.

        The first process deletes them. The others wait for the new ``settings``, or they would delete what it writes
        next.

        Raises:
            ArtifactError: the first process did not delete them in time.
        """
        if share[0] != 0:
            end = time.monotonic() + PATIENCE
            while self.settings() != settings:
                if time.monotonic() > end:
                    raise ArtifactError(
                        f"{self.artifact} was not replaced by the process with RANK=0; start it as well"
                    )
                time.sleep(1.0)
            return
        remove([self.artifact / MANIFEST])
        names = [name for name in self.names() if re.match(r"\d{5,}\.", name) or name == LEFT_OUT]
        remove([self.artifact / name for name in names])
        self.remove()

    def remove(self) -> None:
        """Remove the records, the settings last."""
        remove([self.folder / name for name in entries(self.folder) if name != SETTINGS])
        remove([self.folder / SETTINGS])
        self._finished = set()

    def _path(self, index: int) -> Url:
        return self.folder / f"{index:05d}.json"
