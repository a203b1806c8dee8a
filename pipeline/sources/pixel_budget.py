"""How many pixels all threads of a process may hold decoded at once: a bound on memory that no set of images breaks.

budget = PixelBudget(178_000_000)
with budget.in_use():                                    # of this thread's image, until it has been cropped
    pixels = views(decode_image(stream), 256)            # decode_image takes from the budget, and waits if need be
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LARGE = 16_000_000
"""Pixels of an image whose memory goes back to the system at once."""


class PixelBudget:
    """A number of pixels that threads take from and give back; an image larger than all of it is decoded alone."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()
        self._thread = threading.local()  # taken: pixels this thread holds, to be given back when it is done with them

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Hold ``pixels`` until the block ends, or until the `in_use` around it ends; waits until they are free.

        A thread holds one image at a time and none while it waits, so that threads cannot wait for each other.
        """
        pixels = min(pixels, self._pixels)
        self._give_back()
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        self._thread.taken = pixels
        try:
            yield
        finally:
            if not getattr(self._thread, "keeps", False):
                self._give_back()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold what this thread takes until the block ends."""
        self._thread.keeps = True
        try:
            yield
        finally:
            self._thread.keeps = False
            self._give_back()

    def _give_back(self) -> None:
        taken, self._thread.taken = getattr(self._thread, "taken", 0), 0
        if taken >= LARGE and _trim is not None:
            _trim(0)  # glibc keeps what a thread frees for that thread's own use: gigabytes, with several threads
        if taken:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's function that gives free memory back to the system; None with other C libraries."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


_trim = _malloc_trim()
