"""Progress of a stage: bars on a terminal; elsewhere a line per tenth of the work and every 30 seconds.

progress = Progress()
with progress.task("tokenize", total=2048, unit="images") as task:
    task.advance(64)
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from pipeline.runtime.terminal import Terminal

LINE_EVERY = 30.0  # longest time in seconds between lines without a terminal
LINES = 10  # fewest lines for a task of known size
CTRL_C, WARNED = 130, 75  # exit statuses after a signal; 75 is EX_TEMPFAIL: run again to resume
STATUSES = {signal.SIGINT: CTRL_C, signal.SIGTERM: WARNED, signal.SIGUSR1: WARNED}


class Stopped(Exception):
    """A signal stopped a stage; the message says what is kept and how to resume, ``status`` is the exit status."""

    def __init__(self, message: str, status: int = CTRL_C) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def stops_with(message: str) -> Iterator[None]:
    """Turn Ctrl-C inside the block into :class:`Stopped` with this message."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(message) from None


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], int]]:
    """Defer the signals that end a run, so that a loop can finish its step.

    Yields a function that returns the exit status of the deferred signal, 0 if there was none. The signals are Ctrl-C
    and Slurm's warnings, SIGTERM and SIGUSR1. A second Ctrl-C stops immediately. Outside the main thread, where signals
    cannot be caught, nothing is deferred.
    """
    status = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def defer(number: int, frame: object) -> None:
        nonlocal status
        if status and number == signal.SIGINT:
            raise KeyboardInterrupt
        status = max(status, STATUSES[signal.Signals(number)])

    before = {number: signal.signal(number, defer) for number in STATUSES}
    try:
        yield lambda: status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Task:
    """One piece of work; ``total`` is None if its size is unknown."""

    def __init__(self, bars: Bars | None, console: Console, title: str, total: int | None, unit: str) -> None:
        self._bars, self._console = bars, console
        self._title, self._total, self._unit = title, total, unit
        self._done, self._note = 0, ""
        self._tenths = 0  # already reported
        self._began = self._last_line = time.monotonic()
        self._start = 0
        self._id = bars.add_task(title, total=total, unit=unit, note="", rate="") if bars else None

    def begin_at(self, done: int) -> None:
        """Start at ``done``, which an earlier run finished; the rate does not include it."""
        self.skip(done - self._done)

    def skip(self, n: int) -> None:
        """Count ``n`` more as done by another process or an earlier run; the rate does not include them."""
        self._done += n
        self._start += n
        self._tenths = self._tenth()
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, completed=self._done)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more as done; ``note`` follows the numbers until the next note."""
        self._done += n
        self._note = note or self._note
        now = time.monotonic()
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, completed=self._done, note=self._note, rate=f"{rate:,.1f} {self._unit}/s")
        elif now - self._last_line >= LINE_EVERY or self._tenth() > self._tenths:
            self._last_line, self._tenths = now, self._tenth()
            text = f"{self._title}: {self._done} {self._unit}, {rate:,.1f}/s"
            if self._total is not None:
                left = (self._total - self._done) / rate if rate > 0 else 0.0
                text = f"{self._title}: {self._done}/{self._total} {self._unit}, {rate:,.1f}/s, {left:,.0f} s left"
            text += f", {self._note}" if self._note else ""
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _tenth(self) -> int:
        return self._done * LINES // self._total if self._total else 0


class Progress:
    """The output of stages. It goes to standard error, so that results can be piped."""

    def __init__(self, console: Console | None = None, quiet: bool | None = None) -> None:
        """Report on ``console``; ``quiet`` suppresses all output, None that of all processes but the first."""
        self.console = console or Terminal(stderr=True)
        self.quiet = os.environ.get("RANK", "0") != "0" if quiet is None else quiet
        self._silent = quiet is True

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        """Show a bar (or lines) for one piece of work."""
        if self.quiet:
            yield Task(None, Terminal(quiet=True), title, total, unit)
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}  {task.fields[rate]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Bars(*columns, console=self.console) as bars:
                yield Task(bars, self.console, title, total, unit)
        else:
            yield Task(None, self.console, title, total, unit)

    def say(self, text: str, *, from_any_process: bool = False) -> None:
        """Print one line; with ``from_any_process`` also from other processes than the first."""
        if not self.quiet or (from_any_process and not self._silent):
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
