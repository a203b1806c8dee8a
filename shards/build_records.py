"""The records of an artifact that is being written: its folder ``.build/``, removed once the manifest is written.

    settings.json        the settings that decide the bytes
    NNNNN.json           the record of a finished shard
    NNNNN.unchecked      the record of a shard that an earlier run wrote, until its SHA-256 has been verified
    NNNNN.lock           locked by the process that writes or verifies the shard
    *.process            one per running process, locked until it exits

A process that finds no other one running marks all records unchecked; it and those that join it share the
verification.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from shards.errors import ArtifactError
from shards.files import file_sha256, write_json, write_text
from shards.left_out import LEFT_OUT, write_left_out
from shards.locks import FOLDER, Claims
from shards.manifest import BUILD, MANIFEST, SETTINGS, Container, Manifest, ShardInfo
from shards.records import parse, read_json
from shards.rows import Rows, write_shard

THREADS = min(8, os.cpu_count() or 1)  # that verify shards; hashing releases the GIL


class BuildRecords:
    """The records of one artifact, as this process sees them."""

    def __init__(self, artifact: Path) -> None:
        """Prepare the records of the directory ``artifact``; nothing is read or written yet."""
        self.artifact = artifact
        self.folder = artifact / BUILD
        self.claims = Claims(self.folder)

    @property
    def has_locks(self) -> bool:
        """Whether claims exclude other processes."""
        return self.claims.has_locks

    def prepare(self) -> None:
        """Create the artifact's directory if missing.

        Raises:
            ArtifactError: it is a file.
        """
        if self.artifact.exists() and not self.artifact.is_dir():
            raise ArtifactError(f"{self.artifact} is a file; name a directory to write to")
        self.artifact.mkdir(parents=True, exist_ok=True)

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context in which the build's other processes wait."""
        return Claims(self.artifact).claimed(FOLDER, wait=True)

    def has_manifest(self) -> bool:
        """Return whether the artifact is finished."""
        return (self.artifact / MANIFEST).is_file()

    def names(self) -> list[str]:
        """Return the names in the artifact's directory."""
        return sorted(path.name for path in self.artifact.iterdir())

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the artifact, finished or not; None if there is none.

        Raises:
            ArtifactError: they are damaged.
        """
        if self.has_manifest():
            return Manifest.read(self.artifact).settings
        path = self.folder / SETTINGS
        if not path.is_file():
            return None
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise ArtifactError(f"{path} is damaged: it is {settings!r:.60}, expected an object")
        return settings

    def is_empty(self) -> bool:
        """Return whether the folder exists without settings, as after a kill right after its creation."""
        return self.folder.is_dir() and not (self.folder / SETTINGS).exists()

    def read(self, index: int) -> ShardInfo | None:
        """Return the record of shard ``index``; None if it is not finished, or only unchecked."""
        try:
            return _read(self._path(index))
        except ArtifactError:
            return None

    def __contains__(self, index: int) -> bool:
        return self._path(index).is_file()

    def finished(self) -> set[int]:
        """Return the finished shards."""
        return {int(path.stem) for path in self._files(".json") if path.stem.isdecimal()}

    def infos(self) -> dict[int, ShardInfo]:
        """Return the records of all finished shards, by index."""
        return {index: info for index in sorted(self.finished()) if (info := self.read(index)) is not None}

    def write_shard(self, name: str, rows: Rows, container: Container) -> tuple[str, int]:
        """Write a shard atomically; return its SHA-256 and its bytes."""
        path = self.artifact / name
        digest = write_shard(path, rows, container)
        return digest, path.stat().st_size

    def write(self, index: int, info: ShardInfo) -> None:
        """Record shard ``index`` as finished."""
        write_json(self._path(index), dataclasses.asdict(info))

    def publish(self, manifest: Manifest) -> None:
        """Write the list of inputs left out, then the manifest, and remove the records."""
        write_left_out(self.artifact, [item for shard in manifest.shards for item in shard.left_out])
        remove_parts(self.artifact)
        manifest.write(self.artifact)
        self.remove()

    def claim(self, index: int, *, wait: bool = False) -> bool:
        """Claim shard ``index``; False if another process holds it, or has finished the artifact."""
        try:
            return self.claims.claim(index, wait=wait)
        except FileNotFoundError:
            return False

    def release(self, index: int) -> None:
        """Release shard ``index``; no effect if this object does not hold it."""
        self.claims.release(index)

    def close(self) -> None:
        """Release all claims."""
        self.claims.release_all()

    def count_processes(self) -> int:
        """Return how many other processes are running; 0 on a file system without locks."""
        claims = Claims(self.folder)
        busy = [path for path in self._files(".process") if not claims.claim(path.name)]
        claims.release_all()
        return len(busy)

    def join(self, settings: dict[str, Any], *, first: bool) -> None:
        """Register this process as running; the ``first`` one marks all records unchecked."""
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / SETTINGS).exists():
            write_json(self.folder / SETTINGS, settings)
        if first:
            remove_parts(self.artifact)
            self._uncheck()
        self.claims.claim(f"{uuid.uuid4().hex}.process")

    def _uncheck(self) -> None:
        """Mark all records unchecked; those of a finished artifact come from its manifest."""
        for path in self._files(".process"):
            path.unlink()
        recorded = [path for path in self.folder.iterdir() if re.fullmatch(r"\d{5,}\.(json|unchecked)", path.name)]
        if not (self.artifact / MANIFEST).is_file():
            for path in recorded:
                path.replace(path.with_suffix(".unchecked"))
            return
        for path in recorded:
            path.unlink()
        for index, info in enumerate(Manifest.read(self.artifact).shards):
            write_text(self._path(index, ".unchecked"), json.dumps(dataclasses.asdict(info)), sync=False)

    def verify(self, share: tuple[int, int]) -> None:
        """Verify all unchecked records, together with the other running processes; return when none is left.

        Claims divide the work, so ``share``, the rank and number of processes, is unused.
        """
        indices = sorted(int(path.stem) for path in self._files(".unchecked"))
        with ThreadPoolExecutor(THREADS) as pool:
            verified = list(pool.map(self._verify, indices))
        for index in (index for index, done in zip(indices, verified, strict=True) if not done):
            self._verify(index, wait=True)

    def _verify(self, index: int, wait: bool = False) -> bool:
        """Verify a shard record and drop it on mismatch; False if another process is verifying it."""
        unchecked = self._path(index, ".unchecked")
        if not self.claim(index, wait=wait):
            return not unchecked.exists()
        try:
            try:
                info = _read(unchecked)
                valid = file_sha256(self.artifact / info.name) == info.sha256
            except (OSError, ArtifactError):
                valid = False
            with contextlib.suppress(FileNotFoundError):  # another process has verified it by now
                if valid:
                    unchecked.replace(self._path(index))
                elif unchecked.exists():
                    (self.artifact / MANIFEST).unlink(missing_ok=True)  # first: a manifest vouches for every shard
                    unchecked.unlink()
        finally:
            self.claims.release(index)
        return True

    def remove_artifact(self, settings: dict[str, Any], share: tuple[int, int]) -> None:
        """Delete shards and records, the manifest first: without it the rest counts as unfinished.

        Only one process does this at a time, so ``settings`` and ``share`` are unused here.
        """
        (self.artifact / MANIFEST).unlink(missing_ok=True)
        for path in self.artifact.iterdir():
            if re.match(r"\d{5,}\.", path.name) or path.name == LEFT_OUT:
                path.unlink()
        self.remove()
        remove_parts(self.artifact)

    def remove(self) -> None:
        """Remove the folder, in one step for processes that still look for a lock in it."""
        with contextlib.suppress(OSError):
            aside = self.artifact / f"{BUILD}.{os.getpid()}.part"
            self.folder.replace(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _files(self, suffix: str) -> list[Path]:
        try:  # Path.glob of Python before 3.13 raises if another process removes the folder meanwhile
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [self.folder / name for name in names if name.endswith(suffix)]

    def _path(self, index: int, suffix: str = ".json") -> Path:
        return self.folder / f"{index:05d}{suffix}"


def remove_parts(folder: Path) -> None:
    """Delete the temporary files of killed processes."""
    for path in folder.glob("*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _read(path: Path) -> ShardInfo:
    """Return a record.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return parse(ShardInfo, read_json(path), str(path))
