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
from shards.locks import Claims
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
        self._claims = Claims(folder)
        if not self._claims.claim(LOCK):
            raise StageError(
                f"{folder} is in use by {_describe_holder(path)}. Wait until that command ends, stop it, or name "
                "another output"
            )
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = Holder(host=socket.gethostname(), pid=os.getpid(), since=now)
        if self._claims.has_locks:
            path.write_text(json.dumps(asdict(holder)) + "\n", encoding="utf-8")  # the same file: it is locked

    @property
    def held(self) -> bool:
        """Whether this process has the run to itself; False on a file system without locks."""
        return self._claims.has_locks

    def release(self) -> None:
        """Release the lock."""
        self._claims.release_all()


def _describe_holder(path: Path) -> str:
    try:
        holder = parse(Holder, read_json(path), str(path))
    except (OSError, ValueError):  # it has locked the file and not written to it yet
        return "another process"
    return f"process {holder.pid} on {holder.host}, since {holder.since}"
