"""Run one job of the model at a time; the browser session that started a job can stop it.

jobs = Jobs()
jobs.run(session, lambda progress: pipe("cat", progress=progress))
jobs.stop(session)                                       # from another thread: run raises Cancelled
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
Progress = Callable[[float], None]


class Cancelled(Exception):
    """The user stopped the job, or closed the page."""


class Jobs:
    """The jobs of all sessions. Gradio's queue orders them; the lock covers a job that is still stopping."""

    def __init__(self) -> None:
        self._model = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def run(self, session: str, work: Callable[[Progress], Result], report: Progress = lambda share: None) -> Result:
        """Return the result of ``work``, which calls its argument with the fraction done.

        Raises:
            Cancelled: :meth:`stop` was called for this page.
        """
        with self._model:
            stop = self._stops[session] = threading.Event()

            def progress(share: float) -> None:
                if stop.is_set():
                    raise Cancelled
                report(share)

            try:
                return work(progress)
            finally:
                del self._stops[session]

    def stop(self, session: str) -> None:
        """Stop the running job of a session, if it has one."""
        event = self._stops.get(session)
        if event is not None:
            event.set()
