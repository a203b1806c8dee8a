"""Atomic file writes: a reader sees the old contents or the new, never a mixture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield ``path`` with ``.part`` appended, to write to; then rename it to ``path``, or delete it on an error.

    with atomic_path(folder / "config.json") as part:
        part.write_text(text)
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
