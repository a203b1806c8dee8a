"""Runs an iterator in a thread of its own, so that whoever consumes its items does not wait for the next one.

with closing(ahead(pages(), limit=8)) as stream:         # at most 8 pages are waiting at any time
    for page in stream: ...
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import Empty, Queue
from typing import TypeVar

Item = TypeVar("Item")

LAST_WAIT = 5.0  # seconds an iterator that was stopped may take to end what it is in; it is a daemon's after that


def prefetch(items: Generator[Item, None, None], limit: int) -> Generator[Item, None, None]:
    """The items of ``items``, in order, at most ``limit`` of them ahead of the consumer.

    What ``items`` raises is raised here, after the items before it. Closing this generator, also by an error or
    Ctrl-C in the consumer, closes ``items`` in its thread.
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
        while (got := waiting.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            yield got[0]
    finally:
        stopped.set()
        for _ in range(int(LAST_WAIT / 0.05)):
            while True:  # it may be waiting for room
                try:
                    waiting.get_nowait()
                except Empty:
                    break
            thread.join(0.05)
            if not thread.is_alive():
                break
