"""A limit on the decoded pixels of all threads of a process, which bounds memory for any set of images.

budget = PixelBudget(178_000_000)
with budget.in_use():                                    # keeps this thread's pixels until the image is cropped
    pixels = views(decode_image(stream), 256)            # decode_image takes pixels, waiting if necessary
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LARGE = 16_000_000  # images with at least this many pixels return their memory to the system immediately


class PixelBudget:
    """A number of pixels that threads take and release; a larger image is decoded alone."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()
        self._thread = threading.local()  # taken: the pixels that this thread holds

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait for ``pixels`` and hold them until the end of the block, or of the surrounding `in_use`.

        A thread holds at most one image, and none while it waits, so there is no deadlock.
        """
        pixels = min(pixels, self._pixels)
        self._release()
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        self._thread.taken = pixels
        try:
            yield
        finally:
            if not getattr(self._thread, "keeps", False):
                self._release()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the pixels that this thread takes until the end of the block."""
        self._thread.keeps = True
        try:
            yield
        finally:
            self._thread.keeps = False
            self._release()

    def _release(self) -> None:
        taken, self._thread.taken = getattr(self._thread, "taken", 0), 0
        if taken >= LARGE and _trim is not None:
            _trim(0)  # glibc keeps freed memory per thread: gigabytes with several threads
        if taken:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's function that returns free memory to the system; None with other C libraries."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


_trim = _malloc_trim()
