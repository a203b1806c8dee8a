"""``left_out.tsv``: the inputs that an artifact leaves out, each with its reason, one per line.

Control characters and backslashes are escaped, so that a line is always two fields and the escapes can be undone. The
first character of a field is also escaped if a spreadsheet would read the field as a formula.
"""

from __future__ import annotations

from collections.abc import Sequence

from shards.manifest import LeftOut
from shards.storage import Location, write_text

LEFT_OUT = "left_out.tsv"
CONTROLS = (*range(32), *range(127, 160), 0x2028, 0x2029)
ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in (*CONTROLS, ord("\\"))}
FORMULA = "=+-@"  # first characters of a spreadsheet formula


def write_left_out(folder: Location, items: Sequence[LeftOut]) -> None:
    """Write the file into an artifact's directory, unless there are no items."""
    if items:
        lines = [("key", "reason"), *((item.key, item.reason) for item in items)]
        text = "".join(f"{_escape(key)}\t{_escape(reason)}\n" for key, reason in lines)
        write_text(folder / LEFT_OUT, text, errors="backslashreplace")


def _escape(text: str) -> str:
    escaped = text.translate(ESCAPES)
    return f"\\x{ord(escaped[0]):02x}{escaped[1:]}" if escaped.startswith(tuple(FORMULA)) else escaped
