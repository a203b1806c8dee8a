"""Claims on pieces of work, so that processes do not do the same piece twice.

    claims = Claims(folder)                                  # an existing directory
    if claims.claim(7):                                      # False: another process has piece 7
        ...
        claims.release(7)

A claim is a lock on a file in the folder. The operating system releases a process's locks however it ends, so a kill
leaves no stale claim. On a file system without locks every claim succeeds, and ``has_locks`` is False.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

FOLDER = "."  # the claim on the folder itself


class Claims:
    """This process's claims on the pieces of one folder; any thread may claim and release."""

    def __init__(self, folder: Path) -> None:
        """Prepare claims in ``folder``, which need not exist yet."""
        self.folder = folder
        self.has_locks = True
        self._descriptors: dict[int | str, int] = {}  # open as long as the claim lasts
        weakref.finalize(self, _close_all, self._descriptors)

    def claim(self, piece: int | str, *, wait: bool = False) -> bool:
        """Claim a piece for this object.

        Args:
            piece: a number, a file name in the folder, or `FOLDER`.
            wait: wait until the piece is free.

        Returns:
            Whether the claim succeeded; False if another process holds the piece.

        Raises:
            OSError: the lock file cannot be opened, or the folder does not exist.
        """
        path = self.folder / (f"{piece:05d}.lock" if isinstance(piece, int) else piece)
        # By name, not by what is there: a folder that another process removes meanwhile must not return as a file.
        descriptor = os.open(path, os.O_RDONLY if piece == FOLDER else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            claimed = lock_descriptor(descriptor, blocking=wait)
        except OSError:
            claimed, self.has_locks = True, False
        if claimed and self.has_locks:
            self._descriptors[piece] = descriptor
        else:
            os.close(descriptor)
        return claimed

    def release(self, piece: int | str) -> None:
        """Release a piece; no effect if this object does not hold it."""
        descriptor = self._descriptors.pop(piece, None)
        if descriptor is not None:
            os.close(descriptor)

    def release_all(self) -> None:
        """Release all pieces."""
        _close_all(self._descriptors)

    @contextmanager
    def claimed(self, piece: int | str, *, wait: bool = False) -> Iterator[bool]:
        """Claim a piece for the block; yield the result of :meth:`claim`."""
        claimed = self.claim(piece, wait=wait)
        try:
            yield claimed
        finally:
            if claimed:
                self.release(piece)


def _close_all(descriptors: dict[int | str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
