"""The terminal that everything is printed on: names come from users' data, and what they hold is shown, not obeyed.

console = Terminal()
console.print("class \\x1b[31mred", markup=False)          # class \\u001b[31mred
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# All but the end of a line, in JSON's spelling, so that printed JSON stays JSON.
ESCAPES = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160)) if chr(code) != "\n"}


class Terminal(Console):
    """A console that spells out the control characters in all text, where they would move the cursor or worse."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See `Console.render`."""
        for segment in super().render(renderable, options):
            if segment.control is None and not segment.text.isprintable():
                segment = Segment(segment.text.translate(ESCAPES), segment.style)
            yield segment
