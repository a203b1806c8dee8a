"""Opening files that others named: regular files only.

A named pipe would be waited for and a device read without end, so both are refused before they are opened.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Return what the system says of a regular file, following links.

    Raises:
        OSError: the file is missing, cannot be looked up, or is not a regular file.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return found


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading bytes.

    Raises:
        OSError: see `require_regular`, or the file may not be read.
    """
    require_regular(path)
    return open(path, "rb")
