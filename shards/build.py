"""Writing an artifact so that a kill at any moment loses nothing that was finished.

    build = ArtifactBuild(out, settings=settings, n_shards=12, container="arrow", overwrite=False)
    for index in build.todo(rank, world_size):
        build.add(index, rows)                               # atomic: the shard is there whole, or not at all
    build.finish(make_manifest)                              # by whichever process finds all shards done

A shard is a function of its index and the settings, so any number of processes may share the work, and running the
same command again goes on where it stopped and ends with the same bytes. While the artifact is being written,
``.build/`` records the settings and each finished shard; a shard is believed only if its SHA-256 is the recorded one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.errors import ArtifactError
from shards.manifest import (
    BUILD,
    MANIFEST,
    Container,
    LeftOut,
    Manifest,
    ShardInfo,
    file_sha256,
    parse_shard,
    write_json,
)
from shards.rows import EXTENSION, Rows, write_shard

LEFT_OUT = "left_out.tsv"


class ArtifactBuild:
    """An artifact being written, or being found finished."""

    def __init__(
        self, folder: Path, *, settings: dict[str, Any], n_shards: int, container: Container, overwrite: bool = False
    ) -> None:
        """Opens ``folder`` for writing; makes it if it is not there.

        Args:
            folder: the artifact's directory.
            settings: JSON-able, those that decide the bytes.
            n_shards: how many shards there will be.
            container: the shards' format.
            overwrite: throw away an artifact that other settings made.

        Raises:
            ArtifactError: the folder holds something else, or an artifact made with other settings.
        """
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.n_shards = n_shards
        self.container = container
        self.records = folder / BUILD
        self.finished: Manifest | None = None
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file; name a directory to write to")
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            before = self._settings_before()
            if before is not None and before != self.settings:
                if not overwrite:
                    raise ArtifactError(
                        f"{folder} was made with other settings: {differences(before, self.settings)}. "
                        "Name another output, or pass --overwrite to replace it"
                    )
                self._clear()
                before = None
            if before is None and (held := sorted(p.name for p in folder.iterdir())[:3]):
                raise ArtifactError(
                    f"{folder} holds something else ({', '.join(held)} …); name an empty or new directory"
                )
            self.records.mkdir(exist_ok=True)
            if not (self.records / "settings.json").exists():
                write_json(self.records / "settings.json", self.settings)
            self._adopt_manifest()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps the build's other processes waiting meanwhile, where the file system has locks."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                held = os.open(self.folder, os.O_RDONLY)
                stack.callback(os.close, held)
                fcntl.flock(held, fcntl.LOCK_EX)
            yield

    def _settings_before(self) -> dict[str, Any] | None:
        recorded = self.records / "settings.json"
        if (self.folder / MANIFEST).is_file():
            return Manifest.read(self.folder).settings
        if recorded.is_file():
            settings: dict[str, Any] = json.loads(recorded.read_text(encoding="utf-8"))
            return settings
        # a kill between making the folder and writing the settings leaves this
        if self.records.is_dir() and {p.name for p in self.folder.iterdir()} == {BUILD}:
            return self.settings
        return None

    def _clear(self) -> None:
        """Removes what an earlier run wrote here, the manifest first, so that no half of it is believed."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in self.folder.glob("[0-9]" * 5 + ".*"):
            path.unlink()
        (self.folder / LEFT_OUT).unlink(missing_ok=True)
        shutil.rmtree(self.records, ignore_errors=True)

    def _adopt_manifest(self) -> None:
        """Takes a finished artifact's shards as done, if their bytes are still those of the manifest."""
        if not (self.folder / MANIFEST).is_file():
            return
        manifest = Manifest.read(self.folder)
        whole = True
        for index, info in enumerate(manifest.shards):
            write_json(self._record(index), dataclasses.asdict(info))
            if self.done(index) is None:
                self._record(index).unlink()
                whole = False
        if whole:
            self.finished = manifest
            shutil.rmtree(self.records, ignore_errors=True)
        else:
            (self.folder / MANIFEST).unlink()

    def name(self, index: int) -> str:
        """File name of shard ``index``."""
        return f"{index:05d}{EXTENSION[self.container]}"

    def _record(self, index: int) -> Path:
        return self.records / f"{index:05d}.json"

    def done(self, index: int) -> ShardInfo | None:
        """What is recorded of shard ``index``, if it is there and its bytes are the recorded ones."""
        try:
            info = parse_shard(json.loads(self._record(index).read_text(encoding="utf-8")))
            return info if file_sha256(self.folder / info.name) == info.sha256 else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def todo(self, rank: int = 0, world_size: int = 1) -> Iterator[int]:
        """Shards that this process has still to write."""
        if self.finished is None:
            for index in range(rank, self.n_shards, world_size):
                if self.done(index) is None:
                    yield index

    def add(
        self, index: int, rows: Rows, statistics: dict[str, Any] | None = None, left_out: Sequence[LeftOut] = ()
    ) -> None:
        """Writes shard ``index`` and records it."""
        path = self.folder / self.name(index)
        digest = write_shard(path, rows, self.container)
        info = ShardInfo(
            name=path.name, rows=len(rows), sha256=digest, statistics=statistics or {}, left_out=tuple(left_out)
        )
        write_json(self._record(index), dataclasses.asdict(info))

    def finish(self, make_manifest: Callable[[tuple[ShardInfo, ...]], Manifest]) -> Manifest | None:
        """Writes the manifest if every shard is done; None while other processes still have some to write."""
        if self.finished is not None:
            return self.finished
        with self._alone():
            if (self.folder / MANIFEST).is_file():  # another process was here first
                self.finished = Manifest.read(self.folder)
                return self.finished
            infos = [
                parse_shard(json.loads(self._record(index).read_text(encoding="utf-8")))
                for index in range(self.n_shards)
                if self._record(index).is_file()
            ]
            if len(infos) < self.n_shards:
                return None
            manifest = make_manifest(tuple(infos))
            left = [item for info in infos for item in info.left_out]
            if left:
                lines = "".join(f"{item.key}\t{item.reason}\n" for item in left)
                text = "key\treason\n" + lines
                (self.folder / LEFT_OUT).write_text(text, encoding="utf-8", errors="backslashreplace")
            for part in self.folder.glob("*.part"):  # of processes that were killed
                part.unlink()
            manifest.write(self.folder)
            shutil.rmtree(self.records, ignore_errors=True)
            self.finished = manifest
            return manifest


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, each with both values, in one line."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)
