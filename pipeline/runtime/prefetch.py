"""Run an iterator in a thread, so that its items are ready when the consumer needs them.

with closing(prefetch(pages(), limit=8)) as stream:      # at most 8 pages are queued
    for page in stream: ...
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import Empty, Queue
from typing import TypeVar

Item = TypeVar("Item")

GRACE = 5.0  # seconds for a stopped iterator to finish its item, after which its daemon thread is abandoned


def prefetch(items: Generator[Item, None, None], limit: int) -> Generator[Item, None, None]:
    """Yield ``items`` in order, computed at most ``limit`` items ahead of the consumer.

    An error in ``items`` is raised here, after the items before it. Closing this generator, which an error or Ctrl-C
    in the consumer also does, closes ``items`` in its thread.
    """
    waiting: Queue[tuple[Item] | BaseException | None] = Queue(limit)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                waiting.put((item,))
                if stopped.is_set():
                    return
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)
        finally:
            items.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stopped.set()
        for _ in range(int(GRACE / 0.05)):
            while True:  # the thread may be waiting for a free slot
                try:
                    waiting.get_nowait()
                except Empty:
                    break
            thread.join(0.05)
            if not thread.is_alive():
                break
