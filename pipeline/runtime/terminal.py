"""The terminal that everything is printed on: control characters in users' data are shown, not interpreted.

console = Terminal()
console.print("class \\x1b[31mred", markup=False)          # class \\u001b[31mred
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

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
