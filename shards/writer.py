"""Writing an artifact so that a kill at any moment loses nothing that was finished.

    build = ArtifactBuild(out, settings=settings, n_shards=12, container="arrow", overwrite=False)
    for index in build.todo(rank, world_size):
        build.add(index, rows)                               # atomic: the shard is there whole, or not at all
    build.finish(make_manifest)                              # by whichever process finds all shards done

A shard is a function of its index and the settings, so any number of processes may share the work, and running the
same command again goes on where it stopped and ends with the same bytes. While the artifact is being written,
``.build/`` holds

    settings.json        what decides the bytes
    NNNNN.json           the record of a finished shard that is believed
    NNNNN.unchecked      the record of one from an earlier session, until its SHA-256 has been compared
    NNNNN.lock           locked by the process that writes or checks the shard
    *.process            one a process at work, locked as long as it lives

A session begins when a process finds no other one at work: all records are unchecked then, and the processes of the
session share the checking. Locks end with their process, so nothing has to be tidied up after a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shards.errors import ArtifactError
from shards.locks import NoLocks, take
from shards.manifest import (
    BUILD,
    MANIFEST,
    Container,
    LeftOut,
    Manifest,
    ShardInfo,
    file_sha256,
    write_json,
    write_text,
)
from shards.records import parse, read_json
from shards.rows import EXTENSION, Rows, write_shard

LEFT_OUT = "left_out.tsv"
# Each entry of LEFT_OUT is one line of two fields, whatever a key holds; backslashes, so that it can be undone.
CONTROLS = (*range(32), *range(127, 160), 0x2028, 0x2029)
ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in (*CONTROLS, ord("\\"))}
FORMULA = "=+-@"  # a field that begins with one of these is computed by spreadsheets
CHECKING = min(8, os.cpu_count() or 1)  # threads; hashing leaves the interpreter free


class ArtifactBuild:
    """An artifact being written, or being found finished."""

    def __init__(
        self, folder: Path, *, settings: dict[str, Any], n_shards: int, container: Container, overwrite: bool = False
    ) -> None:
        """Opens ``folder`` for writing; makes it if it is not there; checks what earlier sessions wrote.

        Args:
            folder: the artifact's directory.
            settings: JSON-able, those that decide the bytes.
            n_shards: how many shards there will be.
            container: the shards' format.
            overwrite: throw away an artifact that other settings made.

        Raises:
            ArtifactError: the folder holds something else, or an artifact made with other settings; processes with
                other settings are writing it; or it cannot be written.
        """
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.n_shards = n_shards
        self.container = container
        self.records = folder / BUILD
        self.finished: Manifest | None = None
        self._has_locks = True
        self._held: dict[int | str, int] = {}  # descriptors of locks: this process's own, and the shards it works on
        weakref.finalize(self, _close_all, self._held)
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file; name a directory to write to")
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._enter(overwrite)
            self._check_records()
            with self._alone():
                if (folder / MANIFEST).is_file():  # a bad shard would have ended it
                    self.finished = Manifest.read(folder)
                    self._retire_records()
        if self.finished is not None:
            self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps the build's other processes waiting meanwhile, where the file system has locks."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(NoLocks):
                held = take(self.folder, wait=True)
                assert held is not None  # it has been waited for
                stack.callback(os.close, held)
            yield

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Says how to go on where the disk refuses."""
        try:
            yield
        except OSError as error:
            advice = {
                **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run the same command again"),
                **dict.fromkeys(
                    (errno.EROFS, errno.EACCES, errno.EPERM),
                    "make it writable and run the same command again, or name another output",
                ),
            }.get(error.errno or 0, "run the same command again")
            reason = error.strerror or str(error)
            kept = self.n_shards - self.remaining()
            raise ArtifactError(
                f"cannot write {error.filename or path}: {reason}; {advice}. {kept} finished shards are kept"
            ) from error

    def _enter(self, overwrite: bool) -> None:
        """Makes this process one of those at work, and begins a session if it is the first. Runs alone."""
        working = self._others()
        before = self._settings_before()
        if before is not None and before != self.settings:
            changes = differences(before, self.settings)
            if not overwrite:
                raise ArtifactError(
                    f"{self.folder} was made with other settings: {changes}. "
                    "Name another output, or pass --overwrite to replace it"
                )
            if working:
                count = "1 process is" if working == 1 else f"{working} processes are"
                raise ArtifactError(
                    f"{count} writing to {self.folder} with other settings: {changes}. "
                    "Stop them first, or name another output"
                )
            self._clear()
            before = None
        if before is None and (held := sorted(p.name for p in self.folder.iterdir())[:3]):
            raise ArtifactError(
                f"{self.folder} holds something else ({', '.join(held)} …); name an empty or new directory"
            )
        self.records.mkdir(exist_ok=True)
        if not (self.records / "settings.json").exists():
            write_json(self.records / "settings.json", self.settings)
        if not working:
            self._begin_session()
        with contextlib.suppress(NoLocks):
            held_here = take(self.records / f"{uuid.uuid4().hex}.process")
            assert held_here is not None  # nobody else knows the name
            self._held["process"] = held_here

    def _others(self) -> int:
        """How many other processes are at work here."""
        working = 0
        for path in self.records.glob("*.process"):
            with contextlib.suppress(NoLocks):
                held = take(path)
                if held is None:
                    working += 1
                else:
                    os.close(held)
        return working

    def _begin_session(self) -> None:
        """Makes all records unchecked: of a finished artifact those of its manifest."""
        self._sweep()
        for path in self.records.glob("*.process"):
            path.unlink()
        recorded = [path for path in self.records.iterdir() if re.fullmatch(r"\d{5,}\.(json|unchecked)", path.name)]
        if (self.folder / MANIFEST).is_file():
            for path in recorded:
                path.unlink()
            for index, info in enumerate(Manifest.read(self.folder).shards):
                write_text(self._unchecked(index), json.dumps(dataclasses.asdict(info)), sync=False)
        else:
            for path in recorded:
                path.replace(path.with_suffix(".unchecked"))

    def _check_records(self) -> None:
        """Sees to it that no record is unchecked, together with the other processes at work."""
        indices = sorted(int(path.stem) for path in self.records.glob("*.unchecked"))
        with ThreadPoolExecutor(CHECKING) as pool:
            busy = [i for i, decided in zip(indices, pool.map(self._check, indices), strict=True) if not decided]
        for index in busy:
            self._check(index, wait=True)

    def _check(self, index: int, wait: bool = False) -> bool:
        """Verifies a shard record and drops it on mismatch; False if another process is checking it."""
        if not self._claim(index, wait=wait):
            return not self._unchecked(index).exists()
        try:
            unchecked = self._unchecked(index)
            try:
                info = read_record(unchecked)
                good = file_sha256(self.folder / info.name) == info.sha256
            except (OSError, ArtifactError):
                good = False
            with contextlib.suppress(FileNotFoundError):  # decided by another process meanwhile
                if good:
                    unchecked.replace(self._record(index))
                elif unchecked.exists():
                    (self.folder / MANIFEST).unlink(missing_ok=True)  # first: a manifest vouches for every shard
                    unchecked.unlink()
        finally:
            self._release(index)
        return True

    def _claim(self, index: int, wait: bool = False) -> bool:
        """Takes the lock of shard ``index``; False if another process has it, or has finished the artifact."""
        try:
            held = take(self.records / f"{index:05d}.lock", wait=wait)
        except NoLocks:
            self._has_locks = False
            return True
        except FileNotFoundError:
            return False
        if held is not None:
            self._held[index] = held
        return held is not None

    def _release(self, index: int) -> None:
        held = self._held.pop(index, None)
        if held is not None:
            os.close(held)

    def close(self) -> None:
        """Gives back all locks; what is not written by then is left to the other processes."""
        _close_all(self._held)

    def _settings_before(self) -> dict[str, Any] | None:
        recorded = self.records / "settings.json"
        if (self.folder / MANIFEST).is_file():
            return Manifest.read(self.folder).settings
        if recorded.is_file():
            settings = read_json(recorded)
            if not isinstance(settings, dict):
                raise ArtifactError(f"{recorded} is damaged: it is {settings!r:.60}, expected an object")
            return settings
        # a kill between making the folder and writing the settings leaves this
        if self.records.is_dir() and {p.name for p in self.folder.iterdir()} == {BUILD}:
            return self.settings
        return None

    def _clear(self) -> None:
        """Removes what an earlier run wrote here, the manifest first, so that no half of it is believed."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if re.match(r"\d{5,}\.", path.name):
                path.unlink()
        (self.folder / LEFT_OUT).unlink(missing_ok=True)
        self._retire_records()
        self._sweep()

    def _retire_records(self) -> None:
        """Removes the records, in one moment for whoever might still look for a lock there."""
        with contextlib.suppress(OSError):
            aside = self.folder / f"{BUILD}.{os.getpid()}.part"
            self.records.replace(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what killed processes left half-written."""
        for path in self.folder.glob("*.part"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def name(self, index: int) -> str:
        """File name of shard ``index``."""
        return f"{index:05d}{EXTENSION[self.container]}"

    def _record(self, index: int) -> Path:
        return self.records / f"{index:05d}.json"

    def _unchecked(self, index: int) -> Path:
        return self.records / f"{index:05d}.unchecked"

    def done(self, index: int) -> ShardInfo | None:
        """What is recorded of shard ``index``, if it was written or checked since work began."""
        try:
            return read_record(self._record(index))
        except ArtifactError:
            return None

    def remaining(self) -> int:
        """Shards that are not done, whoever writes them; 0 when the artifact is finished."""
        if self.finished is not None or (self.folder / MANIFEST).is_file():
            return 0
        return sum(not self._record(index).is_file() for index in range(self.n_shards))

    def todo(self, rank: int = 0, world_size: int = 1) -> Generator[int, None, None]:
        """Shards that this process is to write, claimed for it one by one until :meth:`add`.

        It goes round once through all shards, from a place of its own, and takes what is neither done nor claimed by
        another process: those may be of the same ``torchrun`` or started by hand, and what the dead have left is
        taken too. Where the file system has no locks, ``rank`` alone decides.

        Raises:
            ArtifactError: a claim cannot be written.
        """
        if self.finished is not None:
            return
        first = rank * self.n_shards // world_size
        try:
            for step in range(self.n_shards):
                index = (first + step) % self.n_shards
                if self._record(index).is_file():
                    continue
                with self._writing(self.records):
                    claimed = self._claim(index)
                if not claimed or (not self._has_locks and index % world_size != rank):
                    continue
                if (self.folder / MANIFEST).is_file():  # finished by another process
                    self._release(index)
                    return
                if self.done(index) is not None:
                    self._release(index)
                    continue
                yield index
        except GeneratorExit:  # the work was broken off
            self.close()
            raise

    def add(
        self, index: int, rows: Rows, statistics: dict[str, Any] | None = None, left_out: Sequence[LeftOut] = ()
    ) -> None:
        """Writes shard ``index`` and records it; may be called from any thread.

        Raises:
            ArtifactError: the disk refuses; nothing half-written is left under the shard's name.
        """
        path = self.folder / self.name(index)
        try:
            with self._writing(path):
                digest = write_shard(path, rows, self.container)
                info = ShardInfo(
                    name=path.name,
                    rows=len(rows),
                    sha256=digest,
                    bytes=path.stat().st_size,
                    statistics=statistics or {},
                    left_out=tuple(left_out),
                )
                write_json(self._record(index), dataclasses.asdict(info))
        finally:
            self._release(index)

    def finish(self, make_manifest: Callable[[tuple[ShardInfo, ...]], Manifest]) -> Manifest | None:
        """Writes the manifest if every shard is done; None while other processes still have some to write.

        Raises:
            ArtifactError: the disk refuses.
        """
        if self.finished is not None:
            return self.finished
        with self._writing(self.folder / MANIFEST), self._alone():
            if (self.folder / MANIFEST).is_file():  # another process was here first
                self.finished = Manifest.read(self.folder)
            else:
                infos = [info for index in range(self.n_shards) if (info := self.done(index)) is not None]
                if len(infos) == self.n_shards:
                    manifest = make_manifest(tuple(infos))
                    left = [item for info in infos for item in info.left_out]
                    if left:
                        lines = [("key", "reason"), *((item.key, item.reason) for item in left)]
                        text = "".join(f"{_field(key)}\t{_field(why)}\n" for key, why in lines)
                        write_text(self.folder / LEFT_OUT, text, errors="backslashreplace")
                    self._sweep()
                    manifest.write(self.folder)
                    self._retire_records()
                    self.finished = manifest
        self.close()
        return self.finished


def _field(text: str) -> str:
    """A field of `LEFT_OUT`."""
    escaped = text.translate(ESCAPES)
    return f"\\x{ord(escaped[0]):02x}{escaped[1:]}" if escaped.startswith(tuple(FORMULA)) else escaped


def read_record(path: Path) -> ShardInfo:
    """Return the record of a finished shard.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return parse(ShardInfo, read_json(path), str(path))


def _close_all(held: dict[int | str, int]) -> None:
    while held:
        os.close(held.popitem()[1])


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, each with both values, in one line."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)
