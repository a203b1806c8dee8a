"""What a stage shows while it works: bars on a terminal; elsewhere a line at every tenth and every 30 seconds.

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

LINE_EVERY = 30.0  # seconds between lines where there is no terminal, at most
LINES = 10  # over a task of known size, at least
CTRL_C, WARNED = 130, 75  # exit statuses after a signal; 75 is EX_TEMPFAIL: to be gone on with
STATUSES = {signal.SIGINT: CTRL_C, signal.SIGTERM: WARNED, signal.SIGUSR1: WARNED}


class Stopped(Exception):
    """A signal stopped a stage; the message says what was kept and how to go on, ``status`` how the command ends."""

    def __init__(self, message: str, status: int = CTRL_C) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def stops_with(message: str) -> Iterator[None]:
    """Turns Ctrl-C inside the block into :class:`Stopped` with this message."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(message) from None


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], int]]:
    """Holds back the signals that end a run, so that a loop can finish its step.

    Gives the question whether there was one: the exit status that it asks for, 0 while there was none. They are Ctrl-C
    and Slurm's warnings, SIGTERM and SIGUSR1. A second Ctrl-C stops at once. Outside the main thread, where signals
    cannot be caught, nothing is held back.
    """
    asked = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def hold_signals(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = max(asked, STATUSES[signal.Signals(number)])

    before = {number: signal.signal(number, hold_signals) for number in STATUSES}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Task:
    """One piece of work; ``total`` is None where its size is not known."""

    def __init__(self, bars: Bars | None, console: Console, title: str, total: int | None, unit: str) -> None:
        self._bars, self._console = bars, console
        self._title, self._total, self._unit = title, total, unit
        self._done, self._note = 0, ""
        self._tenths = 0  # that a line has been printed for
        self._began = self._spoke = time.monotonic()
        self._start = 0
        self._id = bars.add_task(title, total=total, unit=unit, note="", rate="") if bars else None

    def begin_at(self, done: int) -> None:
        """Says that ``done`` was finished in an earlier run, so that the rate is this run's."""
        self._done = self._start = done
        self._tenths = self._tenth()
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, completed=done)

    def skip(self, n: int) -> None:
        """Counts ``n`` more as done by others or in an earlier run: they do not add to the rate."""
        self._done += n
        self._start += n
        self._tenths = self._tenth()
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, completed=self._done)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts ``n`` more as done; ``note`` stands behind the numbers until the next one."""
        self._done += n
        self._note = note or self._note
        now = time.monotonic()
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, completed=self._done, note=self._note, rate=f"{rate:,.1f} {self._unit}/s")
        elif now - self._spoke >= LINE_EVERY or self._tenth() > self._tenths:
            self._spoke, self._tenths = now, self._tenth()
            text = f"{self._title}: {self._done} {self._unit}, {rate:,.1f}/s"
            if self._total is not None:
                left = (self._total - self._done) / rate if rate > 0 else 0.0
                text = f"{self._title}: {self._done}/{self._total} {self._unit}, {rate:,.1f}/s, {left:,.0f} s left"
            text += f", {self._note}" if self._note else ""
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _tenth(self) -> int:
        return self._done * LINES // self._total if self._total else 0


class Progress:
    """Where stages report. Output goes to standard error, so that results can be piped."""

    def __init__(self, console: Console | None = None, quiet: bool | None = None) -> None:
        """Reports on ``console``; ``quiet`` says nothing, None all but the first of ``torchrun``'s processes."""
        self.console = console or Terminal(stderr=True)
        self.quiet = os.environ.get("RANK", "0") != "0" if quiet is None else quiet
        self._silent = quiet is True

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        """A bar (or lines) for one piece of work."""
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
        """One line; ``from_any_process`` if another one than ``torchrun``'s first may be the only one to know."""
        if not self.quiet or (from_any_process and not self._silent):
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
