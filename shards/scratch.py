"""Temporary directories that a killed process does not leave for good.

    with Scratch() as folder:
        write_shard(folder / "00003.arrow", rows, "arrow")

Each is locked while its process lives. The next process on this machine that makes one removes those without a lock.
"""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from shards.locks import FOLDER, Claims

NEW = "dpar-new-"  # not locked yet
# With the machine's name: machines that share a file system need not see each other's locks.
PREFIX = f"dpar-scratch-{re.sub(r'[^A-Za-z0-9.]', '_', platform.node())}-"


class Scratch:
    """A temporary directory ``folder``, removed at the end of the block or with the object."""

    def __init__(self) -> None:
        """Create it, and remove those of killed processes."""
        remove_abandoned()
        new = Path(tempfile.mkdtemp(prefix=NEW))
        claims = Claims(new)
        claims.claim(FOLDER)
        self.folder = new.rename(new.with_name(PREFIX + new.name.removeprefix(NEW)))
        self._remove = weakref.finalize(self, _remove, self.folder, claims)

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *exception: object) -> None:
        self._remove()


def remove_abandoned() -> None:
    """Remove the directories of killed processes; those of other users, or without locks, stay."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        claims = Claims(folder)
        with suppress(OSError):
            if not folder.is_symlink() and claims.claim(FOLDER) and claims.has_locks:
                _remove(folder, claims)


def _remove(folder: Path, claims: Claims) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    claims.release_all()
