import csv
import io
import json
from typing import Any

import pytest
from rich.markup import escape
from rich.table import Table

from pipeline.runtime.progress import Progress
from pipeline.runtime.terminal import Terminal
from pipeline.scoring.results import _csv

# colours, the window's title, the cursor, an 8-bit CSI, a bell and a backspace
NAME = "cat\x1b[31m\x1b]0;owned\x07\x1b[2J\x9b5A\b\r[bold]x[/nonsense]\x7f"


def printed(show: Any, **options: Any) -> str:
    file = io.StringIO()
    show(Terminal(file=file, width=300, highlight=False, **options))
    return file.getvalue()


def table() -> Table:
    made = Table(title=escape(NAME))
    made.add_column(escape(NAME))
    made.add_row(escape(NAME))
    return made


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    "show",
    [
        lambda console: console.print(NAME, markup=False),
        lambda console: console.print(f"{escape(NAME)}: {NAME.replace('[', '(')}", soft_wrap=True),
        lambda console: console.print(table()),
        lambda console: console.print_json(data={NAME: [NAME]}),
        lambda console: Progress(console, quiet=False).say(NAME),
    ],
)
def test_control_codes_and_markup_in_names_are_shown_not_executed(show: Any, is_terminal: bool) -> None:
    said = printed(show, force_terminal=is_terminal, color_system=None)
    assert not set(said) & set("\x1b\x9b\x07\b\r\x7f")
    assert "\\u001b" in said
    assert "x[/nonsense]" in said


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_task_shows_names_without_interpreting_markup(is_terminal: bool) -> None:
    def show(console: Terminal) -> None:
        with Progress(console, quiet=False).task(NAME, 1, "images") as task:
            task.advance(1, NAME)

    said = printed(show, force_terminal=is_terminal, color_system=None)
    assert "\\u001b]0;owned" in said
    assert not set(said) & set("\x9b\x07\b\x7f")
    assert "\x1b]" not in said
    assert "\x1b[31m" not in said


def test_printed_json_stays_json() -> None:
    assert json.loads(printed(lambda console: console.print_json(data=[NAME]))) == [NAME]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1", "a\tb\nc", "\r=x"])
def test_a_cell_of_results_is_one_line_and_not_a_formula(name: str) -> None:
    text = _csv([{"name": name, "FID": -1.5, "step": 3}])
    assert len(text.splitlines()) == 2
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["name"][0] not in "=+-@\t\r"
    assert (row["FID"], row["step"]) == ("-1.5", "3")
