"""Progress without a terminal."""

import io

from rich.console import Console

from pipeline.runtime.progress import Progress


def lines(total: int | None, *, begin: int = 0, by: int = 1) -> list[str]:
    """Return the lines that a task prints without a terminal."""
    stream = io.StringIO()
    with Progress(Console(file=stream, width=200), quiet=False).task("train", total, "images") as task:
        task.begin_at(begin)
        for _ in range(begin, total or 1000, by):
            task.advance(by)
    return [line.split(" images")[0] for line in stream.getvalue().splitlines()]


def test_a_line_is_printed_at_every_tenth_of_the_work() -> None:
    assert lines(2000) == [f"train: {done}/2000" for done in range(200, 2001, 200)]
    assert lines(2000, begin=1500) == [f"train: {done}/2000" for done in (1600, 1800, 2000)]


def test_steps_larger_than_a_tenth_print_a_line_each_and_work_of_unknown_size_none_at_once() -> None:
    assert lines(100, by=40) == ["train: 40/100", "train: 80/100", "train: 120/100"]
    assert lines(None) == []
