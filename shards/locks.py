"""File locks that a dead process cannot leave behind: how processes that share an artifact's work keep apart.

held = take(path)                                            # a descriptor; None where another process has it
os.close(held)                                               # gives it back, and so does the process's end
"""

from __future__ import annotations

import os
from pathlib import Path


class NoLocks(OSError):
    """The file system, or the operating system, has no such locks."""


def take(path: Path, *, wait: bool = False) -> int | None:
    """Locks ``path``, which is made if it is not there, for this descriptor alone.

    Args:
        path: a file, or a directory that is there.
        wait: wait for whoever has it.

    Returns:
        An open descriptor that holds the lock until it is closed; None where another has it and ``wait`` is off.

    Raises:
        NoLocks: there are none here.
        OSError: the file cannot be opened.
    """
    held = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(held)
        return None
    except (ImportError, OSError) as error:
        os.close(held)
        raise NoLocks(f"no file locks at {path}: {error}") from error
    return held
