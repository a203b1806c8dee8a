"""Read and write single files: regular files only, every write atomic.

    with atomic_path(path) as part:                          # a file beside `path`, renamed to it at the end
        np.savez(part, x=x)
    write_json(path, {"rows": 3})

Named pipes would block a reader and devices never end, so both are refused before they are opened. Whenever a writer
is killed, readers see the old file or the complete new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of a regular file, following links.

    Raises:
        OSError: the file is missing, inaccessible or not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return status


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading bytes.

    Raises:
        OSError: see `require_regular`; or reading is not permitted.
    """
    require_regular(path)
    return open(path, "rb")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path, *, unlocked: bool = False, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; at the end flush the file and rename it to ``path``.

    The temporary file is removed if the block fails. A kill leaves it for the next writer to overwrite or remove.

    Args:
        path: the file to write, in an existing directory.
        unlocked: use a temporary name per process, because processes may write ``path`` at the same time.
        sync: flush to disk before renaming.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if unlocked else f"{path.name}.part")
    try:
        yield part
        if sync:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_text(path: Path, text: str, *, errors: str = "strict", sync: bool = True) -> None:
    """Write a UTF-8 file atomically."""
    with (
        atomic_path(path, unlocked=True, sync=sync) as part,
        open(part, "w", encoding="utf-8", errors=errors, newline="\n") as file,
    ):
        file.write(text)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        ValueError: a number is not finite. JSON lacks such numbers; null stands for a missing value.
    """
    write_text(path, json_text(values))


def json_text(values: Any) -> str:
    """Return the text of a JSON file; see :func:`write_json`."""
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
