"""The lock of a run directory: one command trains in it at a time.

    lock = RunLock(folder)                                   # StageError: the run is in use by process 4711 on …
    lock.release()

The system takes the lock back from a process that ends in any way, so a kill never blocks the next start. The file
``.lock`` stays where it is; what it says of its holder means nothing while nobody holds it.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from pipeline.runtime.errors import StageError
from shards.locks import NoLocks, take
from shards.records import parse, read_json

LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    since: str  # local time, ISO 8601


class RunLock:
    """The lock of one run, held from construction to :meth:`release`."""

    def __init__(self, folder: Path) -> None:
        """Lock ``folder``, which exists.

        Raises:
            StageError: another process holds the lock.
        """
        path = folder / LOCK
        self._descriptor: int | None = None
        try:
            descriptor = take(path)
        except NoLocks:  # this file system has none: nothing is protected, and nothing is blocked
            return
        if descriptor is None:
            raise StageError(
                f"{folder} is in use by {_describe_holder(path)}. Wait until that command ends, stop it, or name "
                "another output"
            )
        self._descriptor = descriptor
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = Holder(host=socket.gethostname(), pid=os.getpid(), since=now)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(asdict(holder)) + "\n").encode(), 0)

    @property
    def held(self) -> bool:
        """Whether this process has the run to itself; False where the file system has no locks."""
        return self._descriptor is not None

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _describe_holder(path: Path) -> str:
    try:
        holder = parse(Holder, read_json(path), str(path))
    except (OSError, ValueError):  # it has locked the file and not written to it yet
        return "another process"
    return f"process {holder.pid} on {holder.host}, since {holder.since}"
