"""The error a stage raises for faults that the user can correct.

    raise StageError("photos/: no images found. Expected photos/CLASS/picture.jpg")

The command line prints the message and exits with status 1; any other error that reaches it is a bug. Of the
processes that ``torchrun`` starts on a machine, only the first that fails prints its message.
"""

from __future__ import annotations

import os
from pathlib import Path

from dpar.errors import ModelError
from shards.errors import ArtifactError

KEPT = "Finished work is kept; run the same command again to resume"


class StageError(ValueError):
    """A user's input cannot be used; the message says what, where, and what to do."""


class PeerEnded(StageError):
    """Another process of this run has ended; its own message has the reason."""


def claim_error_report(error: BaseException) -> bool:
    """Return whether this process reports ``error``: under ``torchrun``, one process per machine does.

    A process that only lost its peers does not: they report, or torchrun does if they were killed. True without
    ``torchrun``.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/RANK/error.json; torchrun removes it
    if not error_file:
        return True
    if isinstance(error, PeerEnded):
        return False
    try:
        os.close(os.open(Path(error_file).parent.parent / "dpar-error-reported", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def one_message(error: Exception) -> str:
    """Return the message for the user about an error that ended a command."""
    if isinstance(error, (StageError, ArtifactError, ModelError)):
        return str(error)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}. {KEPT}"
    return f"{type(error).__name__}: {error} (a bug in dpar; DPAR_DEBUG=1 shows the traceback)"
