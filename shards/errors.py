"""The error this package raises for bad artifacts and failed writes, as opposed to bugs."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MAKE_WRITABLE = "make it writable and run the same command again, or name another output"
ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run the same command again")
ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), MAKE_WRITABLE)


class ArtifactError(ValueError):
    """An artifact cannot be used or written; the message says what, where, and what to do."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line of at most 200 characters, or its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def disk_errors(path: Path | str, count_finished: Callable[[], int]) -> Iterator[None]:
    """Turn an OSError while ``path`` is written into an ArtifactError that says how to resume."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "run the same command again")
        raise ArtifactError(
            f"cannot write {error.filename or path}: {error.strerror or error}; {advice}. "
            f"{count_finished()} finished shards are kept"
        ) from error
