"""Local disk cache of shards at URLs: complete, verified, shared by the processes of a machine, bounded in size.

    cache = ShardCache(Path("/nvme/dpar"), 100 * 10**9)
    with cache.shard(url, info) as path: ...                 # the file is not removed during the block

A file is named after its shard's SHA-256, so artifacts and runs can share a cache. It is verified after download and
when a process first uses it. A lock per shard lets one process download it while the others wait. The least recently
used shards are removed, except those that a process is about to open; an open one stays readable. The file caches of
fsspec and webdataset lack a size limit, locks or checksums, or remove files that are about to be opened.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import ADVICE, ArtifactError
from shards.files import atomic_path, file_sha256
from shards.locks import Claims
from shards.manifest import ShardInfo
from shards.scratch import Scratch
from shards.storage import Url, pieces, size

SHA256 = re.compile(r"[0-9a-f]{64}")
TEMPORARY = 4 * 10**9  # bytes of a cache that ends with the process


class ShardCache:
    """A directory of shards; any thread may use it."""

    def __init__(self, folder: Path, most: int) -> None:
        """Args:
        folder: created if missing; other files in it are left alone.
        most: bytes to keep.
        """
        self.folder, self.most = folder, most
        self._verified: set[str] = set()
        self._scratch: Scratch | None = None

    @classmethod
    def temporary(cls) -> ShardCache:
        """Return a cache in a temporary directory, which is removed with the object."""
        scratch = Scratch()
        cache = cls(scratch.folder, TEMPORARY)
        cache._scratch = scratch
        return cache

    @contextmanager
    def shard(self, url: Url, info: ShardInfo) -> Iterator[Path]:
        """Yield the local file of the shard at ``url``, downloaded if necessary.

        Raises:
            FileNotFoundError: there is no such shard at the URL.
            ArtifactError: it cannot be read, differs from the manifest, or cannot be written to the cache.
        """
        if not SHA256.fullmatch(info.sha256):
            raise ArtifactError(f"{url}: the manifest is damaged: {info.sha256[:70]!r} is not a SHA-256")
        path = self.folder / info.sha256
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with Claims(self.folder).claimed(_lock(path).name, wait=True):
                if not self._is_valid(path):
                    self._download(url, info, path)
                os.utime(path)
                yield path
            self._evict()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and error.filename == url:
                raise
            advice = ADVICE.get(error.errno or 0, "run the same command again")
            raise ArtifactError(
                f"cannot cache {url} in {self.folder}: {error.strerror or error}; {advice}, with another --cache if "
                "this one is too small"
            ) from error

    def _is_valid(self, path: Path) -> bool:
        if not path.exists():
            self._verified.discard(path.name)
        elif path.name not in self._verified and file_sha256(path) == path.name:
            self._verified.add(path.name)
        return path.name in self._verified

    def _download(self, url: Url, info: ShardInfo, path: Path) -> None:
        digest = hashlib.sha256()
        with atomic_path(path, unlocked=True, sync=False) as part, open(part, "wb") as file:
            for piece in pieces(url, size(url) if info.bytes is None else info.bytes):
                file.write(piece)
                digest.update(piece)
            if digest.hexdigest() != info.sha256:
                raise ArtifactError(
                    f"shard {url} is damaged: its SHA-256 differs from the manifest's; rerun the command that made it, "
                    "or, if it has been replaced in the meantime, this command"
                )
        self._verified.add(path.name)

    def _evict(self) -> None:
        """Remove the least recently used shards until the rest is small enough."""
        shards = []
        for entry in os.scandir(self.folder):
            if SHA256.fullmatch(entry.name):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # removed by another process
                    continue
                shards.append((status.st_mtime_ns, status.st_size, self.folder / entry.name))
        excess = sum(size for _, size, _ in shards) - self.most
        for _, bytes_, path in sorted(shards):
            if excess <= 0:
                return
            with Claims(self.folder).claimed(_lock(path).name) as unused:
                if unused:
                    path.unlink(missing_ok=True)
                    _lock(path).unlink(missing_ok=True)
                    excess -= bytes_


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")
