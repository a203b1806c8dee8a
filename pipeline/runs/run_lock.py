"""The lock of a run directory: one command trains in it at a time.

    lock = lock_run(folder)                                  # StageError: the run is in use by process 4711 on …
    lock.release_all()

The operating system releases a process's lock however it ends, so a kill never blocks the next start. The file
``.lock`` remains; the holder it names is valid only while the lock is held.
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


def lock_run(folder: Path) -> Claims:
    """Lock an existing run directory and return the lock, which holds until it is released.

    Raises:
        StageError: another process holds the lock.
    """
    path, lock = folder / LOCK, Claims(folder)
    if not lock.claim(LOCK):
        raise StageError(
            f"{folder} is in use by {_describe_holder(path)}. Wait until that command ends, stop it, or name another "
            "output"
        )
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = Holder(host=socket.gethostname(), pid=os.getpid(), since=now)
    if lock.has_locks:
        path.write_text(json.dumps(asdict(holder)) + "\n", encoding="utf-8")  # in place: this file is locked
    return lock


def _describe_holder(path: Path) -> str:
    try:
        holder = parse(Holder, read_json(path), str(path))
    except (OSError, ValueError):  # locked, but not yet written
        return "another process"
    return f"process {holder.pid} on {holder.host}, since {holder.since}"
