"""The terminal for all output: control characters in users' data are shown, not interpreted.

console = Terminal()
console.print("class \\x1b[31mred", markup=False)          # class \\u001b[31mred
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

# All but the newline, in JSON's notation, so that printed JSON stays valid.
ESCAPES = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160)) if chr(code) != "\n"}


class Terminal(Console):
    """A console that escapes the control characters in all text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See `Console.render`."""
        for segment in super().render(renderable, options):
            if segment.control is None and not segment.text.isprintable():
                segment = Segment(segment.text.translate(ESCAPES), segment.style)
            yield segment


def grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> Table:
    """Return a table for the terminal; with ``numbers`` all columns but the first are right-aligned."""
    table = Table(
        title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=0 if numbers else (0, 1, 0, 0)
    )
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if numbers and i else "left", no_wrap=numbers)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
